"""A checkpoint directory opens without its weights, and is written back to the same bytes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim

from tests.zoo import TEXT, ZOO
from zeroskip.ir.checkpoint import open_checkpoint
from zeroskip.ir.checkpoint_keys import Converted
from zeroskip.ir.checkpoint_writer import save_checkpoint
from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.weights import OnDisk, Weights

HF_ENTRIES = [name for name, entry in ZOO.items() if entry.kind != "plain"]
MIB = 2**20


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the directory that save_pretrained wrote for an entry of the zoo."""
    root = tmp_path_factory.mktemp("saved")

    def directory(name: str) -> Path:
        if not (root / name).exists():
            model: Any = ZOO[name].model()
            model.save_pretrained(root / name)
        return root / name

    return directory


@pytest.fixture
def copied(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Returns a copy of such a directory that the test may change."""

    def directory(name: str) -> Path:
        return Path(shutil.copytree(saved(name), tmp_path / name))

    return directory


def stored(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in model(**inputs).to_tuple() if isinstance(t, Tensor)]


def materialized(model: nn.Module, weights: Weights) -> nn.Module:
    loaded = {name: nn.Parameter(weights[name], requires_grad=False) for name in weights}
    of_parameter = {id(p): loaded[name] for name, p in model.named_parameters()}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, leaf, of_parameter[id(parameter)])
    return model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


def edit_json(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = stored(directory)
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# Opening


@pytest.mark.parametrize("name", HF_ENTRIES)
def test_parameters_outputs_and_buffers_are_those_of_from_pretrained(
    name: str, saved: Callable[[str], Path]
) -> None:
    original = ZOO[name].model()
    checkpoint = open_checkpoint(saved(name))
    parameters = dict(original.named_parameters())
    assert list(checkpoint.weights) == list(parameters)
    assert same(dict(checkpoint.weights), {k: p.detach() for k, p in parameters.items()})
    assert checkpoint.unused == ()
    for key in checkpoint.weights:
        source = checkpoint.weights.source(key)
        assert (source.shape, source.dtype) == (parameters[key].shape, parameters[key].dtype)

    reference = type(checkpoint.model).from_pretrained(saved(name))
    assert same(dict(checkpoint.model.named_buffers()), dict(reference.named_buffers()))
    inputs = ZOO[name].inputs(padded=True)
    model = materialized(checkpoint.model, checkpoint.weights)
    for ours, theirs in zip(outputs(model, inputs), outputs(reference, inputs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "mixtral", "vit"])
def test_the_skeleton_exports_without_meta_devices(name: str, saved: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(saved(name))
    checkpoint.model.config.use_cache = False
    inputs = {
        key: checkpoint.fake_mode.from_tensor(t, static_shapes=True)
        for key, t in ZOO[name].inputs().items()
    }
    free = {key: {0: Dim.AUTO} for key in inputs}
    with torch.no_grad():
        exported = torch.export.export(checkpoint.model, (), inputs, dynamic_shapes=free)
    graph = exported.module(check_guards=False)
    arguments = [a for node in graph.graph.nodes for a in (*node.args, *node.kwargs.values())]
    assert torch.device("cpu") in arguments
    assert torch.device("meta") not in arguments
    assert {n for n, _ in graph.named_parameters()} == set(checkpoint.weights)
    real = ZOO[name].inputs(batch=3, padded=True)
    with torch.no_grad():
        ours = torch.func.functional_call(graph, dict(checkpoint.weights), kwargs=real)
    reference = type(checkpoint.model).from_pretrained(saved(name))
    reference.config.use_cache = False
    for one, other in zip(ours.to_tuple(), outputs(reference, real), strict=True):
        assert torch.equal(one, other)


def test_parameters_are_fake_and_buffers_are_real(saved: Callable[[str], Path]) -> None:
    model = open_checkpoint(saved("llama")).model
    assert not model.training
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(type(b) is Tensor for b in model.buffers())
    assert all(isinstance(p, FakeTensor) for p in model.parameters())


def test_fused_experts_are_converted_and_the_rest_is_on_disk(
    saved: Callable[[str], Path],
) -> None:
    weights = open_checkpoint(saved("mixtral")).weights
    kinds = {name: type(weights.source(name)) for name in weights}
    assert {n for n, kind in kinds.items() if kind is Converted} == {
        f"model.layers.{layer}.mlp.experts.{leaf}"
        for layer in (0, 1)
        for leaf in ("gate_up_proj", "down_proj")
    }
    assert set(kinds.values()) == {Converted, OnDisk}


def test_a_7b_model_opens_in_little_memory(tmp_path: Path) -> None:
    config = hf.LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {k: list(p.shape) for k, p in hf.LlamaForCausalLM(config).named_parameters()}
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        # A hole in the file: 13 GB of zeros that take no room on disk.
        file.truncate(8 + len(text) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.weights.nbytes() > 13e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
    assert checkpoint.weights["model.layers.31.mlp.down_proj.weight"].shape == (4096, 11008)


def test_nothing_stays_open(saved: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(saved("mixtral"))
    assert len(dict(checkpoint.weights)) == len(checkpoint.weights)
    opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert not [path for path in opened if path.endswith(".safetensors")]


@pytest.mark.parametrize(
    "present", [["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]]
)
def test_tied_parameters_have_one_name_whatever_the_file_calls_them(
    present: list[str], copied: Callable[[str], Path]
) -> None:
    directory = copied("llama_tied")
    embedding = stored(directory)["model.embed_tokens.weight"]

    def rename(tensors: dict[str, Tensor]) -> None:
        del tensors["model.embed_tokens.weight"]
        tensors.update({key: embedding.clone() for key in present})

    edit_tensors(directory, rename)
    weights = open_checkpoint(directory).weights
    assert "lm_head.weight" not in weights
    assert torch.equal(weights["model.embed_tokens.weight"], embedding)


def test_base_model_keys_fit_a_head_model_when_the_head_is_tied(
    copied: Callable[[str], Path],
) -> None:
    directory = copied("gpt2")
    names = set(open_checkpoint(directory).weights)

    def strip(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)

    edit_tensors(directory, strip)
    assert "h.0.ln_1.weight" in stored(directory)
    assert set(open_checkpoint(directory).weights) == names


def test_what_the_model_has_no_place_for_is_named(copied: Callable[[str], Path]) -> None:
    directory = copied("llama")
    edit_tensors(directory, lambda tensors: tensors.update(extra=torch.ones(2)))
    assert open_checkpoint(directory).unused == ("extra",)


@pytest.mark.parametrize(
    ("stored_as", "changes", "expected"),
    [
        (torch.bfloat16, {"dtype": None}, torch.bfloat16),
        (torch.float32, {"dtype": "bfloat16"}, torch.bfloat16),
        (torch.float32, {"dtype": None, "torch_dtype": "float16"}, torch.float16),
        (torch.float16, {"dtype": "float32"}, torch.float32),
    ],
)
@pytest.mark.parametrize("name", ["t5", "mixtral"])
def test_the_dtype_is_the_one_of_from_pretrained(
    name: str,
    stored_as: torch.dtype,
    changes: dict[str, Any],
    expected: torch.dtype,
    tmp_path: Path,
) -> None:
    model: Any = ZOO[name].model(dtype=stored_as)
    model.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    checkpoint = open_checkpoint(tmp_path)
    reference = type(checkpoint.model).from_pretrained(tmp_path, dtype="auto")
    assert checkpoint.model.dtype == expected
    # In float16, T5 keeps some of its linears in float32.
    assert same(dict(checkpoint.weights), dict(reference.named_parameters()))
    skeleton = {n: p.dtype for n, p in checkpoint.model.named_parameters()}
    assert skeleton == {n: p.dtype for n, p in reference.named_parameters()}


def test_generation_config_is_the_one_on_disk(copied: Callable[[str], Path]) -> None:
    directory = copied("llama")
    edit_json(directory / "generation_config.json", max_new_tokens=3)
    assert open_checkpoint(directory).model.generation_config.max_new_tokens == 3


# Refusing to open


def _break_index(directory: Path) -> None:
    shutil.move(directory / "model.safetensors", directory / "one.safetensors")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {')


def _write_index(directory: Path, content: Any) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


def _keep_half(directory: Path) -> None:
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def _move_tensor(directory: Path) -> None:
    shutil.move(directory / "model.safetensors", directory / "one.safetensors")
    index = {"weight_map": {**dict.fromkeys(stored(directory), "one.safetensors")}}
    index["weight_map"]["elsewhere"] = "one.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _only_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _drop(key: str) -> Callable[[Path], None]:
    return lambda d: edit_tensors(d, lambda tensors: tensors.pop(key))


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "config.json", **changes)


HEAD = "lm_head.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
REFUSALS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no-config": ("llama", lambda d: (d / "config.json").unlink(), "config.json"),
    "bad-config": ("llama", lambda d: (d / "config.json").write_text("{"), "config.json"),
    "list-config": ("llama", lambda d: (d / "config.json").write_text("[]"), "not an object"),
    "unknown-type": ("llama", _config(model_type="unheard"), "cannot read the config"),
    "no-class": ("llama", _config(architectures=None), "no model class None"),
    "wrong-class": ("llama", _config(architectures=["Llama9"]), "no model class 'Llama9'"),
    "not-a-model": ("llama", _config(architectures=["LlamaConfig"]), "no model class"),
    "odd-config": ("opt", _config(num_attention_heads=5), "OPTForCausalLM cannot be built"),
    "quantized": ("llama", _config(quantization_config={"bits": 4}), "quantized"),
    "adapter": ("llama", lambda d: (d / "adapter_config.json").write_text("{}"), "adapter"),
    "no-weights": ("llama", lambda d: (d / "model.safetensors").unlink(), "neither"),
    "pickle": ("llama", _only_pickle, "pickle"),
    "truncated": ("llama", _keep_half, "model.safetensors"),
    "broken-index": ("llama", _break_index, "index.json"),
    "empty-index": ("llama", lambda d: _write_index(d, {}), "no weight_map"),
    "no-shard": (
        "llama",
        lambda d: _write_index(d, {"weight_map": {HEAD: "two.safetensors"}}),
        "two.safetensors",
    ),
    "escaping-shard": (
        "llama",
        lambda d: _write_index(d, {"weight_map": {HEAD: "../two.safetensors"}}),
        "outside of the directory",
    ),
    "stale-index": ("llama", _move_tensor, "the first is elsewhere"),
    "missing": ("llama", _drop(HEAD), f"no tensor for {HEAD}"),
    "missing-expert": ("mixtral", _drop(EXPERT), "experts.gate_up_proj"),
    "shape": ("llama", _config(intermediate_size=120), "the model expects [120, 64]"),
    "float8": (
        "llama",
        lambda d: edit_tensors(d, lambda t: t.update({HEAD: t[HEAD].to(torch.float8_e4m3fn)})),
        "F8_E4M3",
    ),
    "untied": (
        "llama_tied",
        lambda d: edit_tensors(d, lambda t: t.update({HEAD: torch.zeros(160, 64)})),
        "different values",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_damaged_checkpoint_is_refused(case: str, copied: Callable[[str], Path]) -> None:
    name, damage, words = REFUSALS[case]
    directory = copied(name)
    damage(directory)
    with pytest.raises(ArtifactError) as refusal:
        open_checkpoint(directory)
    assert words in str(refusal.value)
    assert refusal.value.where


def test_buffers_computed_from_weights_are_refused(tmp_path: Path) -> None:
    model = hf.IBertModel(hf.IBertConfig(**TEXT, quant_mode=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="is computed from them") as refusal:
        open_checkpoint(tmp_path)
    assert "live model" in str(refusal.value)


# Writing


@pytest.mark.parametrize("name", HF_ENTRIES)
def test_the_checkpoint_written_is_the_one_that_was_opened(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    original = saved(name)
    checkpoint = open_checkpoint(original)
    target = tmp_path / "out"
    save_checkpoint(
        original, checkpoint.weights, checkpoint.model, target, max_shard_bytes=MIB // 8
    )
    assert len(list(target.glob("*.safetensors"))) > 1
    assert same(stored(target), stored(original))
    configs = [json.loads((d / "config.json").read_text()) for d in (original, target)]
    assert configs[0] == configs[1]
    reloaded = type(checkpoint.model).from_pretrained(target)
    assert same(dict(reloaded.named_parameters()), dict(checkpoint.weights))


@pytest.mark.parametrize("name", ["llama_tied", "gpt_neox", "mixtral", "vit", "t5"])
def test_a_live_model_needs_no_source_directory(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    model: Any = ZOO[name].model()
    save_checkpoint(None, Weights(dict(model.named_parameters())), model, tmp_path / "out")
    assert same(stored(tmp_path / "out"), stored(saved(name)))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {path.name for path in saved(name).iterdir()}
    reloaded = type(model).from_pretrained(tmp_path / "out")
    assert same(reloaded.state_dict(), model.state_dict())


def test_replaced_weights_and_companion_files_are_written(
    copied: Callable[[str], Path], tmp_path: Path
) -> None:
    source = copied("mixtral")
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.bin").write_text("weights of someone else")
    edit_json(source / "config.json", sparsity_config={"format": "dense"})
    checkpoint = open_checkpoint(source)
    checkpoint.model.config.use_cache = False
    name = "model.layers.1.mlp.experts.down_proj"
    pruned = checkpoint.weights.replace({name: torch.zeros_like(checkpoint.weights[name])})
    save_checkpoint(source, pruned, checkpoint.model, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "notes.bin").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "sparsity_config" not in config
    assert config["use_cache"] is True
    reloaded = hf.MixtralForCausalLM.from_pretrained(tmp_path / "out")
    assert same(dict(reloaded.named_parameters()), dict(pruned))


def test_a_cast_model_is_reloaded_in_its_new_dtype(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    model: Any = ZOO["llama"].model(dtype=torch.bfloat16)
    weights = Weights(dict(model.named_parameters()))
    save_checkpoint(saved("llama"), weights, model, tmp_path / "out")
    reloaded = hf.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert same(dict(reloaded.named_parameters()), dict(weights))


# Refusing to write


def test_a_target_that_is_in_use_is_left_alone(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(saved("llama"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "full", tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArtifactError) as refusal:
            save_checkpoint(None, checkpoint.weights, checkpoint.model, target)
        assert str(target) in str(refusal.value)
        assert refusal.value.next_step
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]


def test_an_empty_target_is_used(saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved("llama"))
    (tmp_path / "out").mkdir()
    save_checkpoint(None, checkpoint.weights, checkpoint.model, tmp_path / "out")
    assert same(stored(tmp_path / "out"), stored(saved("llama")))


def test_a_failure_halfway_leaves_nothing(copied: Callable[[str], Path], tmp_path: Path) -> None:
    source = copied("llama")
    checkpoint = open_checkpoint(source)
    _keep_half(source)
    with pytest.raises(ArtifactError, match="cannot read tensor"):
        save_checkpoint(source, checkpoint.weights, checkpoint.model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_weights_of_another_model_are_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved("llama"))
    weights, model = checkpoint.weights, checkpoint.model
    wrong: list[tuple[Weights, nn.Module, str]] = [
        (weights.subset([n for n in weights if n != HEAD]), model, "the weights lack it"),
        (weights.replace({"other": torch.zeros(1)}), model, "no such parameter"),
        (weights.replace({HEAD: torch.zeros(3, 3)}), model, "[3, 3]"),
        (weights.replace({HEAD: weights[HEAD].half()}), model, "torch.float16"),
        (Weights(dict(ZOO["mlp"].model().named_parameters())), ZOO["mlp"].model(), "Mlp is not"),
    ]
    for bad, owner, words in wrong:
        with pytest.raises(ArtifactError) as refusal:
            save_checkpoint(None, bad, owner, tmp_path / "out")
        assert words in str(refusal.value)
    assert not list(tmp_path.iterdir())
