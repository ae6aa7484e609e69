"""Makes the shared modules importable whichever way pytest is started; exports each model once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from onnx_models import Exported

# Tests are not a package: the zoo lies two folders up, what these tests share lies here.
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Returns a function that exports a model of the zoo, once per session."""
    export_entry = importlib.import_module("onnx_models").export_entry
    done: dict[str, Exported] = {}

    def export(name: str) -> Exported:
        if name not in done:
            done[name] = export_entry(name, tmp_path_factory.mktemp("onnx") / name)
        return done[name]

    return export


@pytest.fixture(scope="session")
def small_llama() -> nn.Module:
    """One layer, so that a test that exports its own file stays fast."""
    model: nn.Module = importlib.import_module("onnx_models").small_llama()
    return model
