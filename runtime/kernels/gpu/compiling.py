"""What a kernel module tells a compile check: each shipped configuration as arguments of a compile.

No device is needed: `triton.compile` takes a signature and a target. The arguments are those of a
launch on real sizes, where pointers and strides are multiples of 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class CompileCase(NamedTuple):
    """One kernel with one configuration.

    Attributes:
        name: Kernel and configuration, for people.
        function: What `triton.jit` made.
        signature: Type of every parameter, in order: `*bf16`, `i32`, or `constexpr`.
        constexprs: Value of every parameter whose type is constexpr.
        divisible: Parameters that are multiples of 16.
        options: num_warps and num_stages.
        required: What the name of an instruction of the result must start with, or None. `MMA` stands
            for the tensor-core instruction of the target, whatever it calls it.
    """

    name: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: set[str]
    options: dict[str, int]
    required: str | None


def compile_case(
    name: str,
    function: Any,
    pointers: Mapping[str, str],
    constexprs: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int,
    unaligned: frozenset[str] = frozenset({"tokens"}),
    required: str | None = None,
) -> CompileCase:
    """Returns a case in which every number is an int32, and a multiple of 16 unless `unaligned`."""
    signature = {
        parameter: "constexpr" if parameter in constexprs else pointers.get(parameter, "i32")
        for parameter in function.arg_names
    }
    divisible = {
        parameter
        for parameter, kind in signature.items()
        if kind != "constexpr" and parameter not in unaligned
    }
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return CompileCase(name, function, signature, constexprs, divisible, options, required)
