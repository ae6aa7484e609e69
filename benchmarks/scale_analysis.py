"""How long it takes to find the channel scales of a large model, and how much memory.

    python benchmarks/scale_analysis.py [--layers 32] [--hidden 4096] [--intermediate 11008]
                                        [--json scale_analysis.json]

Writes a LLaMA checkpoint of the size of a 7B model by default, its weights a hole in the file, and
runs `zeroskip inspect --scales` on it in a process of its own. Weights are not read for that.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from zeroskip.runtime.machine import describe_machine

GOAL_SECONDS, GOAL_GIB = 60, 4


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measure the channel-scale analysis.")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--json", type=Path, default=Path("scale_analysis.json"))
    return parser.parse_args()


def write_checkpoint(folder: Path, config: transformers.LlamaConfig) -> int:
    """Writes a bfloat16 checkpoint without content; returns its number of parameters."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    header: dict[str, object] = {}
    end = 0
    for name, parameter in model.named_parameters():
        begin, end = end, end + 2 * parameter.numel()
        header[name] = {
            "dtype": "BF16",
            "shape": list(parameter.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    return end // 2


def main() -> None:
    """Measures once, prints, writes JSON."""
    arguments = parse_arguments()
    config = transformers.LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        vocab_size=arguments.vocabulary,
    )
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_checkpoint(Path(folder), config)
        command = [sys.executable, "-m", "zeroskip", "inspect", "--scales", "--json", folder]
        started = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    found = json.loads(done.stdout)
    document = {
        "machine": describe_machine(),
        "parameters": parameters,
        "seconds": seconds,
        "peak_gib": peak,
        "groups": len(found["groups"]),
        "met": seconds < GOAL_SECONDS and peak < GOAL_GIB,
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(
        f"{parameters / 1e9:.2f} billion parameters: {document['groups']} groups in {seconds:.1f} s "
        f"(Python, torch and transformers included), peak {peak:.2f} GiB; goal: less than "
        f"{GOAL_SECONDS} s and {GOAL_GIB} GiB"
    )


if __name__ == "__main__":
    main()
