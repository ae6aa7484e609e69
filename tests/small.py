"""Models small enough to run every pass on each of them: one block, and what makes it awkward."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import transformers as hf
from torch import Tensor, nn

from tests.kept_traces import capture_once
from tests.zoo import GROUPED, SPECIAL, VOCABULARY, ZOO, Inputs, randomize
from zeroskip.ir.program import Program


class Residual(nn.Module):
    """Two residual branches with tied weights and different biases, and a constant expression."""

    angle: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angle", torch.linspace(0, 1, 16))
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16, bias=False)
        self.again = nn.Linear(16, 24)
        self.again.weight = self.up.weight

    def forward(self, features: Tensor) -> Tensor:
        hidden = features * torch.cos(self.angle)
        hidden = hidden + self.down(torch.relu(self.up(hidden)))
        return hidden + self.down(torch.relu(self.again(hidden)))


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 1}))


def _mixtral() -> nn.Module:
    config = {**GROUPED, "num_hidden_layers": 1, "num_local_experts": 4}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**config, num_experts_per_tok=2))


def _gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**SPECIAL, **sizes))


def _features(rows: int) -> Inputs:
    return {"features": torch.randn(rows, 5, 16, generator=torch.Generator().manual_seed(rows))}


def _tokens(rows: int) -> Inputs:
    return ZOO["llama"].inputs(rows, 9, padded=rows == 3)


def _images(rows: int) -> Inputs:
    return ZOO["convnet"].inputs(rows)


SMALL: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "mlp": (Residual, _features),
    "convnet": (lambda: ZOO["convnet"].model(), _images),
    "llama": (_llama, _tokens),
    "gpt2": (_gpt2, _tokens),
    "moe": (_mixtral, _tokens),
}


def small_model(name: str) -> nn.Module:
    """Returns a fresh model in eval mode; the same numbers each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SMALL[name][0]()
        randomize(model)
    return model.eval()


@functools.cache
def small_program(name: str, dtype: torch.dtype = torch.float32) -> Program:
    """Captures a small model once, with two calibration batches, one of them with padding."""
    batches = [
        {n: t.to(dtype) if t.is_floating_point() else t for n, t in SMALL[name][1](rows).items()}
        for rows in (2, 3)
    ]
    program = capture_once(small_model(name).to(dtype), batches[0])
    return dataclasses.replace(program, calibration=tuple(batches))
