"""lower-semi-structured: what becomes a 2:4 product, which share one, what stays dense, and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.kept_traces import capture_once as capture
from tests.small import small_model, small_program
from tests.zoo import ZOO
from zeroskip import compile_sparse
from zeroskip.ir.biases import ShiftedBiases, find_bias
from zeroskip.ir.errors import LoweringError, RecipeError, RequirementError
from zeroskip.ir.facts import Lowered, SparseWeights
from zeroskip.ir.linears import find_linears
from zeroskip.ir.lowering_24 import lower_alike, restore_linears
from zeroskip.ir.packing import packed_names
from zeroskip.ir.printer import print_program
from zeroskip.ir.program import Program
from zeroskip.ir.sources_24 import Codes24, Stacked, Values24
from zeroskip.passes import (
    ApplyMasks,
    ExportOnnx,
    LowerMasked,
    LowerSemiStructured,
    LowerSparseLinear,
    Observe,
    Pass,
    PassManager,
    PruneMagnitude,
    ShiftToBias,
)
from zeroskip.passes.base import measure_drift, relative_drift
from zeroskip.recipe import loads_recipe
from zeroskip.runtime import gpu_dispatch, verdict_24
from zeroskip.runtime.candidates24 import DENSE, Choice
from zeroskip.runtime.gpu_dispatch import Entry, Key, Table
from zeroskip.runtime.kernels import linear_24 as kernels

ALWAYS = LowerSemiStructured(tune="always")
OPERATOR = "zeroskip::linear_24"
BF16 = torch.bfloat16
FAST = Choice("mma24", {"warps_n": 4, "split": 0})


class Block(nn.Module):
    """Queries, keys and values of three widths, an output, a gate beside a projection."""

    def __init__(self, bias: tuple[bool, bool, bool] = (False, False, False)) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Linear(64, rows, bias=has) for rows, has in zip((128, 64, 32), bias, strict=True)
        )
        self.o = nn.Linear(64, 64)
        self.gate = nn.Linear(64, 160, bias=False)
        self.up = nn.Linear(64, 160, bias=False)
        self.down = Conv1D(64, 160)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        # A view that splits what the slice of a product leaves apart.
        mixed = q.view(*q.shape[:-1], 2, 64).sum(-2) + k + nn.functional.pad(v, (0, 32))
        x = x + self.o(mixed)
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def made(module: nn.Module, *shape: int, dtype: torch.dtype = BF16) -> Program:
    """Captures a module of random numbers on a random x."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    x = torch.randn(shape or (2, 5, 64), generator=generator).to(dtype)
    return capture(module.to(dtype).eval(), {"x": x})


def prune(program: Program, *steps: Pass, pattern: str = "2:4") -> Program:
    return PassManager([PruneMagnitude(pattern), ApplyMasks(), *steps])(program).program


def products(program: Program) -> int:
    return print_program(program).count("zeroskip.linear_24(")


def groups(program: Program) -> set[tuple[str, ...]]:
    """What the fact says was fused, without `.weight`."""
    verdicts: Mapping[str, Any] = program.fact(Lowered).verdicts
    found = {tuple(verdict["fused"]) for verdict in verdicts.values() if verdict["fused"]}
    return {tuple(name.removesuffix(".weight") for name in group) for group in found}


Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]
SPELLINGS: dict[str, tuple[tuple[int, int], int, Spelling]] = {
    "linear": ((24, 64), 3, lambda x, w, b: nn.functional.linear(x, w)),
    "linear with bias": ((24, 64), 3, lambda x, w, b: nn.functional.linear(x, w, b)),
    "addmm": ((64, 24), 2, lambda x, w, b: torch.addmm(b, x, w)),
    "addmm transposed": ((24, 64), 2, lambda x, w, b: torch.addmm(b, x, w.T)),
    "matmul": ((64, 24), 3, lambda x, w, b: torch.matmul(x, w)),
    "matmul transposed": ((24, 64), 3, lambda x, w, b: torch.matmul(x, w.mT)),
    "mm": ((64, 24), 2, lambda x, w, b: torch.mm(x, w)),
    "mm transposed": ((24, 64), 2, lambda x, w, b: torch.mm(x, w.t())),
}


