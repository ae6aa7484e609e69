"""The contract of passes: of every pass in PASSES on every small model, and of the base class."""

from __future__ import annotations

import copy
import dataclasses
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from tests.small import SMALL, small_program
from zeroskip.ir.errors import CompileError, EquivalenceError, RequirementError, VerifyError
from zeroskip.ir.facts import Masks, SparseWeights, same_facts
from zeroskip.ir.printer import print_program
from zeroskip.ir.program import Program, attribute
from zeroskip.ir.statistics import Statistics
from zeroskip.ir.verify import verify
from zeroskip.passes import (
    PASSES,
    AllocateSparsity,
    ApplyMasks,
    CompensateEnergy,
    DistillOutputs,
    EliminateDeadCode,
    ExportOnnx,
    FindScaleGroups,
    FoldConstants,
    FoldScales,
    InduceSparsity,
    LowerMasked,
    LowerSemiStructured,
    LowerSparseLinear,
    MaterializeElastic,
    Observe,
    Pass,
    PassManager,
    PermuteChannels,
    PruneALPS,
    PruneCVR,
    PruneMagnitude,
    PruneRIA,
    PruneSparseGPT,
    PruneWanda,
    PruneZ,
    QuantizeValues,
    ReconstructBlocks,
    RefineDSnoT,
    ShiftToBias,
    SteerScores,
    TrainElastic,
)
from zeroskip.passes.base import TOLERANCES, graph_text, measure_drift, relative_drift
from zeroskip.recipe import Recipe, dump_recipe, load_recipe, loads_recipe


@dataclasses.dataclass(frozen=True)
class Case:
    """How a pass is tested.

    Args:
        make: Makes it; the folder is fresh for each call.
        options: One with every option away from its default.
        before: The shortest list of passes that provides what it requires.
        models: On which small models it runs.
        reorders: Models on which it may change the order of sums.
        dtype: Of the models.
    """

    make: Callable[[Path], Pass]
    options: Pass
    before: tuple[Pass, ...] = ()
    models: tuple[str, ...] = tuple(SMALL)
    reorders: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32


