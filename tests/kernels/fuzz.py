"""Builds the libFuzzer target over packed weights with clang, and runs it.

    python -m tests.kernels.fuzz [--seconds 600] [--folder build/fuzz] [libFuzzer option ...]

Every kernel of this machine is built with AddressSanitizer and UndefinedBehaviorSanitizer, once for
each state of the sources (some minutes). FOLDER/corpus keeps what was found and the next run goes on
from there; an input that is at fault is left in FOLDER. Debian has what is needed in the packages
clang and libclang-rt-14-dev (or another version).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import subprocess
import sys
from pathlib import Path

from tests.kernels.programs import DRIVERS, compile_kernels, link_driver
from zeroskip.runtime.kernels import build, compilers

SANITIZERS = (
    "-fsanitize=fuzzer-no-link,address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    # Comparisons are not traced: those in the loops of the kernels took most of the time.
    "-fno-sanitize-coverage=trace-cmp",
    "-O1",
)
# Choices take 40 bytes of an input. The entropic schedule would cost half of the speed.
OPTIONS = ("-max_len=128", "-entropic=0", "-print_funcs=0", "-print_final_stats=1")
SEEDS = 200


def main() -> int:
    """Runs the fuzzer; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--compiler", default="clang++")
    arguments, options = parser.parse_known_args()
    program = build_target(arguments.folder, arguments.compiler)
    corpus = arguments.folder / "corpus"
    if not corpus.exists():
        write_seeds(corpus)
    artifacts = f"-artifact_prefix={arguments.folder}/"
    command = [str(program), *OPTIONS, f"-max_total_time={arguments.seconds}", artifacts, *options]
    status = subprocess.run([*command, str(corpus)], check=False).returncode
    if status == 0:
        print(covered(program, corpus))
    return status


def build_target(folder: Path, compiler: str) -> Path:
    """Builds the target unless it was built from the same sources; returns the program."""
    digest = hashlib.sha256(build.source_hash().encode())
    for source in (Path(__file__), *sorted(DRIVERS.iterdir())):
        digest.update(source.read_bytes())
    work = folder / digest.hexdigest()[:16]
    program = work / "fuzz_packed"
    if not program.exists():
        work.mkdir(parents=True, exist_ok=True)
        objects = compile_kernels(work, compiler, compilers.architectures()[0], SANITIZERS)
        link_driver(work, "fuzz_packed", compiler, objects, (*SANITIZERS, "-fsanitize=fuzzer"))
    return program


def write_seeds(corpus: Path) -> None:
    """Fills a corpus with random choices, enough to reach every kernel at once."""
    corpus.mkdir(parents=True)
    numbers = random.Random(0)
    for i in range(SEEDS):
        (corpus / f"seed-{i:03}").write_bytes(numbers.randbytes(40))


def covered(program: Path, corpus: Path) -> str:
    """Says how many functions of the kernels the corpus reaches."""
    command = [str(program), "-runs=0", "-print_coverage=1", str(corpus)]
    said = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
    lines = [line for line in said.stderr.splitlines() if str(build.SOURCES) in line]
    reached = sum(line.startswith("COVERED_FUNC") for line in lines)
    missed = [line for line in lines if line.startswith("UNCOVERED_FUNC")]
    files = {
        os.path.basename(found[1]) for line in missed if (found := re.search(r" (/\S+):", line))
    }
    return (
        f"functions of the kernels reached: {reached} of {reached + len(missed)}; "
        f"others are in {', '.join(sorted(files)) or 'none'}"
    )


if __name__ == "__main__":
    sys.exit(main())