class Spelled(nn.Module):
    """One or two products of x, spelled in one way."""

    def __init__(self, shape: tuple[int, int], product: Spelling, two: bool) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(shape))
        self.second = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(24))
        self.product, self.two = product, two

    def forward(self, x: Tensor) -> Tensor:
        first = self.product(x, self.first, self.bias)
        return first * self.product(x, self.second, self.bias) if self.two else first


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_lowered(name: str, two: bool) -> None:
    shape, rank, product = SPELLINGS[name]
    pruned = prune(made(Spelled(shape, product, two), *(3, 5)[: rank - 1], 64))
    lowered = ALWAYS(pruned).program
    assert products(lowered) == 1
    assert lowered.level == "lowered"
    linears = find_linears(lowered)
    expected = find_linears(pruned)
    assert [n.name for n in linears] == [n.name for n in expected] == ["first", "second"][: 1 + two]
    for now, before in zip(linears, expected, strict=True):
        assert now.shape == before.shape == (24, 64)
        assert torch.equal(now.weight(lowered), before.weight(pruned))
    assert measure_drift(pruned, lowered) < 1e-2
    # The dense weights are not read any more.
    assert not set(lowered.read_weights()) & {"first", "second"}


def test_the_text(golden: Callable[[str], None]) -> None:
    golden(print_program(prune(made(Block()), ALWAYS)))


