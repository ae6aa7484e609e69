"""How a product of `mma24` is cut, and its launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from zeroskip.ir.fragments import COLUMNS, ROWS, TILES
from zeroskip.runtime.kernels.gpu.compiling import CompileCase, compile_case

_TOKENS = 8
_STEP_BYTES = 512
"""Values of one step of a warp; those of 8 tokens are as many."""
_RESERVED = 1024
"""Shared memory that the hardware keeps for itself of each program's share."""


@dataclass(frozen=True)
class Config:
    """How the work is cut.

    Args:
        warps_n: Warps side by side over rows of W.
        warps_k: Warps side by side over columns of W; their sums meet in shared memory.
        row_tiles: Tiles of 16 rows of a warp.
        token_tiles: Tiles of 8 tokens of a program.
        stages: Chunks in the ring.
        steps: Tiles of 32 columns of a warp in a chunk: 4 or 8.
        split: Programs that share a tile: 1 leaves each its own, 0 spreads all units evenly over
            the programs that the device holds at once.
    """

    warps_n: int
    warps_k: int
    row_tiles: int
    token_tiles: int
    stages: int
    steps: int = 8
    split: int = 1

    @property
    def warps(self) -> int:
        return self.warps_n * self.warps_k

    @property
    def rows(self) -> int:
        """Rows of W in a tile."""
        return ROWS * self.row_tiles * self.warps_n

    @property
    def tokens(self) -> int:
        """Tokens of a program."""
        return _TOKENS * self.token_tiles

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        weights = self.warps * self.row_tiles * _STEP_BYTES * 9 // 8
        return self.stages * self.steps * (weights + self.token_tiles * self.warps_k * _STEP_BYTES)


CONFIGS = (
    # For each number of token tiles those that were fastest, within 1.5 %, for some layer on an H200;
    # of many tokens, one more that fits into the shared memory of smaller devices.
    Config(1, 2, 1, 1, 3),
    Config(4, 1, 2, 1, 3),
    Config(1, 4, 1, 1, 2),
    Config(1, 2, 2, 1, 2),
    Config(2, 1, 2, 1, 3),
    Config(8, 1, 1, 1, 3),
    Config(2, 2, 1, 2, 3),
    Config(4, 1, 1, 2, 2),
    Config(1, 2, 2, 2, 3),
    Config(2, 1, 2, 2, 4),
    Config(2, 1, 2, 4, 3),
    Config(4, 1, 2, 4, 2),
    Config(4, 1, 1, 4, 3),
    Config(4, 1, 2, 4, 4, steps=4),
    Config(4, 1, 2, 4, 3, steps=4),
    Config(8, 1, 2, 4, 4, steps=4),
    Config(4, 1, 2, 8, 3),
    Config(4, 1, 2, 8, 3, steps=4),
    Config(4, 1, 1, 8, 2),
    Config(8, 1, 2, 8, 2),
    Config(8, 1, 2, 8, 4, steps=4),
    Config(4, 1, 2, 8, 2, steps=4),
)


@dataclass(frozen=True)
class Cut:
    """The numbers of one launch.

    Args:
        programs: For each block of tokens.
        blocks: Of tokens.
        steps: Tiles of 32 columns.
        groups: Eights of steps.
        chunks: Units of a tile.
        tiles: Of rows.
        per: Units of a program.
        part: float32 values of a part of a tile.
    """

    programs: int
    blocks: int
    steps: int
    groups: int
    chunks: int
    tiles: int
    per: int
    part: int

    @property
    def shared_tiles(self) -> bool:
        """Whether programs share tiles."""
        return self.per % self.chunks != 0

    @property
    def floats(self) -> int:
        """Work space for parts of tiles, in float32 values."""
        return 2 * self.programs * self.blocks * self.part if self.shared_tiles else 0

    @property
    def counters(self) -> int:
        """How many int32 counters are needed."""
        return self.tiles * self.blocks if self.shared_tiles else 0


