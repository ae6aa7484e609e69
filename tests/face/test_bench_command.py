"""`zeroskip bench`: what it measures, the sentence it ends with, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.face.test_cli import run
from zeroskip.bench import Bench, Form, parse_tokens
from zeroskip.ir.errors import CompileError
from zeroskip.ir.formats import pack_bitmask
from zeroskip.runtime.bench import Spread
from zeroskip.runtime.onnx.paired_speed import PairedSpeed
from zeroskip.runtime.onnx.sparse_linear import add_functions, make_sparse_linear
from zeroskip.runtime.resident import Residence


def write_packed(folder: Path) -> Path:
    """An ONNX folder whose only node is a packed linear of 96 x 64, half of it zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator)
    weight[torch.rand(96, 64, generator=generator) < 0.5] = 0
    made = make_sparse_linear(pack_bitmask(weight, dtype=torch.float32), "X", "Y", name="fc")
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, ["batch", "sequence", 64])
    y = helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["batch", "sequence", 96])
    graph = helper.make_graph([made.node], "one", [x], [y], list(made.initializers))
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("zeroskip", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=9)
    add_functions(model)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    return folder


def write_dense(folder: Path, columns: int = 64) -> Path:
    folder.mkdir(parents=True)
    weight = numpy_helper.from_array(torch.ones(columns, 96).numpy(), "w")
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, ["batch", "sequence", columns])
    y = helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["batch", "sequence", 96])
    node = helper.make_node("MatMul", ["X", "w"], ["Y"])
    graph = helper.make_graph([node], "one", [x], [y], [weight])
    imports = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=9), folder / "model.onnx")
    return folder


QUICK = ("--threads", "1", "--rounds", "5", "--seconds", "0", "--no-memory")


def test_an_artefact_against_its_own_dense_form(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_packed(tmp_path / "artefact" / "onnx")
    before = sorted(p.name for p in (tmp_path / "artefact" / "onnx").iterdir())
    code, out, err = run(
        capsys, "bench", tmp_path / "artefact", "--tokens", "7,1", *QUICK, "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert [speed["tokens"] for speed in found["speeds"]] == [1, 7]
    for speed in found["speeds"]:
        assert speed["distance"] < 1e-5
        assert speed["rounds"] == 5
        assert speed["speedup"]["low"] <= speed["speedup"]["median"] <= speed["speedup"]["high"]
        assert speed["sparse"]["median"] > 0 < speed["dense_cpu"]["median"]
    assert found["dense"]["path"] is None
    assert found["sparse"]["memory"] is None
    assert found["dense"]["bytes"] > 96 * 64 * 4 > found["sparse"]["bytes"] - 8000
    assert sorted(p.name for p in (tmp_path / "artefact" / "onnx").iterdir()) == before


def test_memory_is_that_of_a_process_of_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_dense(tmp_path / "a")
    write_dense(tmp_path / "b")
    code, out, err = run(
        capsys, "bench", tmp_path / "a", "--dense", tmp_path / "b", "--tokens", "3", *QUICK[:-1]
    )
    assert code == 0, err
    assert "in memory after a run" in out
    # The same file twice: whatever the noise, nobody is told that the zeros pay for certain.
    assert "1 thread" in out
    assert out.rstrip().splitlines()[-1].startswith(("Undecided", "The zeros"))


def spread(middle: float, half: float = 0.02) -> Spread:
    return Spread(middle, middle * (1 - half), middle * (1 + half))


def speed(tokens: int, ratio: float, half: float = 0.02, **changed: Any) -> PairedSpeed:
    values: dict[str, Any] = {
        "tokens": tokens,
        "context": 32 if tokens == 1 else 0,
        "sparse": spread(0.010),
        "dense": spread(0.010 * ratio),
        "sparse_cpu": spread(0.010),
        "dense_cpu": spread(0.010 * ratio),
        "speedup": spread(ratio, half),
        "rounds": 15,
        "distance": 1e-7,
        "warnings": (),
    }
    return PairedSpeed(**{**values, **changed})


def made(*speeds: PairedSpeed) -> Bench:
    residence = Residence(1, 3 << 20, 1, 1, 4 << 20, 1, 0.5, 0.1)
    form = Form(None, 2 << 20, residence)
    return Bench(form, form, speeds, 2, "made-up processor")


@pytest.mark.parametrize(
    ("speeds", "verdict"),
    [
        ([speed(1, 1.8)], "The zeros pay here: 1.80x at one token."),
        (
            [speed(1, 1.8), speed(128, 0.9)],
            "The zeros pay here: 1.80x at one token. They do not pay: 0.90x at 128 tokens.",
        ),
        ([speed(1, 0.7)], "The zeros do not pay here: 0.70x at one token. Keep dense."),
        (
            [speed(128, 1.01, half=0.05)],
            (
                "Undecided: 1.01x at 128 tokens; the difference is smaller than the noise, so there is "
                "no reason not to keep dense."
            ),
        ),
        (
            [speed(1, 1.5), speed(8, 0.99, half=0.1)],
            (
                "The zeros pay here: 1.50x at one token. Undecided: 0.99x at 8 tokens; the difference "
                "is smaller than the noise."
            ),
        ),
    ],
)
def test_it_says_plainly_whether_the_zeros_pay(speeds: list[PairedSpeed], verdict: str) -> None:
    assert made(*speeds).verdict == verdict
    assert str(made(*speeds)).endswith(verdict)


def test_the_table_has_everything_and_the_noise_is_named() -> None:
    text = str(made(speed(1, 1.8, warnings=("other processes used 1.7 cores",))))
    for part in (
        "1 after 32",
        "10.000 ms",
        "18.000 ms",
        "1.80x",
        "1.76-1.84x",
        "2.0 MiB",
        "0.50 s",
    ):
        assert part in text
    assert "noise at 1 tokens: other processes used 1.7 cores" in text
    assert "made-up processor, 2 threads" in text


def test_what_is_dense_already_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_dense(tmp_path / "onnx")
    code, out, err = run(capsys, "bench", tmp_path, *QUICK)
    assert (code, out) == (2, "")
    assert "no linear is packed here" in err
    assert "zeroskip tune" in err


def test_refusals(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "bench", tmp_path, *QUICK)
    assert (code, out) == (2, "")
    assert "there is no model.onnx here, nor in onnx/" in err
    write_packed(tmp_path / "onnx")
    for tokens in ("", "0", "1,x", "2000000"):
        code, _, err = run(capsys, "bench", tmp_path, f"--tokens={tokens}", *QUICK)
        assert code == 2
        assert "no list of lengths" in err
    write_dense(tmp_path / "other", columns=32)
    code, out, err = run(capsys, "bench", tmp_path, "--dense", tmp_path / "other", *QUICK)
    assert (code, out) == (1, "")
    assert "cannot run the model on" in err
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"damaged")
    code, out, err = run(capsys, "bench", tmp_path, *QUICK)
    assert (code, out) == (2, "")
    assert "next:" in err


def test_lengths() -> None:
    assert parse_tokens(" 128, 1,128") == (1, 128)
    with pytest.raises(CompileError):
        parse_tokens("one")
