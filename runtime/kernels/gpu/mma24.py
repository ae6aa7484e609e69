"""2:4 products of few tokens on the sparse tensor cores of NVIDIA GPUs, sm_80 and newer: `mma.sp` from Gluon.

y[m, n] = sum_k x[m, k] W[n, k] + b[n]. W, in the fragment form of `zeroskip.ir.fragments`, is the left
operand of the instruction: 16 rows of W meet 8 tokens. Triton has no operator for it, but
`inline_asm_elementwise` emits it: an int32 tensor [32 * warps, 4] laid out as `_lanes` says is
exactly four registers of each lane.

A unit of work is one chunk of columns (32 * STEPS for each of WARPS_K) of one tile of rows. Each program takes
PER units in a row, across the ends of tiles, and keeps STAGES of them in flight through a ring of
asynchronous copies, so that memory is busy from its first unit to its last. Where programs share a
tile, each writes its part, and the one that arrives last adds up all parts in their order: the result
does not depend on who came when.

Weights are read once, by one warp each, 16 bytes a lane; activations reach all warps through
swizzled shared memory and `ldmatrix`. Nothing is decompressed.

Sources: PTX ISA, "mma.sp::ordered_metadata"; the split of work is that of Stream-K (2301.03598).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from zeroskip.runtime.kernels.gpu.mma24_sums import add_to_tile, store_tile

_RENAMED_AFTER_3_6 = hasattr(async_copy, "async_load")
_copy = async_copy.async_load if _RENAMED_AFTER_3_6 else async_copy.async_copy_global_to_shared


def _instruction(word: int, selector: int, dtype: str) -> str:
    # One metadata word serves two steps: the selector says from which lanes it is taken.
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{dtype}.{dtype}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, "
        f"${16 + word}, 0x{selector};"
    )


_BFLOAT16 = gl.constexpr(tuple(_instruction(at // 2, at % 2, "bf16") for at in range(8)))
_FLOAT16 = gl.constexpr(tuple(_instruction(at // 2, at % 2, "f16") for at in range(8)))
_OPERANDS = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r,r,r,r")


@gluon.constexpr_function
def _lanes(warps):
    """Row 32 * warp + lane of an int32 [32 * warps, 4] is four registers of that lane."""
    return gl.BlockedLayout([1, 4], [32, 1], [warps, 1], [1, 0])


@gluon.jit
def _multiply(a, b, c, e, STEP: gl.constexpr, STEPS: gl.constexpr, FP16: gl.constexpr):
    # Of four steps there are two words, each of them twice.
    AT: gl.constexpr = (STEP // 2) * (8 // STEPS) * 2 + STEP % 2
    if FP16:
        asm: gl.constexpr = _FLOAT16[AT]
    else:
        asm: gl.constexpr = _BFLOAT16[AT]
    return gl.inline_asm_elementwise(
        asm, _OPERANDS, [a, b, c, e], dtype=gl.float32, is_pure=True, pack=4
    )


@gluon.jit
def _issue(
    values,
    codes,
    tokens,
    stage,
    values_ptr,
    codes_ptr,
    x_ptr,
    tile,
    chunk,
    live,
    first_token,
    M,
    tiles_of_16,
    steps,
    groups,
    x_stride,
    WARPS_N: gl.constexpr,
    WARPS_K: gl.constexpr,
    ROW_TILES: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
    STEPS: gl.constexpr,
    EVEN: gl.constexpr,
):
    """Starts the copies of one unit into a stage of the ring; one copy each, or barriers multiply."""
    WARPS: gl.constexpr = WARPS_N * WARPS_K
    LANES: gl.constexpr = _lanes(WARPS)
    register = gl.arange(0, 4, layout=gl.SliceLayout(0, LANES))

    # Rows of the values in a stage: row tile, step, warp, lane.
    row = gl.arange(0, ROW_TILES * STEPS * WARPS * 32, layout=gl.SliceLayout(1, LANES))
    warp = (row // 32) % WARPS
    row_tile = (row // (WARPS * STEPS * 32)) * WARPS_N + warp // WARPS_K
    step = (warp % WARPS_K) * STEPS + (row // (WARPS * 32)) % STEPS
    offset = row_tile * (steps * 128) + step * 128 + (row % 32) * 4
    base = values_ptr + tile.to(gl.int64) * (ROW_TILES * WARPS_N * 128) * steps
    here = (row * 0) < live
    if not EVEN:
        here = here & (step + chunk * (WARPS_K * STEPS) < steps)
        here = here & (tile * (ROW_TILES * WARPS_N) + row_tile < tiles_of_16)
    source = base + chunk * (WARPS_K * STEPS * 128) + (offset[:, None] + register[None, :])
    _copy(values.index(stage), source, mask=here[:, None], eviction_policy="evict_first")

    # Rows of the codes: row tile, warp, lane; a word for two steps.
    WORDS: gl.constexpr = STEPS // 2
    PAIRS: gl.constexpr = gl.BlockedLayout([1, WORDS], [32, 1], [WARPS, 1], [1, 0])
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, PAIRS))
    row = gl.arange(0, ROW_TILES * WARPS * 32, layout=gl.SliceLayout(1, PAIRS))
    warp = (row // 32) % WARPS
    row_tile = (row // (WARPS * 32)) * WARPS_N + warp // WARPS_K
    first = (chunk * WARPS_K + warp % WARPS_K) * STEPS
    offset = row_tile * (groups * 128) + (first // 8) * 128 + (row % 32) * 4 + (first % 8) // 2
    base = codes_ptr + tile.to(gl.int64) * (ROW_TILES * WARPS_N * 128) * groups
    here = (row * 0) < live
    if not EVEN:
        here = here & (first < steps)
        here = here & (tile * (ROW_TILES * WARPS_N) + row_tile < tiles_of_16)
    source = base + (gl.multiple_of(offset, WORDS)[:, None] + word[None, :])
    _copy(codes.index(stage), source, mask=here[:, None], eviction_policy="evict_first")

    # Rows of the activations: token tile, warp along columns, token.
    WIDE: gl.constexpr = STEPS * 16
    QUADS: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WIDE, WIDE // 4], [WARPS, 1], [1, 0])
    row = gl.arange(0, TOKEN_TILES * WARPS_K * 8, layout=gl.SliceLayout(1, QUADS))
    word = gl.arange(0, WIDE, layout=gl.SliceLayout(0, QUADS))
    token = first_token + (row // (WARPS_K * 8)) * 8 + row % 8
    column = ((row // 8) % WARPS_K) * WIDE
    offset = token * (x_stride * 4) + column
    here = ((token < M) & ((row * 0) < live))[:, None]
    if not EVEN:
        # What is masked is filled with zeros: a NaN left in the ring would spoil the sum.
        inside = column[:, None] + word[None, :] + chunk * (WARPS_K * WIDE) < steps * 16
        here = here & inside
    source = x_ptr + chunk * (WARPS_K * WIDE) + (offset[:, None] + word[None, :])
    _copy(tokens.index(stage), source, mask=here)
    async_copy.commit_group()


@gluon.jit
def _next(tile, chunk, chunks):
    chunk += 1
    ends = chunk == chunks
    return gl.where(ends, tile + 1, tile), gl.where(ends, 0, chunk)


@gluon.jit(
    do_not_specialize=[
        "M",
        "N",
        "steps",
        "groups",
        "chunks",
        "tiles",
        "PER",
        "x_stride",
        "y_stride",
    ]
)
def mma24(
    values_ptr,
    codes_ptr,
    x_ptr,
    bias_ptr,
    y_ptr,
    parts_ptr,
    counters_ptr,
    M,
    N,
    steps,
    groups,
    chunks,
    tiles,
    PER,
    x_stride,
    y_stride,
    WARPS_N: gl.constexpr,
    WARPS_K: gl.constexpr,
    ROW_TILES: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    SHARED_TILES: gl.constexpr,
    FP16: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    EVEN: gl.constexpr,
):
    """The kernel.

    Args:
        values_ptr: int32 [N / 16, steps, 32, 4].
        codes_ptr: int32 [N / 16, groups, 32, 4].
        x_ptr: int32 [M, K / 2], its rows x_stride * 16 bytes apart.
        bias_ptr: [N] or None.
        y_ptr: [M, N].
        parts_ptr: float32, two tiles for each program, where tiles are shared.
        counters_ptr: int32, zero before and after, one for each tile and block of tokens.
        M: Tokens.
        N: Rows of W.
        steps: Tiles of 32 columns.
        groups: Eights of them.
        chunks: Units of a tile.
        tiles: Of ROW_TILES * WARPS_N * 16 rows.
        PER: Units of a program.
        x_stride: In 16 bytes: so the compiler knows that rows are aligned.
        y_stride: In elements.
        WARPS_N: Warps over rows of W.
        WARPS_K: Warps over columns of W.
        ROW_TILES: Tiles of 16 rows of a warp.
        TOKEN_TILES: Tiles of 8 tokens of a program.
        STEPS: Tiles of 32 columns of a warp in a unit: 4 or 8.
        STAGES: Of the ring.
        SHARED_TILES: Whether PER divides tiles among programs.
        FP16: float16 rather than bfloat16.
        HAS_BIAS: Whether there is a bias.
        EVEN: Whether tiles and chunks divide the weight.
    """
    WARPS: gl.constexpr = WARPS_N * WARPS_K
    WORDS: gl.constexpr = STEPS // 2
    LANES: gl.constexpr = _lanes(WARPS)
    PAIRS: gl.constexpr = gl.BlockedLayout([1, WORDS], [32, 1], [WARPS, 1], [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 1, [1, 0])
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    # Lane 4g + t holds words t, t + 4, t + 8 and t + 12 of token g; warps over rows hold the same.
    FRAGMENT: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1], [1, 8, 4], [WARPS_N, WARPS_K, 1], [2, 1, 0]
    )
    blocks = (M + 8 * TOKEN_TILES - 1) // (8 * TOKEN_TILES)
    # Blocks of tokens that read the same weights run side by side.
    program = gl.program_id(0) // blocks
    block = gl.program_id(0) % blocks
    first_token = block * (8 * TOKEN_TILES)
    tiles_of_16 = (N + 15) // 16
    first_unit = program * PER
    end = gl.minimum(first_unit + PER, tiles * chunks)

    values = gl.allocate_shared_memory(gl.int32, [STAGES, ROW_TILES * STEPS * WARPS * 32, 4], PLAIN)
    codes = gl.allocate_shared_memory(
        gl.int32,
        [STAGES, ROW_TILES * WARPS * 32, WORDS],
        gl.SwizzledSharedLayout(WORDS, 1, 1, [1, 0]),
    )
    tokens = gl.allocate_shared_memory(
        gl.int32, [STAGES, TOKEN_TILES * WARPS_K * 8, STEPS * 16], SWIZZLED
    )
    sums = ()
    for i in gl.static_range(ROW_TILES * TOKEN_TILES):
        sums = sums + (gl.zeros([32 * WARPS, 4], gl.float32, LANES),)

    first_tile = first_unit // chunks
    tile = first_tile
    chunk = first_unit % chunks
    next_tile = tile
    next_chunk = chunk
    for stage in gl.static_range(STAGES - 1):
        live = (first_unit + stage < end).to(gl.int32)
        _issue(
            values, codes, tokens, stage, values_ptr, codes_ptr, x_ptr, next_tile, next_chunk, live,
            first_token, M, tiles_of_16, steps, groups, x_stride,
            WARPS_N, WARPS_K, ROW_TILES, TOKEN_TILES, STEPS, EVEN,
        )  # fmt: skip
        next_tile, next_chunk = _next(next_tile, next_chunk, chunks)
    slot = 0
    free = STAGES - 1
    for unit in range(first_unit, end):
        live = (unit + STAGES - 1 < end).to(gl.int32)
        _issue(
            values, codes, tokens, free, values_ptr, codes_ptr, x_ptr, next_tile, next_chunk, live,
            first_token, M, tiles_of_16, steps, groups, x_stride,
            WARPS_N, WARPS_K, ROW_TILES, TOKEN_TILES, STEPS, EVEN,
        )  # fmt: skip
        next_tile, next_chunk = _next(next_tile, next_chunk, chunks)
        async_copy.wait_group(STAGES - 1)
        words = ()
        for r in gl.static_range(ROW_TILES):
            e = codes.index(slot).slice(r * 32 * WARPS, 32 * WARPS).load(PAIRS)
            if STEPS == 4:
                e = gl.join(e, e).reshape([32 * WARPS, 4])
            words = words + (gl.convert_layout(e, LANES, assert_trivial=True),)
        for step in gl.static_range(STEPS):
            columns = ()
            for t in gl.static_range(TOKEN_TILES):
                x = tokens.index(slot).slice(t * WARPS_K * 8, WARPS_K * 8)
                b = x.slice(step * 16, 16, dim=1).load(gl.SliceLayout(0, FRAGMENT))
                like = gl.zeros([WARPS_N, WARPS_K * 8, 16], gl.int32, FRAGMENT)
                like, b = gl.broadcast(like, gl.expand_dims(b, 0))
                b = b.reshape([WARPS * 8, 4, 4]).permute(0, 2, 1).reshape([WARPS * 32, 4])
                columns = columns + (gl.convert_layout(b, LANES, assert_trivial=True),)
            new = ()
            for r in gl.static_range(ROW_TILES):
                w = values.index(slot).slice((r * STEPS + step) * 32 * WARPS, 32 * WARPS)
                a = w.load(LANES)
                for t in gl.static_range(TOKEN_TILES):
                    c = sums[r * TOKEN_TILES + t]
                    new = new + (_multiply(a, columns[t], c, words[r], step, STEPS, FP16),)
            sums = new
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        free = gl.where(free == STAGES - 1, 0, free + 1)
        chunk += 1
        if (chunk == chunks) | (unit + 1 == end):
            if SHARED_TILES:
                if (chunk == chunks) & (tile * chunks >= first_unit):
                    store_tile(
                        sums, tile, first_token, bias_ptr, y_ptr, M, N, y_stride,
                        WARPS_N, WARPS_K, ROW_TILES, TOKEN_TILES, HAS_BIAS,
                    )  # fmt: skip
                else:
                    add_to_tile(
                        sums, tile, first_tile, program, block, blocks, first_token, bias_ptr, y_ptr,
                        parts_ptr, counters_ptr, M, N, chunks, PER, tiles, y_stride,
                        WARPS_N, WARPS_K, ROW_TILES, TOKEN_TILES, HAS_BIAS,
                    )  # fmt: skip
            else:
                store_tile(
                    sums, tile, first_token, bias_ptr, y_ptr, M, N, y_stride,
                    WARPS_N, WARPS_K, ROW_TILES, TOKEN_TILES, HAS_BIAS,
                )  # fmt: skip
            cleared = ()
            for i in gl.static_range(ROW_TILES * TOKEN_TILES):
                cleared = cleared + (gl.zeros([32 * WARPS, 4], gl.float32, LANES),)
            sums = cleared
            tile += 1
            chunk = 0
    async_copy.wait_group(0)