def test_inputs_that_are_shared_are_read_once() -> None:
    pruned = prune(made(Block()))
    lowered = ALWAYS(pruned).program
    assert groups(lowered) == {("q", "k", "v"), ("gate", "up")}
    assert products(lowered) == 4
    fact = lowered.fact(Lowered)
    assert set(fact.operators) == {
        f"{n}.weight" for n in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert "one product of q, k, v" in str(fact.verdicts["k.weight"]["reason"])
    values = lowered.weights.source("q.weight_fused_values")
    assert (values.shape, values.dtype) == ((128 + 64 + 32, 32), BF16)
    apart = LowerSemiStructured(tune="always", fuse=False)(pruned).program
    assert products(apart) == 7
    assert groups(apart) == set()
    assert measure_drift(apart, lowered) < 1e-2


def test_nothing_is_packed_before_it_is_read() -> None:
    lowered = prune(made(Block()), ALWAYS)
    kinds = {type(lowered.weights.source(name)) for name in packed_names(lowered)}
    assert kinds == {Values24, Codes24}
    for name in packed_names(lowered):
        source = lowered.weights.source(name)
        loaded = source.load()
        assert (loaded.shape, loaded.dtype) == (source.shape, source.dtype)


@pytest.mark.parametrize(
    ("bias", "fused"),
    [
        ((True, True, True), {("q", "k", "v")}),
        ((True, True, False), {("q", "k")}),
        ((False, True, False), {("q", "v")}),
    ],
)
def test_biases_are_fused_where_all_have_one(
    bias: tuple[bool, bool, bool], fused: set[tuple[str, ...]]
) -> None:
    pruned = prune(made(Block(bias)))
    lowered = ALWAYS(pruned).program
    assert groups(lowered) == fused | {("gate", "up")}
    stacked = [n for n in lowered.weights if isinstance(lowered.weights.source(n), Stacked)]
    assert stacked == (["q.bias_fused"] if all(bias[:2]) else [])
    assert set(stacked) <= packed_names(lowered)
    for linear in find_linears(lowered):
        for use in linear.uses:
            owner = linear.name.removesuffix(".weight")
            has = dict(zip("qkv", bias, strict=True)).get(owner, owner in ("o", "down"))
            assert find_bias(use, lowered) == (f"{owner}.bias" if has else None)


def test_two_of_which_one_has_a_bias_stay_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    lowered = prune(made(Two()), ALWAYS)
    assert (products(lowered), groups(lowered)) == (2, set())


def test_what_is_excluded_is_not_fused_either() -> None:
    lowered = prune(made(Block()), LowerSemiStructured(tune="always", exclude=("k", "up")))
    assert groups(lowered) == {("q", "v")}
    fact = lowered.fact(Lowered)
    assert fact.refusals == {"k.weight": "it is excluded", "up.weight": "it is excluded"}
    only = prune(made(Block()), LowerSemiStructured(tune="always", include=("o", "gate")))
    assert set(only.fact(Lowered).operators) == {"o.weight", "gate.weight"}


def test_a_second_pass_takes_what_the_first_left() -> None:
    first = prune(made(Block()), LowerSemiStructured(tune="always", include=("q", "k")))
    second = ALWAYS(first).program
    assert groups(second) == {("q", "k"), ("gate", "up")}
    assert len(second.fact(Lowered).operators) == 7
    assert measure_drift(first, second) < 1e-2
    assert not ALWAYS(second).modified


class Tied(nn.Module):
    """Two weights that are used twice, on the same inputs, with biases of their own."""

    def __init__(self, own_bias: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.again_a, self.again_b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.again_a.weight, self.again_b.weight = self.a.weight, self.b.weight
        if not own_bias:
            self.again_a.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) * self.b(x)
        return self.again_a(x) * self.again_b(x)


@pytest.mark.parametrize("own_bias", [True, False])
def test_tied_weights_are_packed_once(own_bias: bool) -> None:
    pruned = prune(made(Tied(own_bias)))
    lowered = ALWAYS(pruned).program
    text = print_program(lowered)
    second = "again_a.bias_fused" if own_bias else "a.bias_fused_again"
    assert text.count("@a.weight_fused_values, @a.weight_fused_codes, @a.bias_fused)") == 1
    assert text.count(f"@a.weight_fused_values, @a.weight_fused_codes, @{second})") == 1
    assert measure_drift(pruned, lowered) < 1e-2


def test_inputs_that_differ_at_one_use_stay_apart() -> None:
    class Once(Tied):
        def forward(self, x: Tensor) -> Tensor:
            return self.again_a(self.a(x) * self.b(x))

    assert groups(prune(made(Once(True)), ALWAYS)) == set()


def test_an_input_that_is_written_into_is_read_where_it_was() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            y = self.a(x)
            x.add_(1)
            return y * self.b(x)

    pruned = prune(made(Writes()))
    lowered = ALWAYS(pruned).program
    assert groups(lowered) == set()
    assert measure_drift(pruned, lowered) == 0


def test_refusals_say_why() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.kept = nn.Linear(1020, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.kept(self.odd(x))

    steps = [PruneMagnitude("2:4", include=("odd",)), ApplyMasks(), ALWAYS]
    program = PassManager(steps)(made(Mixed(), 2, 5, 1020)).program
    assert program.fact(Lowered).operators == {}
    assert program.fact(Lowered).refusals == {
        "odd.weight": "eligible: no, K=1020 is not a multiple of 32",
        "kept.weight": "it is not pruned",
    }
    assert program.level == "captured"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_weights_stay(dtype: torch.dtype) -> None:
    fact = prune(made(Block(), dtype=dtype), ALWAYS).fact(Lowered)
    name = str(dtype).removeprefix("torch.")
    assert not fact.operators
    assert set(fact.refusals.values()) == {
        f"its weight is {name}; the kernels take float16 and bfloat16"
    }


def test_float16_is_lowered() -> None:
    pruned = prune(made(Block(), dtype=torch.float16))
    assert measure_drift(pruned, ALWAYS(pruned).program) < 2e-3


def test_experts_stay() -> None:
    fact = prune(small_program("moe", BF16), ALWAYS).fact(Lowered)
    reasons = {reason for name, reason in fact.refusals.items() if "experts" in name}
    assert reasons == {"its weight is 3-D, one matrix for each expert"}
    assert set(fact.operators) == {f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkvo"}


@pytest.mark.parametrize("pattern", ["4:8", "50%"])
def test_masks_that_keep_too_many_are_refused_with_the_place(pattern: str) -> None:
    pruned = prune(made(Block()), pattern=pattern)
    fact = ALWAYS(pruned).program.fact(Lowered)
    assert not fact.operators
    for name, reason in fact.refusals.items():
        keep = pruned.fact(SparseWeights).masks[name].keep()
        row, group = (keep.view(len(keep), -1, 4).sum(-1) > 2).nonzero()[0].tolist()
        count = int(keep[row, 4 * group : 4 * group + 4].sum())
        assert reason == (
            f"its mask keeps {count} of the 4 weights of row {row}, "
            f"columns {4 * group} to {4 * group + 3}"
        )


@pytest.mark.parametrize("pattern", ["1:4", "1:8", "1:2"])
def test_masks_that_keep_fewer_are_exact(pattern: str) -> None:
    pruned = prune(made(Block()), pattern=pattern)
    result = ALWAYS(pruned)
    assert len(result.program.fact(Lowered).operators) == 7
    assert result.drift is not None
    assert result.drift < 1e-2


def test_a_weight_that_is_not_finite_is_named() -> None:
    pruned = prune(made(Block()))
    weight = pruned.weights["up.weight"].clone()
    row, column = pruned.fact(SparseWeights).masks["up.weight"].keep().nonzero()[70].tolist()
    weight[row, column] = torch.inf
    with pytest.raises(LoweringError, match=f"row {row}, column {column}") as caught:
        ALWAYS(pruned.with_weights({"up.weight": weight}))
    assert caught.value.where == "up.weight"


@pytest.mark.parametrize(
    ("target", "advice"),
    [
        ("cuda0", "did you mean cuda?"),
        ("cud", "did you mean cuda?"),
        ("torch-cpu", "use cuda here, or lower-sparse-linear for torch-cpu"),
        ("tensorrt", "use cuda"),
    ],
)
def test_an_unknown_target_is_refused_with_the_nearest(target: str, advice: str) -> None:
    for attempt in (
        lambda: LowerSemiStructured(target=target),
        lambda: loads_recipe(f"passes: [lower-semi-structured: {{target: {target}}}]"),
    ):
        with pytest.raises(RecipeError, match="is no choice") as caught:
            attempt()
        assert caught.value.next_step == advice


@pytest.mark.parametrize(
    "options",
    [{"m": ()}, {"m": (0,)}, {"tune": "fast"}, {"tune": "measure", "device_name": "NVIDIA A10"}],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="is no choice") as caught:
        LowerSemiStructured(**options)
    assert caught.value.pass_name == "lower-semi-structured"


def test_measuring_without_a_device_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ApplyMasks, "run", lambda self, program: pytest.fail("it ran"))
    step = LowerSemiStructured(tune="measure")
    with pytest.raises(RequirementError, match=r"CUDA device, and there is none") as caught:
        PassManager([PruneMagnitude("2:4"), ApplyMasks(), step])(made(Block()))
    assert caught.value.pass_name == "lower-semi-structured"
    assert "tune='table'" in str(caught.value.next_step)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RequirementError, match=r"there is no cuda:1"):
        verdict_24.find_device("cuda:1", "tune='measure'")
    assert verdict_24.find_device("cuda", "it") == torch.device("cuda")


@pytest.fixture
def tables() -> Iterator[Callable[[dict[tuple[int, int], dict[int, Entry]]], None]]:
    """Makes measurements of a `GPU X` known, by (rows, columns)."""

    def plant(measured: dict[tuple[int, int], dict[int, Entry]]) -> None:
        table = Table()
        for (rows, columns), found in measured.items():
            table.put(Key(rows, columns, "bfloat16", "GPU X"), found)
        kernels.use_table(table)

    kernels.forget_tables()
    yield plant
    kernels.forget_tables()


Plant = Callable[[dict[tuple[int, int], dict[int, Entry]]], None]
GAINS = {1: Entry(FAST, 20.0, 10.0), 64: Entry(DENSE, 30.0, 30.0)}
NO_GAIN = {1: Entry(DENSE, 20.0, 20.0)}


def test_tables_decide_for_each_linear(tables: Plant) -> None:
    tables({(224, 64): GAINS, (64, 64): NO_GAIN, (64, 160): GAINS})
    fact = prune(made(Block()), LowerSemiStructured(m=(1, 64))).fact(Lowered)
    assert set(fact.operators) == {"q.weight", "k.weight", "v.weight", "down.weight"}
    reason = "on GPU X: sparse 2.00x at m=1, dense at m=64"
    assert fact.verdicts["down.weight"]["reason"] == reason
    assert fact.verdicts["down.weight"]["speedup"] == {"1": 2.0, "64": 1.0}
    assert fact.verdicts["q.weight"]["reason"] == f"{reason}; one product of q, k, v"
    assert fact.refusals["o.weight"] == "on GPU X: dense at m=1..64"
    assert "was never measured on any device" in fact.refusals["up.weight"]


def test_a_product_that_is_not_in_the_tables_does_not_cost_its_parts(tables: Plant) -> None:
    tables({(128, 64): GAINS})
    program = prune(made(Block()), LowerSemiStructured(m=(1,)))
    assert set(program.fact(Lowered).operators) == {"q.weight"}
    assert groups(program) == set()


def test_the_device_that_is_named_counts(tables: Plant) -> None:
    tables({(64, 160): GAINS})
    pruned = prune(made(Block()))
    other = LowerSemiStructured(m=(1,), device_name="NVIDIA A10")(pruned).program.fact(Lowered)
    assert not other.operators
    assert "was never measured on NVIDIA A10" in other.refusals["down.weight"]
    same = LowerSemiStructured(m=(1,), device_name="GPU X")(pruned).program.fact(Lowered)
    assert set(same.operators) == {"down.weight"}


def test_the_shipped_table_is_used(tables: Plant) -> None:
    module = nn.Sequential(nn.Linear(2048, 2048, bias=False))
    pruned = prune(capture(module.to(BF16).eval(), {"input": torch.randn(2, 2048).to(BF16)}))
    fact = LowerSemiStructured(m=(1, 16))(pruned).program.fact(Lowered)
    assert fact.operators == {"0.weight": OPERATOR}
    assert "on NVIDIA H200: sparse 1." in str(fact.verdicts["0.weight"]["reason"])


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tables: Plant) -> dict[int, float]:
    """A device where a product of some numbers of rows takes another time than dense, 10."""
    times: dict[int, float] = {}

    def tune(weight: Any, tokens: Any) -> dict[int, Entry]:
        us = times.get(weight.rows, 10.0)
        choice = FAST if us < 10.0 else DENSE
        return dict.fromkeys(tokens, Entry(choice, 10.0, us))

    monkeypatch.setattr(verdict_24, "find_device", lambda target, why: torch.device("cpu"))
    monkeypatch.setattr(gpu_dispatch, "tune", tune)
    # Whether Triton has what kernels take is another machine's affair.
    monkeypatch.setattr("zeroskip.passes.lower_semi_structured.explain_refusal", lambda *_: None)
    return times


