"""bitmap_linear is an operator like PyTorch's own: it traces, compiles, exports, differentiates."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from zeroskip.ir.bitmap import BitmapWeight, pack_bitmap
from zeroskip.ir.bitmap_linear import bitmap_linear, bitmap_linear_dx
from zeroskip.ir.capture import capture
from zeroskip.ir.errors import LoweringError, VerifyError
from zeroskip.ir.verify import verify

# What keeps the C++ compiler short; it changes no result.
QUICK = {"cpp_cache_precompile_headers": False}
AHEAD = {
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
    **QUICK,
}
X = [(5, 70), (2, 3, 70), (70,), (0, 70), (1, 0, 70)]


def random_weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    return (weight * (torch.rand(rows, columns, generator=generator) < 0.5)).to(dtype)


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def operands_of(packed: BitmapWeight) -> tuple[Tensor, Tensor, Tensor]:
    return packed.bits, packed.starts, packed.values


@pytest.mark.parametrize("shape", X)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_a_linear_with_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = random_weight(7, 70, dtype)
    operands = operands_of(pack_bitmap(weight))
    x, bias = random_tensor(*shape, dtype=dtype), random_tensor(7, dtype=dtype)
    for offset in (bias, None):
        y = bitmap_linear(x, *operands, offset)
        assert torch.equal(y, F.linear(x, weight, offset))
        assert y.dtype == dtype


@pytest.mark.parametrize(("rows", "columns"), [(0, 70), (4, 0), (0, 0), (3, 64), (1, 1)])
def test_a_weight_of_any_size(rows: int, columns: int) -> None:
    weight = random_weight(rows, columns)
    operands = operands_of(pack_bitmap(weight))
    x = random_tensor(3, columns).requires_grad_()
    y = bitmap_linear(x, *operands, torch.zeros(rows))
    torch.testing.assert_close(y, F.linear(x, weight))
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, weight.sum(0).expand(3, columns))


@pytest.mark.parametrize(
    "x",
    [
        random_tensor(70, 6).T,
        random_tensor(3, 2, 70).transpose(0, 1),
        random_tensor(4, 140)[:, ::2],
        random_tensor(70).expand(3, 70),
    ],
)
def test_strides_of_x_do_not_matter(x: Tensor) -> None:
    weight = random_weight(7, 70)
    assert not x.is_contiguous()
    y = bitmap_linear(x, *operands_of(pack_bitmap(weight)))
    torch.testing.assert_close(y, F.linear(x.contiguous(), weight))


@pytest.mark.parametrize("shape", [(5, 70), (2, 3, 70), (0, 70)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    bits, starts, values = operands_of(pack_bitmap(random_weight(7, 70)))
    x, bias = random_tensor(*shape), random_tensor(7)
    torch.library.opcheck(bitmap_linear, (x, bits, starts, values))
    x.requires_grad_()
    torch.library.opcheck(bitmap_linear, (x, bits, starts, values, bias.requires_grad_()))
    trained = values.clone().requires_grad_()
    torch.library.opcheck(bitmap_linear, (x, bits, starts, trained))
    grad = random_tensor(*shape[:-1], 7).requires_grad_()
    torch.library.opcheck(bitmap_linear_dx, (grad, bits, starts, trained, 70))


@pytest.mark.parametrize("shape", [(5, 70), (2, 3, 70), (70,), (0, 70)])
def test_gradients_are_those_of_the_dense_weight(shape: tuple[int, ...]) -> None:
    packed = pack_bitmap(random_weight(7, 70))
    leaves = (random_tensor(*shape), packed.values.clone(), random_tensor(7))
    for leaf in leaves:
        leaf.requires_grad_()
    x, values, bias = leaves
    ours = bitmap_linear(x, packed.bits, packed.starts, values, bias)
    theirs = F.linear(x, torch.zeros(7, 70).masked_scatter(packed.keep(), values), bias)
    found = torch.autograd.grad(ours.square().sum(), leaves, create_graph=True)
    expected = torch.autograd.grad(theirs.square().sum(), leaves, create_graph=True)
    torch.testing.assert_close(found, expected)
    again = torch.autograd.grad(found[0].square().sum(), leaves)
    torch.testing.assert_close(
        again, torch.autograd.grad(expected[0].square().sum(), leaves), rtol=1e-4, atol=1e-3
    )


def test_what_does_not_go_together_is_refused() -> None:
    bits, starts, values = operands_of(pack_bitmap(random_weight(7, 70)))
    x = random_tensor(3, 70)
    with pytest.raises(TypeError, match=r"x is torch\.bfloat16, values torch\.float32"):
        bitmap_linear(x.bfloat16(), bits, starts, values)
    with pytest.raises(TypeError, match=r"x is torch\.float32, bias torch\.float16"):
        bitmap_linear(x, bits, starts, values, torch.zeros(7).half())
    with pytest.raises(TypeError, match=r"bits are torch\.int64, not torch\.int32"):
        bitmap_linear(x, bits.long(), starts, values)
    with pytest.raises(TypeError, match=r"starts are torch\.int64, not torch\.int32"):
        bitmap_linear(x, bits, starts.long(), values)
    with pytest.raises(ValueError, match="x is 64 wide, the bits are 128"):
        bitmap_linear(x[:, :64], bits, starts, values)
    with pytest.raises(LoweringError, match="bits beyond column 66 are"):
        bitmap_linear(x[:, :66], bits, starts, values)
    with pytest.raises(ValueError, match=r"starts are \(7, 1\)"):
        bitmap_linear(x, bits, starts[:, :1], values)
    with pytest.raises(ValueError, match="values have 2 dimensions, not 1"):
        bitmap_linear(x, bits, starts, values[None])
    with pytest.raises(ValueError, match=r"bias is \(6,\), the weight has 7 rows"):
        bitmap_linear(x, bits, starts, values, torch.zeros(6))
    with pytest.raises(ValueError, match="grad is 70 wide, the weight has 7 rows"):
        bitmap_linear_dx(x, bits, starts, values, 70)


@pytest.mark.parametrize("part", ["bits", "starts", "values", "bias"])
def test_operands_on_another_device_are_named(part: str) -> None:
    bits, starts, values = operands_of(pack_bitmap(random_weight(7, 70)))
    operands = {"bits": bits, "starts": starts, "values": values, "bias": torch.zeros(7)}
    operands[part] = operands[part].to("meta")
    with pytest.raises(ValueError, match=f"x is on cpu, {part} on meta"):
        bitmap_linear(random_tensor(3, 70), **operands)


def test_shapes_without_data() -> None:
    operands = operands_of(pack_bitmap(random_weight(7, 70)))
    meta = [operand.to("meta") for operand in operands]
    assert bitmap_linear(torch.empty(2, 3, 70, device="meta"), *meta).shape == (2, 3, 7)
    assert bitmap_linear_dx(torch.empty(2, 7, device="meta"), *meta, 70).shape == (2, 70)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(operand) for operand in operands]
        assert bitmap_linear(torch.empty(2, 3, 70), *fake).shape == (2, 3, 7)
        with pytest.raises(ValueError, match="x is 129 wide"):
            bitmap_linear(torch.empty(2, 129), *fake)


class Layer(nn.Module):
    bits: Tensor
    starts: Tensor

    def __init__(self, trained: bool = False) -> None:
        super().__init__()
        packed = pack_bitmap(random_weight(7, 70))
        self.values = nn.Parameter(packed.values, trained)
        self.bias = nn.Parameter(random_tensor(7))
        self.register_buffer("bits", packed.bits)
        self.register_buffer("starts", packed.starts)

    def forward(self, x: Tensor) -> Tensor:
        return bitmap_linear(x, self.bits, self.starts, self.values, self.bias).relu()


@pytest.mark.parametrize("trained", [False, True])
def test_compiles_forward_and_backward(trained: bool) -> None:
    layer = Layer(trained)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        gradients = []
        for module in (layer, compiled):
            x = random_tensor(rows, 70).requires_grad_()
            layer.zero_grad()
            module(x).square().sum().backward()
            gradients.append([x.grad, *(p.grad for p in layer.parameters())])
        torch.testing.assert_close(gradients[1], gradients[0])
        assert torch.equal(compiled(x), layer(x))


def test_compiles_with_inductor() -> None:
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, options=QUICK)
    with torch.no_grad():
        for rows in (3, 5):
            x = random_tensor(rows, 70)
            torch.testing.assert_close(compiled(x), layer(x))


def exported_layer() -> torch.export.ExportedProgram:
    dims = {0: torch.export.Dim("rows", max=1024), 1: torch.export.Dim("tokens", max=1024)}
    example = (random_tensor(2, 3, 70),)
    return torch.export.export(Layer().eval(), example, dynamic_shapes=(dims,))


def test_exports_as_one_operator(tmp_path: Path) -> None:
    exported = exported_layer()
    for program in (exported, exported.run_decompositions()):
        targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        assert targets == ["zeroskip.bitmap_linear.default", "aten.relu.default"]
    torch.export.save(exported, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    x = random_tensor(4, 7, 70)
    assert torch.equal(loaded(x), Layer()(x))


def test_compiles_ahead_of_time(tmp_path: Path) -> None:
    path = torch._inductor.aoti_compile_and_package(
        exported_layer(), package_path=str(tmp_path / "layer.pt2"), inductor_configs=AHEAD
    )
    x = random_tensor(4, 7, 70)
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), Layer()(x))


def test_a_lowered_program_may_hold_it() -> None:
    program = capture(Layer().eval(), {"x": random_tensor(3, 70)})
    verify(dataclasses.replace(program, level="lowered"))
    with pytest.raises(VerifyError, match=r"calls zeroskip::bitmap_linear at level captured"):
        verify(program)
