"""zeroskip compile: killed at random moments, run twice, run at once, on a disk that is full."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.face import killed_runs
from tests.small import small_model
from zeroskip.cli import main
from zeroskip.compile import compile_sparse
from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.folders import new_folder
from zeroskip.passes import ApplyMasks, Observe, PruneWanda
from zeroskip.work_folder import work_folder

RECIPES = {
    "wanda": (6, "[observe, prune-wanda: {pattern: '2:4'}, apply-masks]"),
    "sparsegpt": (
        5,
        "[observe: {gram: true}, prune-sparsegpt: {pattern: '2:4'}, reconstruct-blocks: {epochs: 1}]",
    ),
    "biases": (
        4,
        "[observe, prune-wanda: {pattern: 50%}, shift-to-bias: {add: true, parts: 2}, apply-masks]",
    ),
    "elastic": (3, "[train-elastic: {groups: [0.5, 0.75], rank: 2, epochs: 1, held_out: 0.25}]"),
    "onnx": (
        2,
        "[observe, prune-wanda: {pattern: '2:4'}, apply-masks, export-onnx: {directory: onnx, form: plain}]",
    ),
}
CALIBRATION = "calibration: {samples: 4, sequence_length: 16}\n"
TIMED = {"report.json", "report.html", "manifest.json"}


@dataclass
class Runs:
    """A folder to compile in, and the process that does it."""

    folder: Path
    process: subprocess.Popen[str]

    def arguments(self, recipe: str, out: Path) -> list[str]:
        path = self.folder / f"{recipe}.yaml"
        path.write_text(f"passes: {RECIPES[recipe][1]}\n{CALIBRATION}", encoding="utf-8")
        given = {"--recipe": path, "--out": out, "--calibration": self.folder / "text.txt"}
        options = [str(word) for pair in given.items() for word in pair]
        return ["compile", str(self.folder / "dense"), *options, "--quiet"]

    def run(
        self, recipe: str, out: Path, delay: float = 600, after: Path | str = ""
    ) -> dict[str, Any]:
        request = {
            "after": str(after),
            "arguments": self.arguments(recipe, out),
            "delay": delay,
            "log": str(self.folder / "log"),
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    text = folder / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(2000)), encoding="utf-8")
    (folder / "log").touch()
    with subprocess.Popen(
        [sys.executable, killed_runs.__file__, str(folder / "dense"), str(text)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
    ) as process:
        yield Runs(folder, process)
        assert process.stdin is not None
        process.stdin.close()


def contents(out: Path) -> dict[str, str]:
    """Digests of the files that must be the same in every run, and the manifest's of them all."""
    found = {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in TIMED
    }
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    return {**found, "manifest": manifest["content_sha256"]}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k != "seconds"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def report(out: Path) -> Any:
    text = (out / "report.json").read_text(encoding="utf-8").replace(str(out), "OUT")
    return without_times(json.loads(text))


@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_at_random_moments_it_ends_in_the_same_bytes(recipe: str, runs: Runs) -> None:
    wanted = RECIPES[recipe][0]
    expected = runs.folder / f"{recipe}-expected"
    first = runs.run(recipe, expected)
    assert first["code"] == 0, runs.log()
    kills, resumed, number = 0, 0, 0
    seed = random.SystemRandom().randrange(10**6)
    moments = random.Random(seed)
    while kills < wanted or number == 0:
        out = runs.folder / f"{recipe}-{number}"
        work = out.parent / f".{out.name}.work"
        while kills < wanted:
            resumed += any((work / "stages").glob("[0-9]*"))
            # Every other one at any moment of all, and of what comes behind the first stage.
            after, share = (work / "stages", 0.5) if kills % 2 else ("", 1)
            delay = moments.uniform(0, share * first["seconds"])
            answer = runs.run(recipe, out, delay, after)
            if not answer["killed"]:
                break
            kills += 1
            assert not out.exists() or (out / "manifest.json").is_file(), f"seed {seed}: half done"
        assert runs.run(recipe, out)["code"] == 0, f"seed {seed}: {runs.log()}"
        assert contents(out) == contents(expected), f"seed {seed}"
        assert report(out) == report(expected), f"seed {seed}"
        assert not work.exists()
        number += 1
    ours = (f".{recipe}", "zeroskip-")  # Other libraries leave their own things where TMPDIR is.
    left = {path.name for path in runs.folder.iterdir() if path.name.startswith(ours)}
    assert not left, f"seed {seed}: {left}"
    RESUMED.append(resumed)


RESUMED: list[int] = []


