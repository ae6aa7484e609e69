"""Every pruning method on every architecture of the zoo: exact counts, and outputs that are finite."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import pytest
import torch

from tests.zoo import ZOO
from zeroskip.ir.facts import Masks, SparseWeights
from zeroskip.ir.linears import find_linears
from zeroskip.ir.patterns import parse_pattern
from zeroskip.ir.program import Program
from zeroskip.passes import (
    AllocateSparsity,
    ApplyMasks,
    CompensateEnergy,
    DistillOutputs,
    Observe,
    Pass,
    PermuteChannels,
    PruneALPS,
    PruneCVR,
    PruneMagnitude,
    PruneRIA,
    PruneSparseGPT,
    PruneWanda,
    PruneZ,
    ReconstructBlocks,
    RefineDSnoT,
)

N_M, SHARE = "2:4 pad", "50%"
# What is pruned to, and what does it; all start where the inputs were observed.
METHODS: dict[str, tuple[str, tuple[Pass, ...]]] = {
    "magnitude": (SHARE, (PruneMagnitude(SHARE), ApplyMasks())),
    "ria": (N_M, (PruneRIA(N_M), ApplyMasks())),
    "z": (N_M, (PruneZ(N_M), ApplyMasks())),
    "cvr, energy": (SHARE, (PruneCVR(SHARE), CompensateEnergy())),
    "dsnot": (N_M, (PruneWanda(N_M), RefineDSnoT(), ApplyMasks())),
    "sparsegpt": (N_M, (PruneSparseGPT(N_M),)),
    "alps": (SHARE, (PruneALPS(SHARE, iterations=20),)),
    "blocks": (N_M, (PruneWanda(N_M), ApplyMasks(), ReconstructBlocks(batch=1))),
    "outputs": (SHARE, (PruneWanda(SHARE), ApplyMasks(), DistillOutputs(epochs=1, batch=1))),
}


@pytest.fixture(scope="module")
def observed(captured: Callable[[str], Program], arch: str) -> Program:
    """The architecture, its calibration data, and what that says."""
    entry = ZOO[arch]
    batches = (entry.inputs(2, 12), entry.inputs(3, 9, padded=True))
    program = dataclasses.replace(captured(arch), calibration=batches)
    return Observe(gram=True)(program).program


def check_pruned(before: Program, after: Program, pattern: str) -> None:
    """Every linear that has a mask holds as many weights as the pattern says, and nothing is NaN."""
    masks = after.fact(SparseWeights).masks
    assert masks
    exact = parse_pattern(pattern)
    for linear in find_linears(after):
        if linear.name not in masks:
            continue
        keep, weight = masks[linear.name].keep(), linear.weight(after)
        ones = exact.project(torch.rand(linear.shape, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(keep.sum(1), ones.sum(1)), linear.name
        assert not weight.masked_fill(keep, 0).any(), linear.name
    found = after.run({name: before.calibration[0][name] for name in after.inputs})
    assert all(bool(value.isfinite().all()) for value in found.values())


@pytest.mark.parametrize("method", METHODS)
def test_prunes(observed: Program, method: str) -> None:
    pattern, steps = METHODS[method]
    program = observed
    with warnings.catch_warnings():
        # Some experts see few tokens here, and are pruned by magnitude.
        warnings.filterwarnings("ignore", message=".*by magnitude")
        for step in steps:
            program = step(program).program
    check_pruned(observed, program, pattern)


@pytest.mark.parametrize("method", ["owl", "sensitivity"])
def test_allocates(observed: Program, method: str) -> None:
    with warnings.catch_warnings():
        # One or two layers have nothing to share out.
        warnings.filterwarnings("ignore", message=".*gives every linear the same")
        warnings.filterwarnings("ignore", message=".*by magnitude")
        shared = AllocateSparsity(SHARE, method=method)(observed).program  # type: ignore[arg-type]
    masks = PruneWanda(SHARE)(shared).program.fact(Masks).masks
    shapes = {linear.name: linear.shape for linear in find_linears(observed)}
    kept = sum(int(mask.keep().sum()) for mask in masks.values())
    whole = sum(shapes[name][0] * shapes[name][1] for name in masks)
    # Each row is rounded to a weight.
    rows = sum(shapes[name][0] for name in masks)
    assert abs(kept - whole / 2) <= rows


def test_permutes(observed: Program) -> None:
    step = PermuteChannels(N_M)
    moved = step(observed).program
    inputs = {name: observed.calibration[0][name] for name in observed.inputs}
    expected, found = observed.run(inputs), moved.run(inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
