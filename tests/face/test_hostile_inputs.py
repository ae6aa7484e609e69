"""Files that somebody spoiled on purpose: each command refuses them by name, and does nothing else.

What single readers refuse is in tests/ir/test_checkpoint.py, tests/face/test_models.py,
tests/face/test_elastic.py, tests/face/test_manifest.py and tests/runtime/onnx; here are the commands.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.face.artefacts import run, write_inputs
from tests.face.hostile import CANARY, Touch, nothing_changes, refused, safetensors

RECIPE = "passes: [prune-magnitude: {pattern: 2:4}, apply-masks]"
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, tokenizer)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    """A model, a text and a recipe to spoil."""
    return Path(shutil.copytree(inputs, tmp_path / "in"))


def commands(folder: Path, model: str = "dense") -> dict[str, tuple[str | Path, ...]]:
    """Every command that reads a model, with the others of its inputs in order."""
    path, text = folder / model, folder / "text.txt"
    return {
        "compile": ("compile", path, "-r", folder / "recipe.yaml", "-o", folder / "out"),
        "eval": ("eval", path, "--text", text, "--sequence-length", "16", "--max-tokens", "20"),
        "export": ("export", path, "-o", folder / "out"),
        "inspect": ("inspect", path),
        "sensitivity": (
            "sensitivity",
            path,
            "-c",
            text,
            "--samples",
            "1",
            "--sequence-length",
            "8",
        ),
    }


# Checkpoints


def _weights(content: bytes) -> Callable[[Path], Any]:
    return lambda model: (model / "model.safetensors").write_bytes(content)


def _header(**tensors: Any) -> Callable[[Path], Any]:
    return _weights(safetensors(json.dumps(tensors).encode(), b"\0" * 64))


def _tensor(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def _index(target: str) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        shutil.move(model / "model.safetensors", model.parent / "secret.safetensors")
        (model / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"lm_head.weight": target}}), encoding="utf-8"
        )

    return spoil


def _index_text(text: str) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    return spoil


def _linked_out(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("/etc/passwd")


def _linked_to_itself(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("model.safetensors")


def _is_a_folder(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()


def _config(**changes: Any) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        path = model / "config.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**raw, **changes}), encoding="utf-8")

    return spoil


def _file(name: str, content: str | bytes) -> Callable[[Path], Any]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda model: (model / name).write_bytes(data)


SPOILED: dict[str, Callable[[Path], Any]] = {
    "empty": _weights(b""),
    "short": _weights(b"\x10"),
    "header-longer-than-the-file": _weights(safetensors(b"{}", length=10**6)),
    "header-of-64-bits": _weights(safetensors(b"{}", length=2**64 - 1)),
    "header-of-half-a-gigabyte": _weights(safetensors(b"{}", length=2**29)),
    "no-header": _weights(safetensors(b"")),
    "header-no-json": _weights(safetensors(b"{'a': 1}")),
    "header-no-text": _weights(safetensors(b"\xff" * 40)),
    "header-deep": _weights(safetensors(DEEP.encode())),
    "header-list": _weights(safetensors(b"[1, 2]")),
    "offsets-overlap": _header(a=_tensor(), b=_tensor(offsets=(8, 24))),
    "offsets-beyond-the-end": _header(a=_tensor(offsets=(0, 10**9), shape=(250_000_000,))),
    "offsets-backwards": _header(a=_tensor(offsets=(16, 0))),
    "offsets-negative": _header(a=_tensor(offsets=(-16, 0))),
    "offsets-64-bits": _header(a=_tensor(offsets=(2**64 - 16, 2**64 - 1))),
    "shape-64-bits": _header(a=_tensor(shape=(2**62, 2**62))),
    "shape-against-offsets": _header(a=_tensor(shape=(5,))),
    "dtype-nan": _header(a=_tensor(dtype="NaN")),
    "dtype-number": _header(a={**_tensor(), "dtype": 7}),
    "link-out": _linked_out,
    "link-to-itself": _linked_to_itself,
    "folder": _is_a_folder,
    "index-up": _index("../secret.safetensors"),
    "index-absolute": _index("/etc/passwd"),
    "index-parent": _index(".."),
    "index-nothing": _index(""),
    "index-nul": _index("a\0b"),
    "index-newline": _index("a\nb"),
    "index-deep": _index_text('{"weight_map": ' + DEEP),
    "index-list": _index_text("[]"),
    "index-numbers": _index_text('{"weight_map": {"a": 1' + "0" * 5000 + "}}"),
    "config-garbage": _file("config.json", b"\xff\xfe\x00garbage"),
    "config-deep": _file("config.json", DEEP),
    "config-number": _file("config.json", '{"hidden_size": 1' + "0" * 5000 + "}"),
    "config-many-layers": _config(num_hidden_layers=10**12),
    "config-no-layers": _config(num_hidden_layers=-1),
    "config-infinite": _file("config.json", '{"model_type": "llama", "hidden_size": 1e400}'),
    "config-wide": _config(hidden_size=2**62),
    "config-vocabulary": _config(vocab_size=2**62),
    "config-zero": _config(num_attention_heads=0),
    "config-text": _config(hidden_size="wide"),
    "config-class-number": _config(architectures=[7]),
    "config-class-text": _config(architectures="LlamaForCausalLM", model_type="unheard"),
    "config-class-function": _config(architectures=["pipeline"], model_type="unheard"),
    "config-dtype": _config(dtype="float99"),
    "generation-garbage": _file("generation_config.json", b"\xff"),
    "tokenizer-garbage": _file("tokenizer.json", b"\xff\xfe"),
    "tokenizer-deep": _file("tokenizer.json", DEEP),
    "tokenizer-empty": _file("tokenizer.json", "{}"),
}  # fmt: skip
_TURNS = itertools.cycle(("eval", "export", "inspect", "sensitivity"))
# What each command does not read, or does without.
_HARMLESS = {
    ("export", "tokenizer"), ("inspect", "tokenizer"), ("export", "generation"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "other"), [(name, next(_TURNS)) for name in SPOILED])
def test_a_spoiled_checkpoint_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, other: str
) -> None:
    SPOILED[name](folder / "dense")
    given = commands(folder)
    refused(capsys, folder, *given["compile"])
    if (other, name.partition("-")[0]) not in _HARMLESS:
        refused(capsys, folder, *given[other])


# Code


def _remote_code(folder: Path) -> None:
    model = folder / "dense"
    code = f"import os\nos.mkdir({str(folder / CANARY)!r})\nclass Evil: pass\n"
    (model / "evil.py").write_text(code, encoding="utf-8")
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    _config(
        model_type="evil",
        architectures=["Evil"],
        auto_map=dict.fromkeys(names, "evil.Evil"),
    )(model)
    path = model / "tokenizer_config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    path.write_text(json.dumps(raw), encoding="utf-8")


@pytest.mark.parametrize("command", ["compile", "eval", "export", "inspect", "sensitivity"])
def test_code_of_a_checkpoint_never_runs_and_nobody_is_asked(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    def ask(*_: Any) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr("builtins.input", ask)
    _remote_code(folder)
    refused(capsys, folder, *commands(folder)[command])


def test_code_of_a_tokenizer_alone_never_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (folder / "dense" / "config.json").read_bytes()
    _remote_code(folder)
    (folder / "dense" / "config.json").write_bytes(config)
    run(capsys, *commands(folder)["eval"])
    assert not (folder / CANARY).exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_a_pickle_is_never_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    model = folder / "dense"
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps({"a": Touch(folder / CANARY)}))
    for command in ("compile", "eval", "export", "inspect"):
        _, err = refused(capsys, folder, *commands(folder)[command])
        assert f"{name} is a pickle" in err
        assert "save_pretrained" in err


def test_a_pickle_under_another_name_is_none(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _weights(pickle.dumps({"a": Touch(folder / CANARY)}))(folder / "dense")
    for command in ("compile", "eval"):
        refused(capsys, folder, *commands(folder)[command])


# Recipes


def _bomb() -> str:
    lines = ['a: &a ["lol", "lol", "lol", "lol", "lol", "lol", "lol", "lol", "lol"]']
    for before, name in itertools.pairwise("abcdefghi"):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join(lines)


RECIPES = {
    "bomb": _bomb() + "\npasses: *i",
    "bomb-as-option": _bomb() + "\npasses: [observe: {gram: *i}]",
    "bomb-in-place": (_bomb() + "\n").replace("a: &a", "passes: &a") + "x: *i",
    "endless": "passes: &a [*a]",
    "endless-mapping": "&a {passes: [*a]}",
    "tag-python": "!!python/object/apply:os.mkdir [EXECUTED]",
    "tag-python-name": "passes: [!!python/name:os.system]",
    "tag-module": "passes: !!python/module:os",
    "tag-new": "passes: [!!python/object/new:os.system [mkdir EXECUTED]]",
    "tag-int": "passes: [observe: {gram: !!int x}]",
    "tag-bool": "passes: [observe: {gram: !!bool x}]",
    "tag-float": "passes: [observe: {gram: !!float x}]",
    "tag-timestamp": "passes: [!!timestamp 2001-99-99]",
    "tag-binary": "passes: [!!binary x]",
    "tag-unknown": "passes: [!frob x]",
    "deep": "passes: " + DEEP[:3000],
    "deep-mapping": "{a: " * 5000,
    "deep-block": "\n".join(" " * i + "a:" for i in range(3000)),
    "number": "passes: [observe]\nmemory: 1" + "0" * 5000,
    "number-samples": "passes: [observe]\ncalibration: {samples: 1" + "0" * 5000 + "}",
    "duplicate": "passes: [observe]\npasses: [apply-masks]",
    "duplicate-option": "passes: [observe: {gram: true, gram: false}]",
    "merge": "passes: [observe: {<<: 1}]",
    "keys": "? [1, 2]\n: 3\npasses: [observe]",
    "key-of-mapping": "? {a: 1}\n: 3",
    "nul": "passes: [\"a\\0b\"]",
    "raw-nul": "passes: [a\0b]",
    "documents": "passes: [observe]\n---\npasses: [observe]",
    "anchor": "passes: *absent",
    "surrogate": 'passes: ["\\ud800"]',
    "date": "2001-01-01",
    "out-up": "passes: [export-onnx: {directory: ../../escaped}]",
    "out-absolute": "passes: [export-onnx: {directory: /tmp/escaped-zeroskip}]",
    "out-itself": "passes: [export-onnx: {directory: .}]",
    "out-nul": 'passes: [export-onnx: {directory: "a\\0b"}]',
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_refused(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(folder)
    (folder / "recipe.yaml").write_text(RECIPES[name], encoding="utf-8")
    code, err = refused(capsys, folder, *commands(folder)["compile"])
    assert code == 2
    assert len(err) < 10_000
    assert not (folder.parent / "escaped").exists()


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"passes": ' + DEEP, '{"a":' * 100_000, '{"passes": 1' + "0" * 5000 + "}",
     '{"passes": NaN}', '{"passes": ["\\ud800"]}', "null", '"passes"', '{"passes": {}}',
     '{"passes": [["observe"]]}', '{"passes": [{"observe": {"gram": 1e999}}]}'],
)  # fmt: skip
def test_a_hostile_recipe_in_json_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (folder / "recipe.json").write_text(text, encoding="utf-8")
    model = folder / "dense"
    code, _ = refused(
        capsys, folder, "compile", model, "-r", folder / "recipe.json", "-o", folder / "out"
    )
    assert code == 2


# Texts, and places


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"x", None])
def test_a_text_that_is_none(
    folder: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    text = folder / "text.txt"
    text.unlink()
    text.mkdir() if content is None else text.write_bytes(content)
    given = commands(folder)
    refused(capsys, folder, *given["compile"], "-c", text)
    refused(capsys, folder, *given["eval"])


@pytest.mark.parametrize("out", ["text.txt", "text.txt/out", "dense", "loop", "dangling/x"])
def test_a_target_that_is_taken(folder: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("/absent/nowhere")
    given = commands(folder)
    for command in ("compile", "export"):
        refused(capsys, folder, *given[command][:-1], folder / out)


@pytest.mark.parametrize("command", ["compile", "export"])
def test_a_target_that_may_not_be_written(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    # Also as root, whom no mode stops.
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and allowed(path, mode))
    _, err = refused(capsys, folder, *commands(folder)[command])
    assert "may write" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_may_not_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (folder / "dense" / name).chmod(0)
    with pytest.raises(PermissionError):
        (folder / "dense" / name).read_bytes()
    code, out, err = run(capsys, *commands(folder)["compile"])
    assert (code, out) == (2, "")
    assert "error:" in err


def test_a_file_that_may_not_be_read_by_anybody(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from zeroskip import manifest_inputs

    def deny(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(manifest_inputs, "describe_file", deny)
    code, err = refused(capsys, folder, *commands(folder)["compile"])
    assert code == 2
    assert "Permission denied" in err


def test_unicode_spaces_and_newlines_in_paths(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "ein Ordner \U0001f600 mit\nZeile, 'Zitat' & $(touch x) %s"
    shutil.copytree(inputs, odd)
    shutil.move(odd / "dense", odd / "das modell \u00fc")
    given = commands(odd, "das modell \u00fc")
    code, _, err = run(capsys, *given["compile"])
    assert code == 0, err
    with nothing_changes(tmp_path):
        code, _, err = run(capsys, "verify", odd / "out")
        assert code == 0, err
        code, _, err = run(capsys, *commands(odd, "out/checkpoint")["eval"])
        assert code == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {odd.name}
