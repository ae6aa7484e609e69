"""From a dense checkpoint to an answer over HTTP: compile, gate, verify, serve; each step timed.

Every step but the last is one `zeroskip` command, which is printed. Without MODEL a tiny random one
is made first, so that this runs from a fresh clone in a minute or two and without a download.

    python examples/deploy.py [MODEL] [--recipe examples/recipes/deploy.yaml] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
Run = Callable[[list[str]], None]


def run_command(words: list[str]) -> None:
    """Runs `zeroskip WORDS`; ends with its exit code if that is not 0, as a CI job would."""
    done = subprocess.run([sys.executable, "-m", "zeroskip", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


@contextmanager
def timed(title: str, seconds: dict[str, float]) -> Iterator[None]:
    """Prints what begins, and notes how long it took."""
    print(f"\n== {title}", flush=True)
    started = time.perf_counter()
    yield
    seconds[title] = time.perf_counter() - started


def ask_once(folder: Path, prompt: str, tokens: int) -> str:
    """Serves the ONNX folder, sends one request over HTTP, and stops the server."""
    from serve import Generator, make_server

    from zeroskip import custom_ops_path
    from zeroskip.runtime.onnx.custom_ops import uses_sparse_linear

    packed = uses_sparse_linear(folder / "model.onnx")
    server = make_server(Generator(folder, custom_ops_path() if packed else None), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        body = json.dumps({"prompt": prompt, "tokens": tokens}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}", data=body)
        with urllib.request.urlopen(request) as answer:
            return str(json.load(answer)["text"])
    finally:
        server.shutdown()
        server.server_close()


def deploy(
    model: Path, recipe: Path, out: Path, prompt: str, options: list[str], run: Run = run_command
) -> dict[str, float]:
    """Runs every step; returns its seconds.

    Args:
        model: A Hugging Face directory.
        recipe: With `export-onnx: {directory: onnx}`, and the gates that have to hold.
        out: The artefact; it must not be there yet.
        prompt: What to ask the served model.
        options: More options of `zeroskip compile`.
        run: How a `zeroskip` command is run.
    """
    seconds: dict[str, float] = {}
    steps = {
        "compile and gate": ["compile", str(model), "--recipe", str(recipe), "--out", str(out)],
        "verify": ["verify", str(out)],
    }
    steps["compile and gate"] += options
    for title, words in steps.items():
        with timed(title, seconds):
            print(f"$ zeroskip {shlex.join(words)}", flush=True)
            run(words)
    with timed("serve", seconds):
        print(f"{prompt!r} -> {ask_once(out / 'onnx', prompt, tokens=16)!r}")
    print("\n" + "\n".join(f"{value:8.1f} s  {title}" for title, value in seconds.items()))
    print(f"{sum(seconds.values()):8.1f} s  in all; the artefact is in {out}")
    return seconds


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Compile, gate, verify and serve a model.")
    parser.add_argument("model", type=Path, nargs="?", help="default: a tiny random one")
    parser.add_argument("--recipe", type=Path, default=EXAMPLES / "recipes" / "deploy.yaml")
    parser.add_argument("--out", type=Path, help="default: in a new temporary folder")
    parser.add_argument("--prompt", default="The state of our Union is")
    parser.add_argument("--samples", type=int, help="windows of calibration text")
    parser.add_argument("--sequence-length", type=int, help="tokens in each")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="zeroskip-deploy-"))
    model = arguments.model
    options = []
    for name in ("samples", "sequence_length"):
        if getattr(arguments, name) is not None:
            options += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    if model is None:
        from tiny_model import write_tiny_model

        model = folder / "dense"
        write_tiny_model(model)
    deploy(model, arguments.recipe, arguments.out or folder / "sparse", arguments.prompt, options)


if __name__ == "__main__":
    main()
