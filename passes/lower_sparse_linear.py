"""lower-sparse-linear: linear(x, W) with a pruned W becomes sparse_linear(x, bits, values), where it pays."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import fx

from zeroskip.ir.errors import RecipeError
from zeroskip.ir.facts import Lowered, QuantizedValues, SparseWeights
from zeroskip.ir.formats import BitmaskWeight, PackedValues, ValueFormat
from zeroskip.ir.linears import Linear, find_linears, linear_rules
from zeroskip.ir.lowering_24 import drop_unread
from zeroskip.ir.packing import Packing
from zeroskip.ir.program import Program
from zeroskip.ir.rewrite import Editor, Match, apply_rules
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.ir.weights import InMemory, Source
from zeroskip.passes.base import Pass
from zeroskip.runtime.kernels import sparse_linear as _kernels  # noqa: F401  (registers them)

if TYPE_CHECKING:
    from zeroskip.runtime.dispatch import Verdict

OPERATOR = "zeroskip::sparse_linear"
_TARGET = torch.ops.zeroskip.sparse_linear.default
_LAYOUTS = {"auto": (0, 1), "stored": (0,), "throughput": (1,)}
_TARGETS = ("onnxruntime-cpu", "torch-cpu")
_EXACT = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class LowerSparseLinear(Pass):
    """Rewrites pruned linears to `zeroskip::sparse_linear`, each only where the zeros pay.

    The operator holds the weight as a bitmask and its kept values, and runs on zeroskip's CPU
    kernels in eager PyTorch and in ONNX Runtime alike. Values are stored in the dtype of the
    weight, or as `QuantizeValues` left them. A linear is lowered when its kernel is never slower
    than the target's dense product at any of the row counts asked, by measurements on this CPU
    where there are any, and, for ONNX Runtime, by a conservative table where not. The fact
    `Lowered` has the verdict and the reason for each.

    Exact, but where `QuantizeValues` allowed int8 activations: then the rounding of activations
    takes place here, and its drift is recorded.

    Refuses, and leaves as it is, a linear whose weight is 3-D (experts), is not pruned, is double
    precision, or would not be faster.

    Args:
        m: The numbers of rows (tokens times batch) that it will run with: 1 decodes a token, 128
            reads a prompt. No linear gets slower at any of these.
        choose: `auto`: what was measured on this CPU, else the table; the table is of ONNX Runtime,
            for `torch-cpu` what was not measured stays dense. `measure`: measure now what was not
            measured yet. `always`: lower all that can be, fast or not.
        layout: `stored` runs on the packed weight in place. `throughput` repacks it when it is
            loaded, which is faster from about 16 rows on and costs that memory. `auto` takes the
            better one.
        threads: For how many threads; 0 for as many as PyTorch uses.
        target: Where it will run, and so whose dense product it must not be slower than:
            `onnxruntime-cpu`, or `torch-cpu` for this Program in eager PyTorch. The lowered Program
            is the same for both, only the choice is another.
        include: Shell-style patterns of linears. Empty: every pruned one.
        exclude: Patterns of linears to leave dense.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact SparseWeights

    After::

        %2 = zeroskip.sparse_linear(%1, @fc.weight_bitmask, @fc.weight_row_offsets,
            @fc.weight_values, None, @fc.bias, 16, 0, 0, 0) : f32[s0, 8]
        fact Lowered
        fact SparseWeights
    """

    m: tuple[int, ...] = (1, 128)
    choose: Literal["auto", "measure", "always"] = "auto"
    layout: Literal["auto", "stored", "throughput"] = "auto"
    threads: int = 0
    target: str = "onnxruntime-cpu"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    name = "lower-sparse-linear"
    requires = (SparseWeights,)
    provides = (Lowered,)
    # With bfloat16 values and AMX, X is taken in two parts, 16 bits in all: 2^-16 for each linear.
    slack = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "m", tuple(self.m))
        problems = [
            (not self.m or any(m < 1 for m in self.m), f"m={self.m}", "name row counts, such as 1"),
            (self.choose not in ("auto", "measure", "always"), f"choose={self.choose!r}", "auto"),
            (self.layout not in _LAYOUTS, f"layout={self.layout!r}", f"{', '.join(_LAYOUTS)}"),
            (self.threads < 0, f"threads={self.threads}", "0 takes PyTorch's number"),
        ]
        for wrong, what, advice in problems:
            if wrong:
                raise RecipeError(
                    f"{what} is no choice", pass_name=self.name, next_step=f"use {advice}"
                )
        if self.target not in _TARGETS:
            near = difflib.get_close_matches(str(self.target), _TARGETS, n=1, cutoff=0.4)
            advice = f"did you mean {near[0]}?" if near else f"use {' or '.join(_TARGETS)}"
            raise RecipeError(
                f"target={self.target!r} is no choice", pass_name=self.name, next_step=advice
            )

    def is_lossy(self, program: Program) -> bool:
        known = program.facts.get(QuantizedValues, QuantizedValues())
        assert isinstance(known, QuantizedValues)
        return any(form.accuracy_level for form in known.formats.values())

    def check(self, program: Program) -> None:
        check_selection(program, self.include, self.exclude)

    def run(self, program: Program) -> Program:
        chosen = {n.name for n in select_linears(program, self.include or ("*",), self.exclude)}
        packed: dict[str, PackedLinear] = {}
        refusals: dict[str, str] = {}
        verdicts: dict[str, Mapping[str, object]] = {}
        known = program.facts.get(Lowered, Lowered())
        assert isinstance(known, Lowered)
        linears = [n for n in find_linears(program) if n.name not in known.operators]
        judge = None if self.choose == "always" else self._judge(linears, program)
        for linear in linears:
            reason = "it is excluded" if linear.name not in chosen else _refusal(linear, program)
            if reason is None:
                form = _format(linear, program)
                weight = form.pack(linear.weight(program))
                layout = _LAYOUTS[self.layout][0]
                if judge is not None:
                    verdict = judge(linear, weight, form.accuracy_level)
                    verdicts[linear.name] = verdict.to_json()
                    layout, reason = verdict.layout, verdict.reason
                if judge is None or verdict.choice == "sparse":
                    packed[linear.name] = PackedLinear.of(linear, program, weight, form, layout)
                    continue
            assert reason is not None
            refusals[linear.name] = reason
        lowered = rewrite_linears(program, packed)
        fact = Lowered(dict.fromkeys(packed, OPERATOR), refusals, verdicts)
        return lowered.with_fact(known.merge(fact))

    def _judge(
        self, linears: Sequence[Linear], program: Program
    ) -> Callable[[Linear, BitmaskWeight, int], Verdict]:
        # Only who lowers for speed needs ONNX Runtime, against which speed is measured.
        from zeroskip.runtime import dispatch
        from zeroskip.runtime.rivals import ONNX_RUNTIME, Rival

        def rival(linear: Linear) -> Rival:
            if self.target == "onnxruntime-cpu":
                return ONNX_RUNTIME  # The export is float32, whatever the model is.
            return Rival("PyTorch", program.weights.source(linear.parameter).dtype)

        tuner = dispatch.new_tuner()
        working_set = sum(rival(n).dtype.itemsize * n.out_features * n.in_features for n in linears)

        def judge(linear: Linear, weight: BitmaskWeight, accuracy_level: int) -> Verdict:
            return dispatch.judge(
                weight,
                accuracy_level=accuracy_level,
                m_values=self.m,
                threads=self.threads or torch.get_num_threads(),
                layouts=_LAYOUTS[self.layout],
                source="measure" if self.choose == "measure" else "table",
                working_set_bytes=working_set,
                tuner=tuner,
                rival=rival(linear),
            )

        return judge


def _refusal(linear: Linear, program: Program) -> str | None:
    if linear.expert is not None:
        return "its weight is 3-D, one matrix for each expert"
    if linear.name not in program.fact(SparseWeights).masks:
        return "it is not pruned"
    dtype = program.weights.source(linear.parameter).dtype
    if dtype not in _EXACT:
        return f"its weight is {dtype}, kernels compute in float32"
    return None


def _format(linear: Linear, program: Program) -> ValueFormat:
    known = program.facts.get(QuantizedValues, QuantizedValues())
    assert isinstance(known, QuantizedValues)
    exact = ValueFormat(_EXACT[program.weights.source(linear.parameter).dtype])
    return known.formats.get(linear.name, exact)


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """The operands and options of one packed linear, and the parameter that they stand for."""

    packing: Packing
    operands: Mapping[str, Source | None]
    options: tuple[int, int, int, int]

    @classmethod
    def of(
        cls,
        linear: Linear,
        program: Program,
        weight: BitmaskWeight,
        form: ValueFormat,
        layout: int,
    ) -> PackedLinear:
        dense = program.weights.source(linear.parameter)
        operands: dict[str, Source | None] = {
            "bitmask": InMemory(weight.bitmask),
            "row_offsets": InMemory(weight.row_offsets),
            "values": PackedValues(dense, form, linear.transposed, weight.kept),
            "scales": None if weight.scales is None else InMemory(weight.scales),
        }
        options = (linear.in_features, form.block_size, form.accuracy_level, layout)
        return cls(Packing(linear.parameter, linear.transposed), operands, options)


def rewrite_linears(program: Program, packed: Mapping[str, PackedLinear]) -> Program:
    """Rewrites the linears named to `zeroskip::sparse_linear`; the others stay as they are."""
    if not packed:
        return program
    by_node = {u.node.name: n.name for n in find_linears(program) for u in n.uses}

    def check(match: Match) -> str | None:
        return None if by_node.get(match.root.name) in packed else "it is not to be lowered"

    def put(editor: Editor, x: fx.Node, w: fx.Node, b: fx.Node | None = None) -> fx.Node:
        this = packed[by_node[editor.match.root.name]]
        operands = [
            None if source is None else editor.weight(f"{this.packing.parameter}_{part}", source)
            for part, source in this.operands.items()
        ]
        node = editor.call(_TARGET, x, *operands, b, *this.options)
        node.meta["packing"] = this.packing
        return node

    lowered, count, _ = apply_rules(program, linear_rules("sparse_linear", put, check))
    assert count >= len(packed)
    drop_unread(lowered, {this.packing.parameter for this in packed.values()})
    added = {
        f"{this.packing.parameter}_{part}": source
        for this in packed.values()
        for part, source in this.operands.items()
        if source is not None
    }
    return dataclasses.replace(lowered, weights=lowered.weights.replace(added), level="lowered")


def lower_alike(program: Program, other: Program) -> Program:
    """Lowers another capture of the same model, such as one with a cache, as the first was.

    Args:
        program: A program that `LowerSparseLinear` lowered.
        other: Reads the same weights under the same names; it may be returned as it is.
    """
    packed = {}
    for linear in find_linears(program):
        node = linear.uses[0].node
        if node.target is not _TARGET:
            continue
        names = [n.target if isinstance(n, fx.Node) else None for n in node.args[1:5]]
        parts = ("bitmask", "row_offsets", "values", "scales")
        operands = {
            part: None if name is None else program.weights.source(str(name))
            for part, name in zip(parts, names, strict=True)
        }
        options = tuple(node.args[6:10])
        packed[linear.name] = PackedLinear(node.meta["packing"], operands, options)  # type: ignore[arg-type]
    return rewrite_linears(other, packed)
