"""`zeroskip inspect`: readable for many layers, complete as JSON, and silent on errors."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import LlamaForCausalLM

from tests.face.test_bench_command import write_packed
from tests.face.test_cli import run
from tests.face.test_models import write_gguf
from zeroskip.ir.scale_groups import Consumer, Refusal, ScaleGroup, ScaleGroups, Shift
from zeroskip.runtime.eligibility import explain_tensorrt_shape
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
        # Each gain has a scale of its own; the inputs of linears are the second axis of a weight.
        "members": [
            {"parameter": f"{layer}input_layernorm.weight", "axis": None, "exponents": [-1]},
            *({"parameter": name, "axis": 1, "exponents": [1]} for name in names),
        ],
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
    assert "no config.json" in err
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    code, out, err = run(capsys, "inspect", tmp_path)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_the_summary_says_what_could_run_where(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    code, out, err = run(capsys, "inspect", checkpoint)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "LlamaForCausalLM: 34,976 parameters, 137 KiB (float32)"
    assert lines[1].endswith("input_ids, attention_mask -> logits")
    assert "15 linears" in lines[2]
    assert "pruners take 14" in lines[2]
    assert "model.layers.0-1" in lines[3]
    (up,) = [line for line in lines if line.startswith("model.layers.0-1.mlp.up_proj.weight")]
    cells = [cell.strip() for cell in up.split("  ") if cell.strip()]
    assert cells[1:] == ["x 2", "64 x 32", "float32", "yes", "yes", "no", "yes"]
    (head,) = [line for line in lines if line.startswith("lm_head.weight")]
    assert "no: output head" in head
    assert "not cuda 2:4: its weight is float32; the kernels take float16 and bfloat16 (15" in out


def test_the_summary_as_json_and_of_an_artefact(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    artefact = tmp_path / "artefact"
    artefact.mkdir()
    checkpoint.rename(artefact / "checkpoint")
    code, out, err = run(capsys, "inspect", artefact, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["parameters"], found["bytes"]) == (34976, 4 * 34976)
    assert found["dtypes"] == {"float32": 34976}
    assert len(found["linears"]) == 15
    first = found["linears"][0]
    assert first["name"] == "model.layers.0.self_attn.q_proj.weight"
    assert (first["shape"], first["role"], first["prunable"]) == ([32, 32], None, True)
    assert first["stage"] == "model.layers.0"
    assert first["targets"]["onnxruntime-cpu"] is None
    assert "float32" in first["targets"]["cuda 2:4"]


def test_shapes_decide_what_a_gpu_could_do() -> None:
    assert explain_tensorrt_shape((64, 32)) is None
    assert "not a multiple of 4" in str(explain_tensorrt_shape((64, 30)))
    assert "multiples of 8 rows and 16 columns" in str(explain_tensorrt_shape((64, 24)))


def test_an_onnx_folder_says_what_is_packed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = write_packed(tmp_path / "onnx")
    code, out, err = run(capsys, "inspect", folder, "--json")
    assert code == 0, err
    found = json.loads(out)
    (linear,) = found["linears"]
    assert (linear["name"], linear["shape"], linear["is_packed"]) == ("fc", [96, 64], True)
    assert linear["density"] == pytest.approx(0.5, abs=0.02)
    assert linear["bytes"] < linear["dense_bytes"] == 4 * 96 * 64
    assert found["packed"] == 1
    assert found["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    code, out, _ = run(capsys, "inspect", folder / "model.onnx")
    assert code == 0
    assert "1 of 1 linears are packed" in out
    assert "onnxruntime-cpu: sparse, with zeroskip's kernels" in out


@pytest.mark.parametrize("rows_first", [False, True])
def test_dense_weights_of_an_onnx_folder_are_2_4_or_not(
    rows_first: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ones = torch.ones(64, 32)
    pruned = ones * torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(8)
    # The same zeros across the inputs are none along them.
    across = ones * torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(16)[:, None]
    nodes, constants, outputs = [], [], []
    for name, weight in (("pruned", pruned), ("across", across), ("ones", ones)):
        stored = weight if rows_first else weight.T.contiguous()
        constants.append(numpy_helper.from_array(stored.numpy(), name))
        options = {"transB": 1} if rows_first else {}
        kind = "Gemm" if rows_first else "MatMul"
        nodes.append(helper.make_node(kind, ["X", name], [f"Y.{name}"], **options))
        outputs.append(helper.make_tensor_value_info(f"Y.{name}", TensorProto.FLOAT, ["n", 64]))
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, ["n", 32])
    graph = helper.make_graph(nodes, "three", [x], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    code, out, err = run(capsys, "inspect", tmp_path, "--json")
    assert code == 0, err
    found = {each["name"]: each for each in json.loads(out)["linears"]}
    assert [found[name]["is_24"] for name in ("pruned", "across", "ones")] == [True, False, False]
    assert [found[name]["density"] for name in ("pruned", "across", "ones")] == [0.5, 0.5, 1.0]
    assert all(each["shape"] == [64, 32] for each in found.values())
    assert found["pruned"]["targets"]["tensorrt 2:4"] == "yes, with --sparsity=enable"
    assert found["across"]["targets"]["tensorrt 2:4"] == "no: its zeros are not 2:4"
    code, out, _ = run(capsys, "inspect", tmp_path)
    assert "Zeros in dense weights make nothing faster in ONNX Runtime" in out


def test_onnx_folders_that_cannot_be_inspected(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"damaged")
    code, out, err = run(capsys, "inspect", tmp_path)
    assert (code, out) == (2, "")
    assert "the model cannot be read" in err
    code, out, err = run(capsys, "inspect", tmp_path, "--scales")
    assert (code, out) == (2, "")
    assert "not in ONNX files" in err
