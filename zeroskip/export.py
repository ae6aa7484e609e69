"""export: an ONNX folder from a checkpoint, or one without packed weights from one with them."""

from __future__ import annotations

import shutil
from pathlib import Path

from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.folders import new_folder

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
    from zeroskip.compile import compile_sparse
    from zeroskip.models import load_model
    from zeroskip.passes import ExportOnnx

    # A directory is exported from disk; a GGUF file has to be dequantised first.
    model = source if (source / "config.json").is_file() else load_model(source)[0]
    compile_sparse(model, [ExportOnnx(out)])
