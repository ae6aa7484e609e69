"""export-onnx as a pass: what it refuses before any work, and that lowered programs are exported."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.small import small_program
from tests.zoo import ZOO
from zeroskip import compile_sparse
from zeroskip.ir.errors import ArtifactError, CompileError, LoweringError
from zeroskip.ir.facts import Lowered
from zeroskip.ir.program import Program
from zeroskip.passes import (
    ApplyMasks,
    ExportOnnx,
    LowerMasked,
    Observe,
    Pass,
    PassManager,
    PruneMagnitude,
    PruneWanda,
)
from zeroskip.runtime.onnx.session import OnnxModel


@dataclass(frozen=True)
class Spy(Pass):
    seen: list[str] = field(default_factory=list)

    name = "spy"

    def run(self, program: Program) -> Program:
        self.seen.append("ran")
        return program


def assert_refused_at_once(
    step: ExportOnnx, match: str, error: type[CompileError] = ArtifactError
) -> CompileError:
    spy = Spy()
    with pytest.raises(error, match=match) as caught:
        PassManager([spy, step])(small_program("mlp"))
    assert spy.seen == []
    assert caught.value.next_step
    return caught.value


def test_a_taken_folder_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    for target in (tmp_path, tmp_path / "precious"):
        error = assert_refused_at_once(ExportOnnx(target), "already holds something")
        assert error.where == str(target)
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert_refused_at_once(ExportOnnx(tmp_path / "file" / "out"), "cannot be written")
    # Whoever runs the tests as root may write everywhere.
    access: Callable[..., bool] = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode)
    )
    error = assert_refused_at_once(ExportOnnx(tmp_path / "deep" / "out"), "cannot be written")
    assert error.where == str(tmp_path / "deep" / "out")
    assert str(tmp_path) in error.problem
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_threshold_that_is_no_size_is_refused_before_anything_runs(tmp_path: Path) -> None:
    step = ExportOnnx(tmp_path / "out", external_data_threshold="much")
    assert_refused_at_once(step, "'much' is not a size", CompileError)


def test_an_observed_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="holds observers") as caught:
        PassManager([Observe(keep=True), ExportOnnx(tmp_path / "out")])(small_program("mlp"))
    assert caught.value.pass_name == "export-onnx"
    assert "keep=False" in str(caught.value.next_step)
    assert list(tmp_path.iterdir()) == []


def test_a_lowered_module_is_exported(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    program = small_program("mlp")
    steps = [PruneMagnitude("2:4"), ApplyMasks(), LowerMasked(), ExportOnnx(folder)]
    exported = PassManager(steps)(program).program
    assert exported.fact(Lowered).operators
    inputs = dict(program.example_inputs)
    (found,) = OnnxModel(folder, threads=1).run(inputs).values()
    (expected,) = exported.run(inputs).values()
    torch.testing.assert_close(found, expected)


def test_a_bfloat16_checkpoint_without_a_tokenizer_is_exported_from_disk(tmp_path: Path) -> None:
    """Experts in bfloat16 use an operator that has no float32 form; the file is float32."""
    entry = ZOO["mixtral"]
    entry.model(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    ids = torch.arange(3, 35).view(2, 16)
    compiled = compile_sparse(
        tmp_path / "model",
        passes=[Observe(), PruneWanda("2:4"), ApplyMasks(), ExportOnnx(tmp_path / "onnx")],
        calibration=[ids],  # No mask: the padded parity case does not apply.
    )
    assert compiled.report.density == 0.5
    parity = json.loads((tmp_path / "onnx" / "zeroskip_parity.json").read_text())
    assert len(parity["cases"]) == 4
    assert parity["worst"] <= parity["limit"]
    assert not list((tmp_path / "onnx").glob("tokenizer*"))
