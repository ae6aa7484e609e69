"""What can compute a product with a 2:4 weight on a GPU: dense, our kernels, and cuSPARSELt.

Each candidate names the form of the weight that it reads. Forms are made on the device when a
candidate is first used, and never stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from zeroskip.ir.fragments import to_fragments
from zeroskip.ir.semi_structured import SemiStructuredWeight
from zeroskip.runtime.kernels.gpu import mma24_launch

Form = tuple[torch.Tensor, ...]

CUSPARSELT_LEAST = 128
"""Tokens below which cuSPARSELt lost to cuBLAS wherever it was measured."""
MMA_MOST = 512
GEMM_MOST = 256
DECOMPRESS_LEAST = 256


@dataclass(frozen=True)
class Choice:
    """One way to compute the product.

    Args:
        kernel: A key of `KERNELS`.
        options: Of the kernel's configuration; plain values.
    """

    kernel: str
    options: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {"kernel": self.kernel, **self.options}

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> Choice:
        """Returns what `to_json` wrote."""
        options = {key: value for key, value in stored.items() if key != "kernel"}
        return Choice(stored["kernel"], options)

    def __str__(self) -> str:
        return " ".join([self.kernel, *(f"{key}={value}" for key, value in self.options.items())])


DENSE = Choice("dense")


@dataclass(frozen=True)
class Call:
    """A product: y [tokens, rows] = x [tokens, columns] W^T + bias."""

    x: torch.Tensor
    bias: torch.Tensor | None
    rows: int
    scratch: dict[str, torch.Tensor]
    """Work space that outlives the call, by name and size: not for two streams at once."""
    spare: dict[str, torch.Tensor] | None = None
    """Gets as much, for later calls inside a CUDA graph, where it would have to be made anew."""

    def room(self, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns zeros at first, and later what the last user of the name left."""
        key = f"{name} {count}"
        for held in (self.scratch, self.spare):
            if held is not None and key not in held:
                held[key] = torch.zeros(count, dtype=dtype, device=self.x.device)
        return self.scratch[key]


@dataclass(frozen=True)
class Kernel:
    """How a candidate is prepared, listed and run.

    Args:
        make: The form that it reads, from the canonical weight on the device.
        offers: Its options for a number of tokens, rows and columns.
        run: Computes the product.
        refuse: Why it cannot serve a weight on a device, or None.
    """

    make: Callable[[SemiStructuredWeight], Form]
    offers: Callable[[int, int, int], Iterator[dict[str, int]]]
    run: Callable[[Form, Call, Mapping[str, int]], torch.Tensor]
    refuse: Callable[[torch.dtype, int, int, torch.device], str | None]


def _once(tokens: int, rows: int, columns: int) -> Iterator[dict[str, int]]:
    yield {}


def _never_refused(dtype: torch.dtype, rows: int, columns: int, device: torch.device) -> str | None:
    return None


def _run_dense(form: Form, call: Call, options: Mapping[str, int]) -> torch.Tensor:
    return torch.nn.functional.linear(call.x, form[0], call.bias)


