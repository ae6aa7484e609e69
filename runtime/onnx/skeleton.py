"""A copy of a graph that computes in float32 over parameters that have a shape and no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers.integrations.moe  # noqa: F401  (registers transformers::grouped_mm_fallback)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.program import attribute

# The experts' grouped product computes in bfloat16 only; its float32 form has the same arguments.
WIDER_FORMS: dict[Any, Any] = {
    torch.ops.aten._grouped_mm.default: torch.ops.transformers.grouped_mm_fallback.default
}
NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Skeleton:
    """What `torch.export` is given in place of the graph and its inputs.

    Args:
        graph_module: The copy: parameters under the names that `weights` uses, one per tied group.
        example_inputs: The example, without data, in the same fake mode as the parameters.
        parameters: The names of the parameters in `graph_module`.
    """

    graph_module: torch.fx.GraphModule
    example_inputs: dict[str, Any]
    parameters: tuple[str, ...]


def strip_data(
    graph_module: torch.fx.GraphModule,
    example_inputs: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
) -> Skeleton:
    """Copies a graph, replacing parameters by data-free float32 ones and narrow dtypes by float32.

    Args:
        graph_module: Not changed.
        example_inputs: Keywords with tensors anywhere in their values.
        weights: Says under which of its names a tied parameter is bound; nothing is loaded.

    Raises:
        LoweringError: A parameter is in `weights` under none of its names, or a buffer has no data.
    """
    # A mode of its own: two exports in one mode would share their symbolic sizes.
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def without_data(tensor: torch.Tensor, widen: bool = True) -> torch.Tensor:
        dtype = torch.float32 if widen and tensor.dtype in NARROW else tensor.dtype
        with mode:
            return torch.empty(tensor.shape, dtype=dtype, device="cpu")

    graph: torch.fx.Graph = torch.fx.Graph(tracer_cls=graph_module.graph._tracer_cls)
    output = graph.graph_copy(graph_module.graph, val_map={}, return_output_node=True)
    values, _ = cast("tuple[Any, torch.fx.Node]", output)
    graph.output(values)
    graph._codegen = graph_module.graph._codegen
    bound = _bound_names(graph_module, weights)
    attributes: dict[str, Any] = {}
    for node in graph.nodes:
        # Dtypes are constants of the graph wherever the model spelt one out, as in x.to(bfloat16).
        node.args = pytree.tree_map(_widen, node.args)
        node.kwargs = pytree.tree_map(_widen, node.kwargs)
        node.target = WIDER_FORMS.get(node.target, node.target)
        if node.op == "get_attr":
            value = attribute(graph_module, node.target)
            if node.target in bound:
                node.target = bound[node.target]
                hollow = without_data(value, widen=not _is_packed(node))
                attributes[node.target] = torch.nn.Parameter(hollow, False)
            else:
                attributes[node.target] = _constant(node.target, value)
    inputs = pytree.tree_map_only(torch.Tensor, without_data, dict(example_inputs))
    names = tuple(name for name in dict.fromkeys(bound.values()) if name in attributes)
    return Skeleton(torch.fx.GraphModule(attributes, graph), inputs, names)


def _bound_names(
    graph_module: torch.fx.GraphModule, weights: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """Maps every name of a parameter that the graph reads to the one name that `weights` knows."""
    targets = [str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"]
    values = {target: attribute(graph_module, target) for target in dict.fromkeys(targets)}
    every_name = dict(graph_module.named_parameters(remove_duplicate=False))
    bound = {}
    for target, value in values.items():
        # A tied tensor may be read under one name and bound under another.
        aliases = [target, *(name for name, other in every_name.items() if other is value)]
        aliases += [name for name, other in values.items() if other is value]
        known = next((name for name in aliases if name in weights), None)
        if known is not None:
            bound[target] = known
        elif isinstance(value, torch.nn.Parameter):
            raise LoweringError(
                f"the graph reads parameter {target!r}, for which there is no weight",
                where=target,
                next_step="pass weights that hold every parameter of the graph by its name",
            )
    return bound


def _is_packed(node: torch.fx.Node) -> bool:
    """Whether a weight is an operand of `zeroskip::sparse_linear`, which takes narrow values."""
    packed = torch.ops.zeroskip.sparse_linear.default
    return bool(node.users) and all(
        user.target is packed and node in user.args[1:5] for user in node.users
    )


def _constant(name: str, value: Any) -> Any:
    if isinstance(value, FakeTensor) or (isinstance(value, torch.Tensor) and value.is_meta):
        raise LoweringError(
            f"buffer {name!r} has no data, and it is not among the weights",
            where=name,
            next_step="keep buffers real when building a skeleton: they are small and computed",
        )
    if isinstance(value, torch.Tensor) and value.dtype in NARROW:
        return value.float()
    return value


def _widen(value: Any) -> Any:
    return torch.float32 if value in NARROW and isinstance(value, torch.dtype) else value
