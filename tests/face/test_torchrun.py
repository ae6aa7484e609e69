"""zeroskip compile by several processes writes what one process writes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import run_processes
from zeroskip import parallel
from zeroskip.cli import main
from zeroskip.ir import process_group
from zeroskip.ir.errors import CompileError

RECIPE = """\
passes:
  - observe
  - prune-wanda: {pattern: "2:4"}
  - apply-masks
  - export-onnx: {directory: onnx, form: plain}
calibration: {samples: 5, sequence_length: 16}
"""
TIMED = {"report.json", "report.html", "manifest.json"}


@pytest.fixture
def command(tmp_path: Path, checkpoint: Path, text_file: Path) -> list[str]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    options = ["--recipe", str(recipe), "--calibration", str(text_file), "--quiet"]
    return ["compile", str(checkpoint), *options, "--out"]


def files_of(out: Path) -> dict[str, str]:
    found = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in TIMED)
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def call(arguments: list[str], folder: Path) -> None:
    """Runs a command in a process of a group; its exit code and what it says go to files."""
    said = io.StringIO()
    rank = process_group.rank()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            main(arguments)
        except SystemExit as end:
            (folder / f"code-{rank}").write_text(str(end.code or 0))
    (folder / f"said-{rank}").write_text(said.getvalue())


def codes(folder: Path) -> list[str]:
    return [(folder / f"code-{rank}").read_text() for rank in (0, 1)]


def test_two_processes_write_the_bytes_of_one(tmp_path, command):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # As in the processes: sums depend on the number.
    try:
        call([*command, str(tmp_path / "out1")], tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "code-0").read_text() == "0"
    out = str(tmp_path / "out2")
    assert run_processes(2, tmp_path, call, [*command, out], tmp_path) == [0, 0]
    assert codes(tmp_path) == ["0", "0"]
    alone, together = files_of(tmp_path / "out1"), files_of(tmp_path / "out2")
    assert "onnx/model.onnx" in alone
    assert together == alone
    assert not list(tmp_path.glob(".out*"))
    # And again: there is nothing to do, for either of them.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out2").rglob("*")}
    arguments = [*command, str(tmp_path / "out2")]
    assert run_processes(2, tmp_path, call, arguments, tmp_path) == [0, 0]
    assert codes(tmp_path) == ["0", "0"]
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out2").rglob("*")}


def test_what_the_first_refuses_ends_all(tmp_path, command):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    assert run_processes(2, tmp_path, call, [*command, str(out)], tmp_path) == [0, 0]
    assert codes(tmp_path)[0] == "2"
    assert codes(tmp_path)[1] in "12"
    assert "already holds something" in (tmp_path / "said-0").read_text()
    assert "process 1 of 2 lost the others" in (tmp_path / "said-1").read_text()
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_processes_that_cannot_meet_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    meeting = parallel.joined_processes()
    with pytest.raises(CompileError, match="cannot find each other") as caught, meeting:
        pytest.fail("there is no group")
    assert "torchrun" in str(caught.value)


def test_torchrun_starts_it(tmp_path, shallow, text_file):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(re.sub(r"  - export-onnx.*\n", "", RECIPE), encoding="utf-8")
    options = ["--recipe", str(recipe), "--calibration", str(text_file), "--quiet"]
    out = tmp_path / "out"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [
            sys.executable,
            *launcher,
            "-m",
            "zeroskip",
            "compile",
            str(shallow),
            *options,
            "--out",
            str(out),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {"checkpoint/model.safetensors", "recipe.yaml"} <= files_of(out).keys()
