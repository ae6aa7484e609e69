"""Repairs Triton's interpreter, so that what a kernel computes there is what a GPU computes.

Triton runs kernels on the CPU when TRITON_INTERPRET=1 is in the environment before it is first
imported (torch._dynamo imports it, torch alone does not). Up to 3.9 at least, it is silently wrong
for bfloat16, which it holds as uint16:

- `tl.dot`, + - * / and comparisons work on those integers;
- float32 to bfloat16 truncates, and integers become the bits, not the number;
- a comparison keeps the type of its operands, so `mask & (scalar < n)` is refused later.

`repair` replaces those. It also drops two costs: every call of one kernel function by another
patched `triton.language` anew, half of a run, and integer arithmetic was checked for overflow.

Inline assembly and the functions of libdevice stay unsupported, and no interpreter notices races,
misaligned vectors, or layouts: `test_on_device.py` runs the same checks on a GPU.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

_QUIET_NAN = np.uint16(0x7FC0)


def widen(bits: np.ndarray) -> np.ndarray:
    """Returns bfloat16, given as uint16, as float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Returns float32 rounded to bfloat16, to nearest with ties to even, as uint16."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), _QUIET_NAN, rounded)


def repair() -> None:
    """Installs the repairs; a second call does nothing.

    Raises:
        RuntimeError: Triton was imported before TRITON_INTERPRET=1 was set, or it is not.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or not isinstance(tl.cdiv, InterpretedFunction):
        raise RuntimeError("set TRITON_INTERPRET=1 before anything imports triton")
    if getattr(InterpreterBuilder, "is_repaired", False):
        return
    InterpreterBuilder.is_repaired = True
    _repair_dot()
    _repair_casts()
    _repair_binary_operators()
    _repair_calls()
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _is_bfloat16(dtype: Any) -> bool:
    return bool(dtype.scalar == tl.bfloat16)


def _widened(handle: TensorHandle) -> TensorHandle:
    if _is_bfloat16(handle.dtype):
        return TensorHandle(widen(handle.data), tl.float32)
    return handle


def _repair_calls() -> None:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A launch has patched the language for the kernel, but not the module that Triton's own
        # functions (tl.zeros, tl.sum) know it by. Once is enough: that patch is never taken back.
        if tl.core.is_builtin(tl.core.load):
            interpreter._patch_lang(tl.cdiv.fn)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call


def _repair_dot() -> None:
    stock = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> TensorHandle:
        return stock(self, _widened(a), _widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def _repair_casts() -> None:
    stock = InterpreterBuilder.cast_impl
    stock_conversion = InterpreterBuilder.create_fp_to_fp

    def cast_impl(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        if _is_bfloat16(source.dtype) == _is_bfloat16(target):
            return stock(self, source, target)
        if _is_bfloat16(target):
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        wide = _widened(source)
        return wide if target.scalar == tl.float32 else stock(self, wide, target)

    def create_fp_to_fp(self: Any, source: TensorHandle, target: Any, *rest: Any) -> TensorHandle:
        from_wide = source.dtype.scalar in (tl.float16, tl.float32, tl.float64)
        if _is_bfloat16(target) and from_wide:
            return cast_impl(self, source, target)
        return stock_conversion(self, source, target, *rest)

    # Every other cast of the builder calls cast_impl.
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def _repair_binary_operators() -> None:
    stock = InterpreterBuilder.binary_op

    def binary_op(
        self: Any, left: TensorHandle, right: TensorHandle, operator: Callable[..., np.ndarray]
    ) -> TensorHandle:
        if _is_bfloat16(left.dtype):
            result = operator(widen(left.data), widen(right.data))
            if result.dtype != np.bool_:
                return TensorHandle(narrow(result), tl.bfloat16)
        else:
            handle = stock(self, left, right, operator)
            if handle.data.dtype != np.bool_:
                return handle
            result = handle.data
        return TensorHandle(result, tl.int1)

    InterpreterBuilder.binary_op = binary_op
