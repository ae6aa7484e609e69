"""masked_linear is an operator like PyTorch's own: it traces, compiles, exports and differentiates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from zeroskip.ir.formats import pack_bitmask
from zeroskip.ir.ops import masked_linear, sparse_linear
from zeroskip.ir.weights import pack_bits

CASES = [((5, 9), 7, True), ((2, 3, 16), 8, False), ((16,), 3, True), ((0, 8), 4, True)]


def case(
    shape: tuple[int, ...], out: int, bias: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """x, weight, bits, bias and the boolean mask."""
    generator = torch.Generator().manual_seed(out)
    x = torch.randn(shape, dtype=dtype, generator=generator)
    weight = torch.randn(out, shape[-1], dtype=dtype, generator=generator)
    keep = torch.rand(weight.shape, generator=generator) < 0.5
    offset = torch.randn(out, dtype=dtype, generator=generator) if bias else None
    return x, weight, pack_bits(keep), offset, keep


@pytest.mark.parametrize(("shape", "out", "bias"), CASES)
def test_equals_a_linear_with_zeros(shape: tuple[int, ...], out: int, bias: bool) -> None:
    x, weight, bits, offset, keep = case(shape, out, bias)
    assert torch.equal(masked_linear(x, weight, bits, offset), F.linear(x, weight * keep, offset))


def test_pruned_weights_do_not_matter_even_when_not_finite() -> None:
    x, weight, bits, offset, keep = case((4, 9), 7, True)
    poisoned = weight.masked_fill(~keep, float("nan"))
    expected = masked_linear(x, weight, bits, offset)
    assert torch.equal(masked_linear(x, poisoned, bits, offset), expected)


@pytest.mark.parametrize(("shape", "out", "bias"), CASES)
def test_opcheck(shape: tuple[int, ...], out: int, bias: bool) -> None:
    x, weight, bits, offset, _ = case(shape, out, bias)
    torch.library.opcheck(masked_linear, (x, weight, bits, offset))
    weight.requires_grad_()
    torch.library.opcheck(masked_linear, (x.requires_grad_(), weight, bits, offset))


@pytest.mark.parametrize(("shape", "out", "bias"), CASES[:2])
def test_gradients(shape: tuple[int, ...], out: int, bias: bool) -> None:
    x, weight, bits, offset, keep = case(shape, out, bias, torch.float64)
    inputs = [t for t in (x, weight, offset) if t is not None]
    for tensor in inputs:
        tensor.requires_grad_()

    def function(*tensors: Tensor) -> Tensor:
        return masked_linear(tensors[0], tensors[1], bits, tensors[2] if bias else None)

    assert torch.autograd.gradcheck(function, inputs)
    function(*inputs).sum().backward()
    assert weight.grad is not None
    assert (weight.grad[~keep] == 0).all()
    assert (weight.grad[keep] != 0).all()


class Layer(nn.Module):
    bits: Tensor

    def __init__(self) -> None:
        super().__init__()
        _, weight, bits, bias, self.keep = case((1, 12), 5, True)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(5) if bias is None else bias)
        self.register_buffer("bits", bits)

    def forward(self, x: Tensor) -> Tensor:
        return masked_linear(x, self.weight, self.bits, self.bias).relu()


def test_compiles_forward_and_backward() -> None:
    layer = Layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 4):
        x = torch.randn(rows, 12)
        layer.zero_grad()
        expected = layer(x)
        expected.sum().backward()
        gradient = layer.weight.grad
        layer.weight.grad = None
        found = compiled(x)
        found.sum().backward()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(layer.weight.grad, gradient)


def test_exports_as_one_operator() -> None:
    rows = torch.export.Dim("rows")
    layer = Layer().eval()
    exported = torch.export.export(layer, (torch.randn(3, 12),), dynamic_shapes=({0: rows},))
    targets = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert targets == ["zeroskip.masked_linear.default", "aten.relu.default"]
    x = torch.randn(6, 12)
    assert torch.equal(exported.module()(x), layer(x))


def test_masks_that_are_not_bits_are_refused_while_tracing() -> None:
    x, weight, bits, _, _ = case((4, 9), 7, False)
    bytes_as_int = bits.int()
    with FakeTensorMode() as mode:
        x, weight, bits = (mode.from_tensor(t) for t in (x, weight, bytes_as_int))
        with pytest.raises(TypeError, match="int32, not uint8"):
            masked_linear(x, weight, bits)


SPARSE = [((5, 70), 7, True), ((2, 3, 64), 8, False), ((16,), 3, True), ((0, 8), 4, True)]


@pytest.mark.parametrize(("shape", "out", "bias"), SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_sparse_linear_equals_a_linear_with_zeros(
    shape: tuple[int, ...], out: int, bias: bool, dtype: torch.dtype
) -> None:
    x, weight, _, offset, keep = case(shape, out, bias)
    scales = weight.abs().amax(1, keepdim=True) / 127 if dtype == torch.int8 else None
    packed = pack_bitmask(weight * keep, dtype=dtype, scales=scales)
    operands = (packed.bitmask, packed.row_offsets, packed.values, packed.scales, offset)
    expected = F.linear(x, packed.unpack(), offset)
    torch.testing.assert_close(
        sparse_linear(x, *operands, shape[-1]), expected, atol=1e-5, rtol=1e-5
    )
    assert sparse_linear(x.bfloat16(), *operands, shape[-1]).dtype == torch.bfloat16
    torch.library.opcheck(sparse_linear, (x, *operands, shape[-1]))


def test_rounded_activations() -> None:
    """Level 4 is a linear over activations on 256 steps; a row that is not finite stays not finite."""
    x, weight, _, offset, keep = case((6, 70), 9, True)
    x[3] = 0.0
    x[4, 5] = float("nan")
    x[5, 6] = float("inf")
    scales = weight.abs().amax(1, keepdim=True) / 127
    packed = pack_bitmask(weight * keep, dtype=torch.int8, scales=scales)
    operands = (packed.bitmask, packed.row_offsets, packed.values, packed.scales, offset)
    exact = sparse_linear(x, *operands, 70)
    rounded = sparse_linear(x, *operands, 70, 0, 4)
    error = (rounded[:3] - exact[:3]).norm() / exact[:3].norm()
    assert 1e-4 < float(error) < 0.02
    assert torch.equal(rounded[3], exact[3])
    assert rounded[4:].isnan().all()


def test_sparse_linear_notices_a_wrong_width() -> None:
    _, weight, _, _, keep = case((6, 70), 9, True)
    packed = pack_bitmask(weight * keep)
    operands = (packed.bitmask, packed.row_offsets, packed.values, None, None)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="71 wide"):
        sparse_linear(torch.empty(2, 71), *operands, 70)
