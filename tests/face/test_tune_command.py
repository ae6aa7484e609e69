"""`zeroskip tune`: what it prints, writes and refuses; measuring is made up."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from zeroskip import cli
from zeroskip.ir.errors import CompileError
from zeroskip.ir.formats import BitmaskWeight
from zeroskip.runtime.dispatch import Verdict
from zeroskip.runtime.onnx import tune
from zeroskip.runtime.onnx.tune import Tuned
from zeroskip.runtime.tuning import Measured, Tuner
from zeroskip.tune import parse_m, totals


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Runs the command line in this process: exit code, stdout, stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    code = ended.value.code
    out, err = capsys.readouterr()
    return (code if isinstance(code, int) else int(code is not None)), out, err


class MadeUp(Tuner):
    """One shape wins at every m, the other loses at the second; keeps what it was asked."""

    asked: list[dict[str, object]]

    def __init__(self) -> None:
        self.asked = []

    @property
    def instruction_sets(self) -> tuple[str, ...]:
        return ("made-up",)

    def measure(self, weight: BitmaskWeight, **options: object) -> dict[int, Measured]:  # type: ignore[override]
        self.asked.append(options)
        m_values = options["m_values"]
        assert isinstance(m_values, tuple)
        speeds = (2.0, 1.5, 1.25) if weight.rows == 256 else (2.0, 0.7, 1.25)
        return {0: Measured(dict(zip(m_values, speeds, strict=False)), 0.0, 0, {})}


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    made = MadeUp()
    monkeypatch.setattr(tune, "Tuner", lambda: made)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pruned products: [first] with 256 rows, and a second with 320."""
    generator = torch.Generator().manual_seed(0)
    nodes, constants = [], []
    for name, rows, x, y in (("[first]", 256, "X", "h"), ("second", 320, "h", "Y")):
        weight = torch.randn(256, rows, generator=generator) / 16
        weight *= torch.rand(256, rows, generator=generator) < 0.5
        constants.append(numpy_helper.from_array(weight.numpy(), f"{name}.w"))
        nodes.append(helper.make_node("MatMul", [x, f"{name}.w"], [y], name))
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["n", 256])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["n", 320])],
        constants,
    )
    path = tmp_path / "onnx"
    path.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path / "model.onnx")
    return path


def test_the_table_says_what_was_chosen_and_why(
    folder: Path, tuner: MadeUp, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "tune", folder, "--m", "16,1,128", "--threads", "3")
    assert (code, err) == (0, "")
    first = next(line for line in out.splitlines() if line.startswith("[first].w"))
    second = next(line for line in out.splitlines() if line.startswith("second.w"))
    assert "256 x 256" in first
    assert "256 KiB -> " in first
    assert "2.00x @1, 1.50x @16, 1.25x @128" in first
    assert first.endswith("sparse *: 1.55x on average over m=1, 16, 128")
    assert second.endswith("dense kept: 0.70x at m=16")
    assert "speed @ m: of dense in ONNX Runtime, with m rows (batch x tokens); measured" in out
    assert "The slowest of the sparse ones: 1.25x at m=128, [first].w." in out
    assert "1 of 2 linears run sparse" in out
    assert "1 changed (*)." in out
    assert [asked["threads"] for asked in tuner.asked] == [3, 3]
    assert [asked["m_values"] for asked in tuner.asked] == [(1, 16, 128)] * 2
    nodes = onnx.load(folder / "model.onnx").graph.node
    assert [node.op_type for node in nodes] == ["SparseLinear", "MatMul"]
    assert (folder / "zeroskip_tune.json").is_file()


def test_json(folder: Path, tuner: MadeUp, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "tune", folder, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["changed"] == ["[first]"]
    assert result["weights"] == {"[first]": "[first].w", "second": "second.w"}
    assert result["linears"]["second"]["reason"] == "0.70x at m=16"
    verdict = Verdict.from_json(result["linears"]["[first]"])
    assert (verdict.choice, dict(verdict.speedup)) == ("sparse", {1: 2.0, 16: 1.5, 128: 1.25})
    assert result["bytes"] == verdict.packed_bytes + 256 * 320 * 4


def test_a_dry_run_writes_nothing(
    folder: Path, tuner: MadeUp, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, out, _ = run(capsys, "tune", folder, "--dry-run")
    assert code == 0
    assert "nothing was written" in out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "tune", tmp_path)
    assert (code, out) == (2, "")
    assert "there is no model.onnx here" in err
    assert "next:" in err


@pytest.mark.parametrize("m", ["", "0", "1,x", "-1", "1.5", ","])
def test_rows_that_are_none(folder: Path, m: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "tune", folder, f"--m={m}")
    assert code == 2
    assert "no list of row counts" in err


def test_a_damaged_model_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(folder / "model.onnx")
    outside = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 0}
    onnx.save(model, folder / "model.onnx", **outside)
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-8])
    code, _, err = run(capsys, "tune", folder)
    assert code == 2
    assert "cut short" in err
    data.unlink()
    assert run(capsys, "tune", folder)[0] == 2
    (folder / "model.onnx").write_bytes(b"damaged")
    for command in (("tune", folder), ("export", folder, "--dense", "-o", tmp_path / "out")):
        code, _, err = run(capsys, *command)
        assert code == 2, command
        assert "cannot be read" in err
    assert not (tmp_path / "out").exists()


def test_row_counts_are_sorted_and_distinct() -> None:
    assert parse_m(" 16, 1,16,") == (1, 16)
    with pytest.raises(CompileError):
        parse_m("one")


def test_nothing_to_tune_is_said() -> None:
    assert "No linear" in totals(Tuned({}, (), None), dry_run=False)
