"""`zeroskip::linear_24` on CUDA: the kernel that was measured to be fastest for each number of tokens.

Importing this module registers it. The forms of a weight that kernels read are made when they are
first needed and live as long as its tensor of values; so does their work space. Run every shape
once before a CUDA graph is captured: what is made inside a capture belongs to that graph. Graphs
that hold the same linear share its work space: replay them one after another.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from zeroskip.ir.linear_24 import as_rows, check_operands, linear_24, read_weight
from zeroskip.ir.weights import version_of
from zeroskip.runtime.candidates24 import DENSE, KERNELS, Call, Form
from zeroskip.runtime.gpu_dispatch import Table, key_of, shipped_table

_forms: WeakIdKeyDictionary = WeakIdKeyDictionary()
_lock = threading.Lock()
_tables: list[Table] = []


def use_table(table: Table) -> None:
    """Makes a table of measurements decide, before those used so far and that of the package."""
    _tables.insert(0, table)


def known_tables() -> list[Table]:
    """Returns the tables that decide, the first that knows a layer before the others."""
    return [*_tables, shipped_table()]


def forget_tables() -> None:
    """Leaves the table of the package alone to decide."""
    _tables.clear()


@linear_24.register_kernel("cuda")
def multiply(
    x: torch.Tensor,
    values: torch.Tensor,
    codes: torch.Tensor,
    bias: torch.Tensor | None = None,
    rows: int = 0,
) -> torch.Tensor:
    """Computes `zeroskip::linear_24` by the kernel that tables name for this weight and device."""
    columns = x.shape[-1]
    check_operands(x, columns, values, codes, bias, rows)
    count = rows or values.shape[0]
    flat = as_rows(x)
    if not flat.shape[0] or not count or not columns:
        return _empty_product(x, count, bias)
    key = key_of(count, columns, x.dtype, x.device)
    table = next((each for each in known_tables() if key in each.entries), None)
    choice = table.find(key, flat.shape[0]) if table is not None else DENSE
    if KERNELS[choice.kernel].refuse(x.dtype, count, columns, x.device) is not None:
        choice = DENSE
    kernel = KERNELS[choice.kernel]
    form, scratch, spare = _prepare(kernel.make, values, codes, rows, columns)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    y = kernel.run(form, Call(flat, bias, count, scratch, spare), choice.options)
    return y.reshape(*x.shape[:-1], count)


def _empty_product(x: torch.Tensor, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns the product where there is nothing to add up: the bias, or zeros."""
    y = x.new_zeros((*x.shape[:-1], rows))
    return y if bias is None else y + bias


def _prepare(
    make: Any, values: torch.Tensor, codes: torch.Tensor, rows: int, columns: int
) -> tuple[Form, dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """Returns a form of a weight, and the work space of its products: here, and inside graphs."""
    if values.dim() == 4 and make is KERNELS["mma24"].make:
        form: Form = (values, codes)
    else:
        form = _made(make, values, codes, rows, columns)
    is_cuda = values.device.type == "cuda"
    stream = torch.cuda.current_stream(values.device).cuda_stream if is_cuda else 0
    with _lock:
        known = _known(values)
        in_graphs = known.setdefault("in graphs", {})
        if is_cuda and torch.cuda.is_current_stream_capturing():
            return form, in_graphs, None
        return form, known.setdefault(stream, {}), in_graphs


def _made(make: Any, values: torch.Tensor, codes: torch.Tensor, rows: int, columns: int) -> Form:
    # Other codes, or either written in place since, make another weight.
    state = (id(codes), version_of(codes), version_of(values), rows)
    with _lock:
        known = _known(values)
        held = known.get(make)
        if held is None or held[0] != state:
            weight = read_weight(values.detach(), codes, rows, columns)
            # The codes are kept, or another tensor could get their id.
            held = known[make] = (state, make(weight), codes)
        form: Form = held[1]
        return form


def _known(values: torch.Tensor) -> dict[Any, Any]:
    """Returns what is remembered of a weight; under the lock."""
    if values not in _forms:
        _forms[values] = {}
    found: dict[Any, Any] = _forms[values]
    return found