def test_some_of_the_kills_left_finished_stages() -> None:
    """Else the test above would show no more than that a run can be started again."""
    if not RESUMED:
        pytest.skip("runs after the kills")
    assert sum(RESUMED) > 0


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below a folder, and of itself."""
    found = [folder, *folder.rglob("*")]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.fixture(scope="module")
def finished(runs: Runs) -> Path:
    """What one compilation wrote, alone in a folder."""
    out = runs.folder / "finished" / "out"
    assert runs.run("wanda", out)["code"] == 0, runs.log()
    return out


def ended(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ending:
        main(arguments)
    return int(ending.value.code or 0)


def test_a_second_run_does_nothing(
    runs: Runs, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(finished.parent)
    arguments = [word for word in runs.arguments("wanda", finished) if word != "--quiet"]
    assert ended(arguments) == 0
    assert capsys.readouterr().out.strip() == f"{finished} is up to date"
    assert ended([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passes"]
    assert state(finished.parent) == before


def test_killed_when_all_was_done_but_the_cleaning(
    runs: Runs, finished: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    left = tmp_path / ".out.work" / "stages" / "001-00000"
    left.mkdir(parents=True)
    assert ended(runs.arguments("wanda", out)) == 0
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--seed", "3"], "another recipe"),
        (["--recipe", "elastic.yaml"], "another recipe"),
        (["--calibration", "other.txt"], "another calibration"),
    ],
)
def test_something_else_is_not_written_over_it(
    change: list[str],
    named: str,
    runs: Runs,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runs.folder)
    (runs.folder / "other.txt").write_text("another text " * 200, encoding="utf-8")
    runs.arguments("elastic", finished)  # Writes the recipe.
    before = state(finished.parent)
    assert ended([*runs.arguments("wanda", finished), *change]) == 2
    assert named in capsys.readouterr().err
    assert state(finished.parent) == before


def test_an_artefact_that_lost_a_file_is_not_up_to_date(
    runs: Runs, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "checkpoint" / "config.json").unlink()
    assert ended(runs.arguments("wanda", out)) == 2
    assert "checkpoint/config.json is missing" in capsys.readouterr().err


def test_two_runs_into_one_folder(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with work_folder(out):
        assert ended(runs.arguments("wanda", out)) == 2
        message = capsys.readouterr().err
        assert f"another run is writing this folder: process {os.getpid()} on " in message
        # The same folder by another name.
        (tmp_path / "link").symlink_to(tmp_path)
        assert ended(runs.arguments("wanda", tmp_path / "link" / "out")) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "link"]


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with work_folder(out):
                os.write(writing, b"locked")
                signal.pause()
        finally:
            os._exit(1)
    os.read(reading, 6)
    with pytest.raises(ArtifactError, match=f"process {child} on"), work_folder(out):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with work_folder(out) as work:
        assert work.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(ArtifactError, match="No locks available") as error,
        work_folder(tmp_path / "out"),
    ):
        pass
    assert "has locks" in str(error.value.next_step)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_before_it_finished_anything_leaves_nothing(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), work_folder(tmp_path / "out") as work:
        (work / "stages").mkdir()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """As on a full disk, writing fails; Python ignores the signal that comes with it."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_no_room_for_a_stage(tmp_path: Path) -> None:
    model = small_model("llama")
    batch = {"input_ids": torch.arange(24).view(2, 12), "attention_mask": torch.ones(2, 12).long()}
    passes = [Observe(), PruneWanda("2:4"), ApplyMasks()]
    work = tmp_path / "work"
    with no_file_larger_than(512), pytest.raises(ArtifactError) as error:
        compile_sparse(model, passes, calibration=[batch], work=work)
    assert "a finished stage cannot be written" in str(error.value)
    assert str(work) in str(error.value.where)
    assert list(work.iterdir()) == []
    compiled = compile_sparse(model, passes, calibration=[batch], work=work)
    assert compiled.report.density == 0.5
    assert list(work.iterdir())


def test_a_folder_that_may_not_be_written(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    arguments = runs.arguments("wanda", tmp_path / "out")
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert ended(arguments) == 2
    message = capsys.readouterr().err
    assert "the work folder cannot be used" in message
    assert "Read-only file system" in message


def test_a_place_where_no_folder_can_be_made_is_refused_and_not_tried_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def vanish(self: Path, *_: object, **__: object) -> None:
        tried.append(self)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "mkdir", vanish)
    with (
        pytest.raises(ArtifactError, match="the work folder cannot be used"),
        work_folder(tmp_path / "out"),
    ):
        pass
    assert 1 < len(tried) <= 1000


def test_a_target_under_another_name_until_it_is_complete(tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    partial.mkdir()
    (partial / "old").touch()
    with new_folder(tmp_path / "out", partial) as folder:
        assert folder == partial
        assert list(folder.iterdir()) == []
        (folder / "new").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert not partial.exists()
