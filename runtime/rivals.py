"""Whose dense products packed linears are timed against, and how many of them a fair test takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnxruntime
import torch

from zeroskip.ir.formats import BitmaskWeight

STREAMED_BYTES = 1 << 28
"""Weights beyond this are taken to come from memory at every step, whatever their size."""
SWEEP_OPERATIONS = 4e9
"""Where arithmetic dominates, fewer copies do: one pass over them stays below this."""
MOST_COPIES = 256


@dataclass(frozen=True)
class Rival:
    """Whose dense product packed linears are timed against, and where they run themselves.

    Args:
        name: "ONNX Runtime" or "PyTorch"; the latter in eager mode, through the operator.
        dtype: Of the dense weight. ONNX Runtime's is float32.
    """

    name: Literal["ONNX Runtime", "PyTorch"]
    dtype: torch.dtype = torch.float32

    @property
    def is_eager(self) -> bool:
        return self.name == "PyTorch"

    @property
    def version(self) -> str:
        """What measurements depend on."""
        if self.is_eager:
            return f"torch {torch.__version__} {str(self.dtype).removeprefix('torch.')}"
        return f"onnxruntime {onnxruntime.__version__}"

    def dense_bytes(self, weight: BitmaskWeight) -> int:
        """Returns the size of the dense weight, at least 1."""
        return max(1, weight.rows * weight.columns * self.dtype.itemsize)

    def working_set(self, weight: BitmaskWeight, model_bytes: int | None) -> int:
        """Returns what competes for the caches: all dense linears of the model, or this one."""
        own = self.dense_bytes(weight)
        return min(max(own, model_bytes or 0), max(own, STREAMED_BYTES))

    def dense_copies(self, weight: BitmaskWeight, room: int, m: int) -> int:
        """Returns how many dense weights take as much room as the model's."""
        return max(1, min(room // self.dense_bytes(weight), MOST_COPIES, most_copies(weight, m)))

    def packed_copies(self, weight: BitmaskWeight, room: int) -> int:
        """Returns how many packed weights take as much room as the model's will."""
        # What streams when dense is taken to stream when packed, too: the model may be far larger.
        packed = room
        if room < STREAMED_BYTES:
            packed = room * weight.nbytes // self.dense_bytes(weight)
        return max(1, min(packed // max(1, weight.nbytes), MOST_COPIES))


ONNX_RUNTIME = Rival("ONNX Runtime")


def most_copies(weight: BitmaskWeight, m: int) -> int:
    """Returns how many products fit into one pass of bearable length."""
    return max(1, int(SWEEP_OPERATIONS / max(1, 2 * m * weight.rows * weight.columns)))


def class_of(working_set: int) -> str:
    """Returns a power of two: models of about the same size share their measurements."""
    if working_set >= STREAMED_BYTES:
        return "streamed"
    return f"{2 ** (working_set.bit_length() - 1) / 2**20:g} MiB"
