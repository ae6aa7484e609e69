"""One artefact for many sparsities: what is written, what is read back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from zeroskip import cli, elastic_record
from zeroskip.compile import CompiledModel, compile_sparse
from zeroskip.elastic import load_elastic, open_elastic, save_elastic, write_if_elastic
from zeroskip.elastic_curve import bytes_at, choose_point, edges_of
from zeroskip.elastic_files import hash_files, verify_files
from zeroskip.elastic_manifest import (
    CurvePoint,
    FileEntry,
    read_manifest,
    write_manifest,
)
from zeroskip.evaluate import perplexity
from zeroskip.ir.elastic import Elastic
from zeroskip.ir.errors import ArtifactError, CompileError, PatternError, RequirementError
from zeroskip.ir.facts import SparseWeights
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Program
from zeroskip.passes import (
    ApplyMasks,
    ExportOnnx,
    MaterializeElastic,
    Pass,
    PruneMagnitude,
    TrainElastic,
)
from zeroskip.recipe import load_recipe

QUICK: dict[str, Any] = {"groups": (0.5, 0.7), "rank": 2, "epochs": 1, "learning_rate": 0.01}
RECIPE = """\
passes:
  - train-elastic: {groups: [0.5, 0.7], rank: 2, epochs: 1}
calibration: {samples: 2, sequence_length: 16}
"""
LINEAR = "model.layers.0.mlp.up_proj.weight"


def run(capsys: pytest.CaptureFixture[str], *arguments: str | float | Path) -> tuple[int, str, str]:
    """Runs the command line in this process: exit code, stdout, stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    code = ended.value.code
    out, err = capsys.readouterr()
    return (code if isinstance(code, int) else int(code is not None)), out, err


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(256, (2, 16), generator=generator) for _ in range(3)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A checkpoint with tied embeddings, as `checkpoint` but shared by the tests of this module."""
    directory = tmp_path_factory.mktemp("models") / "dense"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def compiled(dense: Path) -> CompiledModel:
    return compile_sparse(dense, [TrainElastic(**QUICK)], calibration=batches())


@pytest.fixture(scope="module")
def saved(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "elastic"
    save_elastic(compiled, directory)
    return directory


@pytest.fixture
def artefact(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "elastic"))


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(directory).state_dict())


# Round trip


def test_what_is_saved_is_loaded(compiled: CompiledModel, saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [
        "checkpoint", "elastic.json", "elastic.safetensors",
    ]  # fmt: skip
    before, after = compiled.program.fact(Elastic), load_elastic(saved).fact(Elastic)
    assert (before.groups, before.hierarchy) == (after.groups, after.hierarchy)
    assert before.linears.keys() == after.linears.keys()
    for name, linear in before.linears.items():
        for part in ("levels", "norms", "up", "down"):
            assert torch.equal(getattr(linear, part), getattr(after.linears[name], part)), name
        assert linear.serves_lowest == after.linears[name].serves_lowest
    assert any(linear.up.any() for linear in after.linears.values())


def test_the_manifest_says_how_it_was_made(saved: Path) -> None:
    content = json.loads((saved / "elastic.json").read_text(encoding="utf-8"))
    assert content["version"] == 1
    assert (content["family"], content["rank"], content["groups"]) == ("rows", 2, [0.5, 0.7])
    assert content["made_by"][0]["pass"] == "train-elastic"
    assert content["made_by"][0]["options"]["learning_rate"] == 0.01
    assert [point["sparsity"] for point in content["curve"]] == [0, 0.5, 0.7]
    assert [point["perplexity"] for point in content["curve"]] == [None] * 3
    assert set(content["files"]) >= {"elastic.safetensors", "checkpoint/model.safetensors"}
    assert str(saved.parent) not in json.dumps(content)


def test_bytes_are_those_of_packed_weights(saved: Path) -> None:
    from zeroskip.compile import materialize
    from zeroskip.ir.packing import packed_names

    program = load_elastic(saved)
    for sparsity in (0.0, 0.33, 0.7):
        made = materialize(program, sparsity, elastic_record.packing(always=True)).program
        stands_for = {n.rpartition("_bitmask")[0] for n in packed_names(made) if "_bitmask" in n}
        assert bool(stands_for) == (sparsity > 0)
        stored = made.weights.subset(n for n in made.weights if n not in stands_for)
        assert stored.nbytes() == bytes_at(program, sparsity)


def test_the_curve_of_a_family_of_patterns_has_patterns() -> None:
    assert edges_of(Elastic((0.5, 0.7), 8)) == [0, 0.5, 0.625]
    assert edges_of(Elastic((0.4, 0.7))) == [0, 0.4, 0.7]


def test_a_live_model_is_saved_as_well(
    compiled: CompiledModel, dense: Path, tmp_path: Path
) -> None:
    made = compile_sparse(LlamaForCausalLM.from_pretrained(dense).eval(), [])
    elastic = made.program.with_fact(compiled.program.fact(Elastic))
    made = dataclasses.replace(made, program=elastic)
    save_elastic(made, tmp_path / "elastic")
    assert weights_of(tmp_path / "elastic" / "checkpoint").keys() == weights_of(dense).keys()
    assert made.at(0.6).model is None


@pytest.mark.parametrize("last", ["pruned", "dense"])
def test_what_is_not_elastic_is_not_saved(
    compiled: CompiledModel, dense: Path, tmp_path: Path, last: str
) -> None:
    steps = [PruneMagnitude("50%"), ApplyMasks()] if last == "pruned" else []
    other = compile_sparse(dense, steps)
    with pytest.raises(RequirementError, match="not elastic"):
        save_elastic(other, tmp_path / "elastic")
    assert not list(tmp_path.iterdir())


def test_weights_that_were_changed_since_are_not_saved(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    linear = next(n for n in find_linears(compiled.program) if n.name == LINEAR)
    changed = compiled.program.with_weights(
        {linear.parameter: compiled.program.weights[linear.parameter].flip(1)}
    )
    with pytest.raises(RequirementError, match=r"(?s)changed since.*up_proj"):
        save_elastic(dataclasses.replace(compiled, program=changed), tmp_path / "elastic")
    assert not list(tmp_path.iterdir())


def test_after_other_passes_compile_writes_no_artefact_and_says_so(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    pruned = compiled.at(0.5)
    assert not write_if_elastic(pruned, tmp_path)
    name = next(n.parameter for n in find_linears(compiled.program) if n.name == LINEAR)
    changed = compiled.program.with_weights({name: compiled.program.weights[name].flip(1)})
    with pytest.warns(UserWarning, match="no elastic artefact is written"):
        assert not write_if_elastic(dataclasses.replace(compiled, program=changed), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_occupied_folder_is_left_alone(compiled: CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(ArtifactError, match="already holds something"):
        save_elastic(compiled, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_disk_that_is_full_leaves_nothing(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("zeroskip.elastic.save_file", fail)
    with pytest.raises(ArtifactError, match="No space left"):
        save_elastic(compiled, tmp_path / "elastic")
    assert not list(tmp_path.iterdir())


# CompiledModel.at


def test_at_gives_a_sparse_model_and_stays_elastic(compiled: CompiledModel) -> None:
    made = compiled.at(0.6)
    assert made.model is None
    assert Elastic not in made.program.facts
    assert made.report.density == pytest.approx(0.4, abs=0.03)
    assert made.report.drift > 0
    again = compiled.at(0.6)
    masks = made.program.fact(SparseWeights).masks
    for linear in find_linears(made.program):
        if linear.name in masks:
            first, second = (linear.weight(m.program) for m in (made, again))
            assert torch.equal(first, second)
    assert Elastic in compiled.program.facts


def test_at_refuses_what_was_not_trained(compiled: CompiledModel, dense: Path) -> None:
    with pytest.raises(PatternError, match=r"0.8 is outside \[0, 0.7\]"):
        compiled.at(0.8)
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(CompileError):
            compiled.at(bad)
    with pytest.raises(RequirementError, match="train-elastic"):
        compile_sparse(dense, []).at(0.5)
    with pytest.raises(RequirementError, match="train-elastic"):
        compiled.at(0.5).at(0.5)


# The commands


@pytest.fixture(scope="module")
def built(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `zeroskip compile` writes for a recipe that ends in train-elastic."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "text.txt").write_text("the quick brown fox jumps " * 40, encoding="utf-8")
    arguments = ("compile", dense, "--recipe", folder / "recipe.yaml", "--out", folder / "out")
    with pytest.raises(SystemExit) as ended:
        cli.main(list(map(str, (*arguments, "--calibration", folder / "text.txt", "--quiet"))))
    assert not ended.value.code
    return folder / "out"


def test_compile_writes_an_artefact(built: Path) -> None:
    assert {path.name for path in built.iterdir()} == {
        "checkpoint", "elastic.json", "elastic.safetensors", "manifest.json", "recipe.yaml",
        "report.html", "report.json",
    }  # fmt: skip
    assert load_elastic(built).fact(Elastic).groups == (0.5, 0.7)


def test_compile_without_the_pass_writes_none(
    capsys: pytest.CaptureFixture[str], dense: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("passes: [prune-magnitude: {pattern: 2:4}, apply-masks]", encoding="utf-8")
    assert run(capsys, "compile", dense, "-r", recipe, "-o", tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "elastic.json").exists()
    code, _, err = run(capsys, "materialize", tmp_path / "out", "-s", 0.5, "-o", tmp_path / "x")
    assert code == 2
    assert "elastic.json is missing" in err
    assert "train-elastic" in err


def test_materialize_one_sparsity(
    capsys: pytest.CaptureFixture[str], built: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sparse"
    code, stdout, stderr = run(capsys, "materialize", built, "--sparsity", 0.62, "--out", out)
    assert code == 0, stderr
    assert "sparsity 0.62" in stdout
    assert {path.name for path in out.iterdir()} == {
        "checkpoint", "manifest.json", "recipe.yaml", "report.html", "report.json",
    }  # fmt: skip
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["elastic"]["sparsity"] == 0.62
    assert report["elastic"]["made_by"][0]["pass"] == "train-elastic"
    assert [step["name"] for step in report["passes"]] == ["materialize-elastic"]
    assert (out / "checkpoint" / "tokenizer_config.json").is_file()

    made = weights_of(out / "checkpoint")
    wanted = load_elastic(built)
    expected = CompiledModel(None, wanted, None).at(0.62).program  # type: ignore[arg-type]
    for name in expected.weights:
        assert torch.equal(made[name], expected.weights[name]), name
    weight = made[LINEAR]
    assert ((weight == 0).sum(1) == int(0.62 * weight.shape[1])).all()


def test_materialize_several_sparsities_loads_once(
    capsys: pytest.CaptureFixture[str], built: Path, dense: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    loads = []
    monkeypatch.setattr(
        "zeroskip.elastic.open_elastic", lambda path: loads.append(path) or open_elastic(path)
    )
    out = tmp_path / "sparse"
    sparsities = ("--sparsity", 0, "--sparsity", 0.5, "--sparsity", 0.7)
    code, stdout, stderr = run(capsys, "materialize", built, *sparsities, "-o", out, "--json")
    assert code == 0, stderr
    assert loads == [built]
    assert [report["elastic"]["sparsity"] for report in json.loads(stdout)] == [0, 0.5, 0.7]
    assert {path.name for path in out.iterdir()} == {"0.0", "0.5", "0.7"}
    same, source = weights_of(out / "0.0" / "checkpoint"), weights_of(dense)
    assert same.keys() == source.keys()
    assert all(torch.equal(same[name], source[name]) for name in source)
    zeros = [
        float((weights_of(out / p / "checkpoint")[LINEAR] == 0).float().mean())
        for p in ("0.5", "0.7")
    ]
    assert zeros == pytest.approx([0.5, 0.7], abs=0.04)


@pytest.fixture(scope="module")
def exported(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `zeroskip materialize --max-bytes ... --onnx` writes; the budget is that of 50 %."""
    out = tmp_path_factory.mktemp("exported") / "sparse"
    limit = str(read_manifest(built).curve[1].bytes)
    with pytest.raises(SystemExit) as ended:
        cli.main(["materialize", str(built), "--max-bytes", limit, "-o", str(out), "--onnx"])
    assert not ended.value.code
    return out


