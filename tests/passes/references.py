"""Pruning as its papers' code does it: hooks on the live model, sorts, no Program anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

Batches = Sequence[dict[str, Tensor]]


def keep_rows(scores: Tensor, sparsity: float) -> Tensor:
    """Prunes the first int(n * sparsity) of a stable ascending sort of each row."""
    order = torch.sort(scores, dim=1, stable=True).indices
    count = int(scores.shape[1] * sparsity)
    return torch.ones_like(scores, dtype=torch.bool).scatter(1, order[:, :count], False)


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Prunes the first m - n of a stable ascending sort of each m consecutive columns."""
    return keep_rows(scores.reshape(-1, m), (m - n) / m).view(scores.shape)


def keep(scores: Tensor, pattern: str) -> Tensor:
    """Decides for `2:4` or for a share of each row, `0.5`."""
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        return keep_n_of_m(scores, n, m)
    return keep_rows(scores, float(pattern))


class _StopError(Exception):
    """Ends a forward pass once what enters the first block is known."""


class _Catcher(nn.Module):
    """Stands before the first block and keeps what enters it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.caught: list[tuple[Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.caught.append((args, kwargs))
        raise _StopError


@torch.no_grad()
def wanda(
    model: nn.Module, blocks: nn.ModuleList, batches: Batches, pattern: str
) -> dict[str, Tensor]:
    """Prunes a live model block by block, and returns what it kept by parameter name.

    All linears of a block are scored on what enters them while the block is unpruned and the
    blocks before it are pruned.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    first = blocks[0]
    blocks[0] = catcher = _Catcher(first)
    for batch in batches:
        try:
            model(**batch, use_cache=False)
        except _StopError:
            continue
    blocks[0] = first
    hidden = [args[0] for args, _ in catcher.caught]
    rest = [(args[1:], kwargs) for args, kwargs in catcher.caught]
    tokens = [batch["attention_mask"].bool().reshape(-1) for batch in batches]
    kept: dict[str, Tensor] = {}
    for block in blocks:
        sums = _Sums(block)
        _run(block, hidden, rest, tokens, sums)
        sums.remove()
        for weight, expert, rms in sums.found():
            matrix = weight if expert is None else weight[expert]
            matrix = matrix.T if weight in sums.stored_in_out else matrix
            mask = keep(matrix.abs() * rms, pattern)
            name = names[id(weight)] + ("" if expert is None else f"[{expert}]")
            kept[name] = mask
            matrix.mul_(mask)
        hidden = _run(block, hidden, rest, tokens, sums)
    return kept


def _run(
    block: nn.Module,
    hidden: list[Tensor],
    rest: list[tuple[Any, Any]],
    tokens: list[Tensor],
    sums: _Sums,
) -> list[Tensor]:
    outputs = []
    for x, (args, kwargs), mask in zip(hidden, rest, tokens, strict=True):
        sums.mask = mask
        y = block(x, *args, **kwargs)
        outputs.append(y[0] if isinstance(y, tuple) else y)
    return outputs


class _Sums:
    """Mean square of what enters each linear, and each expert, of a block."""

    def __init__(self, block: nn.Module) -> None:
        self.mask = torch.ones(0)
        self.stored_in_out: set[Tensor] = set()
        self._squares: dict[tuple[Tensor, int | None], Tensor] = {}
        self._counts: dict[tuple[Tensor, int | None], int] = {}
        self._hooks = []
        for module in block.modules():
            if isinstance(module, nn.Linear | Conv1D):
                self._hooks.append(module.register_forward_pre_hook(self._linear))
                if isinstance(module, Conv1D):
                    self.stored_in_out.add(module.weight)
            elif hasattr(module, "gate_up_proj") and module.gate_up_proj.ndim == 3:
                self._hooks.append(module.register_forward_pre_hook(self._experts))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _add(self, weight: Tensor, expert: int | None, rows: Tensor) -> None:
        key = (weight, expert)
        self._squares[key] = self._squares.get(key, 0) + rows.double().square().sum(0)
        self._counts[key] = self._counts.get(key, 0) + rows.shape[0]

    def _linear(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self._add(module.weight, None, args[0].reshape(-1, args[0].shape[-1])[self.mask])

    def _experts(self, module: Any, args: tuple[Tensor, ...]) -> None:
        hidden, chosen = args[0], args[1]
        for expert in range(module.gate_up_proj.shape[0]):
            rows = hidden[(chosen == expert).any(-1) & self.mask]
            gate, up = functional.linear(rows, module.gate_up_proj[expert]).chunk(2, -1)
            self._add(module.gate_up_proj, expert, rows)
            self._add(module.down_proj, expert, module.act_fn(gate) * up)

    def found(self) -> list[tuple[Tensor, int | None, Tensor]]:
        """(parameter, expert, root of the mean square), all decided before any is pruned."""
        return [
            (*key, (squares / max(self._counts[key], 1)).sqrt().float())
            for key, squares in self._squares.items()
        ]


def published_share(weight: Tensor, inverse: Tensor, share: float) -> Tensor:
    """Marks what `SparseGPT.fasterprune` prunes of a block: one more than the share, or ties."""
    losses = weight**2 / inverse.diagonal() ** 2
    threshold = torch.sort(losses.flatten())[0][int(losses.numel() * share)]
    return losses <= threshold


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    choose: Callable[[int, Tensor, Tensor], Tensor],
    groups: tuple[int, int] | None = None,
    block_size: int = 128,
    damping: float = 0.01,
) -> Tensor:
    """Prunes one linear as `SparseGPT.fasterprune` does, step by step.

    Args:
        weight: [out, in].
        hessian: [in, in].
        choose: Returns what to prune of a block, from its first column, its weights and its part of
            the upper Cholesky factor of the inverse.
        groups: For N:M, how many of how many are pruned; `choose` is not called then.
        block_size: Columns of a block.
        damping: Share of the mean diagonal that is added to the diagonal.
    """
    weight, hessian = weight.clone(), hessian.clone()
    width = weight.shape[1]
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    every = torch.arange(width)
    hessian[every, every] += damping * hessian.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    inverse = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, width, block_size):
        end = min(start + block_size, width)
        block, part = weight[:, start:end].clone(), inverse[start:end, start:end]
        kept, errors = torch.zeros_like(block), torch.zeros_like(block)
        pruned = torch.zeros_like(block, dtype=torch.bool)
        if groups is None:
            pruned = choose(start, block, part)
        for j in range(end - start):
            if groups is not None and j % groups[1] == 0:
                group = slice(j, j + groups[1])
                losses = block[:, group] ** 2 / part.diagonal()[group] ** 2
                least = torch.topk(losses, groups[0], dim=1, largest=False)[1]
                pruned.scatter_(1, j + least, True)
            column = block[:, j].clone()
            kept[:, j] = column.masked_fill(pruned[:, j], 0)
            error = (column - kept[:, j]) / part[j, j]
            block[:, j:] -= error.unsqueeze(1).matmul(part[j, j:].unsqueeze(0))
            errors[:, j] = error
        weight[:, start:end] = kept
        weight[:, end:] -= errors.matmul(inverse[start:end, end:])
    return weight
