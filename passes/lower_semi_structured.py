"""lower-semi-structured: linear(x, W) with W pruned to 2:4 becomes linear_24(x, values, codes)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from zeroskip.ir.errors import RecipeError, RequirementError
from zeroskip.ir.facts import Lowered, Mask, SparseWeights
from zeroskip.ir.input_groups import group_by_input, refusal_to_lower
from zeroskip.ir.linears import Linear, find_linears
from zeroskip.ir.lowering_24 import Packed24, lower_linears
from zeroskip.ir.program import Program
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.ir.semi_structured import SemiStructuredWeight
from zeroskip.passes.base import Pass
from zeroskip.runtime import verdict_24
from zeroskip.runtime.gpu_dispatch import explain_refusal
from zeroskip.runtime.kernels import linear_24 as _kernels
from zeroskip.runtime.verdict_24 import Judge, Verdict24

OPERATOR = "zeroskip::linear_24"
_TUNE = ("table", "measure", "always")
_ELSEWHERE = ("onnxruntime-cpu", "torch-cpu")

Group = tuple[Linear, ...]
Judged = list[tuple[Group, Verdict24]]


@dataclass(frozen=True)
class LowerSemiStructured(Pass):
    """Rewrites linears that are pruned to 2:4 to `zeroskip::linear_24`, each only where it pays.

    The operator holds half of the weights and where they were. On a CUDA device it runs, for each
    number of tokens, the kernel that was measured to be fastest, cuBLAS on the dense weight among
    them; elsewhere it computes through the dense weight. A linear is lowered when a sparse kernel is
    faster at one of the numbers of tokens asked; at the others, dense runs. The fact `Lowered` has
    the verdict and the reason for each.

    Linears that read the same input become one product, and their results slices of it: queries,
    keys and values; gates and projections. Which do is found from the graph. Where only parts were
    measured, or where measuring shows that one product is slower, they stay apart.

    Exact: 0 or 1 weights that a mask keeps of four are filled up with zeros. An ONNX export has
    plain products with the dense weights, zeros included, under the names of the parameters, whether
    fused or not; a checkpoint too. The values of fused linears are one weight of the lowered program,
    `<first parameter>_fused_values`; what exports its module by other means sees that name.

    Refuses, and leaves as it is, a linear whose weight is 3-D (experts), is not pruned, is neither
    float16 nor bfloat16, has inputs that are no multiple of 32, has a mask that keeps more than two of
    four somewhere, or that would not be faster.

    Args:
        target: Where it will run: `cuda`, or one of several devices, such as `cuda:1`.
        tune: `table`: by what the package has measured, or this process did, on the device that is
            here; where none is, on any. What was never measured stays dense. `measure`: measure now,
            on the device that is here, each shape once; the measurements decide in this process,
            and are kept in the report (`gpu_table` of `Report.to_json`). `always`: lower all that
            can be, fast or not.
        m: The numbers of tokens (batch times sequence) that it will run with.
        fuse: Whether linears that read the same input become one product.
        device_name: For `table`: the device that it will run on, as CUDA reports it, such as
            `NVIDIA H200`, if that is another than the one here.
        include: Shell-style patterns of linears. Empty: every pruned one.
        exclude: Patterns of linears to leave dense.

    Before::

        %2 = linear(%1, @q.weight) : bf16[s0, 64]
        %3 = linear(%1, @k.weight) : bf16[s0, 32]
        %4 = linear(%1, @o.weight, @o.bias) : bf16[s0, 64]
        fact SparseWeights

    After::

        %2 = zeroskip.linear_24(%1, @q.weight_fused_values, @q.weight_fused_codes, None)
            : bf16[s0, 96]
        %3 = slice(%2, 1, 0, 64) : bf16[s0, 64]
        %4 = slice(%2, 1, 64, 96) : bf16[s0, 32]
        %5 = zeroskip.linear_24(%1, @o.weight_values, @o.weight_codes, @o.bias) : bf16[s0, 64]
        fact Lowered
        fact SparseWeights
    """

    target: str = "cuda"
    tune: Literal["table", "measure", "always"] = "table"
    m: tuple[int, ...] = (1, 16, 64, 512, 2048)
    fuse: bool = True
    device_name: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    name = "lower-semi-structured"
    requires = (SparseWeights,)
    provides = (Lowered,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "m", tuple(self.m))
        problems = [
            (not self.m or any(m < 1 for m in self.m), f"m={self.m}", "name numbers, such as 1"),
            (self.tune not in _TUNE, f"tune={self.tune!r}", f"use {', '.join(_TUNE)}"),
            (
                bool(self.device_name) and self.tune == "measure",
                f"device_name={self.device_name!r} with tune='measure'",
                "measure on the device that is here, or use tune='table'",
            ),
            (
                not re.fullmatch(r"cuda(:\d+)?", self.target),
                f"target={self.target!r}",
                self._near(),
            ),
        ]
        for wrong, what, advice in problems:
            if wrong:
                raise RecipeError(f"{what} is no choice", pass_name=self.name, next_step=advice)

    def _near(self) -> str:
        if self.target in _ELSEWHERE:
            return f"use cuda here, or lower-sparse-linear for {self.target}"
        near = difflib.get_close_matches(str(self.target), ["cuda"], n=1, cutoff=0.4)
        return f"did you mean {near[0]}?" if near else "use cuda"

    def check(self, program: Program) -> None:
        check_selection(program, self.include, self.exclude)
        self._judge()

    def run(self, program: Program) -> Program:
        masks = program.fact(SparseWeights).masks
        known = program.facts.get(Lowered, Lowered())
        assert isinstance(known, Lowered)
        judge = self._judge()
        chosen = {n.name for n in select_linears(program, self.include or ("*",), self.exclude)}
        eligible, refusals = [], {}
        for linear in (n for n in find_linears(program) if n.name not in known.operators):
            excluded = None if linear.name in chosen else "it is excluded"
            reason = excluded or _refusal(linear, program, masks, judge)
            if reason is None:
                eligible.append(linear)
            else:
                refusals[linear.name] = reason
        groups: list[Group] = [(linear,) for linear in eligible]
        if self.fuse:
            groups = group_by_input(eligible, program)
        packed: list[Packed24] = []
        operators: dict[str, str] = {}
        verdicts: dict[str, Mapping[str, object]] = {}
        for group, verdict in self._judged(groups, program, masks, judge):
            for linear in group:
                rows = {verdict.rows, linear.out_features}
                verdicts[linear.name] = {
                    **verdict.to_json(linear.out_features),
                    **judge.measured_of(rows, verdict.columns, verdict.dtype),
                }
                if verdict.pays:
                    operators[linear.name] = OPERATOR
                else:
                    refusals[linear.name] = verdict.explain()
            if verdict.pays:
                packed.append(Packed24.of(group, program, masks))
        if judge.measured.entries:
            _kernels.use_table(judge.measured)
        fact = Lowered(operators, refusals, verdicts)
        return lower_linears(program, packed).with_fact(known.merge(fact))

    def _judge(self) -> Judge:
        """Finds the device that the options ask for.

        Raises:
            RequirementError: `tune="measure"`, and it is not there.
        """
        if self.tune == "measure":
            try:
                return Judge(self.m, verdict_24.find_device(self.target, "tune='measure'"))
            except RequirementError as error:
                error.pass_name = self.name
                raise
        if self.tune == "always" or self.device_name:
            return Judge(self.m, None, self.device_name)
        return Judge(self.m, verdict_24.device_if_any(self.target))

    def _judged(
        self, groups: list[Group], program: Program, masks: Mapping[str, Mask], judge: Judge
    ) -> Judged:
        """Returns each group with its verdict, taken apart where that is known to be better."""

        def judge_one(group: Group) -> tuple[Group, Verdict24]:
            return group, self._verdict(group, program, masks, judge)

        found: Judged = []
        for group in groups:
            rows = [linear.out_features for linear in group]
            if len(group) == 1 or not verdict_24.allow_same_kernels(rows, group[0].in_features):
                found += [judge_one((linear,)) for linear in group]
                continue
            _, fused = judge_one(group)
            if fused.source == "always":
                found.append((group, fused))
                continue
            apart = [judge_one((linear,)) for linear in group]
            measured = fused.source == "measured"
            worse = measured and not verdict_24.is_not_slower(fused, [v for _, v in apart])
            # Without measurements a product runs dense: fusing must not lose those of its parts.
            found += apart if worse or not (fused.pays or measured) else [(group, fused)]
        return found

    def _verdict(
        self, group: Group, program: Program, masks: Mapping[str, Mask], judge: Judge
    ) -> Verdict24:
        rows, columns = sum(linear.out_features for linear in group), group[0].in_features
        dtype = program.weights.source(group[0].parameter).dtype
        names = tuple(linear.name for linear in group) if len(group) > 1 else ()
        if self.tune == "always":
            return Verdict24(rows, columns, dtype, {}, "always", names)
        if self.tune == "table":
            return judge.look_up(rows, columns, dtype).of(names)

        def load() -> SemiStructuredWeight:
            packed = Packed24.of(group, program, masks)
            return SemiStructuredWeight(packed.values.load(), packed.codes.load())

        return judge.measure(rows, columns, dtype, load).of(names)


def _refusal(
    linear: Linear, program: Program, masks: Mapping[str, Mask], judge: Judge
) -> str | None:
    if linear.expert is not None:
        return "its weight is 3-D, one matrix for each expert"
    if linear.name not in masks:
        return "it is not pruned"
    dtype = program.weights.source(linear.parameter).dtype
    checks: list[Callable[[], str | None]] = [
        lambda: verdict_24.refusal_of_shape(linear.in_features, dtype),
        lambda: verdict_24.refusal_of_mask(masks[linear.name].keep()),
        lambda: refusal_to_lower(linear, program),
    ]
    if judge.device is not None:
        device = judge.device
        checks.append(lambda: explain_refusal(*linear.shape, dtype, device))
    return next((reason for check in checks if (reason := check()) is not None), None)
