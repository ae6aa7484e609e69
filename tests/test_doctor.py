"""`zeroskip doctor`, where the kernels work and where they do not."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from zeroskip import cli, doctor
from zeroskip.ir.errors import KernelLibraryError
from zeroskip.runtime.kernels import compilers, location


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Runs `zeroskip doctor` in this process: exit code, stdout, stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *arguments])
    out, err = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else int(code is not None)), out, err


@pytest.fixture
def library() -> Path:
    if compilers.find_compiler() is None and location.try_library_path() is None:
        pytest.skip("there is no C++ compiler")
    return location.library_path()


def test_a_machine_on_which_the_kernels_work(
    capsys: pytest.CaptureFixture[str], library: Path
) -> None:
    code, out, err = run(capsys, "--json")
    found = json.loads(out)
    assert (code, found["problem"], err) == (0, None, "")
    assert found["library"] == str(library)
    assert found["onnxruntime"] is True
    assert set(found["versions"]) == {"python", *doctor.PACKAGES}
    assert found["gpus"] == [] or found["gpus"][0]["kernels"]
    assert set(found["kernels"]) == {"float32", "float16", "bfloat16", "int8"}
    assert found["kernels"]["float32"]["1"]
    assert found["worst_error"] < 1e-5
    code, out, _ = run(capsys)
    assert code == 0
    for expected in ("kernel library", "takes the library", found["processor"].split()[0]):
        assert expected in out


def test_what_was_built_and_does_not_serve_here_is_said() -> None:
    found = doctor.examine()
    found.build = {"groups": ["avx2", "avx512", "amx"], "compiler": "c++"}
    for sets, said in (
        (["avx2", "portable"], "avx512, amx: this"),
        (["avx512", "avx2"], "amx: this"),
    ):
        found.instruction_sets = sets
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(doctor.findings_table(found))
        assert said in console.export_text()
    found.build, found.instruction_sets = {"groups": ["neon_dotprod"]}, ["neon", "portable"]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(doctor.findings_table(found))
    assert "not used" not in console.export_text()


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with neither a library nor a compiler."""
    monkeypatch.setattr(location, "installed_library", lambda: None)
    monkeypatch.setenv("ZEROSKIP_CACHE", str(tmp_path))
    monkeypatch.delenv("ZEROSKIP_LIBRARY", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compilers, "find_compiler", lambda: None)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("system", "advice"),
    [
        ("linux", "apt-get install g++"),
        ("darwin", "xcode-select --install"),
        ("win32", "Build Tools for Visual Studio"),
    ],
)
def test_a_bare_machine_is_told_how_to_get_a_compiler(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    system: str,
    advice: str,
) -> None:
    monkeypatch.setattr(location.sys, "platform", system)
    code, out, err = run(capsys, "--json")
    found = json.loads(out)
    assert code == 1
    assert found["library"] is None
    assert found["compiler"] is None
    assert found["kernels"] == {}
    assert advice in found["next_step"]
    assert found["problem"] in err
    assert advice in err


@pytest.mark.usefixtures("bare")
def test_the_table_of_a_bare_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert code == 1
    assert "none: " in out
    assert "next:" in err


def test_a_file_that_is_no_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "text.so").write_text("no library", encoding="utf-8")
    monkeypatch.setenv("ZEROSKIP_LIBRARY", str(tmp_path / "text.so"))
    code, out, err = run(capsys, "--json")
    assert code == 1
    assert json.loads(out)["variables"]["ZEROSKIP_LIBRARY"] == str(tmp_path / "text.so")
    assert "cannot be loaded" in err


def test_a_library_that_onnxruntime_refuses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    import onnxruntime

    def refuse(self: object, path: str) -> None:
        raise RuntimeError(f"no entry point in {path}")

    monkeypatch.setattr(onnxruntime.SessionOptions, "register_custom_ops_library", refuse)
    code, out, err = run(capsys, "--json")
    assert code == 1
    assert json.loads(out)["onnxruntime"] is False
    assert "no entry point" in err


def test_portable_kernels_alone_are_not_called_fast(library: Path) -> None:
    found = doctor.Examination(
        versions={}, processor="", variables={}, compiler=None, cache="",
        kernels={"float32": {1: "portable-dot"}}, build={"left_out": ["avx2"]},
    )  # fmt: skip
    with pytest.raises(KernelLibraryError) as raised:
        doctor._judge_kernels(found)
    assert raised.value.next_step is not None
    assert "newer compiler" in raised.value.next_step
    found.kernels["float32"][16] = "avx2-tile"
    doctor._judge_kernels(found)
