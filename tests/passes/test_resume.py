"""Stopped and run again: the same weights, facts and records; damaged files are never believed."""

from __future__ import annotations

import dataclasses
import shutil
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.zoo import ZOO
from zeroskip.ir import facts as facts_module
from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.fact_files import CLASSES, FACTS, Decoder, Encoder, NotStorableError
from zeroskip.ir.facts import Fact, same_facts
from zeroskip.ir.graph_files import decode_graph
from zeroskip.ir.patterns import NM, SparsityPattern
from zeroskip.ir.printer import print_program
from zeroskip.ir.program import Program
from zeroskip.ir.stage_files import StageFiles
from zeroskip.ir.statistics import EdgeStatistics, Statistics
from zeroskip.passes import (
    AllocateSparsity,
    ApplyMasks,
    DistillOutputs,
    FindScaleGroups,
    FoldConstants,
    FoldScales,
    InduceSparsity,
    Instrument,
    LowerMasked,
    Observe,
    Pass,
    PassManager,
    PermuteChannels,
    PipelineResult,
    PruneMagnitude,
    PruneSparseGPT,
    PruneWanda,
    QuantizeValues,
    ReconstructBlocks,
    ShiftToBias,
    TrainElastic,
)
from zeroskip.passes.base import Scope

BATCHES = [ZOO["llama"].inputs(2, 9, padded=odd) for odd in (False, True, False, False)]
WANDA: tuple[Pass, ...] = (Observe(), PruneWanda("2:4"), ApplyMasks())
RECIPES: dict[str, tuple[Pass, ...]] = {
    "wanda": (FoldConstants(), *WANDA, LowerMasked()),
    "sparsegpt": (Observe(gram=True), PruneSparseGPT("2:4"), ReconstructBlocks(epochs=1)),
    "biases": (Observe(), PruneWanda("50%"), ShiftToBias(add=True, parts=2), ApplyMasks()),
    "elastic": (TrainElastic(groups=(0.5, 0.75), rank=2, epochs=1, held_out=0.25),),
    "scales": (
        FindScaleGroups(),
        Observe(),
        FoldScales(),
        PermuteChannels("2:4"),
        InduceSparsity("2:4", epochs=1),
        *WANDA,
        QuantizeValues("int8"),
    ),
    "whole": (
        Observe(),
        AllocateSparsity(0.5),
        PruneMagnitude("50% global"),
        ApplyMasks(),
        DistillOutputs(epochs=1),
    ),
}


@pytest.fixture
def llama(captured: Callable[[str], Program]) -> Program:
    return dataclasses.replace(captured("llama_tied"), calibration=BATCHES)


class PowerCutError(Exception):
    """What no pass expects."""


@dataclass
class Watch(Instrument):
    """Counts what runs and what does not, and cuts the power before a step."""

    allowed: int = 10**9
    ran: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def before_pass(self, step: Pass, program: Program, part: str) -> None:
        if len(self.ran) >= self.allowed:
            raise PowerCutError
        self.ran.append((step.name, part))

    def resumed(self, steps: Sequence[Pass], part: str) -> None:
        self.skipped += [(step.name, part) for step in steps]


def run(
    program: Program,
    passes: Sequence[Pass],
    folder: Path | None,
    allowed: int = 10**9,
    key: str = "",
) -> tuple[PipelineResult, Watch]:
    watch = Watch(allowed)
    files = None if folder is None else StageFiles(folder, key)
    return PassManager(passes, instruments=[watch], files=files)(program), watch


