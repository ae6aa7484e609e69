"""The same inputs and seed give the same bytes, in another process with another order of sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from zeroskip.manifest_files import describe_files

HOLD_TIMES = {"manifest.json", "report.html", "report.json"}


def test_another_process_writes_the_same_bytes(built: Path) -> None:
    folder, other = built.parent, str(int(os.environ.get("PYTHONHASHSEED", "0") == "1") + 1)
    done = subprocess.run(
        [sys.executable, "-m", "zeroskip", "compile", "dense", "-r", "recipe.yaml",
         "-c", "text.txt", "-o", "another", "-q"],
        cwd=folder,
        # As many threads as here: sums depend on their number.
        env={
            **os.environ,
            "PYTHONHASHSEED": other,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (describe_files(path) for path in (built, folder / "another"))
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} <= HOLD_TIMES
    assert {"onnx/model.onnx", "checkpoint/model.safetensors", "recipe.yaml"} <= first.keys()

    # Of the manifest, only what is said to differ does.
    contents = [
        json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for path in (built, folder / "another")
    ]
    differing = {key for key in contents[0] if contents[0][key] != contents[1][key]}
    assert differing <= {"timings", "files", "sha256"}
    assert contents[0]["content_sha256"] == contents[1]["content_sha256"]
