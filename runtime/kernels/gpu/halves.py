"""Device functions that take 32-bit words apart: two 16-bit floats, or 32 bits of a mask."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def low_half(pairs, is_float16: tl.constexpr):
    """Returns the float in the low 16 bits of each int32, as float32."""
    if is_float16:
        half = pairs.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        half = (pairs << 16).to(tl.float32, bitcast=True)
    return half


@triton.jit
def high_half(pairs, is_float16: tl.constexpr):
    """Returns the float in the high 16 bits of each int32, as float32."""
    if is_float16:
        half = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        half = (pairs & -65536).to(tl.float32, bitcast=True)
    return half


@triton.jit
def popcount(words, has_instruction: tl.constexpr):
    """Returns how many bits of each int32 are set.

    Args:
        words: int32, taken as 32 bits.
        has_instruction: The target is CUDA, which counts in one instruction.
    """
    if has_instruction:
        count = libdevice.popc(words)
    else:
        pairs = words - ((words >> 1) & 0x55555555)
        nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
        count = ((octets * 0x01010101) >> 24) & 0xFF
    return count
