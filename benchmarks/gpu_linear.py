"""2:4 linears on a CUDA device: numerics, ceilings, every kernel against cuBLAS, and after dispatch.

    python benchmarks/gpu_linear.py --out gpu_linear.json --table runtime/kernels/gpu_table.json

needs torch and triton, and the package on the path: installed, or made by `benchmarks/on_device.sh`.
Times are medians of replays of CUDA graphs over operands that rotate beyond the L2 cache; winners
are measured in turn with dense.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zeroskip.ir.semi_structured import SemiStructuredWeight, codes_from_nibbles
from zeroskip.runtime import gpu_dispatch, gpu_timing
from zeroskip.runtime.candidates24 import DENSE, KERNELS, Call, Choice, list_candidates

SHAPES = {
    "llama-8b": ((4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)),
    "square": ((2048, 2048), (8192, 8192)),
    "smollm2-135m": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
}
BETWEEN = (1, 3, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 200, 256, 400, 512, 700, 1024, 2048, 4096)
"""Numbers of tokens after dispatch: measured ones and some between them."""
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Relative error of a product rounded to the type, with float32 sums: half a unit and a margin."""
ODD = ((72, 544), (1000, 2080), (200, 1056), (33, 1088))

Case = tuple[Choice, int, int, int, str, bool]


