"""Every example runs as a reader would run it, except those that need a real model.

Scripts run in this process: torch and transformers take longer to import than most of them to run.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import zeroskip
from tests.test_docs import check_command, zeroskip_commands
from zeroskip import cli
from zeroskip.models import load_model
from zeroskip.recipe import load_recipe
from zeroskip.runtime.onnx.session import OnnxModel

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = EXAMPLES.parent / "models"
RECIPE = """\
passes:
  - prune-magnitude: {pattern: "2:4"}
  - apply-masks
"""


def run(
    script: str, cwd: Path, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[dict[str, Any], str]:
    """Runs a script as `python examples/SCRIPT ARGUMENTS`: its names, and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.syspath_prepend(str(EXAMPLES))
        capsys.readouterr()
        names = runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return names, capsys.readouterr().out


def call(words: list[str]) -> None:
    """Runs `zeroskip WORDS` in this process; fails where its exit code is not 0."""
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code in (0, None), shlex.join(words)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a tiny model, where the examples of CI expect it, and a recipe."""
    project = tmp_path_factory.mktemp("project")
    names = runpy.run_path(str(EXAMPLES / "tiny_model.py"))
    names["write_tiny_model"](project / "model", layers=1)
    (project / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return project


def test_the_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, printed = run("quickstart.py", tmp_path, capsys, tmp_path / "out")
    assert "50%" in printed
    assert (tmp_path / "out" / "onnx" / "model.onnx").is_file()


def test_the_custom_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, printed = run("custom_pass.py", tmp_path, capsys)
    assert "with peak=0 it is Wanda" in printed


def test_every_example_has_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    scripts = [path.name for path in EXAMPLES.glob("*.py") if path.name != "fetch_models.py"]
    assert [name for name in scripts if f'"{name}"' not in text] == []
    for recipe in EXAMPLES.glob("recipes/*.yaml"):
        assert load_recipe(recipe).passes


@pytest.fixture(scope="module")
def deployed(tiny: Path) -> Path:
    """compile, gate, verify, serve: with the recipe of the example, on less text."""
    out = tiny / "deployed"
    recipe = (EXAMPLES / "recipes" / "deploy.yaml").read_text(encoding="utf-8")
    quicker = {"../data": str(EXAMPLES / "data"), "max_tokens: 4096": "max_tokens: 256"}
    # Speed is measured, not judged: this machine may have other work.
    quicker["min_speedup: {limit: 0.9,"] = "min_speedup: {limit: 0.01, rounds: 3,"
    for old, new in quicker.items():
        assert old in recipe
        recipe = recipe.replace(old, new)
    (tiny / "deploy.yaml").write_text(recipe, encoding="utf-8")
    options = ["--samples", "2", "--sequence-length", "32", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        deploy = runpy.run_path(str(EXAMPLES / "deploy.py"))["deploy"]
        seconds = deploy(tiny / "model", tiny / "deploy.yaml", out, "Once", options, run=call)
    assert list(seconds) == ["compile and gate", "verify", "serve"]
    return out


def test_the_whole_way_leaves_an_artefact_that_passed_its_gates(deployed: Path) -> None:
    files = {path.name for path in deployed.iterdir()}
    assert {"checkpoint", "onnx", "recipe.yaml", "report.json", "report.html"} <= files
    manifest = json.loads((deployed / "manifest.json").read_text(encoding="utf-8"))
    assert len(manifest["gates"]) == 4


def test_a_failed_gate_ends_the_way(tmp_path: Path) -> None:
    """The exit code is that of the command, and no later step runs."""
    begun = []

    def gate_fails(words: list[str]) -> None:
        begun.append(words[0])
        raise SystemExit(3)

    deploy = runpy.run_path(str(EXAMPLES / "deploy.py"))["deploy"]
    with pytest.raises(SystemExit) as ended:
        deploy(tmp_path, tmp_path / "recipe.yaml", tmp_path / "out", "Once", [], run=gate_fails)
    assert (ended.value.code, begun) == (3, ["compile"])


def test_a_model_in_onnxruntime_genai(
    deployed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime_genai")
    _, printed = run("genai.py", tmp_path, capsys, deployed / "onnx", "--new-tokens", "4")
    assert re.search(r"the same [1-4] tokens as ONNX Runtime", printed)


def test_the_server(deployed: Path) -> None:
    """It gives the tokens that zeroskip's own session gives, and refuses what it cannot use."""
    folder = deployed / "onnx"
    names = runpy.run_path(str(EXAMPLES / "serve.py"))
    generator = names["Generator"](folder, zeroskip.custom_ops_path())
    prompt = generator.tokenizer.encode("Once upon").ids
    expected = OnnxModel(folder).generate(torch.tensor([prompt]), 5)[0, len(prompt) :]
    assert generator.tokens(prompt, 5) == expected.tolist()
    server = names["make_server"](generator, port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        for body in (b"no JSON", b'{"text": "x"}', b'{"prompt": ""}', b'{"prompt": 3}', b"[]"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(address, data=body)
            assert refused.value.code == 400
            assert "error" in json.load(refused.value)
    finally:
        server.shutdown()
        server.server_close()


def pipeline_scripts(name: str) -> str:
    """The shell text of a CI pipeline."""
    pipeline = yaml.safe_load((EXAMPLES / "ci" / name).read_text(encoding="utf-8"))
    if name == "github-actions.yml":
        jobs = pipeline["jobs"].values()
        return "\n".join(step.get("run", "") for job in jobs for step in job["steps"])
    jobs = [job for job in pipeline.values() if isinstance(job, dict) and "script" in job]
    return "\n".join(line for job in jobs for line in job["script"])


def test_the_commands_of_the_pipelines_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = list(zeroskip_commands(pipeline_scripts("github-actions.yml")))
    assert [words[0] for words in commands] == ["doctor", "compile", "verify"]
    assert list(zeroskip_commands(pipeline_scripts("gitlab-ci.yml"))) == commands
    for file in ("model", "recipe.yaml"):
        (tmp_path / file).symlink_to(tiny / file)
    monkeypatch.chdir(tmp_path)
    for words in commands[1:]:  # what doctor says depends on the machine
        call(words)
    check_command(commands[0])


def test_the_rules_for_make(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make runs a recorder in place of zeroskip; what it recorded then runs in this process."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny / "model")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    recorder = tmp_path / "recorder.sh"
    recorder.write_text(
        'echo "zeroskip $@" >> commands; [ $1 != compile ] || { mkdir -p sparse/tiny; '
        "touch sparse/tiny/manifest.json; }\n",
        encoding="utf-8",
    )
    (tmp_path / "Makefile").write_text(
        f"include {EXAMPLES / 'Makefile.fragment'}\n", encoding="utf-8"
    )

    def make(target: str) -> list[list[str]]:
        (tmp_path / "commands").write_text("", encoding="utf-8")
        words = ["make", "--silent", target, f"ZEROSKIP=sh {recorder}"]
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
        return list(zeroskip_commands((tmp_path / "commands").read_text(encoding="utf-8")))

    both = make("verify-tiny")
    assert [words[0] for words in both] == ["compile", "verify"]
    assert make("sparse/tiny/manifest.json") == []  # nothing is newer than the artefact
    (tmp_path / "recipe.yaml").write_text(RECIPE + "# changed\n", encoding="utf-8")
    assert [words[0] for words in make("sparse/tiny/manifest.json")] == ["compile"]
    for words in both:
        check_command(words)


def test_the_container_file_can_be_read() -> None:
    """It is never built here. Its instructions exist, and what it copies and runs exists, too."""
    text = (EXAMPLES / "docker" / "Dockerfile").read_text(encoding="utf-8")
    lines = [
        line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")
    ]
    known = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "CMD"}
    instructions = [line.partition(" ") for line in lines]
    assert {name for name, _, _ in instructions} <= known
    stages = [
        re.fullmatch(r"\S+(?: AS (\w+))?", rest) for n, _, rest in instructions if n == "FROM"
    ]
    assert [found[1] for found in stages if found] == ["compile", None]
    for name, _, rest in instructions:
        words = shlex.split(rest)
        if name == "COPY" and not words[0].startswith("--"):
            assert all((EXAMPLES.parent / word).exists() for word in words[:-1])
        elif name == "COPY":
            assert words[0] == "--from=compile"
        elif name == "CMD":
            assert json.loads(rest)[1] == "/serve.py"
    assert (EXAMPLES.parent / re.findall(r"ARG RECIPE=(\S+)", text)[0]).is_file()
    commands = [c for n, _, rest in instructions if n == "RUN" for c in zeroskip_commands(rest)]
    assert [words[0] for words in commands] == ["compile", "verify"]
    for words in commands:
        check_command(words)


@pytest.mark.real
def test_the_encoder_on_its_first_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = MODELS / "all-minilm-l6-v2"
    if not source.is_dir():
        pytest.skip("make models")
    model, tokenizer = load_model(source)
    model.encoder.layer = model.encoder.layer[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ("--model", tmp_path / "model", "--out", tmp_path / "out", "--samples", "16")
    _, printed = run("encoder.py", tmp_path, capsys, *words)
    (cosine,) = re.findall(r"mean cosine ([\d.]+)", printed)
    assert 0.9 < float(cosine) < 1
    assert (tmp_path / "out" / "onnx" / "model.onnx").is_file()


@pytest.mark.real
def test_the_demo_runs_on_the_first_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it but 29 of the 30 layers, whose export takes minutes."""
    source = MODELS / "smollm2-135m-instruct"
    if not source.is_dir():
        pytest.skip("make models")
    model, tokenizer = load_model(source)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.config.layer_types = None
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = ("--samples", "2", "--sequence-length", "64", "--tokens", "256", "--new-tokens", "4")
    words = ("--model", tmp_path / "model", "--out", tmp_path / "demo")
    _, printed = run("demo.py", tmp_path, capsys, *words, *sizes)
    assert printed.count("perplexity") >= 2
    assert (tmp_path / "demo" / "onnx" / "model.onnx").is_file()
    assert (tmp_path / "demo" / "checkpoint" / "config.json").is_file()


def test_the_texts_are_small_and_disjoint() -> None:
    texts = [
        (EXAMPLES / "data" / f"{name}.txt").read_text(encoding="utf-8")
        for name in ("calibration", "evaluation")
    ]
    assert all(len(text.encode()) <= 400_000 for text in texts)
    speeches = [set(text.strip().split("\n\n")) for text in texts]
    assert not speeches[0] & speeches[1]
