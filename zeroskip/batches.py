"""Batches of inputs: reading what the user passes, checking it, and making up examples."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from zeroskip.ir.dataflow import is_movement
from zeroskip.ir.errors import CalibrationError, CaptureError
from zeroskip.ir.program import Batch, Program

_EXAMPLE_ROWS = 2
_EXAMPLE_TOKENS = 16


def read_batches(calibration: Iterable[Batch | torch.Tensor] | None) -> list[dict[str, Any]]:
    """Turns what the user passes as calibration data into a list of mappings.

    Raises:
        CalibrationError: It is not iterable, or a batch is neither a mapping nor a tensor.
    """
    if calibration is None:
        return []
    if isinstance(calibration, (str, bytes, Mapping, torch.Tensor)):
        raise CalibrationError(
            f"calibration is a {type(calibration).__name__}, not a sequence of batches",
            next_step="wrap it in a list; for text, use zeroskip.calibration_from_text",
        )
    batches: list[dict[str, Any]] = []
    for number, batch in enumerate(calibration):
        if isinstance(batch, torch.Tensor):
            batches.append({"input_ids": batch})
        elif isinstance(batch, Mapping):
            batches.append(dict(batch))
        else:
            raise CalibrationError(
                f"batch {number} is a {type(batch).__name__}",
                next_step="each batch is a mapping of tensors, like the arguments of forward",
            )
    return batches


def example_from(batches: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor] | None:
    """Returns two short rows of the first batch, or None when there is no usable one.

    Tracing takes sizes 0 and 1 for constants, so that a batch of one row is doubled.
    """
    if not batches or not batches[0]:
        return None
    if not all(isinstance(v, torch.Tensor) and v.dim() and v.numel() for v in batches[0].values()):
        return None  # check_batches says what is wrong with it.
    example = {}
    for name, value in batches[0].items():
        rows = value[:_EXAMPLE_ROWS]
        if rows.shape[0] < _EXAMPLE_ROWS:
            rows = rows.repeat(_EXAMPLE_ROWS, *[1] * (rows.dim() - 1))
        if rows.dim() == 2 and not rows.is_floating_point():
            rows = rows[:, :_EXAMPLE_TOKENS]
        example[name] = rows.contiguous()
    return example


def default_inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Makes up inputs for a Hugging Face model from what its forward takes and its config says.

    Raises:
        CaptureError: The model does not tell.
    """
    config: Any = getattr(model, "config", None)
    accepted = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", None)
    inputs: dict[str, torch.Tensor] = {}
    if config is not None and main == "input_ids" and "input_ids" in accepted:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        vocabulary = int(embedding.weight.shape[0])
        ids = torch.arange(_EXAMPLE_ROWS * 9).view(_EXAMPLE_ROWS, 9) % vocabulary
        inputs["input_ids"] = ids
        if "attention_mask" in accepted:
            inputs["attention_mask"] = torch.ones_like(ids)
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids[:, :7].contiguous()
    elif main == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(config, "num_channels", 3)
        inputs["pixel_values"] = torch.linspace(
            -1, 1, _EXAMPLE_ROWS * channels * height * width
        ).view(_EXAMPLE_ROWS, channels, height, width)
    if not inputs:
        raise CaptureError(
            "the model does not tell what inputs it takes",
            where=type(model).__name__,
            next_step="pass example_inputs={...}, the keyword arguments of forward",
        )
    return inputs


def check_batches(program: Program, batches: Sequence[Mapping[str, Any]]) -> None:
    """Checks calibration data against the inputs of a program.

    Raises:
        CalibrationError: Names the batch, the input, what is wrong with it and what to do.
    """
    vocabularies = _vocabularies(program)
    tokens = 0
    for number, batch in enumerate(batches):
        _check_names(program, number, batch)
        rows: dict[str, int] = {}
        for name, value in batch.items():
            _check_tensor(number, name, value, program.example_inputs[name])
            rows[name] = value.shape[0]
            if name in vocabularies:
                _check_ids(number, name, value, vocabularies[name])
        if len(set(rows.values())) > 1:
            raise CalibrationError(
                f"batch {number} has inputs of different batch sizes: {rows}",
                next_step="give every input of a batch the same first dimension",
            )
        tokens += _token_count(program, batch)
    if batches and tokens < 2:
        raise CalibrationError(
            f"the calibration data is too short: {tokens} tokens that are not padding",
            next_step="use at least a few hundred tokens; 32 x 512 is a good start",
        )


def _check_names(program: Program, number: int, batch: Mapping[str, Any]) -> None:
    missing = [name for name in program.inputs if name not in batch]
    unknown = [name for name in batch if name not in program.inputs]
    if missing or unknown:
        raise CalibrationError(
            f"batch {number} does not fit: missing {missing}, unknown {unknown}",
            next_step=f"each batch holds exactly {list(program.inputs)}",
        )


def _check_tensor(number: int, name: str, value: Any, example: torch.Tensor) -> None:
    where = f"batch {number}, {name}"
    if not isinstance(value, torch.Tensor):
        raise CalibrationError(
            f"it is a {type(value).__name__}, not a tensor",
            where=where,
            next_step="convert it with torch.as_tensor",
        )
    if value.dtype != example.dtype:
        raise CalibrationError(
            f"the dtype is {value.dtype}, the model takes {example.dtype}",
            where=where,
            next_step=f"convert it with .to({example.dtype})",
        )
    if value.dim() != example.dim() or value.numel() == 0:
        raise CalibrationError(
            f"the shape is {tuple(value.shape)}, the example is {tuple(example.shape)}",
            where=where,
            next_step="remove empty batches and keep the number of dimensions",
        )
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise CalibrationError(
            "the data holds NaN or inf", where=where, next_step="clean the calibration data"
        )


def _check_ids(number: int, name: str, value: torch.Tensor, vocabulary: int) -> None:
    low, high = int(value.min()), int(value.max())
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise CalibrationError(
            f"token id {wrong} is outside the vocabulary of {vocabulary}",
            where=f"batch {number}, {name}",
            next_step="tokenize with the tokenizer that belongs to this model",
        )


def _vocabularies(program: Program) -> dict[str, int]:
    """Returns the table size of each input that indexes an embedding."""
    sizes: dict[str, int] = {}
    for node in program.graph.find_nodes(
        op="call_function", target=torch.ops.aten.embedding.default
    ):
        table, index = node.args[0], node.args[1]
        while isinstance(index, torch.fx.Node) and is_movement(index):
            index = index.args[0]
        if isinstance(index, torch.fx.Node) and index.op == "placeholder":
            rows = int(table.meta["val"].shape[0])
            name = str(index.target)
            sizes[name] = min(rows, sizes.get(name, rows))
    return sizes


def _token_count(program: Program, batch: Mapping[str, Any]) -> int:
    for name in program.padding_masks:
        return int(batch[name].bool().sum())
    first = next(iter(batch.values()))
    return int(first.numel()) if not first.is_floating_point() else 2 * int(first.shape[0])
