"""Several processes that share a compilation, forked from the test: imports are paid once."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from zeroskip.ir import process_group

DEADLINE = 900


def run_processes(count: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[int]:
    """Runs `work(*arguments)` in so many processes of one group; returns their exit codes.

    What a process has to say goes into files: `work` is given nothing to return. A traceback is
    written to `folder/rank.txt`, and printed by the test that fails.
    """
    context = multiprocessing.get_context("fork")
    store = Path(tempfile.mkdtemp(dir=folder)) / "store"
    processes = [
        context.Process(target=_enter, args=(rank, count, store, folder, work, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE)
        if process.is_alive():
            process.kill()
            process.join()
    for path in sorted(folder.glob("traceback-*.txt")):
        print(path.name, path.read_text(), sep="\n")
    return [int(process.exitcode or 0) for process in processes]


def _enter(
    rank: int,
    count: int,
    store: Path,
    folder: Path,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    # OpenMP's threads did not survive the fork.
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    try:
        with process_group.sharing():
            work(*arguments)
    except BaseException:
        (folder / f"traceback-{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
