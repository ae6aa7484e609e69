"""Which operator domains an ONNX file imports, read without its graph.

A model is a protobuf message: fields one after another, each a tag and a value. The graph, with all
weights that are not in a file of their own, is one field among others, and is stepped over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from zeroskip.ir.errors import ArtifactError

# Numbers of fields: opset_import of a ModelProto, domain of an OperatorSetIdProto.
_OPSET_IMPORT = 8
_DOMAIN = 1

# How values are stored: as a number of variable length, as so many bytes, or with their length.
_VARINT, _BYTES = 0, 2
_SIZES = {1: 8, 5: 4}

_LONGEST_VARINT = 10


def imports_domain(model_path: str | Path, domain: str) -> bool:
    """Tells whether a model imports a domain of operators.

    Raises:
        ArtifactError: The file cannot be read, or is no ONNX model.
    """
    try:
        with Path(model_path).open("rb") as file:
            return finds_domain(file, domain)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"the model cannot be read: {error}",
            where=str(model_path),
            next_step="pass an ONNX file",
        ) from error


def finds_domain(file: BinaryIO, domain: str) -> bool:
    """Tells whether an open model imports a domain; reads tags and names, nothing else.

    Raises:
        ValueError: It is no protobuf message, or is cut short.
    """
    name = domain.encode()
    size = file.seek(0, os.SEEK_END)
    for number, begin, end in _fields(file, 0, size):
        if number != _OPSET_IMPORT:
            continue
        for inner, first, last in _fields(file, begin, end):
            if inner == _DOMAIN and last - first == len(name):
                file.seek(first)
                if file.read(len(name)) == name:
                    return True
    return False


def _fields(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields number, begin and end of every field of a message that holds bytes; skips the others."""
    position = begin
    while position < end:
        file.seek(position)
        number, kind = divmod(_varint(file), 8)
        if number == 0:
            raise ValueError(f"no protobuf message: byte {position} begins no field")
        if kind == _VARINT:
            _varint(file)
            size = 0
        elif kind in _SIZES:
            size = _SIZES[kind]
        elif kind == _BYTES:
            size = _varint(file)
        else:
            raise ValueError(f"no protobuf message: byte {position} begins no value")
        value = file.tell()
        if value + size > end:
            raise ValueError(f"the field at byte {position} ends behind byte {end}, the last")
        position = value + size
        if kind == _BYTES:
            yield number, value, position


def _varint(file: BinaryIO) -> int:
    """Reads a number of seven bits a byte, the lowest first; all bytes but its last have the eighth."""
    number = 0
    for place in range(_LONGEST_VARINT):
        byte = file.read(1)
        if not byte:
            raise ValueError("the file is cut short")
        number |= (byte[0] & 0x7F) << (7 * place)
        if byte[0] < 0x80:
            return number
    raise ValueError("no protobuf message: a number of more than ten bytes")
