"""What `cpu_linear.py` times: one linear in every form, in as many copies as keep the caches honest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import onnx
import torch
from models.forms import pack_values, sparse_linear_model, to_dynamic_int8, to_nbits
from onnx import TensorProto, helper, numpy_helper
from sessions import bound_run, open_session
from torch.nn import functional

from zeroskip.ir.formats import BitmaskWeight
from zeroskip.runtime.kernels.library import CpuLinear, ThreadPool, load_library
from zeroskip.runtime.kernels.location import library_path

BASELINE = "ort float32"


class Copy(Protocol):
    """A linear with weights of its own."""

    def bind(self, x: torch.Tensor) -> Callable[[], object]:
        """Returns what computes x W^T."""

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x W^T."""


@dataclass(frozen=True)
class Form:
    """One way to run a linear.

    Args:
        name: As it is reported.
        copies: Calls take them in turn.
        bytes: The size of the weights of one copy.
        values: Type of the kept values, of ours.
        layout: Of ours.
        accuracy_level: Of ours.
        kernel: The name of the kernel that serves m rows, of ours.
    """

    name: str
    copies: Sequence[Copy]
    bytes: int
    values: str | None = None
    layout: int | None = None
    accuracy_level: int | None = None
    kernel: Callable[[int], str] | None = None

    def bind(self, x: torch.Tensor) -> Callable[[], object]:
        """Returns a call that takes the next copy every time."""
        runs = itertools.cycle([copy.bind(x) for copy in self.copies])
        return lambda: next(runs)()


class SessionCopy:
    """A model with the input `x` and the output `output`, in ONNX Runtime."""

    def __init__(self, model: bytes, *, sparse: bool = False) -> None:
        self._session = open_session(model, sparse=sparse)

    def bind(self, x: torch.Tensor) -> Callable[[], object]:
        return bound_run(self._session, {"x": x.numpy()})

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._session.run(None, {"x": x.numpy()})[0])


class TorchCopy:
    """A dense weight [rows, columns] in torch."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight.clone()

    def bind(self, x: torch.Tensor) -> Callable[[], object]:
        typed = x.to(self._weight.dtype)
        return lambda: functional.linear(typed, self._weight)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x.to(self._weight.dtype), self._weight).float()


class DirectCopy:
    """A packed weight, its kernels called from Python on threads of their own."""

    def __init__(self, packed: BitmaskWeight, options: Options, threads: int) -> None:
        library = load_library(library_path())
        own = BitmaskWeight(
            packed.bitmask.clone(),
            packed.row_offsets.clone(),
            packed.values.clone(),
            None if packed.scales is None else packed.scales.clone(),
            packed.columns,
            packed.block_size,
        )
        self._linear = CpuLinear(library, own, **options._asdict())
        self._pool = ThreadPool(library, threads) if threads > 1 else None

    def bind(self, x: torch.Tensor) -> Callable[[], object]:
        return lambda: self._linear(x, pool=self._pool)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x, pool=self._pool)


class Options(NamedTuple):
    """How a packed weight is run; see `CpuLinear`."""

    layout: int
    accuracy_level: int


def rivals(weight: torch.Tensor, copies: int, names: Sequence[str]) -> Iterator[Form]:
    """Yields the dense forms of a weight [rows, columns], the baseline first."""
    dense = dense_model(weight)
    yield _in_onnxruntime(BASELINE, dense, copies)
    if "dynamic-int8" in names:
        yield _in_onnxruntime("ort dynamic int8", to_dynamic_int8(dense), copies)
    if "nbits" in names:
        yield _in_onnxruntime("ort int4 block 32", to_nbits(dense, 4), copies)
        yield _in_onnxruntime("ort int8 block 32", to_nbits(dense, 8), copies)
    if "torch" in names:
        for dtype in (torch.float32, torch.bfloat16):
            yield _in_torch(weight.to(dtype), copies)


def ours(
    weight: torch.Tensor,
    values: str,
    options: Options,
    copies: int,
    *,
    threads: int,
    direct: bool,
) -> Form:
    """Returns the sparse form of a weight with zeros.

    Args:
        weight: [rows, columns].
        values: Type of the kept values.
        options: How it is run.
        copies: How many.
        threads: Of the direct calls.
        direct: Calls the kernels from Python instead of through ONNX Runtime.
    """
    packed = pack_values(weight, values)
    kernel = CpuLinear(load_library(library_path()), packed, **options._asdict()).kernel
    made: list[Copy]
    if direct:
        made = [DirectCopy(packed, options, threads) for _ in range(copies)]
    else:
        model = sparse_linear_model(packed, *options).SerializeToString()
        made = [SessionCopy(model, sparse=True) for _ in range(copies)]
    level = f" level {options.accuracy_level}" if values == "int8" else ""
    name = f"sparse {values}{level} layout {options.layout}"
    return Form(name, made, packed.nbytes, values, *options, kernel)


def dense_model(weight: torch.Tensor) -> onnx.ModelProto:
    """One MatMul: input `x` [m, columns], `output` [m, rows]."""
    rows, columns = weight.shape
    transposed = np.ascontiguousarray(weight.numpy().T)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["output"], name="linear")],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", columns])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["m", rows])],
        [numpy_helper.from_array(transposed, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _in_onnxruntime(name: str, model: onnx.ModelProto, copies: int) -> Form:
    serialized = model.SerializeToString()
    return Form(name, [SessionCopy(serialized) for _ in range(copies)], len(serialized))


def _in_torch(weight: torch.Tensor, copies: int) -> Form:
    name = f"torch {str(weight.dtype).removeprefix('torch.')}"
    size = weight.numel() * weight.element_size()
    return Form(name, [TorchCopy(weight) for _ in range(copies)], size)
