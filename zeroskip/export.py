"""export: an ONNX folder from a checkpoint, or one without packed weights from one with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.folders import new_folder

if TYPE_CHECKING:
    import torch

    from zeroskip.ir.program import Program

MODEL_FILE = "model.onnx"
# What belongs to the old weights: their data, how they were compared, how they were tuned.
_OLD = (MODEL_FILE, f"{MODEL_FILE}.data", "zeroskip_parity.json", "zeroskip_tune.json")


def export_dense(source: Path, out: Path) -> int:
    """Writes an exported folder again with every packed weight as a dense one.

    Args:
        source: A folder with `model.onnx`.
        out: The folder to write; it must not exist or be empty. It appears when it is complete.

    Returns:
        How many linears were packed.

    Raises:
        ArtifactError: There is no model, it cannot be read, or the target is taken.
    """
    from zeroskip.runtime.onnx.densify import densify

    if not (source / MODEL_FILE).is_file():
        raise ArtifactError(
            f"there is no {MODEL_FILE} here",
            where=str(source),
            next_step="pass a folder that an export wrote",
        )
    with new_folder(out) as folder:
        count = densify(source / MODEL_FILE, folder / MODEL_FILE)
        for file in sorted(source.iterdir()):
            if file.is_file() and file.name not in _OLD:
                shutil.copyfile(file, folder / file.name)
    return count


def export_checkpoint(source: Path, out: Path) -> None:
    """Writes the ONNX folder of a Hugging Face directory or a GGUF file, its weights as they are.

    Raises:
        CompileError: The model cannot be captured or has no ONNX form, or the target is taken.
    """
    export_program(*open_to_export(source), out)


def open_to_export(source: Path) -> tuple[Program, torch.nn.Module | None]:
    """Returns a checkpoint as a program, and the live module where it had to be loaded.

    Raises:
        CompileError: It cannot be read or captured.
    """
    import torch

    from zeroskip.compile import open_program
    from zeroskip.models import open_source

    # A directory is exported from disk; a GGUF file has to be dequantised first.
    opened = open_source(source)
    return open_program(opened), opened if isinstance(opened, torch.nn.Module) else None


def export_program(program: Program, live: torch.nn.Module | None, out: Path) -> None:
    """Writes the ONNX folder of what `open_to_export` returned.

    Raises:
        CompileError: It has no ONNX form, or the target is taken.
    """
    from zeroskip.compile import compile_program
    from zeroskip.passes import ExportOnnx

    compile_program(
        program,
        [ExportOnnx(out)],
        live=live,
        memory="4GiB",
        instruments=(),
        progress=False,
        files=None,
    )
