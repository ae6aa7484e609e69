"""Runs a command that the system refuses AMX: how the same CPU does without its matrix unit.

    python benchmarks/without_amx.py python benchmarks/cpu_linear.py ...

On Linux a process has to ask for the tile registers before it uses them. This refuses the request
to the command and to all that it starts, by a filter of system calls, so that every library in it
takes its next best kernels: ONNX Runtime, torch and zeroskip alike. A comparison on a machine with
AMX then holds for the many servers with AVX-512 only, which an option of one library could not
show: its rivals would keep AMX.

The filter answers arch_prctl(ARCH_REQ_XCOMP_PERM) with EPERM and leaves everything else alone. It
needs no privilege, and cannot be taken off again.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Sequence

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 38, 22
SECCOMP_MODE_FILTER = 2
AUDIT_ARCH_X86_64 = 0xC000003E
SYS_ARCH_PRCTL = 158
ARCH_REQ_XCOMP_PERM = 0x1023
REFUSE, ALLOW = 0x00050000 | 1, 0x7FFF0000  # SECCOMP_RET_ERRNO with EPERM, SECCOMP_RET_ALLOW
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # where they lie in struct seccomp_data


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def filter_program() -> bytes:
    """Returns the instructions of the filter, each a struct sock_filter."""

    def instruction(code: int, value: int, if_equal: int = 0, otherwise: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_equal, otherwise, value)

    return b"".join(
        (
            instruction(LOAD, ARCHITECTURE),
            instruction(JUMP_IF_EQUAL, AUDIT_ARCH_X86_64, 0, 5),
            instruction(LOAD, NUMBER),
            instruction(JUMP_IF_EQUAL, SYS_ARCH_PRCTL, 0, 3),
            instruction(LOAD, FIRST_ARGUMENT),
            instruction(JUMP_IF_EQUAL, ARCH_REQ_XCOMP_PERM, 0, 1),
            instruction(RETURN, REFUSE),
            instruction(RETURN, ALLOW),
        )
    )


def refuse_amx() -> None:
    """Refuses AMX to this process and to all that it starts.

    Raises:
        OSError: This is not Linux on x86-64, or its kernel takes no filters.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise OSError(f"needs Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    code = filter_program()
    memory = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(memory))
    system = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if system.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero) or system.prctl(
        PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(program), zero, zero
    ):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


def main(command: Sequence[str]) -> None:
    """Becomes the command."""
    if not command:
        sys.exit("usage: python benchmarks/without_amx.py COMMAND [ARGUMENT ...]")
    try:
        refuse_amx()
    except OSError as error:
        sys.exit(f"cannot refuse AMX: {error}")
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
