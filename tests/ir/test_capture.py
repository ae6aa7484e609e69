"""Capture: any model becomes a Program that computes the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.zoo import GROUPED, TRANSLATION, ZOO
from zeroskip.ir.capture import cache_disabled, capture
from zeroskip.ir.checkpoint import open_checkpoint
from zeroskip.ir.errors import CaptureError
from zeroskip.ir.program import Batch, Program
from zeroskip.ir.weights import InMemory, OnDisk

aten = torch.ops.aten


def eager(model: nn.Module, inputs: Batch) -> list[Tensor]:
    with cache_disabled(model), torch.no_grad():
        return [t for t in pytree.tree_leaves(model(**inputs)) if isinstance(t, Tensor)]


def assert_same_bits(program: Program, model: nn.Module, inputs: Batch) -> None:
    found, expected = program.run(inputs), eager(model, inputs)
    assert len(found) == len(expected)
    for (name, ours), theirs in zip(found.items(), expected, strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name


class Wrapped(nn.Module):
    """A module around a function of the input and of one weight [6, 8]."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


class Chooses(nn.Module):
    """Takes a branch that depends on a value."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that the error must name
            return x + 1
        return x - 1


def chooses_at() -> str:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    number = next(i for i, line in enumerate(lines, 1) if "the line that the error" in line)
    return f"{Path(__file__).name}:{number}"


# What every model of the zoo promises


@pytest.mark.parametrize("padded", [False, True])
def test_program_equals_eager_bitwise(
    arch: str, captured: Callable[[str], Program], padded: bool
) -> None:
    program = captured(arch)
    assert program.model is not None
    for batch, sequence in ZOO[arch].sizes:
        assert_same_bits(program, program.model, ZOO[arch].inputs(batch, sequence, padded))


def test_parameters_are_the_models_own_objects(
    arch: str, captured: Callable[[str], Program]
) -> None:
    program = captured(arch)
    assert program.model is not None
    parameters = dict(program.model.named_parameters())
    assert list(program.weights) == list(parameters)
    for name, parameter in parameters.items():
        source = program.weights.source(name)
        assert isinstance(source, InMemory)
        assert source.tensor is parameter
    for name in program.read_weights():
        assert program.graph_module.get_parameter(name) is parameters[name]


def test_each_tensor_is_read_under_one_name_just_before_its_first_use(
    arch: str, captured: Callable[[str], Program]
) -> None:
    graph = captured(arch).graph
    reads = graph.find_nodes(op="get_attr")
    assert len({str(node.target) for node in reads}) == len(reads)
    for node in reads:
        following = node.next
        while following.op == "get_attr":
            following = following.next
        assert following in node.users


def test_nothing_mutates_and_nothing_is_asserted(
    arch: str, captured: Callable[[str], Program]
) -> None:
    for node in captured(arch).graph.nodes:
        assert node.target is not aten._assert_tensor_metadata.default
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable, node.format_node()


def test_batch_and_sequence_are_symbols_that_inputs_share(
    arch: str, captured: Callable[[str], Program]
) -> None:
    shapes = {
        str(node.target): node.meta["val"].shape
        for node in captured(arch).graph.find_nodes(op="placeholder")
    }
    batches = {str(shape[0]) for shape in shapes.values()}
    assert len(batches) == 1
    assert not batches.pop().isdigit()
    if {"input_ids", "attention_mask"} <= shapes.keys():
        assert str(shapes["input_ids"]) == str(shapes["attention_mask"])
        assert not str(shapes["input_ids"][1]).isdigit()
        assert captured(arch).padding_masks == ("attention_mask",)


# Configurations and shapes that are not in the zoo


def test_tied_parameters_have_one_name(captured: Callable[[str], Program]) -> None:
    program = captured("llama_tied")
    assert "lm_head.weight" not in program.weights
    assert "lm_head.weight" not in {str(n.target) for n in program.graph.nodes}
    (read,) = [n for n in program.graph.nodes if n.target == "model.embed_tokens.weight"]
    assert {n.target for n in read.users} == {aten.embedding.default, aten.linear.default}


def test_one_layer() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 1})).eval()
    program = capture(model, ZOO["llama"].inputs())
    assert_same_bits(program, model, ZOO["llama"].inputs(3, 4, padded=True))


def test_parameters_that_are_never_read_stay_weights() -> None:
    model = Wrapped(torch.nn.functional.linear).eval()
    model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    program = capture(model, {"x": torch.randn(2, 8)})
    assert list(program.weights) == ["weight", "spare"]
    assert program.read_weights() == ("weight",)


def test_outputs_are_named_by_key_and_by_position() -> None:
    def keyed(x: Tensor, w: Tensor) -> Any:
        return {"logits": x @ w.T, "nested": (x + 1, x + 2)}

    program = capture(Wrapped(keyed).eval(), {"x": torch.randn(2, 8)})
    assert program.outputs == ("logits", "nested.0", "nested.1")
    pair = capture(Wrapped(lambda x, w: (x @ w.T, x)).eval(), {"x": torch.randn(2, 8)})
    assert pair.outputs == ("output_0", "output_1")


def test_an_input_may_have_the_name_of_an_operator() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, linear: Tensor, add: Tensor) -> Tensor:
            return self.fc(linear) + add + self.fc(add)

    model = Clash().eval()
    inputs = {"linear": torch.randn(2, 8), "add": torch.randn(2, 8)}
    program = capture(model, inputs)
    program.graph.lint()
    names = [node.name for node in program.graph.nodes]
    assert len(set(names)) == len(names)
    assert_same_bits(program, model, inputs)


def test_inputs_that_do_not_fit_are_refused(captured: Callable[[str], Program]) -> None:
    with pytest.raises(Exception, match=r"missing \['features'\], unknown \['x'\]"):
        captured("mlp").run({"x": torch.zeros(2, 3, 13)})


# In-place operators


def alias_of_an_alias(x: Tensor, w: Tensor) -> Tensor:
    hidden = x @ w.T
    view = hidden.unsqueeze(0).transpose(1, 2)
    hidden.add_(1)
    return view * 2


def part_of_a_split(x: Tensor, w: Tensor) -> Tensor:
    hidden = x @ w.T
    first, _ = hidden.split(3, -1)
    hidden.mul_(3)
    return first + 1


def through_idle_dropout(x: Tensor, w: Tensor) -> Tensor:
    hidden = x @ w.T
    dropped = torch.nn.functional.dropout(hidden, 0.5, training=False)
    dropped.add_(1)
    return hidden * 2


def no_alias(x: Tensor, w: Tensor) -> Tensor:
    hidden = x @ w.T
    hidden.add_(1)
    hidden.mul_(2)
    return hidden + hidden.relu_()


@pytest.mark.parametrize(
    "function", [alias_of_an_alias, part_of_a_split, through_idle_dropout, no_alias]
)
def test_in_place_operators_keep_their_meaning(
    function: Callable[[Tensor, Tensor], Tensor],
) -> None:
    model = Wrapped(function).eval()
    program = capture(model, {"x": torch.randn(2, 8)})
    assert_same_bits(program, model, {"x": torch.randn(3, 8)})


def test_in_place_operators_without_alias_become_functional() -> None:
    program = capture(Wrapped(no_alias).eval(), {"x": torch.randn(2, 8)})
    targets = [str(node.target) for node in program.graph.nodes]
    assert "aten.add.Tensor" in targets
    assert not [t for t in targets if "_." in t]


# use_cache


class Fails(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise ValueError("planted")


def caches(model: nn.Module) -> list[tuple[int, bool]]:
    return [
        (id(m.config), m.config.use_cache)
        for m in model.modules()
        if hasattr(getattr(m, "config", None), "use_cache")
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_use_cache_is_restored_on_every_configuration(fails: bool) -> None:
    model: Any = hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=16, d_kv=8, d_ff=16, num_heads=2, vocab_size=160, num_layers=1, **TRANSLATION
        )
    ).eval()
    # Each half has its own copy; one that was off must not be switched on.
    model.encoder.config.use_cache = False
    model.decoder.config.use_cache = True
    if fails:
        model.decoder.block[0] = Fails().eval()
    before = caches(model)
    assert {value for _, value in before} == {True, False}
    if fails:
        with pytest.raises(CaptureError, match="planted"):
            capture(model, ZOO["t5"].inputs())
    else:
        capture(model, ZOO["t5"].inputs())
    assert caches(model) == before


# Refusals


def test_training_mode_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"training mode[\s\S]*model\.eval\(\)"):
        capture(ZOO["mlp"].model().train(), ZOO["mlp"].inputs())


def test_no_example_inputs_is_refused() -> None:
    with pytest.raises(CaptureError, match="no example inputs"):
        capture(ZOO["mlp"].model(), {})


def test_unknown_input_is_refused() -> None:
    with pytest.raises(CaptureError, match="cannot be traced"):
        capture(ZOO["mlp"].model(), {"nonsense": torch.zeros(2, 3, 13)})


def test_control_flow_on_values_is_refused_with_module_and_line() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.gate = Chooses()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.gate(self.first(x))
            return result

    with pytest.raises(CaptureError) as raised:
        capture(Outer().eval(), {"x": torch.randn(2, 8)})
    assert raised.value.where is not None
    assert "gate (Chooses)" in raised.value.where
    assert raised.value.where.endswith(chooses_at())
    assert "independent of tensor values" in str(raised.value)


def test_given_dynamic_shapes_are_not_widened() -> None:
    model = ZOO["mlp"].model()
    program = capture(model, ZOO["mlp"].inputs(), dynamic_shapes={"features": {}})
    (placeholder,) = program.graph.find_nodes(op="placeholder")
    assert tuple(placeholder.meta["val"].shape) == (2, 9, 13)


# From a directory


@pytest.mark.parametrize("name", ["llama_tied", "gpt_neox"])
def test_a_checkpoint_is_captured_without_loading_it(name: str, tmp_path: Path) -> None:
    live: Any = ZOO[name].model()
    live.save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    inputs = ZOO[name].inputs()
    fake = {k: checkpoint.fake_mode.from_tensor(t, static_shapes=True) for k, t in inputs.items()}
    program = capture(checkpoint.model, inputs, weights=checkpoint.weights, trace_inputs=fake)
    for key in program.read_weights():
        assert isinstance(program.weights.source(key), OnDisk)
    for node in program.graph.nodes:
        for argument in pytree.tree_leaves((node.args, node.kwargs)):
            assert not (isinstance(argument, torch.device) and argument.type == "meta"), node
    assert all(type(t) is Tensor for t in program.example_inputs.values())
    for batch, sequence in ZOO[name].sizes:
        assert_same_bits(program, live, ZOO[name].inputs(batch, sequence, padded=True))