def assert_same(first: PipelineResult, second: PipelineResult) -> None:
    one, two = first.program, second.program
    assert print_program(one) == print_program(two)
    assert list(one.weights) == list(two.weights)
    for name in one.weights:
        assert torch.equal(one.weights[name], two.weights[name]), name
    assert same_facts(one.facts, two.facts)
    assert (one.dense is None) == (two.dense is None)
    for a, b in zip(first.records, second.records, strict=True):
        assert dataclasses.replace(a, seconds=0) == dataclasses.replace(b, seconds=0)
    assert first.stages == second.stages
    batch = {name: BATCHES[0][name] for name in one.inputs}
    assert torch.equal(one.run(batch)["logits"], two.run(batch)["logits"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_again_and_again_it_ends_the_same(
    recipe: str, llama: Program, tmp_path: Path
) -> None:
    passes = RECIPES[recipe]
    expected, whole = run(llama, passes, None)
    longest = max(len(passes), len(whole.ran) // 3)  # A stage needs no more than one of each.
    for _ in range(len(whole.ran)):
        try:
            result, watch = run(llama, passes, tmp_path / "stages", allowed=longest)
            break
        except PowerCutError:
            continue
    assert watch.skipped, "the last run had nothing to go on with"
    assert len(watch.ran) < len(whole.ran)
    assert_same(expected, result)
    again, watch = run(llama, passes, tmp_path / "stages")
    assert_same(expected, again)
    assert {name for name, _ in watch.ran} <= {"fold-constants", "lower-masked"}
    assert not [p for p in (tmp_path / "stages").iterdir() if not p.name[0].isdigit()]


@pytest.fixture(scope="module")
def finished(
    captured: Callable[[str], Program], tmp_path_factory: pytest.TempPathFactory
) -> tuple[PipelineResult, Path]:
    """Wanda once, with its stages."""
    folder = tmp_path_factory.mktemp("finished")
    program = dataclasses.replace(captured("llama_tied"), calibration=BATCHES)
    return run(program, WANDA, folder)[0], folder


@pytest.fixture
def stages(finished: tuple[PipelineResult, Path], tmp_path: Path) -> Path:
    """The stages of Wanda, to be damaged."""
    return Path(shutil.copytree(finished[1], tmp_path / "stages"))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("facts.safetensors", "truncated"),
        ("stage.json", "altered"),
        ("SHA256SUMS", "truncated"),
        ("facts.safetensors", "removed"),
    ],
)
def test_a_damaged_stage_is_computed_again(
    name: str, damage: str, llama: Program, finished: tuple[PipelineResult, Path], stages: Path
) -> None:
    places = sorted(stages.iterdir())
    path = places[1] / name
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        middle = len(content) // 2
        byte = bytes([content[middle] ^ 1])
        changed = content[:middle] + (byte + content[middle + 1 :] if damage == "altered" else b"")
        path.write_bytes(changed)
    with pytest.warns(UserWarning, match="cannot be used"):
        result, watch = run(llama, WANDA, stages)
    assert_same(finished[0], result)
    assert len(watch.ran) == 3 * (len(places) - 1), "the stage and those behind it"
    assert path.read_bytes() == content or name != "facts.safetensors"


def test_changed_weights_on_disk_are_found_out(llama: Program, tmp_path: Path) -> None:
    passes = (Observe(gram=True), PruneSparseGPT("2:4"))
    expected, _ = run(llama, passes, tmp_path)
    path = sorted(tmp_path.iterdir())[0] / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"weights\.safetensors is not what was written"):
        result, _ = run(llama, passes, tmp_path)
    assert_same(expected, result)


@pytest.mark.parametrize("change", ["key", "options", "passes"])
def test_stages_of_something_else_are_not_used(change: str, llama: Program, stages: Path) -> None:
    passes: tuple[Pass, ...] = WANDA
    if change == "options":
        passes = (WANDA[0], PruneWanda("1:4"), WANDA[2])
    if change == "passes":
        passes = WANDA[:2]
    with pytest.warns(UserWarning, match="something else"):
        _, watch = run(llama, passes, stages, key="another" if change == "key" else "")
    assert not watch.skipped


def test_without_a_gap(llama: Program, finished: tuple[PipelineResult, Path], stages: Path) -> None:
    shutil.rmtree(min(stages.iterdir()))
    result, watch = run(llama, WANDA, stages)
    assert not watch.skipped
    assert_same(finished[0], result)


@dataclass(frozen=True)
class Remark(Fact):
    """A fact that no list of classes knows."""

    def check(self, program: Program) -> str | None:
        return None

    def restrict(self, linears: Iterable[str]) -> Remark:
        return self

    def merge(self, other: Remark) -> Remark:
        return self


@dataclass(frozen=True)
class Remarks(Pass):
    name = "remarks"
    provides = (Remark,)

    @property
    def scope(self) -> Scope:
        return "block"

    def run(self, program: Program) -> Program:
        return program.with_fact(Remark())


@pytest.mark.parametrize("step", [Remarks(), Observe(keep=True)], ids=["fact", "observers"])
def test_what_has_no_form_in_files_runs_again(step: Pass, llama: Program, tmp_path: Path) -> None:
    first, _ = run(llama, [step], tmp_path)
    # A first stage without linears is none that observers were put into.
    assert {path.name for path in tmp_path.iterdir()} <= {"001-00000"}
    second, watch = run(llama, [step], tmp_path)
    assert watch.ran
    assert print_program(first.program) == print_program(second.program)


def test_leftovers_of_a_stage_are_removed(llama: Program, stages: Path) -> None:
    left = stages / ".001-00000.partial"
    left.mkdir()
    (left / "stage.json").write_text("{")
    run(llama, WANDA, stages)
    assert not left.exists()


