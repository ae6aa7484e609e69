"""`zeroskip verify`: each kind of damage is planted and told apart."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from tests.face.artefacts import run, sign_anew
from zeroskip.manifest import LinearRecord, read_manifest
from zeroskip.manifest_changes import recording
from zeroskip.verify import Verification, verify_artefact
from zeroskip.verify_weights import _limit, linear_problem

WEIGHTS = "checkpoint/model.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def artefact(built: Path, tmp_path: Path) -> Path:
    """A copy to spoil; its inputs are not beside it."""
    return Path(shutil.copytree(built, tmp_path / "out"))


def kinds(artefact: Path, **options: Any) -> dict[str, str]:
    """The kind of each finding by its file."""
    found = verify_artefact(artefact, **{"run": False, **options})
    assert all(one.problem and one.next_step for one in found.findings)
    return {one.file: one.kind for one in found.findings}


def edit_weights(artefact: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(artefact / WEIGHTS)
    change(tensors)
    save_file(tensors, artefact / WEIGHTS, metadata={"format": "pt"})


def edit_onnx(artefact: Path, change: Callable[[onnx.ModelProto], Any]) -> None:
    path = artefact / "onnx" / "model.onnx"
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


# What it is


def test_an_artefact_is_what_it_was(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "verify", built)
    assert (code, err) == (0, "")
    assert "it is what it was" in out
    found = verify_artefact(built, run=False)
    assert found.findings == []
    assert found.checked["files"] == len(read_manifest(built).files)
    assert found.checked["linears"] == len(read_manifest(built).linears) == 8
    assert found.checked["inputs"] == 7
    assert found.checked["ONNX weights"] >= 8
    assert any("--no-run" in text for text in found.skipped)


def test_json_says_the_same(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "verify", built, "--no-run", "--json")
    said = json.loads(out)
    assert code == 0
    assert (said["intact"], said["findings"]) == (True, [])
    assert said["content_sha256"] == read_manifest(built).content_sha256


def test_a_copy_elsewhere_is_what_it_was_and_its_inputs_are_not_looked_at(artefact: Path) -> None:
    found = verify_artefact(artefact, run=False)
    assert found.findings == []
    assert "inputs" not in found.checked
    assert any(text.startswith("7 inputs") for text in found.skipped)


# Files


@pytest.mark.parametrize(
    "name",
    [WEIGHTS, "checkpoint/config.json", "onnx/model.onnx", "recipe.yaml", "report.json",
     "checkpoint/tokenizer.json"],
)  # fmt: skip
def test_damaged_files(artefact: Path, name: str) -> None:
    path = artefact / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert kinds(artefact)[name] == "truncated"
    path.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    assert kinds(artefact)[name] == "tampered"
    path.write_bytes(whole + b"\0")
    assert kinds(artefact)[name] == "tampered"
    path.write_bytes(b"")
    assert kinds(artefact)[name] == "truncated"
    path.unlink()
    assert kinds(artefact)[name] == "missing"
    path.mkdir()
    assert kinds(artefact)[name] == "missing"


def test_several_kinds_at_once_are_told_apart(
    artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (artefact / "checkpoint" / "config.json").unlink()
    os.truncate(artefact / "onnx" / "model.onnx", 100)
    (artefact / "recipe.yaml").write_bytes((artefact / "recipe.yaml").read_bytes()[::-1])
    (artefact / "onnx" / "new.bin").write_bytes(b"x")
    code, out, err = run(capsys, "verify", artefact, "--json")
    said = json.loads(out)
    assert (code, said["exit_code"], said["intact"]) == (4, 4, False)
    assert err.startswith("error:")
    assert {one["file"]: one["kind"] for one in said["findings"] if one["kind"] != "wrong"} == {
        "checkpoint/config.json": "missing",
        "onnx/model.onnx": "truncated",
        "recipe.yaml": "tampered",
        "onnx/new.bin": "extra",
    }
    code, out, err = run(capsys, "verify", artefact)
    assert code == 4
    for word in ("missing", "truncated", "tampered", "extra", "next:", "not looked at: weights"):
        assert word in out
    assert "not what was compiled" in err


def test_files_that_nobody_recorded(artefact: Path) -> None:
    (artefact / ".DS_Store").write_text("", encoding="utf-8")
    (artefact / ".git").mkdir()
    (artefact / ".git" / "HEAD").write_text("", encoding="utf-8")
    assert kinds(artefact) == {}  # What nothing reads may be there.
    (artefact / "checkpoint" / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    (artefact / "deep").mkdir()
    (artefact / "deep" / "a b\n.txt").write_text("", encoding="utf-8")
    (artefact / "link").symlink_to("nowhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(artefact / "pipe")
    assert kinds(artefact) == {
        "checkpoint/model.safetensors.index.json": "extra",
        "deep/a b\n.txt": "extra",
        "link": "extra",
        **({"pipe": "extra"} if hasattr(os, "mkfifo") else {}),
    }
    # They do no harm to what is beside them, which is looked at all the same.
    found = verify_artefact(artefact, run=False)
    assert not any("damaged" in text for text in found.skipped)
    assert found.checked["linears"] > 0


@pytest.mark.parametrize("name", [WEIGHTS, "checkpoint", "onnx/model.onnx"])
def test_links(artefact: Path, tmp_path: Path, name: str) -> None:
    moved = tmp_path / "elsewhere"
    (artefact / name).rename(moved)
    (artefact / name).symlink_to(moved)
    found = kinds(artefact)
    assert set(found.values()) <= {"tampered", "extra"}
    assert any(file.startswith(name) for file, kind in found.items() if kind == "tampered")


def test_an_end_that_cannot_be_read(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zeroskip import verify

    def read(path: Path) -> Any:
        if path.name == "model.safetensors":
            raise OSError(5, "Input/output error")
        return describe(path)

    describe = verify.describe_file
    monkeypatch.setattr(verify, "describe_file", read)
    assert kinds(artefact) == {WEIGHTS: "truncated"}


def test_a_file_that_may_not_be_read(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zeroskip import verify

    def read(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(verify, "describe_file", read)
    found = verify_artefact(artefact, run=False)
    assert {one.kind for one in found.findings} == {"missing"}
    assert "right to read" in found.findings[0].next_step


# The manifest


def test_no_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        code, _, err = run(capsys, "verify", folder)
        assert code == 2
        assert "there is no manifest.json here" in err


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda text: text[: len(text) // 2], "truncated"),
        (lambda text: "", "truncated"),
        (lambda text: text.replace('"density": 0.5', '"density": 0.6'), "tampered"),
        (lambda text: text.replace('"version": 1', '"version": 7'), "stale"),
        (lambda text: "{}\n", "tampered"),
    ],
)
def test_a_damaged_manifest(
    artefact: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[str], str],
    kind: str,
) -> None:
    path = artefact / "manifest.json"
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    code, out, _ = run(capsys, "verify", artefact, "--json")
    said = json.loads(out)
    assert code == 4
    assert [(one["file"], one["kind"]) for one in said["findings"]] == [("manifest.json", kind)]


# Inputs


def test_inputs_that_changed_since(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built.parent, tmp_path / "copy"))
    assert kinds(folder / "out") == {}
    (folder / "text.txt").write_text("another text", encoding="utf-8")
    config = folder / "dense" / "config.json"
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert kinds(folder / "out") == {"text.txt": "stale", "dense/config.json": "stale"}
    shutil.rmtree(folder / "dense")
    (folder / "text.txt").unlink()
    found = verify_artefact(folder / "out", run=False)
    assert found.findings == []
    assert any(text.startswith("6 inputs") for text in found.skipped)


@pytest.mark.parametrize("name", ["/etc/shadow/x", "a\0b", "x" * 5000, "../../.."])
def test_names_of_inputs_that_are_none(artefact: Path, name: str) -> None:
    sign_anew(artefact, lambda content: content["inputs"][0].update(name=name))
    assert kinds(artefact) == {}


# What is in the files, where somebody computed all digests anew


def _dense_again(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = torch.ones_like(tensors[UP])


def _three_of_four(tensors: dict[str, torch.Tensor]) -> None:
    row = tensors[UP][0]
    row[0:4] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    row[4:8] = torch.tensor([1.0, 0.0, 0.0, 0.0])


def _one_less(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP].view(-1)[tensors[UP].view(-1).nonzero()[0]] = 0


def _other_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP][:, :-4].contiguous()


def _lacking(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[UP]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_dense_again, "its density is 1.0"),
        (_three_of_four, r"it is not 2:4: row 0, group 0 keeps 3 of 4"),
        (_one_less, "its density is 0.4995"),
        (_other_shape, "has shape"),
        (_lacking, "no tensor for"),
    ],
)
def test_weights_that_contradict_the_manifest(
    artefact: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    edit_weights(artefact, change)
    sign_anew(artefact)
    found = verify_artefact(artefact, run=False)
    wrong = [one for one in found.findings if one.kind == "wrong"]
    assert wrong == found.findings
    assert any(re.search(message, one.problem) for one in wrong)


def test_weights_in_onnx_that_are_not_those_of_the_checkpoint(artefact: Path) -> None:
    # The zeros are where they should be and density is the same: only ONNX can tell.
    edit_weights(artefact, lambda tensors: tensors[UP].mul_(1.5))
    sign_anew(artefact)
    found = verify_artefact(artefact, run=False)
    assert [(one.file, one.kind) for one in found.findings] == [("onnx/model.onnx", "wrong")]
    assert f"{UP}: it is not the weight" in found.findings[0].problem


def test_packed_operands_that_contradict_each_other(artefact: Path) -> None:
    def shift(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == f"{UP}_row_offsets":
                array = numpy_helper.to_array(tensor).copy()
                array[1] += 1
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    edit_onnx(artefact, shift)
    sign_anew(artefact)
    found = verify_artefact(artefact)
    assert [(one.file, one.kind) for one in found.findings] == [("onnx/model.onnx", "wrong")]
    assert "contradict each other" in found.findings[0].problem


def test_a_graph_that_computes_something_else(artefact: Path) -> None:
    def swap(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Sigmoid")
        node.op_type = "Tanh"

    edit_onnx(artefact, swap)
    sign_anew(artefact)
    assert kinds(artefact) == {}  # All weights are right.
    found = verify_artefact(artefact)
    assert [(one.file, one.kind) for one in found.findings] == [("onnx/model.onnx", "wrong")]
    assert "differs by" in found.findings[0].problem


def test_an_onnx_file_that_is_none(artefact: Path) -> None:
    (artefact / "onnx" / "model.onnx").write_bytes(b"\xff" * 100)
    sign_anew(artefact)
    assert kinds(artefact) == {"onnx/model.onnx": "wrong"}


def test_a_recipe_that_is_none(artefact: Path) -> None:
    (artefact / "recipe.yaml").write_text("passes: [frobnicate]", encoding="utf-8")
    sign_anew(artefact)
    assert kinds(artefact) == {"recipe.yaml": "wrong"}


def test_a_parameter_that_is_not_there(artefact: Path) -> None:
    sign_anew(artefact, lambda content: content["linears"][UP].update(parameter="absent"))
    assert kinds(artefact) == {"checkpoint/": "wrong"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"expert": 5}, "shape"),
        ({"expert": 1}, "shape"),
        ({"transposed": True}, "the manifest says"),
        ({"pattern": "nonsense"}, "is not a sparsity pattern"),
        ({"pattern": "1:4"}, "keeps 2 of 4"),
        ({"pattern": "2:3"}, "not a multiple"),
        ({"pattern": "dense"}, None),
    ],
)
def test_records_against_a_weight(change: dict[str, Any], message: str | None) -> None:
    weight = torch.tensor([[1.0, 0, 2, 0], [0, 0, 3, 4]])
    record = {
        "parameter": "w", "transposed": False, "expert": None, "shape": [2, 4], "pattern": "2:4",
        "density": 0.5, "note": "", "error": None, "change": None, "verdict": None,
    }  # fmt: skip
    problem = linear_problem(LinearRecord.model_validate({**record, **change}), weight)
    assert problem is None if message is None else message in (problem or "")
    experts = torch.stack([torch.zeros_like(weight), weight])
    if not change:
        of_expert = LinearRecord.model_validate({**record, "expert": 1})
        assert linear_problem(of_expert, experts) is None
        stored = LinearRecord.model_validate({**record, "expert": 1, "transposed": True})
        assert linear_problem(stored, experts.mT) is None


@pytest.mark.parametrize(
    ("text", "limit"),
    [('{"limit": 1e-3}', 1e-3), ('{"limit": 1e9}', 6e-2), ('{"limit": -1.0}', 1e-4),
     ('{"limit": NaN}', 1e-4), ('{"limit": "x"}', 1e-4), ("[]", 1e-4), ("[" * 10000, 1e-4)],
)  # fmt: skip
def test_a_limit_is_believed_within_reason(tmp_path: Path, text: str, limit: float) -> None:
    path = tmp_path / "zeroskip_parity.json"
    assert _limit(path) == 1e-4
    path.write_text(text, encoding="utf-8")
    assert _limit(path) == limit


def test_a_file_does_not_steer_the_terminal() -> None:
    from zeroskip.verify_command import _lines

    found = Verification()
    found.add("a\x1b[31m\n.txt", "extra", "it \x07rings")
    assert all(line.isprintable() for line in _lines(found))


# Commands that change an artefact on purpose


def test_what_a_command_changed_is_recorded(artefact: Path) -> None:
    before = read_manifest(artefact)
    with recording(artefact / "onnx", "tune"):
        edit_onnx(artefact, lambda model: setattr(model, "producer_name", "another"))
        (artefact / "onnx" / "zeroskip_tune.json").write_text("{}", encoding="utf-8")
        (artefact / "onnx" / "zeroskip_parity.json").unlink()
    assert kinds(artefact) == {}
    after = read_manifest(artefact)
    assert after.changed_by == ["tune"]
    assert after.content_sha256 != before.content_sha256
    assert after.files.keys() ^ before.files.keys() == {
        "onnx/zeroskip_tune.json", "onnx/zeroskip_parity.json",
    }  # fmt: skip
    with recording(artefact, "curve", only="recipe.yaml"):
        (artefact / "recipe.yaml").write_text("passes: [observe]\n", encoding="utf-8")
        (artefact / "onnx" / "config.json").write_text("{}", encoding="utf-8")
    assert kinds(artefact) == {"onnx/config.json": "truncated"}


def test_damage_stays_damage_whatever_command_runs(artefact: Path) -> None:
    (artefact / "onnx" / "config.json").write_text("{}", encoding="utf-8")
    with recording(artefact / "onnx", "tune"):
        edit_onnx(artefact, lambda model: setattr(model, "producer_name", "another"))
    assert read_manifest(artefact).changed_by == []
    assert set(kinds(artefact)) == {"onnx/config.json", "onnx/model.onnx"}


def test_a_command_that_fails_records_nothing(artefact: Path, tmp_path: Path) -> None:
    before = (artefact / "manifest.json").read_bytes()
    with pytest.raises(ZeroDivisionError), recording(artefact / "onnx", "tune"):
        raise ZeroDivisionError
    assert (artefact / "manifest.json").read_bytes() == before
    with recording(tmp_path / "elsewhere", "tune"):
        pass
