"""The processes that share one compilation, where `torchrun` started several.

Every process runs the same passes on the same program in the same order. What is shared out is the
calibration data and the linears of a stage; what is exchanged are tensors, never pickled objects.
Outside of `sharing()` there is one process, and each function here is the identity: whoever calls
`compile_sparse` within a process group of their own, for something else, is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from zeroskip.ir.errors import CompileError

_shares = False


@contextmanager
def sharing() -> Iterator[None]:
    """Makes the processes of torch's default group share what is compiled within the block."""
    global _shares
    _shares = True
    try:
        yield
    finally:
        _shares = False


def count() -> int:
    """Returns how many processes share the compilation."""
    return dist.get_world_size() if _shares else 1


def rank() -> int:
    """Returns the number of this process among them, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def mine(length: int) -> range:
    """Returns the indices that this process works on, out of so many: every `count()`-th."""
    return range(rank(), length, count())


def owner(index: int) -> int:
    """Returns which process works on an index."""
    return index % count()


def share_out(costs: Sequence[int]) -> list[int]:
    """Returns which process does each piece of work: the dearest first, to whom has least to do."""
    loads = [0] * count()
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


def from_owner(tensor: torch.Tensor, source: int) -> torch.Tensor:
    """Returns the tensor that process `source` has; the others give one of its shape and dtype."""
    if count() == 1:
        return tensor
    sent = tensor.contiguous() if rank() == source else torch.empty_like(tensor).contiguous()
    with _losing_a_process():
        # As bytes: gloo knows neither booleans nor short integers.
        dist.broadcast(sent.view(-1).view(torch.uint8), source)
    return sent


def sent_values(values: dict[str, torch.Tensor] | None, source: int) -> dict[str, torch.Tensor]:
    """Returns the named tensors of process `source`, whose names and shapes the others do not know.

    Args:
        values: What is sent; only read at the source.
        source: The process that has them.
    """
    if count() == 1:
        assert values is not None
        return values
    found: dict[str, torch.Tensor] = {}
    known = values if values is not None and rank() == source else {}
    for head in _strings([_head(name, known[name]) for name in sorted(known)], source):
        name, dtype, *shape = head.split("\t")
        if rank() == source:
            tensor = known[name]
        else:
            tensor = torch.empty([int(size) for size in shape], dtype=getattr(torch, dtype))
        found[name] = from_owner(tensor, source)
    return found


def gathered(mine: torch.Tensor, length: int) -> torch.Tensor:
    """Puts together what all processes have of something with one row an index.

    Args:
        mine: [len(mine(length)), ...]: the rows of this process, in order.
        length: Rows of all processes together.

    Returns:
        [length, ...], in the order of the indices, the same in every process.
    """
    if count() == 1:
        return mine
    most = -(-length // count())
    padded = mine.new_zeros((most, *mine.shape[1:]))
    padded[: mine.shape[0]] = mine
    parts = [torch.empty_like(padded) for _ in range(count())]
    with _losing_a_process():
        dist.all_gather(parts, padded)
    # Row j of process r is index j * count + r.
    return torch.stack(parts, dim=1).flatten(0, 1)[:length]


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the sum over all processes; the order of the additions depends on their number."""
    return _reduced(tensor, "SUM")


def largest(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the elementwise maximum over all processes."""
    return _reduced(tensor, "MAX")


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if count() > 1:
        with _losing_a_process():
            dist.barrier()


def _reduced(tensor: torch.Tensor, operation: str) -> torch.Tensor:
    if count() == 1:
        return tensor
    result = tensor.contiguous().clone()
    with _losing_a_process():
        dist.all_reduce(result, getattr(dist.ReduceOp, operation))
    return result


def _head(name: str, tensor: torch.Tensor) -> str:
    return "\t".join([name, str(tensor.dtype).removeprefix("torch."), *map(str, tensor.shape)])


def _strings(texts: Sequence[str], source: int) -> list[str]:
    """Sends texts without line breaks from one process to all."""
    encoded = "\n".join(texts).encode()
    size = from_owner(torch.tensor([len(encoded)]), source)
    data = torch.frombuffer(bytearray(encoded or b"\n"), dtype=torch.uint8)
    if rank() != source:
        data = torch.empty(max(int(size), 1), dtype=torch.uint8)
    received = from_owner(data, source)
    if not int(size):
        return []
    return bytes(received.tolist()).decode().split("\n")


@contextmanager
def _losing_a_process() -> Iterator[None]:
    """Says what it means when the others no longer answer."""
    try:
        yield
    except RuntimeError as error:
        raise CompileError(
            f"process {rank()} of {count()} lost the others: {str(error).splitlines()[0]}",
            next_step="look for the process that ended first: its own message says why; then run "
            "the same command again, finished layers are kept",
        ) from error
