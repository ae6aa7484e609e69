"""What becomes of the sums of `mma24`: written, or added to those of other programs.

Every lane holds four sums of each pair of 16 rows and 8 tokens, a float32 tensor [32 * warps, 4].
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _sums(warps_n, warps_k):
    """The same for [32 * warps_n, 4], held alike by the warps along columns."""
    return gl.SliceLayout(
        0, gl.BlockedLayout([1, 1, 4], [1, 32, 1], [warps_k, warps_n, 1], [2, 1, 0])
    )


@gluon.jit
def _over_columns(partial, WARPS_N: gl.constexpr, WARPS_K: gl.constexpr):
    """Adds what the warps along columns hold: [32 * warps, 4] -> [32 * WARPS_N, 4]."""
    SUMS: gl.constexpr = _sums(WARPS_N, WARPS_K)
    if WARPS_K > 1:
        partial = gl.sum(partial.reshape([WARPS_N, WARPS_K, 32, 4]), 1)
        partial = partial.reshape([WARPS_N * 32, 4])
    return gl.convert_layout(partial, SUMS)


@gluon.jit
def _place(
    tile,
    first_token,
    INDEX: gl.constexpr,
    WARPS_N: gl.constexpr,
    WARPS_K: gl.constexpr,
    ROW_TILES: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
):
    """Which row of W and which token each value of an accumulator belongs to."""
    SUMS: gl.constexpr = _sums(WARPS_N, WARPS_K)
    lane = gl.arange(0, WARPS_N * 32, layout=gl.SliceLayout(1, SUMS))
    register = gl.arange(0, 4, layout=gl.SliceLayout(0, SUMS))
    row_tile = (tile * ROW_TILES + INDEX // TOKEN_TILES) * WARPS_N + lane // 32
    n = (row_tile * 16 + (lane % 32) // 4)[:, None] + 8 * (register // 2)[None, :]
    m = (first_token + (INDEX % TOKEN_TILES) * 8 + 2 * (lane % 4))[:, None]
    return n, m + (register % 2)[None, :]


@gluon.jit
def _write(
    total,
    tile,
    first_token,
    bias_ptr,
    y_ptr,
    M,
    N,
    y_stride,
    INDEX: gl.constexpr,
    WARPS_N: gl.constexpr,
    WARPS_K: gl.constexpr,
    ROW_TILES: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    n, m = _place(tile, first_token, INDEX, WARPS_N, WARPS_K, ROW_TILES, TOKEN_TILES)
    if HAS_BIAS:
        total += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
    place = y_ptr + m.to(gl.int64) * y_stride + n
    gl.store(place, total.to(y_ptr.dtype.element_ty), mask=(m < M) & (n < N))


@gluon.jit
def store_tile(
    sums,
    tile,
    first_token,
    bias_ptr,
    y_ptr,
    M,
    N,
    y_stride,
    WARPS_N: gl.constexpr,
    WARPS_K: gl.constexpr,
    ROW_TILES: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """Writes a tile that is all this program's."""
    for i in gl.static_range(ROW_TILES * TOKEN_TILES):
        _write(
            _over_columns(sums[i], WARPS_N, WARPS_K), tile, first_token, bias_ptr, y_ptr, M, N,
            y_stride, i, WARPS_N, WARPS_K, ROW_TILES, TOKEN_TILES, HAS_BIAS,
        )  # fmt: skip


@gluon.jit
def add_to_tile(
    sums,
    tile,
    first_tile,
    program,
    block,
    blocks,
    first_token,
    bias_ptr,
    y_ptr,
    parts_ptr,
    counters_ptr,
    M,
    N,
    chunks,
    PER,
    tiles,
    y_stride,
    WARPS_N: gl.constexpr,
    WARPS_K: gl.constexpr,
    ROW_TILES: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """Writes this program's part of a tile; the last program to do so adds all parts."""
    SUMS: gl.constexpr = _sums(WARPS_N, WARPS_K)
    COUNT: gl.constexpr = ROW_TILES * TOKEN_TILES
    SIZE: gl.constexpr = COUNT * WARPS_N * 128
    lane = gl.arange(0, WARPS_N * 32, layout=gl.SliceLayout(1, SUMS))
    register = gl.arange(0, 4, layout=gl.SliceLayout(0, SUMS))
    at = (lane * 4)[:, None] + register[None, :]

    # A program shares at most the tile it begins with and the tile it ends with.
    part = (2 * program + (tile != first_tile).to(gl.int32)) * blocks + block
    mine = parts_ptr + part.to(gl.int64) * SIZE
    for i in gl.static_range(COUNT):
        gl.store(mine + i * (WARPS_N * 128) + at, _over_columns(sums[i], WARPS_N, WARPS_K))
    low = (tile * chunks) // PER
    high = (tile * chunks + chunks - 1) // PER
    counter = counters_ptr + tile * blocks + block
    _barrier()
    arrived = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    _barrier()
    if arrived == high - low:
        totals = ()
        for i in gl.static_range(COUNT):
            totals = totals + (gl.zeros([WARPS_N * 32, 4], gl.float32, SUMS),)
        for other in range(low, high + 1):
            is_last = ((other * PER) // chunks != tile).to(gl.int32)
            part = (2 * other + is_last) * blocks + block
            theirs = parts_ptr + part.to(gl.int64) * SIZE
            # All reads of a part before any addition: they are in flight together.
            reads = ()
            for i in gl.static_range(COUNT):
                place = theirs + i * (WARPS_N * 128) + at
                reads = reads + (gl.load(place, cache_modifier=".cg"),)
            new = ()
            for i in gl.static_range(COUNT):
                new = new + (totals[i] + reads[i],)
            totals = new
        for i in gl.static_range(COUNT):
            _write(
                totals[i], tile, first_token, bias_ptr, y_ptr, M, N, y_stride, i,
                WARPS_N, WARPS_K, ROW_TILES, TOKEN_TILES, HAS_BIAS,
            )  # fmt: skip
        gl.store(counter, 0)


if hasattr(gl, "barrier"):

    @gluon.jit
    def _barrier():
        gl.barrier()

else:  # Triton 3.6

    @gluon.jit
    def _barrier():
        gl.thread_barrier()
