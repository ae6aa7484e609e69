"""How commands end: each exit code means one thing, and with --json standard output is one document."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import typer

from tests.face.test_cli import run
from zeroskip import cli, hub
from zeroskip.command_line import CommandLine
from zeroskip.exits import EXIT_CODES, GateError, manner
from zeroskip.ir.errors import ArtifactError, CompileError


def commands() -> list[str]:
    group = typer.main.get_command(cli.app)
    found = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found += [f"{name} {each}" for each in inner] if inner else [name]
    return found


@pytest.mark.parametrize("name", commands())
def test_every_command_has_the_same_manners(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, stdout, _ = run(capsys, *name.split(), "--help")
    assert code == 0
    for flag in ("--json", "--quiet", "--verbose"):
        assert flag in stdout, flag
    assert " ".join(stdout.split()).endswith(EXIT_CODES)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("frobnicate",), "UsageError"),
        (("compile",), "UsageError"),
        (("eval", "model", "--text", "t", "--stride", "x"), "UsageError"),
        (("eval", "/absent", "--text", "t"), "ArtifactError"),
        (("recipe", "check", "absent.yaml"), "RecipeError"),
        (("recipe", "show", "bets"), "RecipeError"),
        (("verify", "/absent"), "ManifestError"),
    ],
)
def test_an_unusable_input_is_a_document_too(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], kind: str
) -> None:
    code, stdout, stderr = run(capsys, *arguments, "--json")
    document = json.loads(stdout)
    assert (code, document["exit_code"]) == (2, 2)
    assert set(document["error"]) == {"kind", "problem", "where", "pass", "next_step"}
    assert document["error"]["kind"] == kind
    assert document["error"]["problem"].splitlines()[0] in stderr


def broken(error: BaseException | None) -> CommandLine:
    app = CommandLine()

    @app.command("fine")
    def fine() -> None:
        typer.echo(json.dumps({"quiet": manner().quiet, "verbose": manner().verbose}))

    @app.command("fails")
    def fails(as_json: bool = typer.Option(False, "--json")) -> None:
        assert error is not None
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (CompileError("no", where="here", pass_name="p", next_step="go"), "CompileError", 1),
        (GateError("no", "aside", {"density": 0.5}), "GateError", 3),
        (OSError(28, "No space left on device", "file"), "SystemRefusedError", 1),
        (MemoryError(), "SystemRefusedError", 1),
        (ZeroDivisionError("oh"), "UnexpectedError", 1),
    ],
)
def test_what_stops_a_command(
    capsys: pytest.CaptureFixture[str], error: Exception, kind: str, code: int
) -> None:
    with pytest.raises(SystemExit) as ended:
        broken(error).run(["fails", "--json"])
    stdout, stderr = capsys.readouterr()
    document = json.loads(stdout)
    assert (ended.value.code, document["exit_code"], document["error"]["kind"]) == (
        code,
        code,
        kind,
    )
    assert ("Traceback" in stderr) == (kind == "UnexpectedError")
    assert document.get("density") == (0.5 if code == 3 else None)


def test_the_traceback_is_for_who_asks_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, shown in (([], False), (["-v"], True)):
        with pytest.raises(SystemExit) as ended:
            broken(CompileError("no")).run(["fails", *flags])
        stdout, stderr = capsys.readouterr()
        assert (ended.value.code, stdout) == (1, "")
        assert ("Traceback" in stderr) is shown


def test_flags_reach_commands_that_do_not_name_them(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ([], ["--quiet"], ["--verbose"]):
        with pytest.raises(SystemExit) as ended:
            broken(None).run(["fine", *flags])
        assert ended.value.code == 0
        said = json.loads(capsys.readouterr().out)
        assert said == {"quiet": "--quiet" in flags, "verbose": "--verbose" in flags}
    assert not manner().quiet


def test_a_recipe_is_listed_shown_and_checked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, stdout, _ = run(capsys, "recipe", "list", "--json")
    assert [each["name"] for each in json.loads(stdout)["presets"]] == ["fast", "balanced", "best"]
    path = tmp_path / "mine.yaml"
    for flags in ((), ("--full",), ("--json",)):
        code, stdout, stderr = run(capsys, "recipe", "show", "best", "--pattern", "2:4", *flags)
        assert code == 0, stderr
        path.write_text(stdout, encoding="utf-8")
        code, stdout, stderr = run(capsys, "recipe", "check", path)
        assert code == 0, stderr
        assert "prune-sparsegpt" in stdout
    for text, message in (
        ("passes: [apply-masks]", "needs Masks"),
        ("passes: [observe]\ngates: {parity: 1e-5}", "exports none"),
        ("passes: [observe]\ncalibration: {text: absent.txt}", "absent.txt"),
    ):
        path.write_text(text, encoding="utf-8")
        code, stdout, stderr = run(capsys, "recipe", "check", path)
        assert (code, stdout) == (2, "")
        assert message in stderr
    code, stdout, _ = run(capsys, "recipe", "schema", "--out", tmp_path / "s.json")
    assert code == 0
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))["$schema"]


def test_a_name_on_the_hub_becomes_a_folder(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    checkpoint: Path,
    text_file: Path,
) -> None:
    asked = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.local_model("owner/tiny@v1") == checkpoint
    assert asked == [("owner/tiny", "v1")]
    code, stdout, stderr = run(
        capsys, "eval", "owner/tiny", "--text", text_file, "--max-tokens", "20", "--json"
    )
    assert code == 0, stderr
    assert json.loads(stdout)["tokens"] == 20
    # What is there, or was meant to be, is never looked for elsewhere.
    asked.clear()
    monkeypatch.chdir(tmp_path)
    for path in (checkpoint, tmp_path / "absent", Path("dense/typo"), Path("gpt2")):
        assert hub.local_model(path) == path
    assert asked == []


def test_without_a_network_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot find it.\nMore.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ArtifactError) as caught:
        hub.local_model("owner/tiny")
    assert "is no local path" in caught.value.problem
    assert caught.value.problem.endswith("Cannot find it.")
    assert "HF_HOME" in str(caught.value.next_step)
