"""zeroskip doctor on GPUs that are not here: what it says of each."""

from __future__ import annotations

import pytest
import torch

from zeroskip import doctor_gpu
from zeroskip.doctor_gpu import GpuFinding, describe_gpu, examine_gpus


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert examine_gpus() == []


def test_a_device_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    pretend(monkeypatch, "NVIDIA H200", (9, 0))
    (found,) = examine_gpus()
    assert {"dense", "mma24", "gemv24", "gemm24"} <= set(found.kernels)
    assert "cusparselt" in found.refusals, "this PyTorch has none"
    assert found.measured == 7
    assert "times of 7 layers are known" in describe_gpu(found)


def test_an_old_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "Tesla T4", (7, 5))
    (found,) = examine_gpus()
    assert "compute capability 8.0" in found.refusals["mma24"]
    text = describe_gpu(found)
    assert text.startswith("Tesla T4: dense")
    assert "run dense until they are tuned" in text


def test_words() -> None:
    gpu = GpuFinding("A", ["dense"], {"mma24": "too old"}, 0)
    assert describe_gpu(gpu).startswith("A: dense; not mma24: too old; no times are known")
    assert doctor_gpu.ROWS % 32 == 0
