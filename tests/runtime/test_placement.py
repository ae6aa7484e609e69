"""A program as a module on a device: the same results, fragments in place, nothing left behind."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.kept_traces import capture_once as capture
from tests.zoo import ZOO
from zeroskip.ir import half_products
from zeroskip.ir.errors import LoweringError
from zeroskip.ir.program import Program, attribute
from zeroskip.passes import ApplyMasks, LowerSemiStructured, PassManager, PruneMagnitude
from zeroskip.runtime.placement import place

LINEAR = torch.ops.zeroskip.linear_24.default


@pytest.fixture(scope="module")
def lowered() -> Program:
    entry = ZOO["llama"]
    model = entry.model().bfloat16()
    program = capture(model, entry.inputs(2, 9))
    steps = [PruneMagnitude("2:4"), ApplyMasks(), LowerSemiStructured(tune="always")]
    return PassManager(steps)(program).program


def operands(module: torch.fx.GraphModule) -> list[torch.Tensor]:
    """The values that each 2:4 product reads."""
    nodes = module.graph.find_nodes(op="call_function", target=LINEAR)
    return [attribute(module, str(node.args[1].target)) for node in nodes]


@pytest.mark.parametrize("fragments", [False, True])
@pytest.mark.parametrize("rows", [2, 5])
def test_it_computes_the_same(
    lowered: Program, fragments: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A module multiplies in its own type; the program is to do so as well, on any processor.
    monkeypatch.setattr(half_products, "is_slow", lambda _: False)
    module = place(lowered, "cpu", fragments=fragments)
    batch = ZOO["llama"].inputs(rows, 7)
    expected = lowered.run(batch)
    with torch.no_grad():
        found = module(*(batch[name] for name in lowered.inputs))
    for value, name in zip(found, lowered.outputs, strict=True):
        torch.testing.assert_close(value, expected[name])
    dimensions = {tensor.dim() for tensor in operands(module)}
    assert dimensions == ({4} if fragments else {2})


def test_the_program_stays_as_it_is(lowered: Program) -> None:
    before = {name: lowered.weights[name].shape for name in lowered.read_weights()}
    place(lowered, "cpu", fragments=True)
    assert {name: lowered.weights[name].shape for name in lowered.read_weights()} == before


def test_fragments_take_no_more_than_the_packed_weight(lowered: Program) -> None:
    sizes = []
    for fragments in (False, True):
        module = place(lowered, "cpu", fragments=fragments)
        held = {id(t): t for t in operands(module)}
        sizes.append(sum(t.numel() * t.element_size() for t in held.values()))
    assert sizes[0] == sizes[1]


def test_what_the_graph_makes_is_made_on_the_device(lowered: Program) -> None:
    module = place(lowered, "meta")
    batch = ZOO["llama"].inputs(2, 9)
    with torch.no_grad():
        found = module(*(batch[name].to("meta") for name in lowered.inputs))
    assert all(value.device.type == "meta" for value in found)
    devices = [a for n in module.graph.nodes for a in (*n.args, *n.kwargs.values())]
    assert not any(a == torch.device("cpu") for a in devices if isinstance(a, torch.device))


def test_a_program_that_is_not_lowered() -> None:
    entry = ZOO["bert"]
    batch = entry.inputs(2, 9)
    program = dataclasses.replace(capture(entry.model(), batch))
    with torch.no_grad():
        found = place(program, "cpu", fragments=True)(*(batch[name] for name in program.inputs))
    for value, name in zip(found, program.outputs, strict=True):
        torch.testing.assert_close(value, program.run(batch)[name])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(lowered: Program) -> None:
    with pytest.raises(LoweringError, match=r"(?s)no CUDA device.*built for CUDA"):
        place(lowered, "cuda")
