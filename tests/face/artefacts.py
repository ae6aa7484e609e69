"""Artefacts small enough to compile in a test, and what tests do to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zeroskip import cli
from zeroskip.manifest import sign
from zeroskip.manifest_files import describe_files

RECIPE = """\
passes:
  - observe
  - prune-wanda: {pattern: "2:4"}
  - apply-masks
  - lower-sparse-linear: {choose: always}
  - export-onnx: {directory: onnx}
calibration: {samples: 2, sequence_length: 16}
"""
TEXT = "".join(chr(97 + i * i % 26) for i in range(600))


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Runs the command line in this process: exit code, stdout, stderr."""
    capsys.readouterr()
    code = ended(*arguments)
    out, err = capsys.readouterr()
    return code, out, err


def ended(*arguments: str | Path) -> int:
    """Runs the command line in this process; returns the exit code."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    code = caught.value.code
    return code if isinstance(code, int) else int(code is not None)


def write_inputs(folder: Path, tokenizer: Any) -> None:
    """Writes a model of one layer, a text and a recipe, as `dense`, `text.txt` and `recipe.yaml`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")


def compile_in(folder: Path, out: str, *options: str) -> int:
    """Compiles what `write_inputs` wrote, within its folder; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return ended(
            "compile", "dense", "-r", "recipe.yaml", "-c", "text.txt", "-o", out, "-q", *options
        )  # fmt: skip


def sign_anew(artefact: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """Changes the manifest as somebody would who knows how its digests are made."""
    content = json.loads((artefact / "manifest.json").read_text(encoding="utf-8"))
    found = describe_files(artefact, besides="manifest.json")
    content["files"] = {n: {"bytes": e.bytes, "sha256": e.sha256} for n, e in found.items()}
    change(content)
    sign(content, artefact)
