"""Where a model was loaded from, and how a folder comes to be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from zeroskip.ir import folders
from zeroskip.ir.folders import new_folder, set_aside, source_folder


def loaded_from(name: object) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(_name_or_path=name))


def test_a_model_from_a_folder_knows_it(tmp_path: Path) -> None:
    assert source_folder(loaded_from(str(tmp_path))) == tmp_path


@pytest.mark.parametrize("name", ["", None, "someone/a-name-on-the-hub"])
def test_a_model_from_elsewhere_has_none(name: object) -> None:
    assert source_folder(loaded_from(name)) is None


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    assert source_folder(loaded_from(str(tmp_path / "model.gguf"))) is None


def test_a_model_without_a_config_has_none() -> None:
    assert source_folder(torch.nn.Linear(1, 1)) is None
    assert source_folder(None) is None


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names in the order in which they were waited for, and the renames between them."""
    seen: list[str] = []

    def named(method: str) -> None:
        original = getattr(Path, method)

        def record(path: Path, target: Path) -> Path:
            seen.append(f"renamed to {Path(target).name}")
            renamed: Path = original(path, target)
            return renamed

        monkeypatch.setattr(Path, method, record)

    named("replace")
    named("rename")
    monkeypatch.setattr(folders, "sync", lambda path: seen.append(path.name))
    return seen


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, moments: list[str]) -> None:
    with new_folder(tmp_path / "above" / "out", tmp_path / "partial") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("1")
        (folder / "link").symlink_to("inner/file")
        assert moments == []
    assert moments == ["file", "inner", "partial", "renamed to out", "above"]


def test_nor_is_one_put_aside_earlier(tmp_path: Path, moments: list[str]) -> None:
    partial = tmp_path / "partial"
    partial.mkdir()
    (partial / "file").write_text("1")
    set_aside(partial, tmp_path / "out.failed")
    assert moments == ["file", "partial", "renamed to out.failed", tmp_path.name]


def test_a_block_that_raises_waits_for_nothing(tmp_path: Path, moments: list[str]) -> None:
    def broken() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert moments == []
    assert list(tmp_path.iterdir()) == []


def test_waiting_works_for_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    folders.sync(tmp_path / "file")
    folders.sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        folders.sync(tmp_path / "none")


def test_what_is_written_is_for_whom_the_umask_lets_read_it(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
        (folder / "inner").mkdir(mode=0o700)
        (folder / "inner" / "private").touch(mode=0o600)
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes["model.safetensors"] == modes["private"] == modes["plain"]
    assert modes["out"] == modes["inner"] == modes["folder"]
