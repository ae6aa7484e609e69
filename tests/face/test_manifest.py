"""manifest.json: what it says, what is the same in every run, and which ones are refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.face.artefacts import ended, sign_anew, write_inputs
from zeroskip.ir.errors import ArtifactError
from zeroskip.manifest import ManifestError, content_digest, read_manifest, sign
from zeroskip.manifest_files import describe_file
from zeroskip.manifest_inputs import name_of, read_inputs, way_back

UP = "model.layers.0.mlp.up_proj.weight"
DENSE = """\
passes:
  - prune-magnitude: {pattern: "50%"}
  - apply-masks
calibration: {samples: 2, sequence_length: 16}
"""


@pytest.fixture
def artefact(built: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(built, tmp_path / "out"))


def content_of(artefact: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((artefact / "manifest.json").read_text(encoding="utf-8"))
    return content


def test_every_file_is_recorded_as_it_is(built: Path) -> None:
    manifest = read_manifest(built)
    there = {p.relative_to(built).as_posix() for p in built.rglob("*") if p.is_file()}
    assert set(manifest.files) == there - {"manifest.json"}
    for name, record in manifest.files.items():
        entry = describe_file(built / name)
        assert (record.bytes, record.sha256) == (entry.bytes, entry.sha256), name


def test_inputs_are_recorded_by_name_as_given(built: Path) -> None:
    manifest = read_manifest(built)
    assert {(x.role, x.name) for x in manifest.inputs} == {
        ("model", "dense/config.json"),
        ("model", "dense/generation_config.json"),
        ("model", "dense/model.safetensors"),
        ("model", "dense/tokenizer.json"),
        ("model", "dense/tokenizer_config.json"),
        ("recipe", "recipe.yaml"),
        ("calibration", "text.txt"),
    }
    for record in manifest.inputs:
        assert record.sha256 == describe_file(built.parent / record.name).sha256
    assert (manifest.inputs_from, manifest.recipe, manifest.seed) == ("..", "recipe.yaml", 0)


def test_no_path_of_this_machine_is_in_it(built: Path) -> None:
    text = (built / "manifest.json").read_text(encoding="utf-8")
    assert str(built.parent) not in text
    assert str(Path.home()) not in text


def test_linears_passes_and_versions(built: Path) -> None:
    manifest = read_manifest(built)
    linear = manifest.linears[UP]
    assert (linear.shape, linear.pattern, linear.density) == ([64, 32], "2:4", 0.5)
    assert linear.error is not None
    assert 0 < linear.error < 1
    head = manifest.linears["model.embed_tokens.weight"]
    assert (head.pattern, head.density) == ("dense", 1.0)
    assert [step.name for step in manifest.passes][:2] == ["observe", "prune-wanda"]
    assert {"zeroskip", "torch", "transformers", "onnx", "onnxruntime", "python"} <= set(
        manifest.versions
    )
    assert set(manifest.timings) >= {"finished", "seconds", "passes"}


def test_what_is_measured_is_a_timing(artefact: Path) -> None:
    from zeroskip.manifest import _linears

    verdict = {"source": "measured", "choice": "dense", "speedup": {"1": 0.8}, "noise": 0.1}
    found = {
        "name": "fc", "verdict": {**verdict, "reason": "0.80x at m=1"}, "note": "0.80x at m=1",
        "shape": (1, 2), "pattern": "dense", "density": 1.0,
    }  # fmt: skip

    class Place:
        name, parameter, transposed, expert = "fc", "fc", False, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zeroskip.manifest.find_linears", lambda _: [Place])
        records, measured = _linears(None, [found])  # type: ignore[arg-type]
    assert "0.8" not in json.dumps(records)
    assert measured == {"fc": {"speedup": {"1": 0.8}, "noise": 0.1, "reason": "0.80x at m=1"}}
    assert records["fc"]["verdict"] == {"source": "measured", "choice": "dense"}


def test_the_content_digest_leaves_out_times_and_reports_only(built: Path) -> None:
    content = content_of(built)
    before = content_digest(content)
    content["timings"] = {"seconds": 1.0}
    content["files"]["report.json"]["sha256"] = "0" * 64
    content["files"]["report.html"]["sha256"] = "0" * 64
    assert content_digest(content) == before == content["content_sha256"]
    content["files"]["recipe.yaml"]["sha256"] = "0" * 64
    assert content_digest(content) != before


def test_names_of_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert name_of(here / "model") == "model"
    assert name_of(Path("./a/../model")) == "model"
    assert name_of(Path("../model")) == "../model"
    assert name_of(tmp_path / "model") == (tmp_path / "model").as_posix()
    cached = tmp_path / "hub" / "models--owner--tiny-model" / "snapshots" / "0a1b" / "config.json"
    assert name_of(cached) == "owner/tiny-model@0a1b/config.json"
    assert way_back(Path("deep/out")) == "../.."
    assert way_back(tmp_path / "out") is None


def test_shards_are_inputs_and_what_nobody_reads_is_not(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for name in (
        "one.safetensors",
        "two.safetensors",
        "consolidated.safetensors",
        "x.bin",
        "c.json",
    ):
        (tmp_path / name).write_bytes(b"")
    names = [Path(found.name).name for found in read_inputs("model", tmp_path)]
    assert names == ["c.json", "model.safetensors.index.json", "one.safetensors", "two.safetensors"]
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_inputs("calibration", tmp_path / "absent")


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("", "truncated", "cut short"),
        ('{"format": "zeroskip-artefact", "ver', "truncated", "cut short"),
        ("[1, 2]\n", "truncated", "holds a list"),
        ('{"a": 1, "a": 2}\n', "tampered", "twice"),
        ('{"a": NaN}\n', "tampered", "NaN"),
        ('{"a": 1' + "0" * 5000 + "}\n", "tampered", "no JSON"),
        ("[" * 100000 + "}\n", "tampered", "nested too deep"),
        ("{}\n", "tampered", "no manifest"),
        ('{"format": "zeroskip-artefact", "version": 2}\n', "stale", "version 2"),
        ('{"format": "zeroskip-artefact", "version": true}\n', "stale", "version True"),
        ('{"format": "zeroskip-artefact", "version": 1}\n', "tampered", "malformed"),
    ],
)
def test_manifests_that_are_none(tmp_path: Path, text: str, kind: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(tmp_path)
    assert (caught.value.kind, bool(caught.value.next_step)) == (kind, True)


def test_a_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no manifest\.json") as caught:
        read_manifest(tmp_path)
    assert caught.value.kind == "missing"


def test_a_manifest_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe{}\n")
    with pytest.raises(ManifestError, match="UTF-8"):
        read_manifest(tmp_path)


def test_a_manifest_edited_by_hand(artefact: Path) -> None:
    path = artefact / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"seed": 0', '"seed": 1'), "utf-8")
    with pytest.raises(ManifestError, match="its digest is another"):
        read_manifest(artefact)


@pytest.mark.parametrize(
    "name",
    ["../secret", "onnx/../../secret", "/etc/passwd", "a//b", "a/./b", "a\\..\\b", "C:/x", "", ".",
     "manifest.json", "a\0b"],
)  # fmt: skip
def test_names_that_lead_elsewhere(artefact: Path, name: str) -> None:
    sign_anew(artefact, lambda c: c["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
    with pytest.raises(ManifestError, match="leads elsewhere"):
        read_manifest(artefact)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", True),
        ("seed", "0"),
        ("seed", 2**70),
        ("versions", {"torch": 2}),
        ("inputs", [{"role": "model", "name": 1, "bytes": 1, "sha256": "0" * 64}]),
        ("inputs", [{"role": "spell", "name": "x", "bytes": 1, "sha256": "0" * 64}]),
        ("linears", {"x": {}}),
        ("linears", []),
        ("density", 1.5),
        ("drift", "small"),
        ("files", {"x": {"bytes": 1, "sha256": "no digest"}}),
        ("files", {"x": {"bytes": -1, "sha256": "0" * 64}}),
        ("files", {"x": {"bytes": 1, "sha256": "0" * 64, "more": 1}}),
        ("surplus", 1),
        ("changed_by", "tune"),
    ],
)
def test_values_of_another_kind(artefact: Path, key: str, value: Any) -> None:
    content = content_of(artefact)
    content[key] = value
    sign(content, artefact)
    with pytest.raises(ManifestError, match=f"malformed: {key}"):
        read_manifest(artefact)


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    before = (artefact / "manifest.json").read_bytes()
    names = sorted(os.listdir(artefact))
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ArtifactError, match="No space left"):
        sign_anew(artefact)
    assert sorted(os.listdir(artefact)) == names
    assert (artefact / "manifest.json").read_bytes() == before


def test_names_that_are_no_utf8_come_back(artefact: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.txt")
    try:
        (artefact / odd).write_text("x", encoding="utf-8")
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    sign_anew(artefact)
    assert odd in read_manifest(artefact).files


def test_a_preset_is_no_file_and_the_model_may_be_absolute(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path, tokenizer)
    (tmp_path / "r.yaml").write_text(DENSE, encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = tmp_path / "out"
    assert ended("compile", tmp_path / "dense", "-r", tmp_path / "r.yaml", "-o", out, "-q") == 0
    manifest = read_manifest(out)
    assert manifest.inputs_from is None
    assert (tmp_path / "dense" / "config.json").as_posix() in {x.name for x in manifest.inputs}
    assert {x.role for x in manifest.inputs} == {"model", "recipe"}
