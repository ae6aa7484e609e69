"""The capture of a decoder with its cache: what it reads from the model, and what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from onnx_models import without_data
from torch import nn
from zoo import ZOO

from zeroskip.ir.errors import LoweringError
from zeroskip.runtime.onnx.cache_geometry import LayerShape, is_causal_lm, read_geometry
from zeroskip.runtime.onnx.cache_graph import capture_with_cache


@pytest.mark.parametrize("name", ZOO)
def test_causal_models_are_known_by_what_they_do(name: str) -> None:
    assert is_causal_lm(ZOO[name].model()) == (ZOO[name].kind == "causal-lm")


def test_geometry_comes_from_the_cache_itself() -> None:
    # Multi-query attention: one head, which no configuration field says in so many words.
    assert read_geometry(ZOO["falcon"].model()).layers == (LayerShape((1, 16), (1, 16)),) * 2
    # A head width that is not hidden_size / heads.
    assert read_geometry(ZOO["gemma3"].model()).layers == (LayerShape((2, 24), (2, 24)),) * 2


def test_graph_computes_prefill_and_decode(small_llama: nn.Module) -> None:
    captured = capture_with_cache(small_llama)
    names = {n.target for n in captured.graph_module.graph.find_nodes(op="get_attr")}
    assert {name for name, _ in small_llama.named_parameters()} <= names
    ids = torch.randint(3, 64, (1, 5), generator=torch.Generator().manual_seed(0))
    past = captured.geometry.empty(1)
    found = []
    with torch.no_grad():
        for start, stop in ((0, 4), (4, 5)):
            logits, past = captured.graph_module(
                input_ids=ids[:, start:stop],
                attention_mask=torch.ones(1, stop, dtype=torch.long),
                position_ids=torch.arange(start, stop)[None],
                past_key_values=past,
            )
            found.append(logits)
        expected = small_llama(input_ids=ids).logits
    torch.testing.assert_close(torch.cat(found, 1), expected)


def test_tied_weights_have_one_name() -> None:
    model = ZOO["llama_tied"].model()
    graph = capture_with_cache(model).graph_module.graph
    names = {n.target for n in graph.find_nodes(op="get_attr")}
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names


def test_a_skeleton_is_captured_like_a_live_model(small_llama: nn.Module) -> None:
    skeleton = without_data(small_llama)
    captured = capture_with_cache(skeleton)
    live = capture_with_cache(small_llama)
    assert captured.geometry == live.geometry
    assert [n.target for n in captured.graph_module.graph.nodes] == [
        n.target for n in live.graph_module.graph.nodes
    ]


class _Explodes(nn.Module):
    """Answers with a cache once, then fails while it is traced."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.config = copy.deepcopy(inner.config)
        self.config.use_cache = False
        self.calls = 0

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> Any:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("boom")
        return self.inner(input_ids=input_ids, use_cache=use_cache)


def test_a_failed_capture_restores_the_model(small_llama: nn.Module) -> None:
    model = _Explodes(small_llama).eval()
    small_llama.config.use_cache = False
    with pytest.raises(LoweringError, match="cannot trace _Explodes with its cache: boom"):
        capture_with_cache(model)
    assert "forward" not in model.__dict__
    assert model.config.use_cache is False
    assert small_llama.config.use_cache is False
    small_llama.config.use_cache = True


def test_training_mode_is_refused() -> None:
    model = ZOO["llama"].model().train()
    with pytest.raises(LoweringError, match="training mode"):
        read_geometry(model)


def test_meta_parameters_are_refused() -> None:
    with pytest.raises(LoweringError, match="meta device"):
        read_geometry(ZOO["llama"].model().to("meta"))


def test_an_encoder_decoder_is_refused_with_a_reason() -> None:
    with pytest.raises(LoweringError, match="T5ForConditionalGeneration cannot be exported"):
        capture_with_cache(ZOO["t5"].model())
