"""Where a model was loaded from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zeroskip.ir.folders import source_folder


def loaded_from(name: object) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(_name_or_path=name))


def test_a_model_from_a_folder_knows_it(tmp_path: Path) -> None:
    assert source_folder(loaded_from(str(tmp_path))) == tmp_path


@pytest.mark.parametrize("name", ["", None, "someone/a-name-on-the-hub"])
def test_a_model_from_elsewhere_has_none(name: object) -> None:
    assert source_folder(loaded_from(name)) is None


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    assert source_folder(loaded_from(str(tmp_path / "model.gguf"))) is None


def test_a_model_without_a_config_has_none() -> None:
    assert source_folder(torch.nn.Linear(1, 1)) is None
    assert source_folder(None) is None