ADD: fx.node.Target = torch.ops.aten.add.Tensor
NAMES: dict[str, Any] = {"include": ("*.up", "*proj*"), "exclude": ("head",)}
CASES: dict[str, Case] = {
    "find-scale-groups": Case(lambda _: FindScaleGroups(), FindScaleGroups()),
    # Scales by group are tensors: the one option that no recipe can hold.
    "fold-scales": Case(
        lambda _: FoldScales(power_of_two=True),
        FoldScales(
            "smoothquant",
            alpha=0.25,
            limit=8.0,
            power_of_two=True,
            include=("up", "down"),
            exclude=("up",),
        ),
        before=(FindScaleGroups(), Observe()),
    ),
    "induce-sparsity": Case(
        lambda _: InduceSparsity(epochs=1),
        InduceSparsity(
            "2:4",
            score="wanda",
            target="stage",
            init="paper",
            epochs=2,
            learning_rate=0.1,
            temperature=0.3,
            refresh=2,
            regularization=0.5,
            alpha=0.1,
            limit=8.0,
            kappa=0.5,
            mean_weight=0.9,
            held_out=0.5,
            guard=False,
            literal=True,
            p=1.0,
            shift=False,
            seed=7,
            **NAMES,
        ),
        before=(FindScaleGroups(),),
        reorders=tuple(SMALL),  # A learned scale is no power of two.
    ),
    "observe": Case(lambda _: Observe(), Observe(gram=True, keep=True, **NAMES)),
    "prune-magnitude": Case(lambda _: PruneMagnitude(), PruneMagnitude("4:8 pad", **NAMES)),
    "prune-wanda": Case(
        lambda _: PruneWanda(), PruneWanda("block:4x8:0.25", **NAMES), before=(Observe(),)
    ),
    "prune-z": Case(
        lambda _: PruneZ(),
        PruneZ("0.5 matrix", **NAMES, base=0.6, adaptation=0.2, exponent=1.0, small=0.2),
        before=(Observe(),),
    ),
    "prune-cvr": Case(
        lambda _: PruneCVR(),
        PruneCVR("block:4x8:0.25", **NAMES, alpha=0.5, epsilon=1e-4),
        before=(Observe(),),
    ),
    "compensate-energy": Case(
        lambda _: CompensateEnergy(),
        CompensateEnergy("row", (0.25, 4.0), guard=False, held_out=2),
        before=(PruneMagnitude("2:4"),),
    ),
    "prune-ria": Case(
        lambda _: PruneRIA(), PruneRIA("4:8 pad", a=1.0, **NAMES), before=(Observe(),)
    ),
    "permute-channels": Case(
        lambda _: PermuteChannels("2:4"),
        PermuteChannels("4:8 pad", "prune-wanda", 3, **NAMES),
        before=(Observe(),),
        reorders=tuple(SMALL),  # Sums run over channels.
    ),
    "prune-alps": Case(
        lambda _: PruneALPS(iterations=30),
        PruneALPS("block:4x8:0.25", damping=0.1, rho=0.2, iterations=30, cg_steps=3, **NAMES),
        before=(Observe(gram=True),),
    ),
    "refine-dsnot": Case(
        lambda _: RefineDSnoT(),
        RefineDSnoT(cycles=7, tolerance=0.01, power=0.5, guard=False, **NAMES),
        before=(Observe(), PruneWanda("2:4")),
    ),
    "prune-sparsegpt": Case(
        lambda _: PruneSparseGPT(),
        PruneSparseGPT("4:8 pad", block_size=64, damping=0.1, preserve_mask=True, **NAMES),
        before=(Observe(gram=True),),
    ),
    "apply-masks": Case(lambda _: ApplyMasks(), ApplyMasks(), before=(PruneMagnitude("2:4"),)),
    "reconstruct-blocks": Case(
        lambda _: ReconstructBlocks(epochs=1),
        ReconstructBlocks(3, 0.5, 3, False, 0.3, 7, 9, **NAMES, loss="stage", inputs="both"),
        before=(PruneMagnitude("2:4"), ApplyMasks()),
    ),
    "distill-outputs": Case(
        lambda _: DistillOutputs(epochs=1),
        DistillOutputs(3, 0.5, 2, False, 0.3, 7, 9, **NAMES),
        before=(PruneMagnitude("2:4"), ApplyMasks()),
    ),
    "train-elastic": Case(
        lambda _: TrainElastic((0.5,), 1, epochs=1),
        TrainElastic(
            (0.5, 0.75), 3, "8", 2, 0.5, "shared", "drawn", "stage", False, 0.3, 7, **NAMES
        ),
    ),
    "materialize-elastic": Case(
        lambda _: MaterializeElastic(0.5),
        MaterializeElastic(0.25),
        before=(TrainElastic((0.5,), 1, epochs=1),),
    ),
    "lower-masked": Case(
        lambda _: LowerMasked(),
        LowerMasked(),
        before=(PruneMagnitude("2:4"), ApplyMasks()),
        reorders=("gpt2",),  # addmm becomes a product and a sum.
    ),
    "quantize-values": Case(
        lambda _: QuantizeValues(),
        QuantizeValues("int8", 128, "float32", **NAMES),
        before=(PruneMagnitude("2:4"), ApplyMasks()),
    ),
    "lower-sparse-linear": Case(
        lambda _: LowerSparseLinear(choose="always"),
        LowerSparseLinear((1, 7), "measure", "stored", 3, "torch-cpu", **NAMES),
        before=(PruneMagnitude("2:4"), ApplyMasks()),
        reorders=("mlp", "llama", "gpt2", "moe", "convnet"),
    ),
    "lower-semi-structured": Case(
        lambda _: LowerSemiStructured(tune="always"),
        LowerSemiStructured("cuda:1", "always", (1, 7), False, "NVIDIA H200", **NAMES),
        before=(PruneMagnitude("2:4"), ApplyMasks()),
        models=("llama", "gpt2", "moe"),
        reorders=("llama", "gpt2", "moe"),
        dtype=torch.bfloat16,
    ),
    "steer-scores": Case(
        lambda _: SteerScores(),
        SteerScores("prune-magnitude", "2:4", 7, 0.2, 0.05, 8.0, 0.5, **NAMES),
        before=(Observe(gram=True),),
    ),
    "allocate-sparsity": Case(
        lambda _: AllocateSparsity(),
        AllocateSparsity("30% matrix", "sensitivity", 7.0, 0.1, 0.2, 0.9, (0.25, 0.75), **NAMES),
    ),
    "shift-to-bias": Case(
        lambda _: ShiftToBias(add=True),
        ShiftToBias(add=True, updated=True, parts=3, **NAMES),
        before=(PruneMagnitude("2:4"),),
    ),
    "fold-constants": Case(lambda _: FoldConstants(), FoldConstants(limit=7)),
    "eliminate-dead-code": Case(lambda _: EliminateDeadCode(), EliminateDeadCode()),
    "export-onnx": Case(
        ExportOnnx,
        ExportOnnx(
            directory="out",
            form="plain",
            opset=19,
            external_data_threshold="7MiB",
            sparse_initializers=True,
            tokenizer="tokens",
            parity_limit=0.25,
        ),
        models=("mlp",),
    ),
}


