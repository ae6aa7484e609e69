"""quantize-values: round the weights that are left to bfloat16, float16 or int8.

int8, for one row of W and scale s, q = clamp(round(w / s)):

    error(s) = sum_k h_k (w_k - s q_k)^2,   h_k = E[x_k^2],   least at s = <w, q>_h / <q, q>_h
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from zeroskip.ir.errors import CompileError, RecipeError
from zeroskip.ir.facts import QuantizedValues, SparseWeights
from zeroskip.ir.formats import (
    VALUE_TYPES,
    Rounded,
    ValueFormat,
    count_blocks,
    round_to_steps,
)
from zeroskip.ir.linears import Linear
from zeroskip.ir.program import Program
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.ir.statistics import Statistics
from zeroskip.ir.weights import Source, all_finite
from zeroskip.passes.base import Pass, Scope

# Ranges that are tried, as shares of the largest weight: clipping an outlier a little often pays.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True)
class QuantizeValues(Pass):
    """Rounds the kept weights of pruned linears; zeros stay zeros.

    The weights stay where they are, in their own dtype, holding only values that the format has.
    int8 scales start from the largest weight and are refined to the least squared output error,
    with inputs weighted by their mean square where `Statistics` are known (put `Observe` between
    `ApplyMasks` and this pass), and alike where not.

    Leaves alone linears that are not pruned, and 3-D weights (experts), which are not lowered.

    Args:
        dtype: `bfloat16`, `float16` or `int8`.
        block_size: For int8: columns that share a scale, a multiple of 64; 0 for the whole row.
        activations: For int8: `int8` lets kernels round each row of activations to 8 bits, which is
            what makes them fastest; `float32` keeps activations exact.
        include: Shell-style patterns of linears. Empty: every pruned one.
        exclude: Patterns of linears to leave as they are.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact SparseWeights

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact QuantizedValues
        fact SparseWeights
    """

    dtype: Literal["bfloat16", "float16", "int8"] = "bfloat16"
    block_size: int = 0
    activations: Literal["int8", "float32"] = "int8"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    name = "quantize-values"
    requires = (SparseWeights,)
    provides = (QuantizedValues,)
    lossy = True

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float16", "int8"):
            raise RecipeError(
                f"values of dtype {self.dtype!r}",
                pass_name=self.name,
                next_step="choose bfloat16, float16 or int8",
            )
        if self.activations not in ("int8", "float32"):
            raise RecipeError(
                f"activations {self.activations!r}",
                pass_name=self.name,
                next_step="choose int8 or float32",
            )
        if self.block_size and self.dtype != "int8":
            raise RecipeError(
                f"{self.dtype} values have no scales, block_size is {self.block_size}",
                pass_name=self.name,
                next_step="leave block_size out",
            )
        count_blocks(64, self.block_size)

    @property
    def scope(self) -> Scope:
        return "block"

    def check(self, program: Program) -> None:
        check_selection(program, self.include, self.exclude)

    def targets(self, program: Program) -> frozenset[str] | None:
        return frozenset(linear.name for linear in self._chosen(program))

    def _chosen(self, program: Program) -> list[Linear]:
        # Empty means every pruned one: also a head that was pruned on request.
        return select_linears(program, self.include or ("*",), self.exclude)

    def run(self, program: Program) -> Program:
        masks = program.fact(SparseWeights).masks
        statistics = program.facts.get(Statistics, Statistics())
        assert isinstance(statistics, Statistics)
        formats: dict[str, ValueFormat] = {}
        sources: dict[str, Source] = {}
        for linear in self._chosen(program):
            if linear.name not in masks or linear.expert is not None:
                continue
            edge = statistics.edges.get(linear.name)
            importance = None if edge is None else edge.root_mean_square().square()
            form = self._format(linear, linear.weight(program).float(), importance)
            formats[linear.name] = form
            source = program.weights.source(linear.parameter)
            rounded = Rounded(source, form, linear.transposed)
            if not torch.equal(rounded.load(), source.load()):
                sources[linear.parameter] = rounded
        if sources:
            program = program.with_weights(sources)
        known = program.facts.get(QuantizedValues, QuantizedValues())
        assert isinstance(known, QuantizedValues)
        return program.with_fact(known.merge(QuantizedValues(formats)))

    def _format(
        self, linear: Linear, weight: torch.Tensor, importance: torch.Tensor | None
    ) -> ValueFormat:
        if not all_finite(weight):
            raise CompileError(
                "the weight is not finite",
                where=linear.name,
                pass_name=self.name,
                next_step="repair the checkpoint",
            )
        if self.dtype == "int8":
            scales = choose_scales(weight, importance, self.block_size)
            level = 4 if self.activations == "int8" else 0
            return ValueFormat("int8", scales, self.block_size, level)
        if not all_finite(weight.to(VALUE_TYPES[self.dtype])):
            raise CompileError(
                f"a weight of {float(weight.abs().max()):.3g} does not fit into {self.dtype}",
                where=linear.name,
                pass_name=self.name,
                next_step="choose bfloat16",
            )
        return ValueFormat(self.dtype)


def choose_scales(
    weight: torch.Tensor, importance: torch.Tensor | None = None, block_size: int = 0
) -> torch.Tensor:
    """Returns the int8 scales of a weight that make the least weighted squared error.

    Args:
        weight: float32 [out, in].
        importance: E[x^2] of each input, [in]; None weighs all alike.
        block_size: Columns that share a scale; 0 for the whole row.

    Returns:
        float32 [out, blocks], all positive.
    """
    rows, columns = weight.shape
    blocks = count_blocks(columns, block_size)
    width = block_size or max(columns, 1)
    padded = torch.nn.functional.pad(weight, (0, blocks * width - columns))
    parts = padded.view(rows, blocks, width)
    share = torch.ones(columns)
    if importance is not None and float(importance.sum()) > 0:
        # A channel that calibration never saw still gets a vote: it may be seen later.
        share = importance.float().clamp(min=float(importance.mean()) * 1e-3)
    share = torch.nn.functional.pad(share, (0, blocks * width - columns)).view(blocks, width)
    tiny = torch.finfo(torch.float32).tiny
    largest = parts.abs().amax(-1)
    best, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for reach in RANGES:
        scale = torch.where(largest > 0, (largest * reach / 127).clamp(min=tiny), 1.0)
        q = round_to_steps(parts, scale.unsqueeze(-1))
        over = (q * parts * share).sum(-1)
        under = (q * q * share).sum(-1)
        scale = torch.where((under > 0) & (over > tiny * under), over / under, scale)
        q = round_to_steps(parts, scale.unsqueeze(-1))
        error = ((parts - q * scale.unsqueeze(-1)).square() * share).sum(-1)
        better = error < least
        best = torch.where(better, scale, best)
        least = torch.where(better, error, least)
    return best
