"""A decoder with 2:4 linears on a CUDA device: decode, prefill and memory against the dense one.

    python benchmarks/gpu_model.py --table runtime/kernels/gpu_table.json --out gpu_model.json

The model is a LLaMA of random weights in plain PyTorch, its projections of the same input fused in
both forms and its head dense in both. A decode step is one CUDA graph: every sequence takes one
token at the end of a full cache. Both forms are timed in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_linear import describe_machine, make_weight
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from zeroskip.ir.fragments import to_fragments
from zeroskip.ir.semi_structured import SemiStructuredWeight
from zeroskip.runtime import gpu_dispatch, gpu_timing
from zeroskip.runtime.kernels import linear_24


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head: int
    vocabulary: int


SHAPES = {
    "llama-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 64, 49152),
}


class Sparse(nn.Module):
    """A 2:4 linear in fragment form."""

    def __init__(self, weight: SemiStructuredWeight) -> None:
        super().__init__()
        values, codes = to_fragments(weight)
        self.register_buffer("values", values)
        self.register_buffer("codes", codes)
        self.rows = weight.rows

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.zeroskip.linear_24(x, self.values, self.codes, None, self.rows)


class Dense(nn.Module):
    """The same linear, dense."""

    def __init__(self, weight: SemiStructuredWeight) -> None:
        super().__init__()
        self.register_buffer("weight", weight.unpack())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def gate(x: Tensor) -> Tensor:
    gates, ups = x.chunk(2, -1)
    return F.silu(gates) * ups


def add_norm(x: Tensor, residual: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, F.rms_norm(total, total.shape[-1:], gain, 1e-5)


class Layer(nn.Module):
    """One decoder layer with its part of the cache."""

    def __init__(self, shape: Shape, make: Any, weights: list[SemiStructuredWeight]) -> None:
        super().__init__()
        self.shape = shape
        self.qkv, self.o, self.gate_up, self.down = (make(weight) for weight in weights)
        self.norms = nn.Parameter(torch.ones(2, shape.hidden), requires_grad=False)

    def forward(
        self, x: Tensor, residual: Tensor, turn: tuple[Tensor, Tensor], cache: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        shape, (batch, length) = self.shape, x.shape[:2]
        residual, x = add_norm(x, residual, self.norms[0])
        heads = self.qkv(x).view(batch, length, -1, shape.head).transpose(1, 2)
        query, key, value = heads.split([shape.heads, shape.key_heads, shape.key_heads], 1)
        query, key = rotate(query, *turn), rotate(key, *turn)
        cache[0].index_copy_(2, at, key)
        cache[1].index_copy_(2, at, value)
        causal = length > 1
        keys, values = (cache[0], cache[1]) if not causal else (key, value)
        seen = F.scaled_dot_product_attention(
            query, keys, values, is_causal=causal, enable_gqa=True
        )
        x = self.o(seen.transpose(1, 2).reshape(batch, length, -1))
        residual, x = add_norm(x, residual, self.norms[1])
        return self.down(gate(self.gate_up(x))), residual


class Decoder(nn.Module):
    """All layers and the head."""

    def __init__(self, shape: Shape, layers: list[Layer], embedding: Tensor, head: Tensor) -> None:
        super().__init__()
        self.shape, self.layers = shape, nn.ModuleList(layers)
        self.embedding, self.head = embedding, head
        self.norm = torch.ones(shape.hidden, device=head.device, dtype=head.dtype)
        half = shape.head // 2
        pace = 500000.0 ** (-torch.arange(half, device=head.device) / half)
        angles = torch.arange(8192, device=head.device)[:, None] * pace
        self.cos, self.sin = angles.cos().to(head.dtype), angles.sin().to(head.dtype)

    def forward(self, ids: Tensor, at: Tensor, caches: Tensor) -> Tensor:
        x = F.embedding(ids, self.embedding)
        turn = self.cos[at], self.sin[at]
        residual = torch.zeros_like(x)
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, turn, cache, at)
        last = add_norm(x[:, -1], residual[:, -1], self.norm)[1]
        return F.linear(last, self.head)


def build(shape: Shape) -> dict[str, Decoder]:
    """Returns the dense and the sparse form of one random model."""
    kept: dict[str, list[Layer]] = {"dense": [], "sparse": []}
    width = (shape.heads + 2 * shape.key_heads) * shape.head
    sizes = (
        (width, shape.hidden),
        (shape.hidden, shape.heads * shape.head),
        (2 * shape.inner, shape.hidden),
        (shape.hidden, shape.inner),
    )
    for _ in range(shape.layers):
        weights = [
            make_weight(rows, columns, torch.bfloat16, "cuda", scale=0.02)
            for rows, columns in sizes
        ]
        kept["dense"].append(Layer(shape, Dense, weights).to("cuda", torch.bfloat16))
        kept["sparse"].append(Layer(shape, Sparse, weights).to("cuda", torch.bfloat16))
    embedding, head = (
        torch.randn(shape.vocabulary, shape.hidden, device="cuda", dtype=torch.bfloat16) * 0.02
        for _ in range(2)
    )
    return {name: Decoder(shape, layers, embedding, head) for name, layers in kept.items()}


def count_bytes(model: Decoder) -> int:
    """Returns the bytes of everything that the layers and the head hold."""
    held = [*model.layers.buffers(), *model.layers.parameters(), model.head, model.embedding]
    return sum(each.numel() * each.element_size() for each in held)


def measure(models: dict[str, Decoder], batch: int, length: int, context: int) -> dict[str, Any]:
    """Times one forward of both forms in turn, each as a CUDA graph."""
    shape = models["dense"].shape
    caches = torch.randn(
        shape.layers, 2, batch, shape.key_heads, context, shape.head,
        device="cuda", dtype=torch.bfloat16,
    )  # fmt: skip
    ids = torch.randint(0, shape.vocabulary, (batch, length), device="cuda")
    at = torch.arange(context - length, context, device="cuda")
    outputs, graphs = {}, {}
    for name, model in models.items():
        outputs[name] = model(ids, at, caches)
        graphs[name] = gpu_timing.capture([lambda model=model: model(ids, at, caches)])
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(12):
        for name, graph in graphs.items():
            times[name].append(gpu_timing.replay(graph))
    found = {name: median(each[2:]) for name, each in times.items()}
    dense = outputs["dense"].float()
    difference = float((outputs["sparse"].float() - dense).norm() / dense.norm())
    return {
        "batch": batch,
        "tokens": length,
        "context": context,
        "dense_ms": found["dense"] / 1e3,
        "sparse_ms": found["sparse"] / 1e3,
        "speedup": found["dense"] / found["sparse"],
        "sparse_tokens_per_s": batch * length / found["sparse"] * 1e6,
        "dense_tokens_per_s": batch * length / found["dense"] * 1e6,
        "logits_differ": difference,
    }


def main() -> None:
    global rotate, gate, add_norm
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu_model.json"))
    parser.add_argument("--table", type=Path, help="winners by gpu_linear.py, else the package's")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer, to try it")
    parser.add_argument("--eager", action="store_true", help="leave elementwise operations unfused")
    args = parser.parse_args()
    if args.table:
        stored = json.loads(args.table.read_text())
        linear_24.use_table(gpu_dispatch.Table.from_json(stored))
    if not args.eager:
        rotate, gate, add_norm = (
            torch.compile(each, dynamic=False) for each in (rotate, gate, add_norm)
        )
        torch._dynamo.config.recompile_limit = 64
    begin = time.time()
    result: dict[str, Any] = {"machine": describe_machine(), "fused": not args.eager, "models": []}
    for name in args.shapes:
        shape = SHAPES[name]
        if args.layers:
            shape = Shape(**{**vars(shape), "layers": args.layers})
        with torch.inference_mode():
            models = build(shape)
            sizes = {form: count_bytes(model) for form, model in models.items()}
            print(f"{time.time() - begin:.0f} s  {name} {sizes}", flush=True)
            runs = []
            for batch, length, context in (
                (1, 1, 512), (8, 1, 512), (16, 1, 512), (32, 1, 512), (64, 1, 512),
                (1, 128, 128), (1, 512, 512), (1, 2048, 2048), (4, 2048, 2048),
            ):  # fmt: skip
                before = torch.cuda.memory_allocated()
                run = measure(models, batch, length, context)
                # Forms that kernels for this many tokens read besides the fragments.
                run["forms_bytes"] = torch.cuda.memory_allocated() - before
                runs.append(run)
                print(
                    f"{time.time() - begin:.0f} s  batch {batch} tokens {length}: dense "
                    f"{run['dense_ms']:.2f} ms, sparse {run['sparse_ms']:.2f} ms, "
                    f"{run['speedup']:.2f}x, logits differ {run['logits_differ']:.1e}",
                    flush=True,
                )
            result["models"].append({"name": name, "bytes": sizes, "runs": runs})
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            del models


if __name__ == "__main__":
    main()