def every_run() -> list[tuple[str, str]]:
    # A pass without a case is still listed, and fails where its case is looked up.
    unknown = Case(lambda _: EliminateDeadCode(), EliminateDeadCode())
    return [(name, model) for name in PASSES for model in CASES.get(name, unknown).models]


def prepared(name: str, model: str) -> Program:
    """Returns a program that knows what a pass requires."""
    program = small_program(model, CASES[name].dtype)
    for step in CASES[name].before:
        program = step(program).program
    return program


def ready_again(program: Program, case: Case) -> Program:
    """Renews what the pass needs and drops itself, such as statistics."""
    for step in case.before:
        if not set(step.provides) <= set(program.facts):
            program = step(program).program
    return program


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Everything that must not change about a program."""

    text: str
    nodes: list[str]
    held: dict[str, tuple[int, int, torch.Tensor]]
    facts: Any
    identities: dict[Any, int]

    @classmethod
    def of(cls, program: Program) -> Snapshot:
        tensors = {n: attribute(program.graph_module, n) for n in _reads(program)}
        return cls(
            print_program(program),
            [node.format_node() or "" for node in program.graph.nodes],
            {n: (id(t), t._version, _value(program, n).clone()) for n, t in tensors.items()},
            copy.deepcopy(program.facts),
            {
                **{name: id(program.weights.source(name)) for name in program.weights},
                **{kind: id(fact) for kind, fact in program.facts.items()},
            },
        )

    def check(self, program: Program) -> None:
        now = Snapshot.of(program)
        assert now.text == self.text
        assert now.nodes == self.nodes
        assert now.identities == self.identities
        assert same_facts(now.facts, self.facts)
        for name, (identity, version, value) in self.held.items():
            assert now.held[name][:2] == (identity, version), name
            assert torch.equal(now.held[name][2], value), name


def _reads(program: Program) -> set[str]:
    return {str(node.target) for node in program.graph.find_nodes(op="get_attr")}


def _value(program: Program, name: str) -> torch.Tensor:
    held: torch.Tensor = attribute(program.graph_module, name)
    return program.weights[name] if name in program.weights else held.detach()


def test_every_pass_has_a_case() -> None:
    assert set(CASES) == set(PASSES), "give each pass of zeroskip.passes.PASSES a case here"


@pytest.mark.parametrize(("name", "model"), every_run())
def test_a_pass_keeps_its_contract(name: str, model: str, tmp_path: Path) -> None:
    case = CASES[name]
    program = prepared(name, model)
    before = Snapshot.of(program)
    step = case.make(tmp_path / "first")
    result = step(program)
    verify(result.program)
    before.check(program)
    assert set(step.provides) <= set(result.program.facts)
    assert not set(step.invalidates) & (set(result.program.facts) - set(step.provides))
    assert result.program.inputs == program.inputs
    if not step.lossy:
        old, new = (p.run(program.example_inputs) for p in (program, result.program))
        for key in old:
            if model in case.reorders:
                assert relative_drift(old[key], new[key]) <= TOLERANCES[old[key].dtype]
            else:
                assert torch.equal(old[key], new[key])
    once = ready_again(result.program, case)
    again = case.make(tmp_path / "second")(once)
    kept = again.program.without_facts(step.invalidates)
    assert graph_text(kept) == graph_text(result.program)
    assert again.drift is None
    assert same_facts(kept.facts, result.program.facts)
    assert again.modified == (once is not result.program)


@pytest.mark.parametrize(("name", "model"), every_run())
def test_a_failed_pass_leaves_its_program_untouched(
    name: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = prepared(name, model)
    before = Snapshot.of(program)
    step = CASES[name].make(tmp_path / "out")
    work = type(step).run

    def fails_when_all_is_done(self: Pass, given: Program) -> Program:
        work(self, given)
        raise CompileError("planted")

    monkeypatch.setattr(type(step), "run", fails_when_all_is_done)
    with pytest.raises(CompileError, match="planted") as caught:
        step(program)
    assert caught.value.pass_name == name
    before.check(program)
    verify(program)


@pytest.mark.parametrize("name", PASSES)
def test_requirements_are_the_shortest_list(name: str) -> None:
    before = CASES[name].before
    for missing in range(len(before)):
        rest = [*before[:missing], *before[missing + 1 :], CASES[name].options]
        with pytest.raises(RequirementError):
            PassManager(rest)(small_program("mlp"))


@pytest.mark.parametrize("name", PASSES)
def test_options_survive_a_recipe(name: str, tmp_path: Path) -> None:
    step = CASES[name].options
    assert type(step) is PASSES[name]
    for field in dataclasses.fields(step):
        assert getattr(step, field.name) != field.default, f"{field.name} is at its default"
    text = dump_recipe(Recipe((step,)))
    assert loads_recipe(text).passes == (step,)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe([step], defaults=True))
    assert load_recipe(path).passes == (step,)


@pytest.mark.parametrize("name", PASSES)
def test_names_and_docstring(name: str) -> None:
    cls = PASSES[name]
    words = name.split("-")
    assert cls.name == name
    assert cls.__module__ == f"zeroskip.passes.{'_'.join(words)}"
    # Acronyms keep their spelling: PruneCVR.
    # Capitals are as published, such as those of ALPS.
    assert cls.__name__.lower() == "".join(words)
    text = cls.__doc__ or ""
    same = "Before and after are the same program" in text
    assert same or re.search(r"Before::\n.*After::\n", text, re.DOTALL)


# Planted passes, each with one fault.


@dataclasses.dataclass(frozen=True)
class Negates(Pass):
    name = "negates"

    def run(self, program: Program) -> Program:
        for node in program.graph.find_nodes(
            op="call_function", target=torch.ops.aten.relu.default
        ):
            node.target = torch.ops.aten.neg.default
        program.graph_module.recompile()
        return program


@dataclasses.dataclass(frozen=True)
class Scales(Pass):
    name = "scales"

    def run(self, program: Program) -> Program:
        return program.with_weights({"up.weight": program.weights["up.weight"] * 1.01})


@dataclasses.dataclass(frozen=True)
class WritesInPlace(Pass):
    name = "writes-in-place"
    lossy = True

    def run(self, program: Program) -> Program:
        program.weights["up.weight"].mul_(0.5)
        return program


@dataclasses.dataclass(frozen=True)
class BreaksItsPromise(Pass):
    name = "breaks-its-promise"
    provides = (Masks,)

    def run(self, program: Program) -> Program:
        return program


@dataclasses.dataclass(frozen=True)
class ChangesTheSignature(Pass):
    name = "changes-the-signature"
    renames_output: bool = False

    def run(self, program: Program) -> Program:
        if self.renames_output:
            return dataclasses.replace(program, outputs=("other",))
        with program.graph.inserting_before(next(iter(program.graph.nodes))):
            node = program.graph.placeholder("extra")
        node.meta = {"val": torch.zeros(1)}
        return program


@dataclasses.dataclass(frozen=True)
class Fails(Pass):
    name = "fails"
    claims: str | None = None

    def run(self, program: Program) -> Program:
        raise CompileError("planted", pass_name=self.claims)


@dataclasses.dataclass(frozen=True)
class Spy(Pass):
    seen: list[str] = dataclasses.field(default_factory=list)

    name = "spy"

    def run(self, program: Program) -> Program:
        self.seen.append("ran")
        return program


def fresh_program() -> Program:
    """Returns a program whose weights are its own, to be damaged."""
    program = small_program("mlp")
    return program.with_weights({n: program.weights[n].clone() for n in program.weights})


@pytest.mark.parametrize("step", [Negates(), Scales()], ids=lambda step: step.name)
def test_an_exact_pass_that_changes_outputs_is_caught(
    step: Pass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = fresh_program()
    with pytest.raises(EquivalenceError, match="moved the outputs by") as caught:
        step(program)
    error = caught.value
    assert error.pass_name == step.name
    assert error.where in program.outputs
    folder = Path(str(error.next_step).rpartition(" in ")[2])
    texts = [(folder / name).read_text() for name in ("before.txt", "after.txt")]
    assert texts[0] == print_program(program)
    assert ("neg(" in texts[1]) == isinstance(step, Negates)


@dataclasses.dataclass(frozen=True)
class Grows(Pass):
    """Makes a weight larger by a share of itself."""

    share: float = 0.0

    name = "grows"
    slack = 10.0

    def run(self, program: Program) -> Program:
        return program.with_weights(
            {"down.weight": program.weights["down.weight"] * (1 + self.share)}
        )


def test_a_pass_may_move_the_outputs_by_its_slack_and_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program, limit = fresh_program(), TOLERANCES[torch.float32]
    # What a share of the weight is of the outputs.
    effect = measure_drift(program, Grows(0.01).run(program)) / 0.01
    drift = Grows(5 * limit / effect)(program).drift
    assert drift is not None
    assert limit < drift < 10 * limit
    with pytest.raises(EquivalenceError, match=r"limit 0\.0001"):
        Grows(20 * limit / effect)(program)


def test_a_write_into_a_weight_is_caught() -> None:
    with pytest.raises(VerifyError, match="wrote into a tensor of its input") as caught:
        WritesInPlace()(fresh_program())
    assert caught.value.where == "up.weight"
    assert caught.value.pass_name == "writes-in-place"
    assert "with_weights" in str(caught.value.next_step)


def test_a_promised_fact_must_be_there() -> None:
    with pytest.raises(VerifyError, match="promises Masks and did not provide it") as caught:
        BreaksItsPromise()(fresh_program())
    assert caught.value.pass_name == "breaks-its-promise"


@pytest.mark.parametrize("renames_output", [False, True])
def test_the_signature_must_stay(renames_output: bool) -> None:
    with pytest.raises(VerifyError, match="changed the signature") as caught:
        ChangesTheSignature(renames_output)(fresh_program())
    assert caught.value.pass_name == "changes-the-signature"


def test_errors_name_the_pass_that_raised_them() -> None:
    with pytest.raises(CompileError, match="planted") as caught:
        Fails()(fresh_program())
    assert caught.value.pass_name == "fails"
    with pytest.raises(CompileError, match="planted") as caught:
        Fails(claims="inner")(fresh_program())
    assert caught.value.pass_name == "inner"


def test_a_missing_requirement_is_found_before_anything_runs() -> None:
    spy = Spy()
    program = small_program("mlp")
    with pytest.raises(RequirementError, match="prune-wanda needs Statistics") as caught:
        PassManager([spy, PruneWanda()])(program)
    assert "observe" in str(caught.value.next_step)
    with pytest.raises(RequirementError, match="apply-masks needs Masks") as caught:
        PassManager([spy, ApplyMasks()])(program)
    assert "prune-magnitude" in str(caught.value.next_step)
    assert "prune-wanda" in str(caught.value.next_step)
    assert caught.value.pass_name == "apply-masks"
    assert spy.seen == []
    with pytest.raises(RequirementError, match="lower-masked needs SparseWeights") as caught:
        LowerMasked()(program)
    assert caught.value.next_step


def test_an_invalidated_requirement_names_who_invalidated_it() -> None:
    spy = Spy()
    steps = [spy, Observe(), PruneWanda(), ApplyMasks(), PruneWanda("2:4")]
    with pytest.raises(RequirementError, match="apply-masks invalidated it") as caught:
        PassManager(steps)(small_program("mlp"))
    assert "observe" in str(caught.value.next_step)
    assert spy.seen == []


def test_facts_known_from_the_start_are_enough() -> None:
    program = PassManager([Observe()])(small_program("mlp")).program
    result = PassManager([PruneWanda("2:4"), ApplyMasks()])(program).program
    assert SparseWeights in result.facts
    assert Statistics not in result.facts


def test_options_that_do_not_fit_are_refused_before_anything_runs() -> None:
    spy = Spy()
    with pytest.raises(CompileError, match="matches no linear"):
        PassManager([spy, PruneMagnitude(include=("nonsense",))])(small_program("mlp"))
    assert spy.seen == []


def test_modified_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    program = fresh_program()
    same = program.with_weights({"up.weight": program.weights["up.weight"].clone()})
    monkeypatch.setattr(Spy, "run", lambda self, given: same)
    assert not Spy()(program).modified

    def swaps(self: Pass, given: Program) -> Program:
        node = next(iter(given.graph.find_nodes(op="call_function", target=ADD)))
        node.args = (node.args[1], node.args[0])
        given.graph_module.recompile()
        return given

    monkeypatch.setattr(Spy, "run", swaps)
    result = Spy()(program)
    assert result.modified
    assert result.drift == 0
