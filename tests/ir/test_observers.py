"""Observers record exactly what enters each linear, without padding."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.zoo import ZOO, Inputs
from zeroskip.ir.capture import cache_disabled, capture
from zeroskip.ir.errors import CalibrationError
from zeroskip.ir.linears import find_linears
from zeroskip.ir.observers import Observer, insert_observers, read_observers
from zeroskip.ir.program import Program
from zeroskip.ir.statistics import EdgeStatistics, Statistics
from zeroskip.ir.verify import verify


def observe(program: Program, batches: list[Inputs], gram: bool = False) -> Statistics:
    linears = find_linears(program)
    observed = insert_observers(program, linears, gram)
    for batch in batches:
        observed.run(batch)
    return read_observers(observed, linears, program)


def inputs_of(model: nn.Module, batches: list[Inputs]) -> dict[str, list[Tensor]]:
    """What PyTorch's own hooks see in front of each projection, batch by batch."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    hooks = [
        module.register_forward_hook(
            lambda _, args, out, name=name: seen[f"{name}.weight"].append(args[0].detach())
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    with cache_disabled(model), torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def tokens(values: list[Tensor], batches: list[Inputs]) -> Tensor:
    """float64 [tokens, channels] of everything that is not padding."""
    rows = [
        v[b["attention_mask"].bool()]
        if v.shape[:2] == b["attention_mask"].shape
        else v.reshape(-1, v.shape[-1])
        for v, b in zip(values, batches, strict=True)
    ]
    return torch.cat(rows).double()


def assert_edge(edge: EdgeStatistics, expected: Tensor) -> None:
    assert edge.count == expected.shape[0]
    torch.testing.assert_close(edge.total, expected.sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        edge.total_of_squares, expected.square().sum(0), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(edge.abs_max, expected.abs().amax(0).float())


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_sums_equal_those_over_the_tokens(name: str, captured: Callable[[str], Program]) -> None:
    program = captured(name)
    assert program.model is not None
    batches = [ZOO[name].inputs(2, 9, padded=True), ZOO[name].inputs(3, 5, padded=True)]
    padding = sum(int((b["attention_mask"] == 0).sum()) for b in batches)
    assert padding == 4
    seen = inputs_of(program.model, batches)
    edges = observe(program, batches).edges
    checked = 0
    for linear, edge in edges.items():
        if "pooler" in linear or linear not in seen:
            continue
        assert edge.count == 33 - padding
        assert_edge(edge, tokens(seen[linear], batches))
        checked += 1
    assert checked >= 8


def test_the_first_token_alone_is_not_masked(captured: Callable[[str], Program]) -> None:
    """BERT's pooler sees one row for each sequence: no mask has that shape."""
    batch = ZOO["bert"].inputs(3, 5, padded=True)
    assert observe(captured("bert"), [batch]).edges["pooler.dense.weight"].count == 3


def test_the_gram_matrix(captured: Callable[[str], Program]) -> None:
    program = captured("llama")
    assert program.model is not None
    batches = [ZOO["llama"].inputs(2, 9, padded=True)]
    seen = inputs_of(program.model, batches)
    for name, edge in observe(program, batches, gram=True).edges.items():
        x = tokens(seen[name], batches).float()
        assert edge.gram is not None
        torch.testing.assert_close(edge.gram, x.T @ x)
    assert observe(program, batches).edges["lm_head.weight"].gram is None


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_see_the_tokens_routed_to_them(
    name: str, captured: Callable[[str], Program]
) -> None:
    program = captured(name)
    model: Any = program.model
    batch = ZOO[name].inputs(2, 9, padded=True)
    routed: list[tuple[Tensor, Tensor]] = []

    def hook(gate: Any, args: Any, out: Any) -> None:
        hidden = args[0].reshape(-1, args[0].shape[-1])
        routed.append((hidden, (hidden @ gate.weight.T).topk(2).indices))

    hooks = [layer.mlp.gate.register_forward_hook(hook) for layer in model.model.layers]
    with cache_disabled(model), torch.no_grad():
        model(**batch)
    for handle in hooks:
        handle.remove()
    edges = observe(program, [batch]).edges
    real = batch["attention_mask"].reshape(-1).bool()
    for layer, (hidden, experts) in enumerate(routed):
        prefix = f"model.layers.{layer}.mlp.experts"
        total = 0
        for e in range(4):
            mine = (experts == e).any(1) & real
            assert_edge(edges[f"{prefix}.gate_up_proj[{e}]"], hidden[mine].double())
            assert edges[f"{prefix}.down_proj[{e}]"].count == int(mine.sum())
            total += int(mine.sum())
        assert total == 2 * int(real.sum())
        assert edges[f"model.layers.{layer}.mlp.gate.weight"].count == int(real.sum())


def test_linears_that_share_an_edge_share_an_observer(captured: Callable[[str], Program]) -> None:
    program = captured("llama")
    observed = insert_observers(program, find_linears(program))
    # For each layer: q k v, o, gate up, down; and the head.
    assert len(observed.graph.find_nodes(op="call_module")) == 2 * 4 + 1
    edges = observe(program, [ZOO["llama"].inputs()]).edges
    layer = "model.layers.0"
    q, k, v = (edges[f"{layer}.self_attn.{p}_proj.weight"] for p in "qkv")
    assert q is k is v
    assert edges[f"{layer}.mlp.gate_proj.weight"] is edges[f"{layer}.mlp.up_proj.weight"]
    assert q is not edges[f"{layer}.mlp.up_proj.weight"]


def test_observers_change_nothing(arch: str, captured: Callable[[str], Program]) -> None:
    program = captured(arch)
    nodes = len(program.graph.nodes)
    observed = insert_observers(program, find_linears(program))
    verify(observed)
    assert observed.level == "annotated"
    assert len(program.graph.nodes) == nodes
    assert not any(isinstance(m, Observer) for m in program.graph_module.modules())
    inputs = ZOO[arch].inputs(3, 6, padded=True)
    expected = program.run(inputs)
    for name, value in observed.run(inputs).items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("target", [7, 9], ids=["shorter", "equal"])
def test_the_encoders_mask_is_not_the_decoders(
    target: int, captured: Callable[[str], Program]
) -> None:
    """A decoder input as long as the encoder's must not be taken for the encoder's tokens."""
    inputs = ZOO["t5"].inputs(2, 9, padded=True)
    inputs["decoder_input_ids"] = torch.randint(
        3, 150, (2, target), generator=torch.Generator().manual_seed(0)
    )
    program = captured("t5")
    if inputs["decoder_input_ids"].shape != program.example_inputs["decoder_input_ids"].shape:
        assert program.model is not None
        program = capture(program.model, inputs)
    real = int(inputs["attention_mask"].sum())
    assert real == 15
    edges = observe(program, [inputs]).edges
    assert edges["encoder.block.1.layer.0.SelfAttention.q.weight"].count == real
    assert edges["decoder.block.1.layer.0.SelfAttention.q.weight"].count == 2 * target
    assert edges["decoder.block.1.layer.2.DenseReluDense.wi.weight"].count == 2 * target
    cross = "decoder.block.1.layer.1.EncDecAttention"
    assert edges[f"{cross}.q.weight"].count == 2 * target
    assert edges[f"{cross}.k.weight"].count == real
    assert edges[f"{cross}.v.weight"].count == real


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_linear(
    value: float, captured: Callable[[str], Program]
) -> None:
    program = captured("mlp")
    weight = program.weights["up.weight"].clone()
    weight[3] = value
    broken = program.with_weights({"up.weight": weight})
    with pytest.raises(CalibrationError, match="NaN or inf") as raised:
        observe(broken, [ZOO["mlp"].inputs()])
    assert raised.value.where == "mix.weight"


def test_padding_may_hold_anything(captured: Callable[[str], Program]) -> None:
    observer = Observer(4)
    x = torch.randn(2, 3, 4)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    clean = x[mask.bool()].double()
    x[0, 0] = float("nan")
    assert observer(x, mask) is x
    assert_edge(observer.statistics(), clean)


def test_no_token_at_all() -> None:
    observer = Observer(4, gram=True)
    observer(torch.randn(2, 3, 4), torch.zeros(2, 3))
    edge = observer.statistics()
    assert edge.count == 0
    assert edge.root_mean_square().tolist() == [0] * 4
    assert edge.mean().tolist() == edge.variance().tolist() == [0] * 4


def test_variance_of_a_large_offset() -> None:
    """E[x^2] - E[x]^2 cancels in float32: a channel at 1e4 with a spread of 1."""
    observer = Observer(1)
    x = 1e4 + torch.randn(4096, 1, generator=torch.Generator().manual_seed(0))
    for part in x.split(512):
        observer(part)
    edge = observer.statistics()
    torch.testing.assert_close(
        edge.variance(), x.double().var(0, unbiased=False), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(edge.mean(), x.double().mean(0), rtol=1e-12, atol=0)


def test_experts_by_offsets_and_by_stack() -> None:
    rows = torch.randn(7, 3)
    by_offsets = Observer(3, experts=3)
    by_offsets(rows, offsets=torch.tensor([2, 2, 7], dtype=torch.int32))
    assert by_offsets.count.tolist() == [2, 0, 5]
    assert_edge(by_offsets.statistics(2), rows[2:].double())
    stacked = Observer(3, experts=2)
    stacked(rows[:6].view(2, 3, 3), torch.tensor([[1, 0, 1], [0, 0, 1]]))
    assert stacked.count.tolist() == [2, 1]
    assert_edge(stacked.statistics(1), rows[5:6].double())


def test_a_program_without_mask_counts_every_row(captured: Callable[[str], Program]) -> None:
    program = dataclasses.replace(captured("llama"), padding_masks=())
    batch = ZOO["llama"].inputs(2, 9, padded=True)
    assert {edge.count for edge in observe(program, [batch]).edges.values()} == {18}


def test_float32_gram_matrices_hold_over_many_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    observer = Observer(24, gram=True)
    exact = torch.zeros(24, 24, dtype=torch.float64)
    for _ in range(128):  # As many tokens as 128 windows of 1024.
        x = torch.randn(1024, 24, generator=generator) + 5
        x[:, 3] *= 1000
        observer(x)
        exact += x.double().T @ x.double()
    gram = observer.statistics().gram
    assert gram is not None
    size = exact.diagonal().sqrt()
    assert float(((gram.double() - exact) / size / size[:, None]).abs().max()) < 5e-6
