"""Capture: a live module, or a skeleton whose weights are on disk, becomes a Program.

`torch.export` traces the module, non-strict and without gradients, with dynamic batch and sequence,
into pre-dispatch ATen: `linear`, `layer_norm` and attention stay whole. The graph is then put into
one form: tied parameters under one name, each parameter read just before its first use, no
in-place operators, no assertions about devices.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import traceback
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from zeroskip.ir.dataflow import is_view
from zeroskip.ir.errors import CaptureError
from zeroskip.ir.program import Batch, Program, attribute, holder
from zeroskip.ir.selection import find_roles
from zeroskip.ir.weights import Weights

aten = torch.ops.aten


def capture(
    model: torch.nn.Module,
    example_inputs: Batch,
    *,
    dynamic_shapes: Mapping[str, Any] | None = None,
    weights: Weights | None = None,
    trace_inputs: Batch | None = None,
) -> Program:
    """Captures a module as a Program whose parameters are the module's own.

    Args:
        model: In evaluation mode. Its parameters may be FakeTensors when `weights` is given.
        example_inputs: Keyword arguments of `forward`; batch and sequence of at least 2, because
            `torch.export` takes sizes 0 and 1 for constants.
        dynamic_shapes: As for `torch.export`; by default batch and sequence are dynamic.
        weights: Where the values of the parameters are, when not in the module.
        trace_inputs: Fake counterparts of the example inputs, for a module of FakeTensors.

    Returns:
        A Program at level `captured` that knows its `Roles`.

    Raises:
        CaptureError: The module is in training mode, or cannot be traced; names module and line.
    """
    if model.training:
        raise CaptureError("the model is in training mode", next_step="call model.eval() first")
    if not example_inputs:
        raise CaptureError("there are no example inputs", next_step="pass example_inputs={...}")
    inputs = dict(trace_inputs if trace_inputs is not None else example_inputs)
    with cache_disabled(model):
        exported = _export(model, inputs, dynamic_shapes)
    graph_module = exported.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    outputs = _output_names(exported)
    graph_module = _plain(graph_module, list(inputs))
    _canonicalise(graph_module, model)
    if weights is None:
        weights = Weights(dict(model.named_parameters()))
    program = Program(
        graph_module=graph_module,
        weights=weights,
        example_inputs=dict(example_inputs),
        outputs=outputs,
        padding_masks=tuple(name for name in example_inputs if name.endswith("attention_mask")),
        model=model,
    )
    return program.with_fact(find_roles(program))


@contextlib.contextmanager
def cache_set_to(use_cache: bool, model: torch.nn.Module) -> Iterator[None]:
    """Sets `use_cache` on every configuration of a model, and restores it in any case.

    Encoder-decoder models copy their configuration into each half, so the model's own is not enough.
    """
    configurations: dict[int, Any] = {}
    for module in model.modules():
        configuration = getattr(module, "config", None)
        if configuration is not None and hasattr(configuration, "use_cache"):
            configurations[id(configuration)] = configuration
    before = [(c, c.use_cache) for c in configurations.values()]
    try:
        for configuration, _ in before:
            configuration.use_cache = use_cache
        yield
    finally:
        for configuration, value in before:
            configuration.use_cache = value


def cache_disabled(model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """Runs a block with `use_cache=False`: the graph to analyse returns no cache."""
    return cache_set_to(False, model)


def _export(
    model: torch.nn.Module, inputs: dict[str, Any], dynamic_shapes: Mapping[str, Any] | None
) -> torch.export.ExportedProgram:
    failure: Exception | None = None
    shapes = dict(dynamic_shapes) if dynamic_shapes is not None else _shared_dimensions(inputs)
    # The second try takes the ranges and relations that the tracer itself found (a table of
    # positions bounds the sequence); the last leaves every dimension to it.
    for attempt in range(3):
        try:
            with torch.no_grad(), _quiet():
                return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # torch.export raises many kinds; the first is reported below.
            failure = failure or error
            if dynamic_shapes is not None:
                break
            refined = _refined(error, shapes) if attempt == 0 else None
            shapes = refined if refined is not None else _separate_dimensions(inputs)
            if refined is None and attempt > 0:
                break
    assert failure is not None
    raise CaptureError(
        f"the model cannot be traced: {_first_line(failure)}",
        where=_model_line(failure, model),
        next_step="make that line independent of tensor values, or pass other example_inputs or "
        "dynamic_shapes",
    ) from failure


def _shared_dimensions(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Equal batch and sequence sizes of the example inputs are one symbol.

    `Program.run` refuses inputs that break such an equality. A decoder's inputs have a length of
    their own, even where the example lengths agree. Floating-point inputs of rank 2 are [batch,
    features]; of rank 3 [batch, sequence, features]; of rank 4, images: only the batch varies.
    Integer and boolean inputs are [batch, sequence].
    """
    sizes: dict[tuple[int, int, bool], Any] = {}
    shapes: dict[str, Any] = {}
    for name, value in inputs.items():
        shapes[name] = {}
        for axis in _varying_axes(value):
            key = (axis, value.shape[axis], axis > 0 and name.startswith("decoder_"))
            if key not in sizes:
                kind = "batch" if axis == 0 else "sequence"
                taken = sum(k[0] == axis for k in sizes)
                sizes[key] = torch.export.Dim(f"{kind}_{taken}" if taken else kind)
            shapes[name][axis] = sizes[key]
    return shapes


