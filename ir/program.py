"""A Program: a graph of ATen operators, the weights it reads, and the facts known about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from zeroskip.ir.errors import CompileError, RequirementError
from zeroskip.ir.half_products import gains_by_float32, in_float32
from zeroskip.ir.weights import InMemory, Source, Weights

if TYPE_CHECKING:
    from zeroskip.ir.facts import Fact

Level = Literal["captured", "annotated", "lowered"]
Batch = Mapping[str, torch.Tensor]
AnyFact = TypeVar("AnyFact", bound="Fact")


@dataclass(frozen=True)
class Program:
    """What every pass takes and returns.

    Tensors are replaced, never written in place, so a Program stays usable whatever happens to the
    ones derived from it.

    Args:
        graph_module: Placeholders are the inputs, `get_attr` nodes name parameters and constants by
            fully qualified name, the single output is a flat tuple. Call `run`, not the module:
            the module holds no values for weights that live on disk or behind a mask.
        weights: All parameters of the model, read by the graph or not. Tied ones are one entry.
        example_inputs: One batch by placeholder name; small, used to compare before with after.
        outputs: A name for each output, such as `logits`.
        level: Which operators the graph may hold (see `zeroskip.ir.verify`).
        facts: What is known, by type.
        calibration: Batches that observers run on; empty when there is no calibration data.
        dense_outputs: For each calibration batch of a stage, what the stage gave for it before
            anything was pruned, on inputs that came out of unpruned stages; the calibration batches
            themselves come out of the pruned ones. Empty unless a pass asks for them.
        dense_inputs: For each calibration batch of a stage, what entered it then; with `dense_outputs`.
        dense: What the program was before the first lossy pass changed it; None while none has.
        padding_masks: Placeholders that hold 1 for a token and 0 for padding.
        model: The module that the Program was captured from; None for a stage.
    """

    graph_module: fx.GraphModule
    weights: Weights
    example_inputs: Batch
    outputs: tuple[str, ...]
    level: Level = "captured"
    facts: Mapping[type[Fact], Fact] = field(default_factory=dict)
    calibration: Sequence[Batch] = ()
    dense_outputs: Sequence[Batch] = ()
    dense_inputs: Sequence[Batch] = ()
    dense: Program | None = None
    padding_masks: tuple[str, ...] = ()
    model: torch.nn.Module | None = None

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the placeholders, in order."""
        return tuple(str(node.target) for node in self.graph.find_nodes(op="placeholder"))

    def fork(self) -> Program:
        """Returns a Program whose graph may be edited freely; every tensor is shared."""
        return dataclasses.replace(self, graph_module=copy_graph_module(self.graph_module))

    def with_fact(self, *facts: Fact) -> Program:
        """Returns a Program that also knows these facts; one of the same type is replaced."""
        return dataclasses.replace(self, facts={**self.facts, **{type(f): f for f in facts}})

    def without_facts(self, kinds: Iterable[type[Fact]]) -> Program:
        """Returns a Program that no longer knows facts of these types."""
        dropped = tuple(kinds)
        return dataclasses.replace(
            self, facts={k: f for k, f in self.facts.items() if k not in dropped}
        )

    def fact(self, kind: type[AnyFact]) -> AnyFact:
        """Returns the fact of a type.

        Raises:
            RequirementError: The fact is not known.
        """
        found = self.facts.get(kind)
        if found is None:
            raise RequirementError(
                f"the program holds no {kind.__name__}",
                next_step=f"put a pass that provides {kind.__name__} earlier in the list",
            )
        return found  # type: ignore[return-value]

    def with_weights(self, updates: Mapping[str, Source | torch.Tensor]) -> Program:
        """Returns a Program with some weights replaced; shapes and dtypes must stay.

        Raises:
            CompileError: A name is unknown, or the shape or dtype differs.
        """
        graph_module = copy_graph_module(self.graph_module)
        weights = self.weights.replace(updates)
        for name in updates:
            if name not in self.weights:
                raise CompileError(f"there is no weight {name!r}", where=name)
            old, new = self.weights.source(name), weights.source(name)
            if (old.shape, old.dtype) != (new.shape, new.dtype):
                raise CompileError(
                    f"a weight of {tuple(old.shape)} {old.dtype} cannot become "
                    f"{tuple(new.shape)} {new.dtype}",
                    where=name,
                )
            bind_parameter(graph_module, name, new)
        return dataclasses.replace(self, graph_module=graph_module, weights=weights)

    def run(self, inputs: Batch) -> dict[str, torch.Tensor]:
        """Runs the program on one batch, loading each weight just before its first use.

        Args:
            inputs: A tensor for every placeholder.

        Returns:
            The outputs by name, in order.

        Raises:
            CompileError: An input is missing, unknown or of another shape, or an operator refuses
                its values (a sequence longer than the table of positions, say).
        """
        self.check_inputs(inputs)
        runner = _Runner(self)
        try:
            with torch.no_grad():
                values = runner.run(*(inputs[name] for name in self.inputs))
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            shapes = {name: tuple(inputs[name].shape) for name in self.inputs}
            raise CompileError(
                f"the program cannot run on inputs of shape {shapes}: {error}",
                where=runner.place(),
                next_step="check the sizes and values of the inputs against what the model takes",
            ) from error
        return dict(zip(self.outputs, values, strict=True))

    @cached_property
    def example_outputs(self) -> dict[str, torch.Tensor]:
        """What it gives for its own example inputs, computed once; nobody writes into it."""
        return self.run(self.example_inputs)

    def loaded(self) -> Program:
        """Returns the same program with the weights that it reads in memory, to run many batches."""
        return dataclasses.replace(self, weights=self.weights.load(self.read_weights()))

    def check_inputs(self, inputs: Batch) -> None:
        """Raises CompileError when an input is missing, unknown, or of a shape that does not fit."""
        missing = [name for name in self.inputs if name not in inputs]
        unknown = [name for name in inputs if name not in self.inputs]
        if missing or unknown:
            raise CompileError(
                f"the inputs do not fit: missing {missing}, unknown {unknown}",
                next_step=f"pass exactly {list(self.inputs)}",
            )
        sizes: dict[str, tuple[int, str]] = {}
        for node in self.graph.find_nodes(op="placeholder"):
            expected, name = node.meta.get("val"), str(node.target)
            if isinstance(expected, torch.Tensor):
                _check_shape(name, expected.shape, inputs[name].shape, sizes)

    def module(self) -> fx.GraphModule:
        """Returns a runnable GraphModule that holds every weight in memory.

        It takes the inputs by position or name and returns a flat tuple; it can be compiled,
        exported again, or trained.
        """
        module = copy_graph_module(self.graph_module, fx.GraphModule)
        for name in self.read_weights():
            bind_parameter(module, name, InMemory(self.weights[name]))
        return module

    def read_weights(self) -> tuple[str, ...]:
        """Names of the weights that the graph reads; a model may own others."""
        targets = dict.fromkeys(str(n.target) for n in self.graph.find_nodes(op="get_attr"))
        return tuple(name for name in targets if name in self.weights)


