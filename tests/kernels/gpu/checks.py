"""Checks that every kernel for GPUs passes, in the interpreter and on a device.

A check takes a kernel by name, so that both places run the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from zeroskip.ir.bitmap import pack_bitmap
from zeroskip.ir.semi_structured import pack_semi_structured
from zeroskip.ir.weights import pack_bits
from zeroskip.runtime.kernels.gpu import (
    bitmap_gemv,
    decompress24,
    gemm24,
    gemv24,
    layout24,
    masked_gemm,
    split_sum,
)

FLOAT_TYPES = (torch.bfloat16, torch.float16)
SHAPES = (
    # tokens, rows, columns
    (1, 64, 512),
    (1, 33, 516),
    (2, 100, 68),
    (3, 17, 2048),
    (17, 9, 1028),
    (5, 40, 1536),
    (1, 1, 8),
    (4, 3, 4),
)
ODD_SHAPES = ((3, 35, 65), (1, 5, 1), (17, 9, 127), (2, 70, 577))


class Kernel(NamedTuple):
    """One kernel.

    Attributes:
        pack: Dense weight, whose pruned entries are anything, and mask, to operands.
        launch: The launcher.
        configs: What it ships.
        semi_structured: It takes 2:4 weights only.
        sums_in_float32: It does not leave the product to a library, which may round partial sums.
    """

    pack: Callable[[torch.Tensor, torch.Tensor], Any]
    launch: Callable[..., torch.Tensor]
    configs: tuple[Any, ...]
    semi_structured: bool
    sums_in_float32: bool = True


def pack24(weight: torch.Tensor, keep: torch.Tensor) -> layout24.Operands24:
    return layout24.pack(pack_semi_structured(weight, keep))


def pack_masked(weight: torch.Tensor, keep: torch.Tensor) -> masked_gemm.MaskedOperands:
    return masked_gemm.pack(weight, pack_bits(keep))


KERNELS = {
    "gemv24": Kernel(pack24, gemv24.launch, gemv24.CONFIGS, True),
    "gemm24": Kernel(pack24, gemm24.launch, gemm24.CONFIGS, True),
    "decompress24": Kernel(pack24, decompress24.launch, decompress24.CONFIGS, True, False),
    "masked_gemm": Kernel(pack_masked, masked_gemm.launch, masked_gemm.CONFIGS, False),
    "bitmap_gemv": Kernel(pack_bitmap, bitmap_gemv.launch, bitmap_gemv.CONFIGS, False),
}


class Problem(NamedTuple):
    """Operands of one product, and what float64 makes of them."""

    x: torch.Tensor
    weight: torch.Tensor
    keep: torch.Tensor
    bias: torch.Tensor

    sums_in_float32: bool

    def compare(self, y: torch.Tensor, has_bias: bool, where: object) -> None:
        """Fails where y is off by more than rounding its type, and the sums, explains."""
        x = self.x.double()
        weight = self.weight.double().masked_fill(~self.keep, 0)
        wanted, size = x @ weight.t(), x.abs() @ weight.abs().t()
        if has_bias:
            wanted, size = wanted + self.bias.double(), size + self.bias.double().abs()
        eps = torch.finfo(y.dtype).eps
        share = 2e-6 if self.sums_in_float32 else eps / 4
        allowed = eps / 2 * wanted.abs() + share * size + 1e-7
        off = (y.double() - wanted).abs()
        assert y.shape == wanted.shape, where
        assert (off <= allowed).all(), (where, (off / allowed).nan_to_num(torch.inf).max().item())


def problem(
    kernel: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str, seed: int = 0
) -> Problem:
    """Returns a product with empty rows, rows that keep what they can, and rows in between."""
    tokens, rows, columns = shape
    generator = torch.Generator().manual_seed(seed + tokens * rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    if KERNELS[kernel].semi_structured:
        order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
        keep = (order < 2).view(rows, columns)
        # Groups of two kept weights, of one, and of none.
        keep &= torch.rand(rows, columns, generator=generator) < 0.9
        keep[:, -4:] = torch.tensor([False, False, False, True])
    else:
        keep = torch.rand(rows, columns, generator=generator) < 0.5
        keep[4::5] = True
        # Tiles of 64 columns without a kept weight; and rows of tiles that keep nothing at all.
        keep[:, 64:192] = False
        keep[64:128] = False
    keep[2::7] = False
    # What is pruned must not be read: infinity times zero would show.
    weight = weight.masked_fill(
        ~keep & (torch.rand(weight.shape, generator=generator) < 0.5), torch.inf
    )
    x = torch.randn(tokens, columns, generator=generator)
    bias = torch.randn(rows, generator=generator)
    return Problem(
        x.to(device, dtype),
        weight.to(device, dtype),
        keep.to(device),
        bias.to(device, dtype),
        KERNELS[kernel].sums_in_float32,
    )


def apart(x: torch.Tensor, offset: int, gap: int) -> torch.Tensor:
    """Returns x in memory where rows lie `gap` elements apart and the first starts at `offset`.

    What lies between is NaN.
    """
    tokens, columns = x.shape
    memory = x.new_full((offset + tokens * (columns + gap),), torch.nan)
    view = memory[offset:].view(tokens, columns + gap)[:, :columns]
    view.copy_(x)
    return view


def shapes(kernel: str) -> tuple[tuple[int, int, int], ...]:
    return SHAPES if KERNELS[kernel].semi_structured else SHAPES + ODD_SHAPES


def check_shape(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str, every_config: bool
) -> None:
    """A shape with every configuration, or with one that depends on shape and type."""
    kernel, given = KERNELS[name], problem(name, shape, dtype, device)
    operands = kernel.pack(given.weight, given.keep)
    first, count = sum(shape) + FLOAT_TYPES.index(dtype), len(kernel.configs)
    chosen = range(count) if every_config else (first % count,)
    for index in chosen:
        config = kernel.configs[index]
        has_bias = bool((index + first) % 2)
        y = kernel.launch(given.x, operands, given.bias if has_bias else None, config)
        assert y.dtype == dtype
        given.compare(y, has_bias, config)


def check_operands_given(name: str, dtype: torch.dtype, device: str) -> None:
    """Rows of x apart and at odd addresses; out within a larger tensor; a workspace of NaN."""
    kernel, given = KERNELS[name], problem(name, (3, 37, 132), dtype, device)
    tokens, rows, columns = 3, 37, 132
    operands = kernel.pack(given.weight, given.keep)
    for index, (offset, gap) in enumerate(((0, 0), (0, 4), (8, 12), (4, 8), (1, 3))):
        config = kernel.configs[-1 - index % len(kernel.configs)]
        x = apart(given.x, offset, gap)
        around = torch.full((tokens + 2, rows + 5), 7.0, dtype=dtype, device=device)
        out = around[1:-1, 2:-3].fill_(torch.nan)
        split = getattr(config, "split", 0)
        kind, size = (torch.float32, split * tokens * rows) if split else (dtype, rows * columns)
        workspace = torch.full((size + 8,), torch.nan, dtype=kind, device=device)
        y = kernel.launch(x, operands, given.bias, config, out=out, workspace=workspace)
        assert y.data_ptr() == out.data_ptr()
        given.compare(out, True, (config, offset, gap))
        assert workspace[-8:].isnan().all()
        assert int((around == 7.0).sum()) >= around.numel() - out.numel(), config


def check_nan_stays_in_its_token(name: str, dtype: torch.dtype, device: str) -> None:
    kernel, given = KERNELS[name], problem(name, (4, 20, 68), dtype, device)
    operands = kernel.pack(given.weight, given.keep)
    for config in kernel.configs[:: max(1, len(kernel.configs) // 2)]:
        spoilt = given.x.clone()
        spoilt[1] = torch.nan
        spoilt[3, -1] = torch.nan  # a column that all rows but the empty ones keep
        y = kernel.launch(spoilt, operands, None, config)
        clean = kernel.launch(given.x, operands, None, config)
        assert torch.equal(y[[0, 2]], clean[[0, 2]]), config
        used = given.keep[:, -1]
        assert y[1][given.keep.any(1)].isnan().all(), config
        assert y[3][used].isnan().all(), config


def check_no_tokens_and_no_rows(name: str, device: str) -> None:
    kernel, dtype = KERNELS[name], torch.float16
    given = problem(name, (1, 8, 16), dtype, device)
    operands = kernel.pack(given.weight, given.keep)
    for config in kernel.configs:
        assert kernel.launch(given.x[:0], operands, given.bias, config).shape == (0, 8)
    if name != "masked_gemm":
        empty = kernel.pack(given.weight[:0], given.keep[:0])
        assert kernel.launch(given.x, empty).shape == (1, 0)


def check_decompressed(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """The dense weight, bit for bit, and nothing beside it."""
    given, (_, rows, columns) = problem("decompress24", shape, dtype, device), shape
    operands = pack24(given.weight, given.keep)
    for config in decompress24.CONFIGS:
        around = torch.full((rows + 2, columns + 8), 7.0, dtype=dtype, device=device)
        dense = around[1:-1, 4:-4].fill_(torch.nan)
        decompress24.decompress(operands, config, dense)
        assert torch.equal(dense, given.weight.masked_fill(~given.keep, 0)), config
        assert (around[[0, -1]] == 7.0).all(), config
        assert (around[:, :4] == 7.0).all(), config
        assert (around[:, -4:] == 7.0).all(), config


def check_split_sum(device: str) -> None:
    """The parts are added in order, in float32, and the bias after them."""
    generator = torch.Generator().manual_seed(0)
    for split, tokens, rows, dtype in (
        (2, 3, 300, torch.bfloat16),
        (4, 1, 1, torch.float16),
        (16, 2, 257, torch.bfloat16),
    ):
        parts = torch.randn(split, tokens, rows, generator=generator).to(device)
        bias = torch.randn(rows, generator=generator).to(device, dtype)
        wanted = torch.zeros(tokens, rows, device=device)
        for part in parts:
            wanted = wanted + part
        for offset in (None, bias):
            around = torch.full((tokens, rows + 4), 7.0, dtype=dtype, device=device)
            split_sum.launch(parts, offset, around[:, :rows])
            total = wanted if offset is None else wanted + offset.float()
            assert torch.equal(around[:, :rows], total.to(dtype))
            assert (around[:, rows:] == 7.0).all()
