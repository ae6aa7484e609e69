"""Opening and running an exported folder, and what is said when that is not possible."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnx_models import logits_of, parameters
from torch import nn

from zeroskip.ir.capture import capture
from zeroskip.ir.errors import ArtifactError
from zeroskip.runtime.onnx import session
from zeroskip.runtime.onnx.export import export_onnx
from zeroskip.runtime.onnx.session import OnnxModel, positions


@pytest.fixture(scope="module")
def folder(small_llama: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("session") / "llama"
    return export_onnx(
        target,
        weights=parameters(small_llama),
        reference=logits_of(small_llama),
        model=small_llama,
        external_data_threshold=1000,
    ).path


def test_generation_equals_eager_with_left_padding(folder: Path, small_llama: nn.Module) -> None:
    ids = torch.randint(4, 64, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    expected = small_llama.generate(  # type: ignore[operator]
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=[2, 3]
    )
    found = OnnxModel(folder, threads=1).generate(
        ids, 12, attention_mask=mask, eos_token_id=[2, 3], pad_token_id=0
    )
    assert torch.equal(found, expected)


def test_generation_ends_at_any_end_token(folder: Path) -> None:
    model = OnnxModel(folder, threads=1)
    free = model.generate(torch.tensor([[5, 6, 7], [8, 9, 10]]), 8)
    first = int(free[0, 3])
    stopped = model.generate(
        torch.tensor([[5, 6, 7], [8, 9, 10]]), 8, eos_token_id=first, pad_token_id=0
    )
    assert stopped[0, 3] == first
    assert (stopped[0, 4:] == 0).all()


def test_a_mask_of_ones_and_an_empty_past_are_the_defaults(folder: Path) -> None:
    model = OnnxModel(folder, threads=1)
    ids = torch.tensor([[5, 6, 7]])
    step = model.logits(ids)
    again = model.logits(ids, torch.ones_like(ids), model.empty_past(1))
    assert torch.equal(step.logits, again.logits)
    assert step.past[0].shape[2] == 3


def test_positions_skip_padding() -> None:
    assert positions(torch.tensor([[0, 0, 1, 1]])).tolist() == [[0, 0, 0, 1]]


def test_missing_and_unknown_inputs_are_named(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"missing inputs: \['attention_mask'.*\['tokens'\]"):
        OnnxModel(folder).run({"input_ids": torch.ones(1, 1), "tokens": torch.ones(1)})


def test_inputs_of_a_wrong_shape_are_named(folder: Path) -> None:
    model = OnnxModel(folder)
    past = tuple(torch.zeros(1, 7, 0, 8) for _ in model.empty_past(1))
    with pytest.raises(ArtifactError, match="cannot run the model on"):
        model.logits(torch.ones(1, 1, dtype=torch.long), past=past)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no model\.onnx here"):
        OnnxModel(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_truncated_file_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    for file in folder.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if file.name == name else data)
    with pytest.raises(ArtifactError, match="cannot load") as caught:
        OnnxModel(tmp_path)
    assert "truncated" in str(caught.value.next_step)


def test_a_missing_data_file_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    with pytest.raises(ArtifactError, match="cannot load"):
        OnnxModel(tmp_path)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One product with 64 MiB of weights, as an export writes it: transposed in the graph."""
    target = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    inputs = {"input": torch.randn(2, 4096)}
    program = capture(nn.Linear(4096, 4096).eval(), inputs)
    export_onnx(
        target / "onnx",
        weights=program.weights,
        reference=None,
        graph_module=program.graph_module,
        example_inputs=inputs,
        output_names=program.outputs,
        form="plain",
        external_data_threshold=1000,
    )
    return target / "onnx"


def anonymous_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file of zeros takes its size")
def test_a_mapped_model_may_be_larger_than_memory(tmp_path: Path) -> None:
    width = 8192
    size = 4 * width * width
    count = 3 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // size + 1
    weights, nodes = [], []
    for i in range(count):
        weight = onnx.TensorProto(name=f"w{i}", data_type=onnx.TensorProto.FLOAT)
        weight.dims.extend([width, width])
        weight.data_location = onnx.TensorProto.EXTERNAL
        place = {"location": "model.onnx.data", "offset": str(i * size), "length": str(size)}
        for key, value in place.items():
            weight.external_data.add(key=key, value=value)
        weights.append(weight)
        nodes.append(onnx.helper.make_node("Transpose", [f"w{i}"], [f"t{i}"], perm=[1, 0]))
        nodes.append(onnx.helper.make_node("MatMul", [f"y{i}", f"t{i}"], [f"y{i + 1}"]))
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, width])
        for name in ("y0", f"y{count}")
    ]
    graph = onnx.helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10),
        tmp_path / "model.onnx",
    )
    with (tmp_path / "model.onnx.data").open("wb") as file:
        file.truncate(count * size)  # All zeros: next to nothing on the disk.
    # Nothing is run: that would read all of it.
    assert OnnxModel(tmp_path, mapped=True, threads=1).inputs == ("y0",)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_mapped_model_computes_the_same_and_copies_no_weights(wide_folder: Path) -> None:
    inputs = {"input": torch.randn(2, 4096)}
    before = anonymous_memory()
    mapped = OnnxModel(wide_folder, mapped=True, threads=1)
    found = mapped.run(inputs)
    taken = anonymous_memory() - before
    before = anonymous_memory()
    copied = OnnxModel(wide_folder, threads=1)
    torch.testing.assert_close(found, copied.run(inputs))
    assert taken < 2**24
    assert anonymous_memory() - before > 2**25


def test_only_a_large_model_is_compared_from_its_file(
    wide_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(session, "OnnxModel", lambda _, mapped: asked.append(mapped))
    monkeypatch.setattr(session, "_LARGE", 2**25)
    session.open_to_compare(wide_folder)
    session.open_to_compare(folder)
    assert asked == [True, False]
