"""A program as a module on a device, its 2:4 weights in the form that kernels there read."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.fragments import COLUMNS, to_fragments
from zeroskip.ir.program import Program, attribute, holder
from zeroskip.ir.semi_structured import SemiStructuredWeight
from zeroskip.runtime.kernels import linear_24 as _kernels  # noqa: F401  (registers them)

_TARGET = torch.ops.zeroskip.linear_24.default


def place(
    program: Program, device: torch.device | str = "cuda", *, fragments: bool | None = None
) -> fx.GraphModule:
    """Returns a runnable module on a device; the program stays as it is.

    It takes the inputs by position or name, on the device, and returns a flat tuple. 2:4 weights
    become fragments, which take the same 9/16 of the dense weight and which the kernels for few
    tokens read as they are. It can be captured in a CUDA graph once every shape has run.

    Args:
        program: Lowered by `LowerSemiStructured`, or any other.
        device: Where it is to run.
        fragments: Whether 2:4 weights become fragments; by default where `mma24` runs.

    Raises:
        LoweringError: There is no such device.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LoweringError(
            "PyTorch sees no CUDA device",
            where=f"device {device}",
            next_step="run it on a machine that has one, with a PyTorch built for CUDA",
        )
    module = program.module()
    if fragments is None:
        fragments = device.type == "cuda" and torch.version.hip is None
        fragments = fragments and torch.cuda.get_device_capability(device) >= (8, 0)
    if fragments:
        _make_fragments(module)
    for node in module.graph.nodes:
        # What the graph makes itself, positions and masks, is made where the capture was.
        node.args = fx.node.map_aggregate(node.args, lambda value: _moved(value, device))
        node.kwargs = fx.node.map_aggregate(node.kwargs, lambda value: _moved(value, device))
    module.recompile()
    return module.to(device)


def _moved(value: Any, device: torch.device) -> Any:
    return device if isinstance(value, torch.device) else value


def _make_fragments(module: fx.GraphModule) -> None:
    done: dict[tuple[str, str], int] = {}
    for node in module.graph.find_nodes(op="call_function", target=_TARGET):
        x, values, codes, *rest = node.args
        if not all(isinstance(n, fx.Node) and n.op == "get_attr" for n in (values, codes)):
            continue
        names = (str(values.target), str(codes.target))
        if names not in done:
            weight = SemiStructuredWeight(*(attribute(module, name).detach() for name in names))
            if weight.columns % COLUMNS or weight.values.element_size() != 2:
                continue  # No kernel for fragments serves it.
            for name, tensor in zip(names, to_fragments(weight), strict=True):
                owner, leaf = holder(module, name)
                owner._parameters.pop(leaf, None)
                owner.register_buffer(leaf, tensor)
            done[names] = weight.rows
        bias = rest[0] if rest else None
        node.args = (x, values, codes, bias, done[names])
