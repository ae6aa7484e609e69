"""Peak memory and time of a 7B model: compiled to 2:4 by Wanda, then exported to ONNX.

The checkpoint is made here: the sizes of LLaMA-7B, random bfloat16 weights in one shard a layer,
13.5 GB, and random tokens to calibrate on, since no text means anything to random weights. The
arithmetic, the memory and the files are those of a real model. Each step is a process of its own.
Its peak of resident memory is what the system says of it; pages of files that are mapped count in
it, though they can be dropped at any time. The peak of anonymous memory, sampled ten times a second,
does not have them: it is what a container needs at least. Linux only.

A step that was stopped goes on where it was: finished layers are kept in the folder.

    python benchmarks/large_model.py FOLDER [--layers 32] [--samples 16] [--sequence-length 512]
        [--threads N] [--memory 512MiB] [--steps make compile export] [--json FILE] [--tiny]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from zeroskip.runtime.machine import cpu_name

STEPS = ("make", "compile", "export")
SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
}
# What the issue of a deployment is: does it fit?
MOST_GIB = {"compile": 8.0, "export": 4.0}


def parse_arguments() -> argparse.Namespace:
    """Reads the command line; `--worker` is how the script calls itself."""
    parser = argparse.ArgumentParser(description="Compile and export a 7B-shaped model.")
    parser.add_argument("folder", type=Path, help="needs about 70 GB of disk for 32 layers")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--memory", default="512MiB", help="budget for activations")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--json", type=Path, default=Path("large_model.json"))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs each step in a fresh process, prints what it took, writes JSON."""
    arguments = parse_arguments()
    if arguments.worker:
        print(json.dumps(measured(arguments)))
        return
    results = []
    for step in arguments.steps:
        command = [sys.executable, __file__, str(arguments.folder), "--worker", "--steps", step]
        command += ["--layers", str(arguments.layers), "--samples", str(arguments.samples)]
        command += ["--sequence-length", str(arguments.sequence_length)]
        command += ["--memory", arguments.memory, *(["--tiny"] if arguments.tiny else [])]
        command += ["--threads", str(arguments.threads)] if arguments.threads else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"{step} ended with code {done.returncode}")
        row = json.loads(done.stdout.splitlines()[-1])
        results.append(row)
        most = MOST_GIB.get(step)
        goal = f", goal {most:.0f}" if most and not arguments.tiny else ""
        print(
            f"{step}: {row['seconds']:.0f} s ({row['cpu_seconds']:.0f} s of the processor), "
            f"peak {row['peak_gib']:.2f} GiB, {row['peak_anonymous_gib']:.2f} of it anonymous{goal}",
            flush=True,
        )
        document = {"conditions": conditions(arguments), "results": results}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"written to {arguments.json}")


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs one step and says what it took."""
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    (step,) = arguments.steps
    started = time.perf_counter(), time.process_time()
    anonymous = [0]
    threading.Thread(target=watch, args=(anonymous,), daemon=True).start()
    found = {"make": make, "compile": compile_it, "export": export}[step](arguments)
    return {
        "step": step,
        "seconds": time.perf_counter() - started[0],
        "cpu_seconds": time.process_time() - started[1],
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "peak_anonymous_gib": anonymous[0] / 2**30,
        "load_average": os.getloadavg()[0],
        **found,
    }


def watch(peak: list[int]) -> None:
    """Keeps the most anonymous memory that this process was seen to have, in bytes."""
    while True:
        lines = Path("/proc/self/status").read_text().splitlines()
        found = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        peak[0] = max(peak[0], found * 1024)
        time.sleep(0.1)


def config_of(arguments: argparse.Namespace) -> Any:
    """The configuration of the model."""
    from transformers import LlamaConfig

    sizes = TINY if arguments.tiny else SIZES
    return LlamaConfig(
        **sizes, num_hidden_layers=arguments.layers, tie_word_embeddings=False, dtype="bfloat16"
    )


def make(arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes the checkpoint, a shard a layer; nothing larger than one tensor is in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    folder = arguments.folder / "dense"
    folder.mkdir(parents=True)
    config = config_of(arguments)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    index: dict[str, str] = {}
    total = 0
    names = sorted(shapes, key=lambda name: (_shard(name), name))
    for name, following in zip(names, [*names[1:], ""], strict=True):
        value = torch.randn(shapes[name], generator=generator) * (shapes[name][-1] ** -0.5)
        if len(shapes[name]) == 1:
            value = 1 + 0.1 * value
        shard = _shard(name)
        shards.setdefault(shard, {})[name] = value.bfloat16()
        index[name] = shard
        total += 2 * value.numel()
        if not following or _shard(following) != shard:
            save_file(shards.pop(shard), folder / shard, {"format": "pt"})
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document), encoding="utf-8")
    return {"parameters": total // 2, "bytes": total}


def _shard(name: str) -> str:
    parts = name.split(".")
    number = int(parts[2]) + 1 if parts[1] == "layers" else 0
    return f"model-{number:05d}.safetensors"


def compile_it(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compiles the checkpoint to 2:4, its weights left on disk, and saves the result."""
    import torch

    from zeroskip import compile_sparse
    from zeroskip.passes import ApplyMasks, Observe, PruneWanda

    generator = torch.Generator().manual_seed(1)
    vocabulary = config_of(arguments).vocab_size
    size = (1, arguments.sequence_length)
    tokens = [
        torch.randint(vocabulary, size, generator=generator) for _ in range(arguments.samples)
    ]
    out = arguments.folder / "sparse"
    shutil.rmtree(out, ignore_errors=True)
    compiled = compile_sparse(
        arguments.folder / "dense",
        [Observe(), PruneWanda("2:4"), ApplyMasks()],
        calibration=[{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in tokens],
        memory=arguments.memory,
        work=arguments.folder / "work",
        progress=sys.stderr.isatty(),
    )
    compiled.save_pretrained(out)
    shutil.rmtree(arguments.folder / "work")
    report = compiled.report
    return {
        "density": report.density,
        "drift": report.drift,
        "linears": len(report.linears),
        "passes": {record.name: record.seconds for record in report.passes},
    }


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    """Exports the compiled checkpoint to ONNX."""
    from zeroskip.export import export_checkpoint

    out = arguments.folder / "onnx"
    shutil.rmtree(out, ignore_errors=True)
    export_checkpoint(arguments.folder / "sparse", out)
    return {"bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file())}


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """All it takes to measure the same again."""
    return {
        **(TINY if arguments.tiny else SIZES),
        "layers": arguments.layers,
        "calibration": f"{arguments.samples} x {arguments.sequence_length}",
        "memory": arguments.memory,
        "threads": arguments.threads,
        "cores": len(os.sched_getaffinity(0)),
        "processor": cpu_name(),
        "python": platform.python_version(),
        **{n: importlib.metadata.version(n) for n in ("torch", "transformers", "onnx")},
    }


if __name__ == "__main__":
    main()