MEASURE = LowerSemiStructured(tune="measure", m=(1, 16))


def test_measurements_decide(device: dict[int, float]) -> None:
    device.update({224: 5.0, 64: 4.0, 320: 20.0, 160: 6.0})
    program = prune(made(Block()), MEASURE)
    assert groups(program) == {("q", "k", "v")}, "320 rows take longer than twice 160"
    assert len(program.fact(Lowered).operators) == 7
    reason = program.fact(Lowered).verdicts["o.weight"]["reason"]
    assert reason == "on cpu: sparse 2.50x at m=1..16"


def test_a_product_that_is_slower_than_its_parts_is_taken_apart(device: dict[int, float]) -> None:
    device.update({128: 1.0, 64: 1.0, 32: 1.0, 224: 4.0})
    program = prune(made(Block()), MEASURE)
    assert ("q", "k", "v") not in groups(program)
    assert set(program.fact(Lowered).operators) == {
        f"{n}.weight" for n in ("q", "k", "v", "o", "down")
    }
    assert program.fact(Lowered).refusals["up.weight"] == "on cpu: dense at m=1..16"


def test_what_was_measured_is_kept_in_the_report(device: dict[int, float]) -> None:
    device.update({224: 5.0, 64: 4.0})
    model = Block().to(BF16).eval()
    compiled = compile_sparse(
        model,
        [PruneMagnitude("2:4"), ApplyMasks(), MEASURE],
        example_inputs={"x": torch.randn(2, 5, 64).to(BF16)},
    )
    assert len(kernels.known_tables()) > 1, "this process goes by it already"
    stored = json.loads(json.dumps(compiled.report.to_json()))
    assert all("table" not in (linear["verdict"] or {}) for linear in stored["linears"])
    text = str(compiled.report)
    assert "measured on this machine\n" in text
    assert "not measured" not in text
    # A later process.
    kernels.forget_tables()
    table = Table.from_json(stored["gpu_table"])
    kernels.use_table(table)
    assert table.find(Key(224, 64, "bfloat16", "cpu"), 1) == FAST
    assert table.find(Key(64, 64, "bfloat16", "cpu"), 16) == FAST
    verdicts = compiled.program.fact(Lowered).verdicts.values()
    assert verdict_24.table_of(verdicts).entries == table.entries
    again = LowerSemiStructured(m=(1,))(prune(made(Block()))).program.fact(Lowered)
    assert set(again.operators) >= {"q.weight", "k.weight", "v.weight", "o.weight"}
    assert not any("was never measured" in reason for reason in again.refusals.values())


