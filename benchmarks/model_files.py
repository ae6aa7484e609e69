"""Writes the forms of a model to files, once; what is there already is used again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from model_cases import ModelCase
from models.forms import to_dynamic_int8, to_nbits, to_sparse
from models.weights import prune, save, save_with_layout

BASELINE = "ort float32"


@dataclass(frozen=True)
class ModelFile:
    """A form of a model.

    Args:
        name: As it is reported.
        path: The ONNX file.
        values: Type of the kept values, of ours.
        layout: Of ours.
        accuracy_level: Of ours.
        pruned: The same model with its zeros in dense weights, of ours.
    """

    name: str
    path: Path
    values: str | None = None
    layout: int | None = None
    accuracy_level: int | None = None
    pruned: Path | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether it has our operator."""
        return self.values is not None


class ModelFiles:
    """The files of one model.

    Args:
        case: The model.
        folder: Where they are, or will be.
    """

    def __init__(self, case: ModelCase, folder: Path) -> None:
        self._case = case
        self._folder = folder

    def dense(self, rivals: Sequence[str]) -> list[ModelFile]:
        """The dense model, first, and its quantised forms."""
        source = self._write("dense", self._case.model)
        files = [ModelFile(BASELINE, source)]

        def add(name: str, stem: str, make: Callable[[onnx.ModelProto], onnx.ModelProto]) -> None:
            path = self._write(stem, lambda: make(onnx.load(str(source))))
            files.append(ModelFile(name, path))

        if "dynamic-int8" in rivals:
            add("ort dynamic int8", "dynamic-int8", to_dynamic_int8)
        if "nbits" in rivals:
            add("ort int4 block 32", "int4", lambda model: to_nbits(model, 4))
            add("ort int8 block 32", "int8", lambda model: to_nbits(model, 8))
        return files

    def sparse(
        self, pattern: str, values: Sequence[str], layouts: Sequence[int]
    ) -> list[ModelFile]:
        """Our forms of the model at one pattern; int8 values with activations rounded to 8 bits."""
        stem = pattern.replace("%", "").replace(":", "of")
        pruned = self._write(f"{stem}-pruned", lambda: self._pruned(pattern))
        files = []
        for kind in values:
            level = 4 if kind == "int8" else 0
            first = self._write(
                f"{stem}-{kind}",
                lambda kind=kind, level=level: to_sparse(
                    onnx.load(str(pruned)),
                    kind,
                    accuracy_level=level,
                    min_weights=self._case.min_weights,
                ),
            )
            for layout in layouts:
                path = first
                if layout:
                    path = first.with_name(f"{first.stem}-layout{layout}.onnx")
                    save_with_layout(first, layout, path)
                name = f"sparse {kind} layout {layout}"
                files.append(ModelFile(name, path, kind, layout, level, pruned))
        return files

    def _pruned(self, pattern: str) -> onnx.ModelProto:
        model = onnx.load(str(self._folder / "dense.onnx"))
        prune(model, pattern, self._case.min_weights)
        return model

    def _write(self, stem: str, make: Callable[[], onnx.ModelProto]) -> Path:
        path = self._folder / f"{stem}.onnx"
        # The graph is written last: a file that is there is complete.
        return path if path.is_file() else save(make(), path)
