"""ONNX and GGUF files that somebody spoiled on purpose, and seeded random damage to everything."""

from __future__ import annotations

import contextlib
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from transformers import LlamaConfig, LlamaForCausalLM

from tests.face.artefacts import write_inputs
from tests.face.hostile import refused
from tests.face.test_models import write_gguf
from zeroskip.elastic_manifest import read_manifest as read_elastic
from zeroskip.ir.checkpoint import open_checkpoint
from zeroskip.ir.errors import CompileError
from zeroskip.manifest import read_manifest
from zeroskip.models import load_tokenizer
from zeroskip.recipe import load_recipe
from zeroskip.runtime.onnx.densify import densify
from zeroskip.runtime.onnx.session import OnnxModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def write_onnx(folder: Path) -> None:
    """A model of one product over an embedding, its weights in a file of their own."""
    generator = np.random.default_rng(0)
    weights = {
        "embed": generator.normal(size=(256, 8)).astype(np.float32),
        "head": generator.normal(size=(8, 256)).astype(np.float32),
    }
    ids, logits = (
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
            ("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", 256]),
        )
    )
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["embed", "input_ids"], ["hidden"], name="look"),
            helper.make_node("MatMul", ["hidden", "head"], ["logits"], name="head.product"),
        ],
        "tiny",
        [ids],
        [logits],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, tokenizer)
    write_onnx(folder / "onnx")
    tokenizer.save_pretrained(folder / "onnx")
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(inputs, tmp_path / "in"))