def test_a_report_without_measurements_has_no_table() -> None:
    compiled = compile_sparse(
        Block().to(BF16).eval(),
        [PruneMagnitude("2:4"), ApplyMasks(), ALWAYS],
        example_inputs={"x": torch.randn(2, 5, 64).to(BF16)},
    )
    assert "gpu_table" not in compiled.report.to_json()
    assert "zeroskip::linear_24" in str(compiled.report) or "not timed" in str(compiled.report)


def test_rows_that_would_lose_a_kernel_stay_apart() -> None:
    assert verdict_24.allow_same_kernels((96, 48, 32), 96)
    assert verdict_24.allow_same_kernels((96, 48, 16), 64)
    assert verdict_24.allow_same_kernels((40, 50), 64)
    assert not verdict_24.allow_same_kernels((96, 40), 64)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_lowered_module_is_compiled_as_one_graph(backend: str) -> None:
    lowered = prune(made(Block((True, True, True))), ALWAYS)
    torch._dynamo.reset()
    with torch.no_grad():
        fast = torch.compile(lowered.module(), backend=backend, fullgraph=True)
        for rows in (2, 3):
            x = torch.randn(rows, 5, 64).to(BF16)
            (expected,) = lowered.run({"x": x}).values()
            # Inductor rounds to bfloat16 less often, in the dense program as well.
            assert relative_drift(expected, fast(x)[0]) < (2e-2 if backend == "inductor" else 1e-6)
    torch._dynamo.reset()