def test_a_file_in_the_place_of_the_folder_is_an_error(llama: Program, tmp_path: Path) -> None:
    place = tmp_path / "stages"
    place.write_text("")
    with pytest.raises(ArtifactError, match="cannot be kept"):
        run(llama, WANDA, place)


def all_facts(cls: type = Fact) -> list[type[Fact]]:
    found = []
    for child in cls.__subclasses__():
        if child.__module__.startswith("zeroskip."):
            found += [child, *all_facts(child)]
    return [f for f in found if not getattr(f, "__abstractmethods__", None)]


# Of which nothing is ever made: its children are the facts.
BASES = {"Outcomes"}


def sample(hint: Any, depth: int = 0) -> Any:
    """A value of a type, filled to the leaves, with numbers that a careless file would change."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return arguments[-1]
    if origin in (typing.Union, types.UnionType):
        return sample(next(a for a in arguments if a is not type(None)), depth)
    if origin is tuple:
        items = arguments[:1] * 2 if arguments[-1] is Ellipsis else arguments
        return tuple(sample(item, depth) for item in items)
    if origin is frozenset:
        return frozenset({"b", "a"})
    if origin in (dict, Mapping):
        return {name: sample(arguments[1], depth) for name in ("z.é weight", "a")}
    if hint is SparsityPattern:
        return NM(2, 4)
    if hint is Tensor:
        return torch.tensor([[0.1, -0.0, float("inf")], [1e-45, 3.0, 2.0]]).T
    if dataclasses.is_dataclass(hint):
        return fill(hint)
    return {str: "é\n", int: 7, float: 0.1 + 0.2, bool: True, object: {"speed": float("inf")}}[hint]


def fill(cls: Any) -> Any:
    scope = {**vars(facts_module), **{c.__name__: c for c in CLASSES.values()}}
    hints = typing.get_type_hints(cls, localns=scope)
    return cls(**{f.name: sample(hints[f.name]) for f in dataclasses.fields(cls)})


def there_and_back(value: Any, known: Mapping[str, object] | None = None) -> Any:
    encoder = Encoder(known or {})
    encoded = encoder.encode(value)
    return Decoder(encoder.objects, encoder.tensors, {}, known or {}).decode(encoded)


@pytest.mark.parametrize("kind", [k for k in all_facts() if k.__name__ not in BASES])
def test_every_fact_comes_back_from_files(kind: type[Fact]) -> None:
    """A new fact has to be put into the list of classes, or the stages that have it cannot resume."""
    fact = fill(kind)
    back = there_and_back(fact)
    assert type(back) is kind
    assert same_facts({kind: fact}, {kind: back})
    assert kind in FACTS


def test_what_was_shared_is_shared_again() -> None:
    edge = EdgeStatistics(1, torch.ones(2), torch.ones(2), torch.ones(2), torch.ones(2, 2))
    encoder = Encoder({})
    encoded = encoder.encode(Statistics({"q": edge, "k": edge}))
    assert len(encoder.tensors) == 4
    back = Decoder(encoder.objects, encoder.tensors, {}, {}).decode(encoded)
    assert back.edges["q"] is back.edges["k"]


@pytest.mark.parametrize("value", [object(), {1: 2}, Path("x"), torch.ones(1, device="meta"), 1j])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(NotStorableError):
        there_and_back(value)


@pytest.mark.parametrize(
    "entry",
    [
        {"class": "Path", "fields": {}},
        {"class": "Masks", "fields": {"mask": 1}},
        {"class": "Masks"},
        {"class": "Roles", "fields": {"heads": {"object": 0}}},
        {"class": "Roles", "fields": {"heads": {"import": "os"}}},
        {"class": "Roles", "fields": {"heads": {"dtype": "load"}}},
    ],
)
def test_no_other_class_is_ever_made(entry: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="stored facts"):
        Decoder([entry], {}, {}, {})


@pytest.mark.parametrize(
    "entry",
    [
        {"same": "nowhere"},
        {"read": "a", "weight": "nowhere"},
        {"call": "a", "operator": ["quantized", "add", "default"], "arguments": [], "module": None},
        {"call": "a", "operator": ["aten", "add", "Tensor"], "arguments": [], "module": None},
    ],
)
def test_no_other_operator_is_ever_called(entry: dict[str, Any], llama: Program) -> None:
    with pytest.raises(ArtifactError, match="stored graph"):
        decode_graph(llama, [entry], {})


def test_no_warning_where_nothing_is_wrong(llama: Program, stages: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not run(llama, WANDA, stages)[1].ran
