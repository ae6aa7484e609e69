"""What `zeroskip doctor` says of GPUs: which kernels a 2:4 weight would get on each, and why not others."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

# What the refusals are asked for: no refusal depends on how large a linear is.
ROWS, COLUMNS = 4096, 4096


@dataclass
class GpuFinding:
    """One GPU.

    Attributes:
        name: As its driver reports it.
        kernels: Those that serve a 2:4 weight there.
        refusals: Kernel to why it does not.
        measured: Layers of which the table of the package knows times on this device.
    """

    name: str
    kernels: list[str] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)
    measured: int = 0


def examine_gpus() -> list[GpuFinding]:
    """Looks at every CUDA or ROCm device that PyTorch sees; launches nothing."""
    from zeroskip.runtime.candidates24 import KERNELS
    from zeroskip.runtime.gpu_dispatch import shipped_table

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        gpu = GpuFinding(torch.cuda.get_device_name(device))
        for name, kernel in KERNELS.items():
            reason = kernel.refuse(torch.bfloat16, ROWS, COLUMNS, device)
            if reason is None:
                gpu.kernels.append(name)
            else:
                gpu.refusals[name] = reason
        gpu.measured = sum(key.device == gpu.name for key in shipped_table().entries)
        found.append(gpu)
    return found


def describe_gpu(gpu: GpuFinding) -> str:
    """Returns a finding in words."""
    parts = [f"{gpu.name}: {', '.join(gpu.kernels)}"]
    parts += [f"not {name}: {reason}" for name, reason in gpu.refusals.items()]
    if gpu.measured:
        parts.append(f"times of {gpu.measured} layers are known")
    else:
        parts.append("no times are known: 2:4 linears run dense until they are tuned on it")
    return "; ".join(parts)
