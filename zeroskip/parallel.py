"""Several processes of `torchrun` at one compilation: the first leads, the others work along.

All read the model, the recipe and the calibration data; each runs its own batches, and prunes its
own linears. The first holds the lock, keeps finished stages, and writes the artefact; the others
read finished stages from the same folder, so it must be on a file system that all of them see.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from zeroskip.ir import process_group
from zeroskip.ir.errors import CompileError
from zeroskip.ir.stage_files import StageFiles

if TYPE_CHECKING:
    from pathlib import Path

    from zeroskip.passes.base import Pass

# A process that dies is noticed at once. This is for one that waits while the first measures what
# the dense model is worth, which may take hours.
_PATIENCE = timedelta(hours=24)


@contextmanager
def joined_processes() -> Iterator[None]:
    """Joins the processes that `torchrun` started; without it there is one, and nothing to do.

    Raises:
        CompileError: They cannot find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise CompileError(
            f"the processes cannot find each other: {str(error).splitlines()[0]}",
            next_step="start them with torchrun: see docs/large-models.md",
        ) from error
    try:
        with process_group.sharing():
            yield
    finally:
        dist.destroy_process_group()


def tell_others(goes_on: bool) -> None:
    """Says, in the first process, whether there is anything to compute."""
    process_group.from_owner(torch.tensor([goes_on]), 0)


def work_along(
    source: Any,
    passes: Sequence[Pass],
    batches: Sequence[Any] | None,
    memory: str,
    stages: Path,
) -> None:
    """Runs what is shared of a compilation, in a process that is not the first.

    Args:
        source: The model, as for `compile_sparse`.
        passes: All passes of the recipe; what comes after the last one that runs stage by stage is
            left to the first process.
        batches: All calibration batches.
        memory: Budget for activations of each process.
        stages: Where the first process keeps finished stages.
    """
    from zeroskip.compile import compile_sparse

    if not bool(process_group.from_owner(torch.tensor([False]), 0)):
        return
    shared = [number for number, step in enumerate(passes) if step.scope == "block"]
    if not shared:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The first process says it.
        compile_sparse(
            source,
            passes[: shared[-1] + 1],
            calibration=batches,
            memory=memory,
            work=StageFiles(stages, "read by their numbers"),
        )
