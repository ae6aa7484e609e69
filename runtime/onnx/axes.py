"""Readable names for the dynamic axes of an ONNX graph, in place of the exporter's s0, s77."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir
from onnx_ir.traversal import RecursiveGraphIterator

BATCH, SEQUENCE = "batch_size", "sequence_length"
AxisNames = Mapping[str, Mapping[int, str]]


def cache_axes(input_names: tuple[str, ...], output_names: tuple[str, ...]) -> AxisNames:
    """Returns the names that clients of a decoder with cache expect, by input or output name."""
    total, past = "total_sequence_length", "past_sequence_length"
    axes: dict[str, dict[int, str]] = {}
    for name in (*input_names, *output_names):
        if name.startswith("past_key_values."):
            axes[name] = {0: BATCH, 2: past}
        elif name.startswith("present."):
            axes[name] = {0: BATCH, 2: total}
        else:
            axes[name] = {0: BATCH, 1: total if name == "attention_mask" else SEQUENCE}
    return axes


def name_axes(model: onnx_ir.Model, wanted: AxisNames) -> None:
    """Renames the dynamic axes of a model in place.

    Args:
        model: Its inputs and outputs have shapes.
        wanted: Input or output name -> axis -> name. Symbols that it does not reach are called
            `batch_size`, `sequence_length` or after the first input that has them.
    """
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            symbol = None if isinstance(dim, int) else dim.value
            # A sum such as s0 + s1 is no name of its own.
            if symbol is not None and symbol.isidentifier() and symbol not in names:
                asked = wanted.get(str(value.name), {}).get(axis)
                names[symbol] = asked or _free_name(str(value.name), axis, set(names.values()))
    values = [*model.graph.inputs, *model.graph.outputs]
    values += [output for node in RecursiveGraphIterator(model.graph) for output in node.outputs]
    for value in dict.fromkeys(values):
        if value.shape is not None:
            asked_axes = wanted.get(str(value.name), {})
            dims = [
                dim
                if isinstance(dim, int)
                else asked_axes.get(axis) or _substitute(dim.value, names)
                for axis, dim in enumerate(value.shape)
            ]
            value.shape = onnx_ir.Shape(dims)


def _free_name(value: str, axis: int, taken: set[str]) -> str:
    plain = {0: BATCH, 1: SEQUENCE}.get(axis)
    if plain is not None and plain not in taken:
        return plain
    return f"{value}_{plain or f'axis_{axis}'}"


def _substitute(symbol: str | None, names: Mapping[str, str]) -> str | None:
    if symbol is None:
        return None
    return re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), symbol)