def test_a_lowered_module_is_exported() -> None:
    lowered = prune(made(Block()), ALWAYS)
    x = torch.randn(3, 5, 64).to(BF16)
    exported = torch.export.export(lowered.module(), (x,)).module()
    (expected,) = lowered.run({"x": x}).values()
    torch.testing.assert_close(exported(x)[0], expected)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "opt"])
def test_architectures_in_bfloat16(name: str) -> None:
    inputs = ZOO[name].inputs()
    pruned = prune(capture(ZOO[name].model(dtype=BF16), inputs))
    result = ALWAYS(pruned)
    assert result.drift is not None
    assert result.drift < 2e-2
    fused = {tuple(n.rpartition(".")[2] for n in group) for group in groups(result.program)}
    assert (
        fused
        >= {
            "llama": {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")},
            "bert": {("query", "key", "value")},
            "t5": {("q", "k", "v")},
            "opt": {("q_proj", "k_proj", "v_proj")},
        }[name]
    )
    # Cut into stages and put together again, it is the same.
    again = PassManager([PruneMagnitude("2:4"), Observe()])
    with_calibration = {"calibration": (inputs,)}
    program = again(_replace(result.program, **with_calibration)).program
    assert program.fact(SparseWeights).masks.keys() == pruned.fact(SparseWeights).masks.keys()
    assert measure_drift(result.program, program) == 0


def _replace(program: Program, **changes: Any) -> Program:
    import dataclasses

    return dataclasses.replace(program, **changes)


def test_another_capture_is_lowered_alike() -> None:
    pruned = prune(small_program("llama", BF16))
    lowered = LowerSemiStructured(tune="always", exclude=("*.up_proj",))(pruned).program
    again = lower_alike(lowered, pruned)
    assert print_program(again).count("zeroskip.linear_24(") == products(lowered) == 3
    assert measure_drift(lowered, again) == 0
    sources = {n: lowered.weights.source(n) for n in packed_names(lowered)}
    assert {n: again.weights.source(n) for n in packed_names(again)} == sources


def test_linears_can_be_restored() -> None:
    pruned = prune(made(Block((True, True, True))))
    restored = restore_linears(ALWAYS(pruned).program)
    assert products(restored) == 0
    assert " linear(" in print_program(restored)
    assert not packed_names(restored)
    assert measure_drift(pruned, restored) < 1e-2
    assert {n.name for n in find_linears(restored)} == {n.name for n in find_linears(pruned)}


def test_the_other_lowering_passes_leave_it_alone() -> None:
    pruned = prune(made(Block()))
    first = LowerSemiStructured(tune="always", include=("q", "k", "v"))(pruned).program
    both = LowerSparseLinear(choose="always")(first).program
    assert set(both.fact(Lowered).operators.values()) == {OPERATOR, "zeroskip::sparse_linear"}
    assert ALWAYS(both).drift is None
    masked = LowerMasked()(first).program
    assert products(masked) == 1
    assert measure_drift(pruned, masked) < 1e-2


def test_shifted_biases_are_still_found() -> None:
    import dataclasses

    program = made(Block((True, True, True)))
    batches = tuple({"x": torch.randn(2, 5, 64).to(BF16)} for _ in range(4))
    program = dataclasses.replace(program, calibration=batches)
    steps = [PruneMagnitude("2:4"), ShiftToBias(), ApplyMasks(), ALWAYS]
    lowered = PassManager(steps)(program).program
    assert lowered.fact(ShiftedBiases).shifts
    assert groups(lowered) == {("q", "k", "v"), ("gate", "up")}


@pytest.mark.usefixtures("translated_once")
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("form", ["cache", "plain"])
def test_onnx_has_dense_weights_under_their_names(form: Any, fuse: bool, tmp_path: Path) -> None:
    import onnx

    steps = [
        PruneMagnitude("2:4"),
        ApplyMasks(),
        LowerSemiStructured(tune="always", fuse=fuse),
        ExportOnnx(tmp_path / "onnx", form=form),
    ]
    inputs = small_program("llama").example_inputs
    compiled = compile_sparse(small_model("llama").to(BF16), steps, example_inputs=inputs)
    assert compiled.program.fact(Lowered).operators
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    stored = {each.name: each for each in model.graph.initializer}
    for name, mask in compiled.program.fact(SparseWeights).masks.items():
        weight = torch.from_numpy(onnx.numpy_helper.to_array(stored[name]).copy())
        assert torch.equal(weight, compiled.program.weights[name].float()), name
        assert not weight[~mask.keep()].any()
    assert not any("fused" in name or "_values" in name for name in stored)


def test_checkpoints_hold_the_dense_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = small_model("llama").to(BF16)
    inputs = small_program("llama").example_inputs
    compiled = compile_sparse(
        model, [PruneMagnitude("2:4"), ApplyMasks(), ALWAYS], example_inputs=inputs
    )
    compiled.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=BF16)
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in model.named_parameters()}
    for name, value in again.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name
    with torch.no_grad():
        expected = model(**inputs).logits
    assert torch.allclose(compiled(**inputs)["logits"], expected, atol=0.1, rtol=0.05)