@lru_cache(maxsize=4096)  # A call asks twice: for its work space, and for the launch.
def cut(
    config: Config, tokens: int, rows: int, columns: int, processors: int, shared_bytes: int
) -> Cut:
    """Returns how a product is cut.

    Args:
        config: Of the kernel.
        tokens: Rows of x.
        rows: Of W.
        columns: Of W.
        processors: Of the device.
        shared_bytes: Of each processor.
    """
    steps = -(-columns // COLUMNS)
    groups = -(-steps // TILES)
    chunks = -(-steps // (config.steps * config.warps_k))
    tiles = -(-rows // config.rows)
    blocks = -(-tokens // config.tokens)
    if config.split:
        per = -(-chunks // config.split)
    else:
        fit = min(shared_bytes // (config.shared_bytes + _RESERVED), 2048 // (32 * config.warps))
        per = -(-tiles * chunks // max(1, processors * max(1, fit) // blocks))
    part = config.row_tiles * config.token_tiles * config.warps_n * 128
    return Cut(-(-tiles * chunks // per), blocks, steps, groups, chunks, tiles, per, part)


@cache
def device_limits(index: int) -> tuple[int, int]:
    """Returns the processors of a CUDA device, and the bytes of shared memory of each."""
    found = torch.cuda.get_device_properties(index)
    return found.multi_processor_count, found.shared_memory_per_multiprocessor


def launch(
    x: torch.Tensor,
    values: torch.Tensor,
    codes: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    config: Config,
    *,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes y = x W^T + b; allocates nothing when `out` and, where needed, both others are given.

    Args:
        x: float16 or bfloat16 [M, K], M at least 1, K a multiple of 32; rows and their distance
            are multiples of 16 bytes.
        values: [rows / 16, K / 32, 32, 8] of the dtype of x.
        codes: int32 [rows / 16, K / 256, 32, 4].
        bias: [rows] or None.
        rows: The true number.
        config: How to cut it.
        out: [M, rows], its rows contiguous.
        workspace: float32, at least `cut(...).floats`.
        counters: int32 zeros, at least `cut(...).counters`; they are zeros again afterwards. No
            other launch may use them at the same time.
    """
    from zeroskip.runtime.kernels.gpu.mma24 import mma24

    tokens, columns = x.shape
    plan = cut(config, tokens, rows, columns, *device_limits(x.device.index or 0))
    if out is None:
        out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    if plan.shared_tiles:
        if workspace is None:
            workspace = torch.empty(plan.floats, dtype=torch.float32, device=x.device)
        if counters is None:
            counters = torch.zeros(plan.counters, dtype=torch.int32, device=x.device)
    pairs = x.view(torch.int32)
    mma24[(plan.programs * plan.blocks,)](
        values.view(torch.int32),
        codes,
        pairs,
        bias,
        out,
        workspace if plan.shared_tiles else None,
        counters if plan.shared_tiles else None,
        tokens,
        rows,
        plan.steps,
        plan.groups,
        plan.chunks,
        plan.tiles,
        plan.per,
        pairs.stride(0) // 4,
        out.stride(0),
        WARPS_N=config.warps_n,
        WARPS_K=config.warps_k,
        ROW_TILES=config.row_tiles,
        TOKEN_TILES=config.token_tiles,
        STEPS=config.steps,
        STAGES=config.stages,
        SHARED_TILES=plan.shared_tiles,
        FP16=x.dtype == torch.float16,
        HAS_BIAS=bias is not None,
        EVEN=plan.steps % (config.steps * config.warps_k) == 0 and rows % config.rows == 0,
        num_warps=config.warps,
    )
    return out


def compile_cases(backend: str = "cuda") -> list[CompileCase]:
    """Returns what a compile check builds: every configuration, some of them in all variants.

    Args:
        backend: `cuda`; others have no such instruction.
    """
    from zeroskip.runtime.kernels.gpu.mma24 import mma24

    cases = []
    for at, config in enumerate(CONFIGS):
        # float16, whether there is a bias, whether tiles divide the weight and whether they are shared.
        variants = [(False, True, True, True), (True, False, False, at % 2 == 0)]
        for is_float16, has_bias, is_even, is_shared in variants[: 2 if at % 3 == 0 else 1]:
            float_type = "fp16" if is_float16 else "bf16"
            constexprs = {
                "WARPS_N": config.warps_n,
                "WARPS_K": config.warps_k,
                "ROW_TILES": config.row_tiles,
                "TOKEN_TILES": config.token_tiles,
                "STEPS": config.steps,
                "STAGES": config.stages,
                "SHARED_TILES": is_shared,
                "FP16": is_float16,
                "HAS_BIAS": has_bias,
                "EVEN": is_even,
            }
            pointers = {
                "values_ptr": "*i32",
                "codes_ptr": "*i32",
                "x_ptr": "*i32",
                "bias_ptr": f"*{float_type}",
                "y_ptr": f"*{float_type}",
                "parts_ptr": "*fp32",
                "counters_ptr": "*i32",
            }
            case = compile_case(
                f"mma24 {config} {float_type} {'whole' if is_even else 'masked'}",
                mma24,
                pointers,
                constexprs,
                num_warps=config.warps,
                num_stages=1,
                unaligned=frozenset(set(mma24.arg_names) - set(pointers)),
                required="HMMA.SP",
            )
            cases.append(case)
    return cases
