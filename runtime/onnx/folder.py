"""A folder that appears complete or not at all: everything is written beside it, then renamed."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import onnx_ir
from onnx import numpy_helper

from zeroskip.ir.errors import ArtifactError, CompileError, LoweringError
from zeroskip.runtime.onnx.sparse_linear_function import DOMAIN, OP

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
EXTERNAL_DATA_THRESHOLD = 1 << 30
PROTOBUF_LIMIT = (1 << 31) - (1 << 24)
"""Beyond 2 GiB no single file can be parsed; the margin is for the graph."""
PACKED_THRESHOLD = 1 << 20
"""Packed weights of a file of their own are mapped and used in place; others are copied at load."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)


def save_model(
    model: onnx_ir.Model,
    folder: Path,
    *,
    external_data_threshold: int = EXTERNAL_DATA_THRESHOLD,
    sparse_initializers: bool = False,
) -> int:
    """Writes `model.onnx`, and `model.onnx.data` beside it when the weights exceed the threshold.

    With packed weights the threshold is 1 MiB at most, and the data aligned for use in place.

    With external data one tensor is in memory at a time; without, the whole file is.

    Args:
        model: Its initializers may be lazy.
        folder: An existing directory.
        external_data_threshold: Bytes of initializers from which on they get a file of their own.
        sparse_initializers: Stores weights with enough zeros as `sparse_initializer`. ONNX Runtime
            expands them when it loads; several tools drop them, so it is off unless asked for.

    Returns:
        The size of what was written, in bytes.

    Raises:
        LoweringError: Sparse initializers are asked for beyond the threshold.
    """
    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    packed = any((node.domain, node.op_type) == (DOMAIN, OP) for node in model.graph.all_nodes())
    threshold = min(external_data_threshold, PACKED_THRESHOLD if packed else PROTOBUF_LIMIT)
    external = size > threshold
    if external and sparse_initializers:
        raise LoweringError(
            f"sparse initializers do not go together with external data ({size} bytes of weights)",
            where=str(folder),
            next_step="raise external_data_threshold, or leave sparse_initializers off",
        )
    path = folder / MODEL_FILE
    try:
        onnx_ir.save(
            model,
            path,
            external_data=DATA_FILE if external else None,
            # Kernels use packed weights in the mapped file: each begins where its type may.
            alignment=4096 if packed else None,
            align_threshold=0,
        )
    except onnx_ir.serde.SerdeError as error:
        # What a lazy tensor raises comes wrapped once for every level of the file.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (CompileError, OSError)):
            cause = cause.__cause__
        raise cause or error from None
    if sparse_initializers:
        _store_sparse(path)
    return sum(file.stat().st_size for file in folder.iterdir())


def copy_tokenizer(source: object, folder: Path) -> None:
    """Writes the files of a tokenizer, given as an object with `save_pretrained` or a directory.

    Raises:
        ArtifactError: The directory holds no tokenizer.
    """
    save = getattr(source, "save_pretrained", None)
    if save is not None:
        save(folder)
        return
    found = [name for name in TOKENIZER_FILES if (Path(str(source)) / name).is_file()]
    if not found:
        raise ArtifactError(
            "there is no tokenizer here",
            where=str(source),
            next_step="pass the directory of the checkpoint, a tokenizer, or None",
        )
    for name in found:
        shutil.copyfile(Path(str(source)) / name, folder / name)


def _store_sparse(path: Path) -> None:
    # Last and with plain onnx: onnx_ir does not know sparse initializers and would lose them.
    model = onnx.load(path)
    dense = list(model.graph.initializer)
    del model.graph.initializer[:]
    for tensor in dense:
        array = numpy_helper.to_array(tensor)
        places = array.reshape(-1).nonzero()[0]
        # A kept entry costs its value and an int64 position.
        if places.size * (array.itemsize + 8) >= array.nbytes or not array.size:
            model.graph.initializer.append(tensor)
            continue
        values = numpy_helper.from_array(array.reshape(-1)[places], tensor.name)
        indices = numpy_helper.from_array(places.astype("int64"), f"{tensor.name}.indices")
        model.graph.sparse_initializer.append(
            onnx.helper.make_sparse_tensor(values, indices, list(array.shape))
        )
    onnx.save(model, path)