def test_what_was_materialized_is_an_artefact(
    capsys: pytest.CaptureFixture[str], built: Path, exported: Path, tmp_path: Path
) -> None:
    elastic, out = tmp_path / "elastic", tmp_path / "several"
    shutil.copytree(built, elastic)
    arguments = ("materialize", elastic, "-s", 0.5, "-s", 0.62, "--out", out)
    assert run(capsys, *arguments)[0] == 0
    for made in (out / "0.5", out / "0.62", exported):
        code, stdout, stderr = run(capsys, "verify", made)
        assert code == 0, stdout + stderr
        steps = load_recipe(made / "recipe.yaml").passes
        assert isinstance(steps[0], MaterializeElastic)
        assert (made / "report.html").stat().st_size > 1000
    assert isinstance(load_recipe(exported / "recipe.yaml").passes[-1], ExportOnnx)
    # It knows what it came from, and when that changes; a curve that is measured changes nothing.
    assert run(capsys, "curve", elastic, "-s", 0.6)[0] == 0
    assert run(capsys, "verify", out / "0.5", "--no-run")[0] == 0
    tensors = elastic / "elastic.safetensors"
    tensors.write_bytes(tensors.read_bytes() + b" ")
    code, stdout, _ = run(capsys, "verify", out / "0.5", "--no-run")
    assert code == 4
    assert "stale" in stdout
    weights = out / "0.62" / "checkpoint" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-3] ^= 1
    weights.write_bytes(bytes(damaged))
    code, stdout, _ = run(capsys, "verify", out / "0.62", "--no-run")
    assert code == 4
    assert "tampered" in stdout


