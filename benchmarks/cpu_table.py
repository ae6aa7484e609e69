"""Writes runtime/kernels/cpu_table.json: the lowest speed-ups of the CPU kernels over shapes.

    python benchmarks/cpu_table.py [--instruction-sets avx512,avx2] [--types float32,int8/4]

What was asked for replaces what the table said about it; the rest stays. Takes about an hour for
everything, on a machine with nothing else to do. Each cell is the lowest over shapes, over weights
that stay in the caches and weights that come from memory, of one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from datetime import date
from pathlib import Path

import onnxruntime
import torch

from zeroskip.ir.formats import VALUE_TYPES, BitmaskWeight, pack_bitmask
from zeroskip.runtime.kernels.library import load_library
from zeroskip.runtime.kernels.location import library_path
from zeroskip.runtime.machine import cpu_name
from zeroskip.runtime.rivals import STREAMED_BYTES
from zeroskip.runtime.speed_table import TABLE_FILE
from zeroskip.runtime.tuning import Tuner
from zeroskip.runtime.tuning_cache import TuningCache, write_atomically

SHAPES = "768x3072,2048x2048,4096x4096"
TYPES = "float32,float16,bfloat16,int8,int8/4"
DENSITIES = (0.5, 0.25, 0.1)
M_VALUES = (1, 4, 16, 128)
TARGET = Path(__file__).parents[1] / "runtime" / "kernels" / TABLE_FILE.name
Lowest = dict[str, dict[str, dict[str, float]]]


def random_weight(rows: int, columns: int, density: float, value_type: str) -> BitmaskWeight:
    """Returns a weight whose zeros are anywhere."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    keep = torch.rand(rows, columns, generator=generator) < density
    dtype = VALUE_TYPES[value_type]
    scales = weight.abs().amax(1, keepdim=True) / 127 if dtype == torch.int8 else None
    return pack_bitmask(weight, keep, dtype=dtype, scales=scales)


def measure(
    tuner: Tuner, name: str, types: list[str], shapes: list[tuple[int, int]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the lowest speed-ups of an instruction set: values and layout, density, m."""
    lowest: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for columns, rows in shapes:
        for described in types:
            value_type, _, level = described.partition("/")
            for density in DENSITIES:
                weight = random_weight(rows, columns, density, value_type)
                for working_set in (None, STREAMED_BYTES):
                    found = tuner.measure(
                        weight,
                        m_values=M_VALUES,
                        threads=1,
                        accuracy_level=int(level or 0),
                        working_set_bytes=working_set,
                    )
                    for layout in (0, 1):
                        # A layout that is left out runs the kernels of the stored one.
                        measured = found.get(layout, found[0])
                        cell = lowest[f"{name}/{value_type}/{level or 0}/{layout}"][str(density)]
                        for m, speedup in measured.speedup.items():
                            cell[str(m)] = round(min(speedup, cell.get(str(m), speedup)), 2)
                        print(
                            name,
                            f"{columns}x{rows}",
                            described,
                            density,
                            layout,
                            dict(cell),
                            flush=True,
                        )
    return lowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--instruction-sets", default="", help="default: all but the portable ones")
    parser.add_argument("--types", default=TYPES, help="int8/4 is int8 with accuracy level 4")
    parser.add_argument("--shapes", default=SHAPES, help="in x out")
    parser.add_argument("--seconds", type=float, default=0.3, help="for one comparison")
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args()
    shapes = []
    for text in options.shapes.split(","):
        columns, rows = map(int, text.split("x"))
        shapes.append((columns, rows))
    library = load_library(library_path())
    torch.set_num_threads(1)
    table = json.loads(options.out.read_text("utf-8")) if options.out.is_file() else {}
    cells: Lowest = table.get("lowest_speedup", {})
    origins = table.get("measured", {})
    # The portable kernels are slower than dense everywhere: not in the table means dense.
    here = [name for name in Tuner(library).instruction_sets if name != "portable"]
    for name in options.instruction_sets.split(",") if options.instruction_sets else here:
        with tempfile.TemporaryDirectory() as scratch:
            # A cache of its own: what was measured at another time is not asked.
            cache = TuningCache(Path(scratch) / "tuning.json")
            tuner = Tuner(library, cache, seconds=options.seconds, instruction_set=name)
            cells.update(measure(tuner, name, options.types.split(","), shapes))
        origins[name] = {
            "cpu": cpu_name(),
            "onnxruntime": onnxruntime.__version__,
            "date": date.today().isoformat(),
            "shapes": options.shapes,
        }
        text = json.dumps({"measured": origins, "lowest_speedup": cells}, indent=1, sort_keys=True)
        write_atomically(options.out, text + "\n")


if __name__ == "__main__":
    main()