def _external(**changes: str) -> Callable[[Path], None]:
    """Changes what a weight says of its data."""

    def spoil(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        for entry in model.graph.initializer[1].external_data:
            entry.value = changes.pop(entry.key, entry.value)
        for key, value in changes.items():
            model.graph.initializer[1].external_data.add(key=key, value=value)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return spoil


def _edit(change: Callable[[onnx.ModelProto], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return spoil


def _model(content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.onnx").write_bytes(content)


def _half(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _short_data(folder: Path) -> None:
    path = folder / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-4000])


def _linked_data(folder: Path) -> None:
    secret = folder.parent / "secret.data"
    (folder / "model.onnx.data").rename(secret)
    (folder / "model.onnx.data").symlink_to(secret)


def _data_is_a_folder(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    (folder / "model.onnx.data").mkdir()


ONNX: dict[str, Callable[[Path], Any]] = {
    "empty": _model(b""),
    "garbage": _model(b"\xff" * 200),
    "text": _model(b"this is no model"),
    "half": _half,
    "data-short": _short_data,
    "data-missing": lambda folder: (folder / "model.onnx.data").unlink(),
    "data-link-out": _linked_data,
    "data-folder": _data_is_a_folder,
    "location-up": _external(location="../text.txt"),
    "location-absolute": _external(location="/etc/passwd"),
    "location-empty": _external(location=""),
    "location-parent": _external(location=".."),
    "location-nul": _external(location="a\0b"),
    "offset-beyond": _external(offset=str(10**9)),
    "offset-negative": _external(offset="-8"),
    "offset-text": _external(offset="here"),
    "length-beyond": _external(length=str(2**62)),
    "length-negative": _external(length="-1"),
    "dims-huge": _edit(lambda model: model.graph.initializer[1].dims.__setitem__(0, 2**40)),
    "dims-negative": _edit(lambda model: model.graph.initializer[1].dims.__setitem__(0, -8)),
    "type-unknown": _edit(lambda model: setattr(model.graph.initializer[1], "data_type", 99)),
    "input-string": _edit(
        lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", 8)
    ),
    "operator-unknown": _edit(lambda model: setattr(model.graph.node[0], "op_type", "Frob")),
    "domain-unknown": _edit(lambda model: setattr(model.graph.node[0], "domain", "frob")),
    "cycle": _edit(lambda model: model.graph.node[0].input.__setitem__(1, "logits")),
    "no-graph": _edit(lambda model: model.ClearField("graph")),
}


@pytest.mark.parametrize("name", ONNX)
def test_a_spoiled_onnx_folder_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    ONNX[name](folder / "onnx")
    text = folder / "text.txt"
    refused(capsys, folder, "eval", folder / "onnx", "--text", text, "--max-tokens", "20")
    for arguments in (
        ("export", folder / "onnx", "--dense", "-o", folder / "out"),
        ("tune", folder / "onnx", "--dry-run"),
        ("inspect", folder / "onnx"),
        ("bench", folder / "onnx", "--seconds", "0", "--rounds", "5", "--no-memory"),
    ):
        harmless(capsys, folder, *arguments)


def harmless(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str | Path) -> None:
    """Runs a command that may refuse or not, but neither breaks nor writes where it should not."""
    from tests.face.artefacts import run
    from tests.face.hostile import CANARY, snapshot

    before = snapshot(folder)
    code, _, err = run(capsys, *arguments)
    assert code in (0, 1, 2), (arguments, err)
    assert "Traceback" not in err
    assert code == 0 or any(line.startswith("error:") for line in err.splitlines()), err
    after = {k: v for k, v in snapshot(folder).items() if k.split("/")[0] != "out"}
    assert after == before, arguments
    assert not list(folder.rglob(CANARY))
    shutil.rmtree(folder / "out", ignore_errors=True)


def test_a_secret_beside_the_model_does_not_get_into_what_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _linked_data(folder / "onnx")
    refused(capsys, folder, "export", folder / "onnx", "--dense", "-o", folder / "out")


# Random damage: every reader raises a CompileError or nothing at all


def _mutations(data: bytes, seed: int, count: int) -> list[bytes]:
    """Bits flipped, bytes replaced, pieces removed, repeated or cut off: the same for each seed."""
    chance, made = random.Random(seed), []
    for _ in range(count):
        spoiled = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            place = chance.randrange(max(len(spoiled), 1))
            kind = chance.randrange(6)
            if kind == 0 and spoiled:
                spoiled[place] ^= 1 << chance.randrange(8)
            elif kind == 1 and spoiled:
                spoiled[place] = chance.choice((0, 255, 34, 91, 123, 45, 57))
            elif kind == 2:
                del spoiled[place : place + chance.randrange(1, 30)]
            elif kind == 3:
                spoiled[place:place] = spoiled[place : place + chance.randrange(1, 30)]
            elif kind == 4:
                del spoiled[place:]
            else:
                spoiled[place : place + 8] = chance.choice(
                    (b"\xff" * 8, b"\0" * 8, b"\x7f" * 8, b"99999999")
                )
        made.append(bytes(spoiled))
    return made


def _densify(path: Path) -> None:
    out = path.parent / "dense.onnx"
    try:
        densify(path, out)
    finally:
        for made in path.parent.glob("dense.onnx*"):
            made.unlink()


def _head(data: bytes, size: int = 4096) -> list[bytes]:
    """The part of a file where damage matters most, and the rest."""
    return [data[:size], data[size:]]


READERS: dict[str, tuple[str, Callable[[Path], Any], int]] = {
    "config": ("dense/config.json", lambda path: open_checkpoint(path.parent), 60),
    "generation": ("dense/generation_config.json", lambda p: open_checkpoint(p.parent), 20),
    "safetensors": ("dense/model.safetensors", lambda path: open_checkpoint(path.parent), 60),
    "tokenizer": ("dense/tokenizer.json", lambda path: load_tokenizer(path.parent), 30),
    "recipe": ("recipe.yaml", load_recipe, 200),
    "onnx": ("onnx/model.onnx", lambda path: OnnxModel(path.parent), 60),
    "densify": ("onnx/model.onnx", _densify, 60),
    "manifest": ("manifest.json", lambda path: read_manifest(path.parent), 100),
    "elastic": ("elastic.json", lambda path: read_elastic(path.parent), 60),
}


@pytest.mark.parametrize("name", READERS)
def test_random_damage_is_refused_by_name_or_makes_no_difference(folder: Path, name: str) -> None:
    file, read, count = READERS[name]
    path = folder / file
    if not path.is_file():
        path.write_text(_MANIFESTS[name], encoding="utf-8")
    head, rest = _head(path.read_bytes())
    for number, spoiled in enumerate(_mutations(head, seed=len(name), count=count)):
        path.write_bytes(spoiled + rest)
        with warnings.catch_warnings(), contextlib.suppress(CompileError):
            warnings.simplefilter("ignore")
            try:
                read(path)
            except CompileError:
                raise
            except BaseException as error:
                raise AssertionError(f"mutation {number}: {error!r}") from error


_MANIFESTS = {
    "manifest": """{"format": "zeroskip-artefact", "version": 1, "versions": {"python": "3"},
 "seed": 0, "recipe": "fast", "key": {}, "inputs": [], "inputs_from": null, "passes": [],
 "linears": {"w": {"parameter": "w", "transposed": false, "expert": null, "shape": [2, 4],
 "pattern": "2:4", "density": 0.5, "note": "", "error": null, "change": null, "verdict": null}},
 "drift": 0.0, "density": 0.5, "gates": {}, "changed_by": [], "timings": {}, "files": {"checkpoint/x":
 {"bytes": 1, "sha256": "0000000000000000000000000000000000000000000000000000000000000000"}},
 "content_sha256": "00", "sha256": "00"}
""",
    "elastic": """{"format": "zeroskip-elastic", "version": 1, "zeroskip": "0.1.0", "groups": [0.5],
 "family": "rows", "hierarchy": "none", "rank": 2, "linears": {"w": {"shape": [2, 4],
 "serves_lowest": true}}, "made_by": [{"pass": "x", "options": {}}], "curve": [{"sparsity": 0.5,
 "bytes": 1, "perplexity": null, "latency": null}], "measured": {}, "files": {}}
""",
}


def test_random_damage_to_a_gguf_file(folder: Path) -> None:
    from zeroskip.models import load_model

    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    path = folder / "tiny.gguf"
    write_gguf(path, LlamaForCausalLM(config))
    head, rest = _head(path.read_bytes(), 6000)
    for number, spoiled in enumerate(_mutations(head, seed=5, count=25)):
        path.write_bytes(spoiled + rest)
        try:
            load_model(path)
        except CompileError:
            continue
        except BaseException as error:
            raise AssertionError(f"mutation {number}: {error!r}") from error