def test_materialize_with_onnx(exported: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the lazy dog sleeps " * 10, encoding="utf-8")
    report = (exported / "report.json").read_text(encoding="utf-8")
    assert json.loads(report)["elastic"]["sparsity"] == 0.5
    assert "partial" not in report
    assert "zeroskip::sparse_linear" in report, "a budget in bytes packs whatever the speed"
    found = [
        perplexity(exported / part, text, sequence_length=32).perplexity
        for part in ("onnx", "checkpoint")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_latency_is_measured_in_onnx_runtime(
    saved: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclasses.dataclass(frozen=True)
    class Copied(Pass):
        """An export that was made before."""

        directory: Path
        name = "copied"

        def run(self, program: Program) -> Program:
            shutil.copytree(exported / "onnx", self.directory)
            return program

    monkeypatch.setattr(elastic_record, "ExportOnnx", Copied)
    monkeypatch.setattr(elastic_record, "_LEAST_SECONDS", 0.0)
    seconds, how = elastic_record.measure_latency(load_elastic(saved), 0.7, threads=1)
    assert 0 < seconds < 5
    assert how["threads"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no sparsity is given"),
        (("-s", "0.5", "--max-bytes", "1MiB"), "--sparsity and --max-bytes are given together"),
        (("--max-perplexity", "9", "--target-latency", "1"), "are given together"),
        (("-s", "0.5", "-s", "0.5"), "given twice"),
        (("-s", "0.8"), "outside [0, 0.7]"),
        (("-s", "nan"), "outside [0, 0.7]"),
        (("--max-bytes", "many"), "not a size"),
        (("--max-bytes", "0"), "is no budget"),
        (("--max-bytes", "10KiB"), "the nearest is"),
        (("--max-perplexity", "nan"), "is no budget"),
        (("--max-perplexity", "20"), "zeroskip curve ARTEFACT --text"),
        (("--target-latency", "20"), "zeroskip curve ARTEFACT --latency"),
    ],
)
def test_choices_that_are_refused(
    capsys: pytest.CaptureFixture[str],
    built: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
) -> None:
    code, stdout, stderr = run(capsys, "materialize", built, *options, "-o", tmp_path / "sparse")
    assert (code, stdout) == (2, "")
    assert message in stderr
    assert "next:" in stderr
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_materialisation_that_stops(
    capsys: pytest.CaptureFixture[str], built: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    done = []

    def stop(self: CompiledModel, directory: Path) -> None:
        done.append(directory)
        if len(done) == 2:
            raise OSError("No space left on device")
        directory.mkdir(parents=True)

    monkeypatch.setattr(CompiledModel, "save_pretrained", stop)
    arguments = ("-s", 0.5, "-s", 0.6, "-o", tmp_path / "sparse")
    code, _, stderr = run(capsys, "materialize", built, *arguments)
    assert code == 1
    assert "No space left" in stderr
    assert not list(tmp_path.iterdir())


# The curve, and budgets


def test_the_curve_is_measured_and_kept(
    capsys: pytest.CaptureFixture[str], artefact: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the lazy dog sleeps " * 10, encoding="utf-8")
    times = iter((0.004, 0.003, 0.002, 0.001))
    monkeypatch.setattr(
        elastic_record, "measure_latency", lambda *_: (next(times), {"machine": "made up"})
    )
    arguments = ("--text", text, "--latency", "-s", 0.6, "--sequence-length", 32, "--json")
    code, stdout, stderr = run(capsys, "curve", artefact, *arguments)
    assert code == 0, stderr
    curve = json.loads(stdout)["curve"]
    assert [point["sparsity"] for point in curve] == [0, 0.5, 0.6, 0.7]
    assert [point["latency"] for point in curve] == [4, 3, 2, 1]
    sizes = [point["bytes"] for point in curve]
    assert sizes == sorted(sizes, reverse=True)
    dense = perplexity(artefact / "checkpoint", text, sequence_length=32).perplexity
    assert curve[0]["perplexity"] == pytest.approx(dense, rel=1e-5)
    measured = json.loads(stdout)["measured"]
    assert (measured["perplexity"]["tokens"], measured["latency"]["machine"]) == (199, "made up")

    code, shown, _ = run(capsys, "curve", artefact)
    assert code == 0
    assert "3.000 ms" in shown
    out = tmp_path / "sparse"
    arguments = ("--target-latency", 2.5, "-o", out, "--json")
    code, stdout, stderr = run(capsys, "materialize", artefact, *arguments)
    assert code == 0, stderr
    assert json.loads(stdout)[0]["elastic"]["sparsity"] == 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "missing.txt"), "cannot be read"),
        (("--sparsity", "0.9"), "outside"),
        (("--text", "{text}", "--sequence-length", "500"), "has 128 positions"),
    ],
)
def test_a_curve_that_cannot_be_measured_stays(
    capsys: pytest.CaptureFixture[str],
    artefact: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("x" * 1000, encoding="utf-8")
    before = (artefact / "elastic.json").read_bytes()
    given = [option.replace("{text}", str(text)) for option in options]
    code, _, stderr = run(capsys, "curve", artefact, *given)
    assert code == (1 if "500" in options else 2)
    assert message.lower() in stderr.lower()
    assert (artefact / "elastic.json").read_bytes() == before


CURVE = (
    CurvePoint(0.0, 100, 10.0, 4.0),
    CurvePoint(0.5, 60, 12.0, 5.0),
    CurvePoint(0.6, 50, 11.5, 3.0),
    CurvePoint(0.7, 40, None, 2.0),
)


@pytest.mark.parametrize(
    ("budget", "sparsity"),
    [
        ({"max_perplexity": 11.5}, 0.6),
        ({"max_perplexity": 11.4}, 0.0),
        ({"max_perplexity": 99.0}, 0.6),
        ({"max_bytes": 60}, 0.5),
        ({"max_bytes": 59}, 0.6),
        ({"max_bytes": 100}, 0.0),
        ({"target_latency": 3.5}, 0.6),
        ({"target_latency": 4.0}, 0.0),
        ({"target_latency": 2.0}, 0.7),
    ],
)
def test_budgets_choose_recorded_points(budget: dict[str, Any], sparsity: float) -> None:
    assert choose_point(CURVE, **budget).sparsity == sparsity


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            {"max_perplexity": 9.9},
            r"(?s)perplexity 9.9.*nearest is perplexity 10.0000 at sparsity 0;",
        ),
        ({"max_bytes": 39}, r"(?s)39 bytes or less.*nearest is 40 bytes at sparsity 0.7"),
        ({"target_latency": 1.0}, r"(?s)1.000 ms or less.*nearest is 2.000 ms at sparsity 0.7"),
        ({"max_bytes": -1}, "no budget"),
        ({}, "0 budgets"),
        ({"max_bytes": 60, "target_latency": 5.0}, "2 budgets"),
    ],
)
def test_budgets_that_no_point_meets(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        choose_point(CURVE, **budget)


# Hostile files. Where a digest would hide what else is checked, it is computed anew.


def resign(artefact: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """Changes the manifest as somebody would who knows how its digests are made."""
    from zeroskip.manifest_files import digest_of

    path = artefact / "elastic.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["files"] |= {
        name: dataclasses.asdict(entry) for name, entry in hash_files(artefact).items()
    }
    change(content)
    content.pop("sha256")
    content["sha256"] = digest_of(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def refused(artefact: Path, message: str, file: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        load_elastic(artefact)
    assert file in str(caught.value.where)
    assert caught.value.next_step


def test_a_manifest_signed_anew_is_read(artefact: Path) -> None:
    resign(artefact)
    assert load_elastic(artefact).fact(Elastic).linears


@pytest.mark.parametrize(
    "name", ["elastic.safetensors", "checkpoint/model.safetensors", "checkpoint/config.json"]
)
def test_damaged_files(artefact: Path, name: str) -> None:
    path = artefact / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    refused(artefact, "truncated", name)
    path.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    refused(artefact, "tampered", name)
    path.write_bytes(whole + b"\0")
    refused(artefact, "tampered", name)
    path.unlink()
    refused(artefact, "missing", name)


def test_files_that_do_not_belong(artefact: Path, tmp_path: Path) -> None:
    (artefact / "recipe.yaml").write_text("passes: []", encoding="utf-8")
    (artefact / "checkpoint" / ".DS_Store").write_text("", encoding="utf-8")
    verify_files(read_manifest(artefact), artefact)  # What nothing reads may be there.
    added = artefact / "checkpoint" / "model.safetensors.index.json"
    added.write_text("{}", encoding="utf-8")
    refused(artefact, "was added", added.name)
    added.unlink()
    tensors = artefact / "elastic.safetensors"
    tensors.rename(tmp_path / "elsewhere")
    tensors.symlink_to(tmp_path / "elsewhere")
    refused(artefact, "is a link", tensors.name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "truncated or no JSON"),
        ('{"format": "zeroskip-elastic", "ver', "truncated or no JSON"),
        ("[1, 2]", "holds a list, not an object"),
        ("[" * 100000, "truncated or no JSON"),
        ('{"version": NaN}', "NaN is not a number"),
        ("{}", "no elastic artefact"),
        ('{"format": "zeroskip-elastic", "version": 2}', "another version: 2, and this is 1"),
        ('{"format": "zeroskip-elastic", "version": true}', "another version"),
        ('{"format": "zeroskip-elastic", "version": 1}', "malformed"),
    ],
)
def test_manifests_that_are_none(artefact: Path, text: str, message: str) -> None:
    (artefact / "elastic.json").write_text(text, encoding="utf-8")
    refused(artefact, message, "elastic.json")


def test_a_manifest_edited_by_hand(artefact: Path) -> None:
    path = artefact / "elastic.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("0.7", "0.8"), encoding="utf-8")
    refused(artefact, "tampered", "elastic.json")


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "checkpoint/../../secret",
        "/etc/passwd",
        "checkpoint/./config.json",
        "checkpoint//config.json",
        "checkpoint\\..\\secret",
        "C:/secret",
        "checkpoint/C:secret",
        "checkpoint",
        "recipe.yaml",
        "",
    ],
)
def test_names_that_lead_elsewhere(artefact: Path, name: str) -> None:
    resign(
        artefact, lambda content: content["files"].update({name: {"bytes": 1, "sha256": "0" * 64}})
    )
    refused(artefact, "leads elsewhere", "elastic.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("groups", []),
        ("groups", [0.7, 0.5]),
        ("groups", [0.5, 1.0]),
        ("groups", ["0.5"]),
        ("groups", [True]),
        ("family", "3"),
        ("family", 8),
        ("hierarchy", "flat"),
        ("rank", 0),
        ("rank", 1.5),
        ("linears", []),
        ("linears", {"x": {"shape": [1], "serves_lowest": True}}),
        ("linears", {"x": {"shape": [1, -1], "serves_lowest": True}}),
        ("linears", {"x": {"shape": [1, 1], "serves_lowest": 1}}),
        ("curve", {}),
        ("curve", [{"sparsity": 0.9, "bytes": 1}]),
        ("curve", [{"sparsity": 0.5, "bytes": -1}]),
        ("curve", [{"sparsity": 0.5, "bytes": 1}, {"sparsity": 0.5, "bytes": 1}]),
        ("curve", [{"sparsity": 0.5, "bytes": 1, "perplexity": "low"}]),
        ("curve", [{"sparsity": 0.5, "bytes": 1, "latency": 10**400}]),
        ("made_by", ["train-elastic"]),
        ("measured", None),
        ("zeroskip", 1),
        ("files", {}),
        ("files", {"elastic.safetensors": {"bytes": 1, "sha256": "0" * 64}}),
        ("files", {"elastic.safetensors": {"bytes": 1, "sha256": 0}}),
    ],
)
def test_values_of_another_kind(artefact: Path, key: str, value: Any) -> None:
    resign(artefact, lambda content: content.update({key: value}))
    refused(artefact, "malformed", "elastic.json")


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LINEAR}.up"][1, 0, 0] = float("nan")


