"""What the tests of the CPU kernels share: weights, the dense answer, the kernels there are."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.formats import BitmaskWeight, count_blocks, pack_bitmask
from zeroskip.runtime.kernels.library import CpuLinear, load_library
from zeroskip.runtime.kernels.location import library_path

TYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
SETS = ("portable", "avx2", "avx512", "amx", "neon")


@cache
def library() -> ctypes.CDLL:
    """The library of these sources; built here if it is not yet."""
    loaded = load_library(library_path())
    loaded.zs_kernel_name.restype = ctypes.c_char_p
    return loaded


@cache
def kernels() -> tuple[str, ...]:
    """The names of the kernels that this CPU can run."""
    names = []
    while name := library().zs_kernel_name(len(names)):
        names.append(name.decode())
    return tuple(names)


def random_weight(
    rows: int, columns: int, density: float | str, dtype: str, block_size: int = 0, seed: int = 0
) -> BitmaskWeight:
    """A packed weight; density `2:4` keeps two of each four. Some rows are empty, some full."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    chance = torch.rand(rows, columns, generator=generator)
    if density == "2:4":
        groups = torch.rand(rows, -(-columns // 4), 4, generator=generator)
        keep = (groups.argsort(-1).argsort(-1) < 2).view(rows, -1)[:, :columns]
    else:
        keep = chance < density
        keep[4::5] = False
        keep[6::7] = True
    scales = None
    if dtype == "int8":
        blocks = count_blocks(columns, block_size)
        scales = (torch.rand(rows, blocks, generator=generator) + 0.5) * 0.02
    else:
        block_size = 0
    return pack_bitmask(weight, keep, dtype=TYPES[dtype], scales=scales, block_size=block_size)


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of x as accuracy_level 4 sees them: float64 of what 8 bits leave of them."""
    if not x.shape[1]:
        return x.double()
    low = x.min(1, keepdim=True).values.clamp(max=0)
    high = x.max(1, keepdim=True).values.clamp(min=0)
    scale = ((high.double() - low.double()) / 255).float()
    scale[scale == 0] = 1
    zero = (-low / scale).round().clamp(0, 255)
    steps = ((x / scale).round() + zero).clamp(0, 255)
    rounded = (steps - zero).double() * scale.double()
    rounded[~x.isfinite().all(1)] = torch.nan
    return rounded


def tolerance(where: object) -> float:
    """What a kernel may be off, as a share of the sum of all terms without their signs.

    The AMX kernel for bfloat16 values takes x in two bfloat16 parts, 16 bits in all: far closer
    than the 8 bits of the values, but not as close as float32.
    """
    return 2.0**-16 if "amx-bfloat16" in str(where) else 2e-6


def check(
    y: torch.Tensor,
    weight: BitmaskWeight,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    level: int,
    where: object,
) -> None:
    """Asserts that y is x W^T + bias, as far as float32 sums can be."""
    dense = weight.unpack().double()
    seen = round_rows(x) if level == 4 else x.double()
    wanted = seen @ dense.T
    if level == 4:
        wanted[~x.isfinite().all(1)] = torch.nan
    terms = seen.nan_to_num(0, 0, 0).abs() @ dense.abs().T + 1
    if bias is not None:
        wanted = wanted + bias.double()
    finite = wanted.isfinite()
    assert torch.equal(y.isfinite(), finite), (where, "finite")
    # Infinities as they are, NaN where NaN is.
    assert torch.equal(y[~finite].nan_to_num(7.0), wanted[~finite].float().nan_to_num(7.0)), where
    error = ((y.double() - wanted).abs() / terms)[finite]
    assert not error.numel() or error.max() < tolerance(where), (where, float(error.max()))


def linears(
    weight: BitmaskWeight, level: int, sets: tuple[str | None, ...] = (None, *SETS)
) -> list[CpuLinear]:
    """The weight made ready for each kernel that serves it, then as the library chooses.

    `sets` are the instruction sets that the library may choose from; None for all there are.
    """
    made = []
    for kernel in kernels():
        try:
            made.append(CpuLinear(library(), weight, layout=1, accuracy_level=level, kernel=kernel))
        except LoweringError as error:
            if "no kernel serves" not in str(error):
                raise
    for layout in (0, 1):
        for allowed in sets:
            made.append(
                CpuLinear(
                    library(),
                    weight,
                    layout=layout,
                    accuracy_level=level,
                    instruction_set=allowed,
                )
            )
    return made


def serves(linear: CpuLinear, m: int) -> bool:
    """Whether a linear that was made for one kernel can compute m rows."""
    return linear.kernel(m) is not None
