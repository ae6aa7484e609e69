"""Activation streams: what flows between stages, in memory up to a budget, then on disk."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from zeroskip.ir.errors import ArtifactError, CompileError
from zeroskip.ir.program import Batch

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_bytes(text: str | int) -> int:
    """Reads a size such as `4GiB`, `512 MB` or a number of bytes.

    Raises:
        CompileError: It is not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", str(text).lower())
    if found is None or found[2] not in _UNITS:
        raise CompileError(f"{text!r} is not a size", next_step='write "4GiB" or "512MiB"')
    return int(float(found[1]) * _UNITS[found[2]])


class Stream(Sequence[Batch]):
    """The values that are alive between two stages, for every batch.

    Args:
        batches: The first values: the inputs of the program.
        budget: Bytes of tensors kept in memory; what goes beyond is written to safetensors files
            in a temporary folder and read back when it is needed.
        folder: Where that folder is made; the system's temporary directory by default.

    Use it as a context manager: leaving it removes the files.
    """

    def __init__(
        self, batches: Iterable[Batch], budget: int, folder: Path | str | None = None
    ) -> None:
        self._budget = budget
        self._parent = folder
        self._folder: Path | None = None
        self._in_memory = 0
        self._values: list[dict[str, torch.Tensor | Path]] = []
        try:
            for batch in batches:
                self._values.append({})
                self.write(len(self._values) - 1, batch)
        except BaseException:
            self.close()  # The `with` block that would do it is never entered.
            raise

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return _Loaded(self._values[index])

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of tensors held in memory now."""
        return self._in_memory

    def write(self, index: int, values: Batch) -> None:
        """Adds values to a batch, or replaces them."""
        for name, value in values.items():
            self._drop(index, name)
            tensor = value.detach()
            if self._in_memory + tensor.nbytes <= self._budget:
                self._values[index][name] = tensor
                self._in_memory += tensor.nbytes
            else:
                self._values[index][name] = self._spill(index, name, tensor)

    def keep_only(self, names: Iterable[str]) -> None:
        """Forgets every value that has none of these names."""
        wanted = set(names)
        for index, values in enumerate(self._values):
            for name in [n for n in values if n not in wanted]:
                self._drop(index, name)

    def _drop(self, index: int, name: str) -> None:
        old = self._values[index].pop(name, None)
        if isinstance(old, torch.Tensor):
            self._in_memory -= old.nbytes
        elif old is not None:
            old.unlink(missing_ok=True)

    def _spill(self, index: int, name: str, tensor: torch.Tensor) -> Path:
        try:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="zeroskip-", dir=self._parent))
            path = self._folder / f"{index}-{name}.safetensors"
            save_file({"value": tensor.contiguous()}, path)
        except (OSError, SafetensorError) as error:  # safetensors wraps what the disk answers.
            raise ArtifactError(
                f"cannot write activations to disk: {error}",
                where=str(self._folder or self._parent or tempfile.gettempdir()),
                next_step="free disk space, or raise `memory`"
                + ("" if self._parent else ", or set TMPDIR to a larger disk"),
            ) from error
        return path

    def close(self) -> None:
        """Removes the files."""
        self._values = []
        self._in_memory = 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Loaded(Mapping[str, torch.Tensor]):
    """One batch; a value on disk is read each time it is asked for."""

    def __init__(self, values: Mapping[str, torch.Tensor | Path]) -> None:
        self._values = values

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self._values[name]
        if isinstance(value, torch.Tensor):
            return value
        try:
            return load_file(value)["value"]
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"cannot read activations back: {error}",
                where=str(value),
                next_step="something else changed the temporary folder; run again",
            ) from error

    def __contains__(self, name: object) -> bool:
        return name in self._values  # Mapping's own would read the file to find out.

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