def _infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LINEAR}.norms"][3] = float("inf")


def _negative(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LINEAR}.norms"][3] = -1


def _constant(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LINEAR}.levels"][:] = 7


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LINEAR}.levels"] = tensors[f"{LINEAR}.levels"][:, :-1].contiguous()


def _wide_type(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LINEAR}.levels"] = tensors[f"{LINEAR}.levels"].short()


def _half(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LINEAR}.down"] = tensors[f"{LINEAR}.down"].half()


def _few_groups(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LINEAR}.up"] = tensors[f"{LINEAR}.up"][:1].clone()


def _lacking(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{LINEAR}.norms"]


def _extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["another.levels"] = tensors[f"{LINEAR}.levels"].clone()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_nan, "up holds what is no number"),
        (_infinite, "norms holds what is no number"),
        (_negative, "negative"),
        (_constant, "out of range"),
        (_narrow, r"levels is U8 \[72, 31\], not U8 \[72, 32\]"),
        (_wide_type, "levels is I16"),
        (_half, "down is F16"),
        (_few_groups, r"up is F32 \[1, 72, 2\], not F32 \[2, 72, 2\]"),
        (_lacking, "lacks the tensor"),
        (_extra, "unknown to elastic.json"),
    ],
)
def test_tensors_that_are_wrong(
    artefact: Path, spoil: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    path = artefact / "elastic.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path)
    refused(artefact, "tampered|truncated", path.name)
    resign(artefact)
    refused(artefact, message, path.name)


def test_a_file_of_tensors_that_is_none(artefact: Path) -> None:
    path = artefact / "elastic.safetensors"
    for content in (b"", b"\xff" * 64, path.read_bytes()[:5000]):
        path.write_bytes(content)
        resign(artefact)
        refused(artefact, "truncated or damaged", path.name)


def test_linears_of_another_model(artefact: Path) -> None:
    path = artefact / "elastic.safetensors"
    tensors = {
        name.replace("up_proj", "other_proj"): tensor for name, tensor in load_file(path).items()
    }
    save_file(tensors, path)
    other = LINEAR.replace("up_proj", "other_proj")
    resign(artefact, lambda c: c["linears"].update({other: c["linears"].pop(LINEAR)}))
    refused(artefact, "another model.*other_proj", "elastic.json")


def test_a_checkpoint_of_another_size(artefact: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(artefact / "checkpoint")
    config.intermediate_size = 64
    LlamaForCausalLM(config).save_pretrained(artefact / "checkpoint")
    resign(artefact)
    refused(artefact, "another model", "elastic.json")


def test_a_checkpoint_that_is_none(artefact: Path) -> None:
    (artefact / "checkpoint" / "config.json").write_text("[]", encoding="utf-8")
    resign(artefact)
    with pytest.raises(ArtifactError):
        load_elastic(artefact)


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    manifest = read_manifest(artefact)
    before = {path.name: path.stat().st_size for path in artefact.iterdir()}
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ArtifactError, match="No space left"):
        write_manifest(manifest, artefact)
    assert {path.name: path.stat().st_size for path in artefact.iterdir()} == before


def test_a_digest_knows_its_file(artefact: Path) -> None:
    files = hash_files(artefact)
    assert files == read_manifest(artefact).files
    assert all(isinstance(entry, FileEntry) for entry in files.values())