def _refined(error: Exception, shapes: dict[str, Any]) -> dict[str, Any] | None:
    """Applies the fixes that torch.export suggests in an error message, if it does."""
    head, marker, fixes = str(error).partition("Suggested fixes:")
    if not marker:
        return None
    # The parser takes the rest of the message for fixes; what follows a blank line is advice.
    message = head + marker + fixes.lstrip("\n").partition("\n\n")[0]
    try:
        refined = torch.export.dynamic_shapes.refine_dynamic_shapes_from_suggested_fixes(
            message, shapes
        )
    except Exception:  # A fix it cannot express: the next attempt leaves the shapes to torch.
        return None
    assert isinstance(refined, dict)
    return refined


def _separate_dimensions(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves it to torch.export which dimensions are equal, or fixed."""
    auto = torch.export.Dim.AUTO
    return {name: dict.fromkeys(_varying_axes(v), auto) for name, v in inputs.items()}


def _varying_axes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return ()
    if value.is_floating_point():
        return (0, 1) if value.dim() == 3 else (0,)
    return tuple(range(min(value.dim(), 2)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch.export's own log of a failed attempt, and its warnings, off the user's screen."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|copyreg")
            yield
    finally:
        logger.setLevel(before)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def _model_line(error: Exception, model: torch.nn.Module) -> str:
    """Returns the module class, file and line of the innermost model code in a traceback."""
    frames = list(traceback.walk_tb(error.__traceback__))
    classes = {type(module) for module in model.modules()}
    found = type(model).__name__
    for frame, line in frames:
        owner = frame.f_locals.get("self")
        if type(owner) in classes and not type(owner).__module__.startswith("torch."):
            name = next((n for n, m in model.named_modules() if m is owner), "")
            label = f"{name} ({type(owner).__name__})" if name else type(owner).__name__
            found = f"{label}, {frame.f_code.co_filename}:{line}"
    return found


def _output_names(exported: torch.export.ExportedProgram) -> tuple[str, ...]:
    """Names each output by its key in the model's output, or `output_N`."""
    spec = exported.call_spec.out_spec
    assert spec is not None
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names = []
    for i, (path, _) in enumerate(pytree.tree_flatten_with_path(leaves)[0]):
        keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path]
        name = ".".join(k for k in keys if k)
        names.append(name if name and not name.isdigit() else f"output_{i}")
    return tuple(names)


def _plain(graph_module: fx.GraphModule, names: list[str]) -> fx.GraphModule:
    """Replaces the pytree calling convention by named placeholders and a flat tuple."""
    graph = graph_module.graph
    graph.set_codegen(fx.graph.CodeGen())
    for node, name in zip(graph.find_nodes(op="placeholder"), names, strict=True):
        node.target = name
        node.name = name
    output = graph.output_node()
    flat = pytree.tree_leaves(output.args[0], is_leaf=lambda x: isinstance(x, fx.Node))
    output.args = (tuple(flat),)
    return fx.GraphModule(graph_module, graph)


def _canonicalise(graph_module: fx.GraphModule, model: torch.nn.Module) -> None:
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    _functionalise(graph)
    _unify_parameters(graph_module, model)
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or _has_effect(n))
    _sink_parameters(graph)
    graph.lint()
    graph_module.recompile()
    # Recompiling keeps the attributes that nothing reads any more; a fresh module does not.
    fresh = fx.GraphModule(graph_module, graph)
    graph_module.__dict__.update(fresh.__dict__)


def _has_effect(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _functionalise(graph: fx.Graph) -> None:
    """Replaces an in-place operator by its functional form where no alias can tell the difference."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not _has_effect(node):
            continue
        target = node.args[0] if node.args else None
        packet = getattr(aten, node.target._schema.name.removeprefix("aten::").rstrip("_"), None)
        overload = getattr(packet, node.target._overloadname, None)
        if not isinstance(target, fx.Node) or overload is None or _has_alias(target, node):
            continue
        later = [user for user in target.users if user is not node and user > node]
        for user in later:
            user.replace_input_with(target, node)
        node.target = overload


def _has_alias(target: fx.Node, node: fx.Node) -> bool:
    """Whether another view of the tensor that a node overwrites is read afterwards.

    Only an operator that makes a new tensor is known to have no views but its users, and theirs.
    """
    maker = target.args[0] if target.target is operator.getitem else target
    if not isinstance(maker, fx.Node) or maker.op != "call_function" or is_view(maker):
        return True
    views, queue = {target}, [target]
    while queue:
        found = {u for u in queue.pop().users if u is not node and is_view(u)} - views
        views |= found
        queue += found
    return any(user > node for view in views - {target} for user in view.users)


def _unify_parameters(graph_module: fx.GraphModule, model: torch.nn.Module) -> None:
    """Reads each tensor under one name: the first that the model lists for it."""
    canonical = {id(p): name for name, p in model.named_parameters()}
    canonical.update({id(b): name for name, b in model.named_buffers() if id(b) not in canonical})
    first: dict[str, fx.Node] = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value = attribute(graph_module, str(node.target))
        name = canonical.get(id(value), str(node.target))
        if name in first:
            node.replace_all_uses_with(first[name])
            graph_module.graph.erase_node(node)
            continue
        first[name] = node
        if name != node.target:
            owner, leaf = holder(graph_module, name)
            setattr(owner, leaf, value)
            node.target = name


def _sink_parameters(graph: fx.Graph) -> None:
    """Moves each `get_attr` to just before its first use, so that weights can be loaded late."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="get_attr"):
        if node.users:
            min(node.users, key=order.__getitem__).prepend(node)