def _check_shape(
    name: str, expected: Sequence[Any], actual: Sequence[int], sizes: dict[str, tuple[int, str]]
) -> None:
    """Compares a shape with the captured one; sizes of one symbol must agree over all inputs."""
    if len(expected) != len(actual):
        raise CompileError(
            f"input {name} has {len(actual)} dimensions, the program takes {len(expected)}",
            where=name,
        )
    for axis, (size, given) in enumerate(zip(expected, actual, strict=True)):
        if isinstance(size, int):
            fits, reason = size == given, f"the program was captured for {size} only"
        else:
            first, other = sizes.setdefault(str(size), (given, name))
            fits, reason = first == given, f"{other} has {first} there, and both must agree"
        if not fits:
            raise CompileError(
                f"axis {axis} of input {name} is {given}: {reason}",
                where=name,
                next_step="capture with example_inputs whose sizes differ there, or set "
                "dynamic_shapes",
            )


class _Runner(fx.Interpreter):
    """Runs a graph node by node, taking parameters from `Weights` and freeing after last use."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self._weights = program.weights
        self.extra_traceback = False  # `run` names the node itself.
        self._current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self._current = n
        return super().run_node(n)

    def place(self) -> str | None:
        """Names the operator that was running, and the module that it was traced in."""
        if self._current is None:
            return None
        stack = list((self._current.meta.get("nn_module_stack") or {}).values())
        module = f" in {stack[-1][0]}" if stack and stack[-1][0] else ""
        return f"{self._current.name} ({self._current.target}){module}"

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if gains_by_float32(target, args):
            return in_float32(target, args, kwargs)
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self._weights:
            return self._weights[target]
        return super().get_attr(target, args, kwargs)


def copy_graph_module(
    source: fx.GraphModule, kind: type[fx.GraphModule] = _LazyGraphModule
) -> fx.GraphModule:
    """Copies the graph and its metadata; parameters, buffers and submodules are shared.

    Args:
        source: What to copy.
        kind: By default, Python is made of the graph when somebody asks for it: passes copy often,
            and a Program runs node by node.
    """
    graph = fx.Graph()
    copied: Any = graph.graph_copy(source.graph, val_map={}, return_output_node=True)
    value, old = copied
    graph.output(value).meta = dict(old.meta)
    return kind(source, graph)


def bind_parameter(module: fx.GraphModule, name: str, source: Source) -> None:
    """Makes an attribute of a GraphModule stand for a source.

    The containers on the way belong to this module alone (fx makes them when it copies a graph).
    A tensor in memory is bound itself. One that is not becomes a `meta` tensor: running the module
    directly then fails at once, instead of computing with values that are no longer true.
    """
    if isinstance(source, InMemory):
        tensor = source.tensor
    else:
        tensor = torch.empty(source.shape, dtype=source.dtype, device="meta")
    if not isinstance(tensor, torch.nn.Parameter):
        tensor = torch.nn.Parameter(tensor, requires_grad=False)
    owner, leaf = holder(module, name)
    owner._buffers.pop(leaf, None)
    owner._parameters[leaf] = tensor


def holder(module: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """Returns the container that holds a dotted name, made where it is missing, and the last part."""
    *path, leaf = name.split(".")
    owner = module
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, torch.nn.Module())
        owner = owner.get_submodule(part)
    return owner, leaf


def attribute(module: torch.nn.Module, target: str) -> Any:
    """Returns the attribute at a dotted path.

    Raises:
        AttributeError: There is none.
    """
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value