def _offer_mma(tokens: int, rows: int, columns: int) -> Iterator[dict[str, int]]:
    if tokens > MMA_MOST:
        return
    needed = -(-tokens // 8)
    widest = max(config.token_tiles for config in mma24_launch.CONFIGS)
    tiles = min(
        (c.token_tiles for c in mma24_launch.CONFIGS if c.token_tiles >= needed), default=widest
    )
    for config in mma24_launch.CONFIGS:
        if config.token_tiles != tiles:
            continue
        for split in (1, 2, 4, 0):
            programs = -(-rows // config.rows) * -(-tokens // config.tokens)
            if split < 2 or split * programs <= _ENOUGH_PROGRAMS:
                yield dataclasses.asdict(dataclasses.replace(config, split=split))


_ENOUGH_PROGRAMS = 1024
"""More need not share tiles."""


def _fits(options: Mapping[str, int], device: torch.device) -> bool:
    found = torch.cuda.get_device_properties(device)
    most = int(getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block))
    return mma24_launch.Config(**options).shared_bytes <= most


def _run_mma(form: Form, call: Call, options: Mapping[str, int]) -> torch.Tensor:
    config = mma24_launch.Config(**options)
    x, columns = call.x, call.x.shape[1]
    if columns % 8 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = torch.nn.functional.pad(x, (0, -columns % 32)).contiguous()
    limits = mma24_launch.device_limits(x.device.index or 0)
    plan = mma24_launch.cut(config, x.shape[0], call.rows, columns, *limits)
    parts = counters = None
    if plan.shared_tiles:
        parts = call.room("parts", plan.floats, torch.float32)
        counters = call.room("counters", plan.counters, torch.int32)
    values, codes = form
    return mma24_launch.launch(
        x, values, codes, call.bias, call.rows, config, workspace=parts, counters=counters
    )


def _refuse_mma(dtype: torch.dtype, rows: int, columns: int, device: torch.device) -> str | None:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"values are {dtype}"
    if columns % 32:
        return f"K={columns} is not a multiple of 32"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "mma.sp takes an NVIDIA GPU of compute capability 8.0 or more"
    return _refuse_gluon()


@cache
def _refuse_gluon() -> str | None:
    try:
        from triton.experimental import gluon  # noqa: F401
    except ImportError as error:
        return f"Triton has no Gluon: {error}"
    return None


def _make_plain(weight: SemiStructuredWeight) -> Form:
    from zeroskip.runtime.kernels.gpu.layout24 import pack

    packed = pack(weight)
    return packed.pairs, packed.metadata


def _plain(form: Form, x: torch.Tensor) -> Any:
    from zeroskip.runtime.kernels.gpu.layout24 import Operands24

    pairs, metadata = form
    return Operands24(pairs, metadata, x.dtype)


def _refuse_plain(dtype: torch.dtype, rows: int, columns: int, device: torch.device) -> str | None:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"values are {dtype}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed: {error}"
    return None


def _offer_gemv(tokens: int, rows: int, columns: int) -> Iterator[dict[str, int]]:
    from zeroskip.runtime.kernels.gpu import gemv24

    for config in gemv24.CONFIGS:
        if config.tokens >= tokens > config.tokens // 2:
            yield dataclasses.asdict(config)


def _run_gemv(form: Form, call: Call, options: Mapping[str, int]) -> torch.Tensor:
    from zeroskip.runtime.kernels.gpu import gemv24

    config = gemv24.Gemv24Config(**options)
    room = _split_room(call, config.split)
    return gemv24.launch(call.x, _plain(form, call.x), call.bias, config, workspace=room)


def _offer_gemm(tokens: int, rows: int, columns: int) -> Iterator[dict[str, int]]:
    from zeroskip.runtime.kernels.gpu import gemm24

    if not 4 < tokens <= GEMM_MOST:
        return
    widest = max(config.tokens for config in gemm24.CONFIGS)
    for config in gemm24.CONFIGS:
        if config.tokens >= min(tokens, widest):
            yield dataclasses.asdict(config)


def _run_gemm(form: Form, call: Call, options: Mapping[str, int]) -> torch.Tensor:
    from zeroskip.runtime.kernels.gpu import gemm24

    config = gemm24.Gemm24Config(**options)
    room = _split_room(call, config.split)
    return gemm24.launch(call.x, _plain(form, call.x), call.bias, config, workspace=room)


def _split_room(call: Call, split: int) -> torch.Tensor | None:
    if split == 1:
        return None
    return call.room("split", split * call.x.shape[0] * call.rows, torch.float32)


def _offer_decompress(tokens: int, rows: int, columns: int) -> Iterator[dict[str, int]]:
    from zeroskip.runtime.kernels.gpu import decompress24

    if tokens >= DECOMPRESS_LEAST:
        for config in decompress24.CONFIGS:
            yield dataclasses.asdict(config)


def _run_decompress(form: Form, call: Call, options: Mapping[str, int]) -> torch.Tensor:
    from zeroskip.runtime.kernels.gpu import decompress24

    config = decompress24.Decompress24Config(**options)
    return decompress24.launch(call.x, _plain(form, call.x), call.bias, config)


def _make_blob(weight: SemiStructuredWeight) -> Form:
    return (torch._cslt_compress(weight.unpack()),)


def _offer_cusparselt(tokens: int, rows: int, columns: int) -> Iterator[dict[str, int]]:
    if tokens >= CUSPARSELT_LEAST:
        # -1: searched when it is tuned, by `search_cusparselt`; the others often win.
        for algorithm in (-1, 17, 20, 12):
            plain = {"algorithm": algorithm, "split_k": 1, "split_k_mode": -1}
            yield {"least": tokens, **plain}


def _run_cusparselt(form: Form, call: Call, options: Mapping[str, int]) -> torch.Tensor:
    tokens = call.x.shape[0]
    # An algorithm found for some number of tokens can take twice as long for fewer: as many are
    # given to it. It takes them by 8 in any case.
    missing = max(options["least"] - tokens, -tokens % 8)
    x = torch.nn.functional.pad(call.x, (0, 0, 0, missing)).contiguous()
    y = torch._cslt_sparse_mm(
        form[0],
        x.t(),
        bias=call.bias,
        transpose_result=True,
        alg_id=max(0, options["algorithm"]),
        split_k=options["split_k"],
        split_k_mode=options["split_k_mode"],
    )
    return y[:tokens]


def search_cusparselt(form: Form, x: torch.Tensor) -> dict[str, int]:
    """Returns the options that cuSPARSELt's own search prefers for as many tokens as x has."""
    algorithm, split_k, mode, _ = torch._C._cusparselt.mm_search(  # type: ignore[attr-defined]
        form[0], x.t(), None, None, None, True
    )
    return {"algorithm": int(algorithm), "split_k": int(split_k), "split_k_mode": int(mode)}


def _refuse_cusparselt(
    dtype: torch.dtype, rows: int, columns: int, device: torch.device
) -> str | None:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"values are {dtype}"
    if rows % 32 or columns % 64:
        return f"cuSPARSELt takes rows by 32 and columns by 64, not {rows} x {columns}"
    if torch.version.hip is not None or not torch.backends.cusparselt.is_available():
        return "PyTorch was built without cuSPARSELt"
    return None


KERNELS: Mapping[str, Kernel] = {
    "dense": Kernel(lambda weight: (weight.unpack(),), _once, _run_dense, _never_refused),
    "mma24": Kernel(to_fragments, _offer_mma, _run_mma, _refuse_mma),
    "gemv24": Kernel(_make_plain, _offer_gemv, _run_gemv, _refuse_plain),
    "gemm24": Kernel(_make_plain, _offer_gemm, _run_gemm, _refuse_plain),
    "decompress24": Kernel(_make_plain, _offer_decompress, _run_decompress, _refuse_plain),
    "cusparselt": Kernel(_make_blob, _offer_cusparselt, _run_cusparselt, _refuse_cusparselt),
}


def list_candidates(
    dtype: torch.dtype, tokens: int, rows: int, columns: int, device: torch.device
) -> list[Choice]:
    """Returns every candidate but dense for a product, in a fixed order."""
    return [
        Choice(name, options)
        for name, kernel in KERNELS.items()
        if name != "dense" and kernel.refuse(dtype, rows, columns, device) is None
        for options in kernel.offers(tokens, rows, columns)
        if name != "mma24" or _fits(options, device)
    ]