def make_weight(
    rows: int, columns: int, dtype: torch.dtype, device: str, scale: float = 1.0
) -> SemiStructuredWeight:
    """Returns a random 2:4 weight, a sixteenth of whose kept values are zero."""
    values = torch.randn(rows, columns // 2, device=device) * scale
    values[torch.rand_like(values) < 1 / 16] = 0
    # The six ways to keep two of four columns: i0 | i1 << 2.
    codes = torch.tensor([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], dtype=torch.uint8)
    chosen = torch.randint(0, 6, (rows, columns // 4), device=device)
    return SemiStructuredWeight(
        values.to(dtype), codes_from_nibbles(codes.to(device)[chosen].contiguous())
    )


def check(case: Case) -> tuple[str, float | str, bool]:
    """Runs one candidate once; returns its name, its error against float64, and if that is right."""
    choice, tokens, rows, columns, dtype_name, has_bias = case
    name = f"{choice} {tokens}x{rows}x{columns} {dtype_name}"
    try:
        dtype = getattr(torch, dtype_name)
        torch.manual_seed(tokens * rows + columns)
        weight = make_weight(rows, columns, dtype, "cuda")
        x = torch.randn(tokens, columns, device="cuda").to(dtype)
        bias = torch.randn(rows, device="cuda").to(dtype) if has_bias else None
        kernel = KERNELS[choice.kernel]
        y = kernel.run(kernel.make(weight), Call(x, bias, rows, {}), choice.options)
        expected = torch.nn.functional.linear(
            x.double(), weight.unpack().double(), None if bias is None else bias.double()
        )
        error = float((y.double() - expected).norm() / expected.norm())
        return name, error, error < TOLERANCE[dtype]
    except Exception as error:
        return name, f"{type(error).__name__}: {str(error)[:300]}", False


def list_cases() -> Iterator[Case]:
    """Lists what is compiled and checked: each candidate on a whole shape, some on odd ones."""
    device = torch.device("cuda")
    seen: set[tuple[Any, ...]] = set()
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128):
        for at, choice in enumerate(list_candidates(torch.bfloat16, tokens, 4096, 4096, device)):
            if choice.kernel == "cusparselt":
                continue
            # Splits differ in numbers only, not in what is compiled.
            options = {k: v for k, v in choice.options.items() if k != "split"}
            split = choice.options.get("split", 1)
            small = tokens in (1, 8) and choice.kernel in ("gemv24", "gemm24")
            key = (choice.kernel, *options.values(), split != 1, small)
            if key in seen:
                continue
            seen.add(key)
            yield choice, tokens, 512, 2048, "bfloat16", False
            if at % 5 == 0:
                rows, columns = ODD[at // 5 % len(ODD)]
                yield choice, max(1, tokens - 1), rows, columns, "bfloat16", True
                yield choice, tokens, rows, columns, "float16", True


def check_all(workers: int) -> dict[str, Any]:
    """Compiles and checks in parallel; what is compiled stays in Triton's cache."""
    cases = list(list_cases())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        found = list(pool.map(check, cases, chunksize=2))
    wrong = [(name, error) for name, error, right in found if not right]
    worst = max((error for _, error, _ in found if isinstance(error, float)), default=math.nan)
    return {"checked": len(found), "wrong": wrong, "worst_relative_error": worst}


def check_some(count: int) -> None:
    """Checks odd shapes one after another, as under compute-sanitizer."""
    odd = [case for case in list_cases() if (case[2], case[3]) in ODD]
    for case in odd[:: max(1, len(odd) // count)][:count]:
        name, error, right = check(case)
        print("right" if right else "WRONG", error, name, flush=True)
        if not right:
            raise SystemExit(1)


def measure_ceilings() -> dict[str, float]:
    """Measures what no product can exceed: reads of memory, and a large dense product."""
    data = torch.empty(2**30, device="cuda").normal_()
    read = gpu_timing.time_call([lambda: data.sum()])
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = gpu_timing.time_call([lambda: a @ b])
    return {"read_TBps": 4 * data.numel() / read / 1e6, "bf16_TFLOPs": 2 * 8192**3 / product / 1e6}


def describe_machine() -> dict[str, Any]:
    """Returns what the numbers depend on."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "processors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "cusparselt": torch.backends.cusparselt.version(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def measure_dispatched(
    weight: SemiStructuredWeight, entries: dict[int, gpu_dispatch.Entry]
) -> list[dict[str, Any]]:
    """Measures the operator itself, as a lowered model calls it, in turn with dense."""
    rows, columns = weight.rows, weight.columns
    dense = weight.unpack()
    size = dense.numel() * dense.element_size()
    copies = gpu_timing.copies_beyond_cache(size * 9 // 16, weight.values.device)
    weights = [(weight.values.clone(), weight.codes.clone()) for _ in range(copies)]
    denses = [dense.clone() for _ in range(gpu_timing.copies_beyond_cache(size, dense.device))]
    table = gpu_dispatch.Table()
    key = gpu_dispatch.key_of(rows, columns, weight.values.dtype, weight.values.device)
    table.put(key, entries)
    found = []
    for tokens in BETWEEN:
        x = torch.randn(tokens, columns, device="cuda").to(dense.dtype)
        choice = table.find(key, tokens)
        if choice == DENSE:
            found.append({"tokens": tokens, "choice": "dense", "ratio": 1.0})
            continue
        dense_us, us = gpu_timing.time_pair(
            [partial(torch.nn.functional.linear, x, each) for each in denses],
            [partial(torch.ops.zeroskip.linear_24, x, *each) for each in weights],
        )
        y = torch.ops.zeroskip.linear_24(x, *weights[0])
        expected = torch.nn.functional.linear(x, dense)
        difference = float((y - expected).float().norm() / expected.float().norm())
        found.append(
            {
                "tokens": tokens,
                "choice": str(choice),
                "dense_us": dense_us,
                "us": us,
                "ratio": dense_us / us,
                "from_dense": difference,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu_linear.json"))
    parser.add_argument("--table", type=Path, help="where to write the table of winners")
    parser.add_argument("--seconds", type=float, default=420, help="start no shape after this")
    parser.add_argument("--only", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--check", type=int, help="only check so many odd cases, in this process")
    args = parser.parse_args()
    if args.check:
        check_some(args.check)
        return
    from zeroskip.runtime.kernels import linear_24

    begin = time.time()
    result: dict[str, Any] = {"machine": describe_machine(), "shapes": []}

    def save() -> None:
        # One line a measurement keeps the file readable in a diff.
        args.out.write_text(json.dumps(result, indent=1) + "\n")

    print(result["machine"], flush=True)
    result["numerics"] = check_all(args.workers)
    print(f"{time.time() - begin:.0f} s", result["numerics"], flush=True)
    result["ceilings"] = measure_ceilings()
    print(f"{time.time() - begin:.0f} s", result["ceilings"], flush=True)
    table = gpu_dispatch.Table()
    for rows, columns in (shape for name in args.only for shape in SHAPES[name]):
        if time.time() - begin > args.seconds:
            print(f"{rows} x {columns} skipped: out of time")
            continue
        weight = make_weight(rows, columns, torch.bfloat16, "cuda")
        trials: list[dict[str, Any]] = []

        def keep(trial: gpu_dispatch.Trial, trials: list[dict[str, Any]] = trials) -> None:
            told = {"tokens": trial.tokens, **trial.choice.to_json(), "us": trial.us}
            trials.append(told | ({"error": trial.error} if trial.error else {}))

        entries = gpu_dispatch.tune(weight, on_trial=keep)
        table.put(gpu_dispatch.key_of(rows, columns, torch.bfloat16, weight.values.device), entries)
        linear_24.forget_tables()
        linear_24.use_table(table)
        dispatched = measure_dispatched(weight, entries)
        least = min(dispatched, key=lambda each: each["ratio"])
        shape = {
            "rows": rows,
            "columns": columns,
            "verdict": gpu_dispatch.describe(entries),
            "winners": [
                {
                    "tokens": tokens,
                    "choice": str(entry.choice),
                    "dense_us": entry.dense_us,
                    "us": entry.us,
                    "speedup": entry.speedup,
                }
                for tokens, entry in entries.items()
            ],
            "dispatched": dispatched,
            "trials": trials,
        }
        result["shapes"].append(shape)
        save()
        print(f"{time.time() - begin:.0f} s  {rows} x {columns}: {shape['verdict']}")
        for tokens, entry in entries.items():
            print(
                f"  m={tokens:5d} dense {entry.dense_us:8.1f} us, {entry.us:8.1f} us "
                f"{entry.speedup:.2f}x {entry.choice}"
            )
        print(f"  least after dispatch: {least['ratio']:.3f} at m={least['tokens']}", flush=True)
    save()
    if args.table:
        args.table.write_text(json.dumps(table.to_json(), indent=1) + "\n")
    wrong = result["numerics"]["wrong"]
    if wrong:
        raise SystemExit(f"{len(wrong)} wrong results, such as {wrong[0]}")


if __name__ == "__main__":
    main()
