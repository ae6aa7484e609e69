"""The recipe for sparse linears in ONNX Runtime, from the command line to the numbers it computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM

from zeroskip import cli
from zeroskip.runtime import dispatch, tuning_cache
from zeroskip.runtime.dispatch import Verdict
from zeroskip.runtime.onnx.custom_ops import session_options
from zeroskip.runtime.speed_table import Table

RECIPE = Path(__file__).parents[2] / "examples" / "recipes" / "sparse-cpu.yaml"


class Fast(Table):
    """Says that every packed linear is twice as fast as dense."""

    def speedups(self, *arguments: object) -> dict[int, float]:
        return dict.fromkeys(arguments[-1], 2.0)  # type: ignore[call-overload, no-any-return]


def run(*arguments: str | Path) -> None:
    """Runs the command line in this process; it must succeed."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert not ended.value.code


def logits(folder: Path, *, kernels: bool) -> np.ndarray:
    """What a folder computes for a prompt of 9 tokens and then for another one, in two rows."""
    options = session_options() if kernels else onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    tokens = torch.randint(0, 256, (2, 10), generator=torch.Generator().manual_seed(3)).numpy()
    feeds: dict[str, np.ndarray] = {}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            shape = [2 if i == 0 else 0 if i == 2 else n for i, n in enumerate(value.shape)]
            feeds[value.name] = np.zeros(shape, np.float32)
    names = [value.name for value in session.get_outputs()]
    steps = []
    for begin, end in ((0, 9), (9, 10)):
        feeds["input_ids"] = tokens[:, begin:end]
        feeds["attention_mask"] = np.ones((2, end), np.int64)
        if "position_ids" in {value.name for value in session.get_inputs()}:
            feeds["position_ids"] = np.tile(np.arange(begin, end), (2, 1))
        found = dict(zip(names, session.run(None, feeds), strict=True))
        steps.append(found.pop("logits"))
        feeds.update({k.replace("present", "past_key_values"): v for k, v in found.items()})
    return np.concatenate(steps, axis=1)


def test_the_recipe(
    tmp_path: Path,
    shallow: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tuning_cache, "tuning_file", lambda: tmp_path / "tuning.json")
    # Without it, what runs sparse would depend on the machine.
    monkeypatch.setattr(dispatch, "load_table", lambda: Fast({}))
    monkeypatch.setattr(dispatch, "NODE_SECONDS", 0.0)
    out = tmp_path / "sparse"
    sizes = ("--samples", "2", "--sequence-length", "32")
    run("compile", shallow, "-r", RECIPE, "-o", out, "--calibration", text_file, *sizes)
    printed = capsys.readouterr().out

    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    pruned = {each["name"]: each for each in report["linears"] if each["pattern"] != "dense"}
    assert len(pruned) == 7
    verdicts = {name: Verdict.from_json(each["verdict"]) for name, each in pruned.items()}
    for name, verdict in verdicts.items():
        assert (verdict.value_type, verdict.source) == ("bfloat16", "table"), name
        assert (verdict.choice, verdict.rival) == ("sparse", "ONNX Runtime"), name
        assert [verdict.rows, verdict.columns] == pruned[name]["shape"]
    nodes = onnx.load(out / "onnx" / "model.onnx").graph.node
    packed = [node.input[1] for node in nodes if node.op_type == "SparseLinear"]
    assert {name.removesuffix("_bitmask") for name in packed} == set(verdicts)

    line = next(x for x in printed.splitlines() if "layers.0.mlp.up_proj.weight" in x)
    assert "2.00x @1, 2.00x @128" in line
    assert line.endswith("sparse: 2.00x on average over m=1, 128")

    run("export", out / "onnx", "--dense", "-o", tmp_path / "plain")
    got = logits(out / "onnx", kernels=True)
    expected = logits(tmp_path / "plain", kernels=False)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    tokens = torch.randint(0, 256, (2, 10), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        np.testing.assert_allclose(got, model(tokens).logits.numpy(), rtol=1e-4, atol=1e-4)
