"""`zeroskip inspect --scales`: readable for many layers, complete as JSON, and silent on errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.face.test_cli import run
from tests.face.test_models import write_gguf
from zeroskip.ir.scale_groups import Consumer, Refusal, ScaleGroup, ScaleGroups, Shift
from zeroskip.scale_table import scales_json, scales_table


def test_layers_share_a_line(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    code, out, err = run(capsys, "inspect", checkpoint, "--scales")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split("  ")[0] == "group"
    (up,) = [line for line in lines if "mlp.up_proj -> " in line]
    assert up.split() == [
        "model.layers.0-1.mlp.up_proj",
        "->",
        "model.layers.0-1.mlp.down_proj",
        "x",
        "2",
        "64",
        "any",
        "down_proj",
        "-",
    ]
    assert "q_proj, k_proj, v_proj" in out
    assert "\n11 groups\n" in out
    (gate,) = [line for line in lines if line.startswith("model.layers.0-1.mlp.gate_proj")]
    assert gate.endswith("outputs  silu at silu, silu_1: not known to keep them")


def test_json_is_complete(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    code, out, err = run(capsys, "inspect", checkpoint, "--scales", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert len(found["groups"]) == 11
    layer = "model.layers.1."
    names = [f"{layer}self_attn.{x}_proj.weight" for x in "qkv"]
    assert found["groups"][5] == {
        "name": f"{layer}input_layernorm.weight -> {names[0]}",
        "channels": 32,
        "sign": "any",
        "inputs_of": names,
        "parameters": [f"{layer}input_layernorm.weight", *names],
        "shift": [],
    }
    assert {
        "linear": "lm_head.weight",
        "side": "outputs",
        "reason": "it leaves the program",
    } in found["refusals"]


def test_a_gguf_file_has_the_groups_of_the_directory(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, model: LlamaForCausalLM
) -> None:
    write_gguf(tmp_path / "tiny.gguf", model)
    code, out, err = run(capsys, "inspect", tmp_path / "tiny.gguf", "--scales", "--json")
    assert code == 0, err
    _, expected, _ = run(capsys, "inspect", checkpoint, "--scales", "--json")
    assert json.loads(out) == json.loads(expected)
    code, out, err = run(capsys, "inspect", tmp_path / "tiny.gguf", "--scales")
    assert code == 0, err
    assert "\n11 groups\n" in out
    assert "silu at silu, silu_1: not known to keep them" in out


def test_signs_shifts_and_experts_are_shown() -> None:
    channels = torch.arange(8)

    def group(layer: int, positive: bool) -> ScaleGroup:
        ones = torch.ones(8, dtype=torch.int8)
        experts = [Consumer(f"layers.{layer}.experts.down[{e}]", channels, ones) for e in range(3)]
        shifts = (Shift(f"layers.{layer}.up.bias", channels),)
        name = f"layers.{layer}.up.weight -> layers.{layer}.experts.down"
        return ScaleGroup(name, 8, positive, (), tuple(experts), (), shifts)

    # One layer that is unlike the others has a line of its own.
    groups = [group(layer, layer != 2) for layer in range(5)]
    found = ScaleGroups({each.name: each for each in groups})
    rows = [line.split("  ") for line in scales_table(found).splitlines()[2:4]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells == [
        [
            "layers.0-1,3-4.up -> layers.0-1,3-4.experts.down",
            "x 4",
            "8",
            "> 0",
            "down[0-2]",
            "up.bias",
        ],
        ["layers.2.up -> layers.2.experts.down", "8", "any", "down[0-2]", "up.bias"],
    ]
    assert scales_json(found)["groups"][0]["shift"] == ["layers.0.up.bias"]
    assert "not scaled" not in scales_table(found)


def test_reasons_keep_what_differs() -> None:
    reasons = ["silu at silu: no", "silu at silu_1: no", "silu at silu_2: no", "it leaves"]
    refusals = [Refusal(f"layers.{n}.gate", "outputs", why) for n, why in enumerate(reasons)]
    text = scales_table(ScaleGroups({}, tuple(refusals)))
    assert "layers.0-2.gate  x 3    outputs  silu at silu, ..., silu_2: no" in text
    assert "layers.3.gate           outputs  it leaves" in text


def test_what_cannot_be_inspected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "inspect", tmp_path / "absent", "--scales")
    assert (code, out) == (2, "")
    assert str(tmp_path / "absent") in err
    code, out, err = run(capsys, "inspect", tmp_path)
    assert (code, out) == (2, "")
    assert "add --scales" in err
