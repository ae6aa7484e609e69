"""linear_24 is an operator like PyTorch's own: it traces, compiles, exports and differentiates."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from zeroskip.ir.capture import capture
from zeroskip.ir.errors import LoweringError, VerifyError
from zeroskip.ir.fragments import to_fragments
from zeroskip.ir.linear_24 import linear_24, linear_24_dx
from zeroskip.ir.semi_structured import SemiStructuredWeight, pack_semi_structured
from zeroskip.ir.verify import verify

# What keeps the C++ compiler short; it changes no result.
QUICK = {"cpp_cache_precompile_headers": False}
AHEAD = {
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
    **QUICK,
}
X = [(5, 20), (2, 3, 20), (20,), (0, 20), (1, 0, 20)]


def random_weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    groups = torch.randn(rows, columns // 4, 4, generator=generator)
    order = torch.rand(groups.shape, generator=generator).argsort(-1)
    weight = groups.masked_fill(order > 1, 0).reshape(rows, columns)
    weight[0, :4] = 0.0
    return weight.to(dtype)


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("shape", X)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_a_linear_with_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = random_weight(7, 20, dtype)
    packed = pack_semi_structured(weight)
    x, bias = random_tensor(*shape, dtype=dtype), random_tensor(7, dtype=dtype)
    for offset in (bias, None):
        y = linear_24(x, packed.values, packed.codes, offset)
        assert torch.equal(y, F.linear(x, weight, offset))
        assert y.dtype == dtype
    assert torch.equal(linear_24(x, packed.values, packed.codes, None, 7), F.linear(x, weight))


@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (21, 68), (5, 4), (40, 288)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fragments_are_the_same_weight(rows: int, columns: int, dtype: torch.dtype) -> None:
    packed = pack_semi_structured(random_weight(rows, columns, dtype))
    values, codes = to_fragments(packed)
    x, bias = random_tensor(3, columns, dtype=dtype), random_tensor(rows, dtype=dtype)
    expected = linear_24(x, packed.values, packed.codes, bias)
    assert torch.equal(linear_24(x, values, codes, bias, rows), expected)
    grad = random_tensor(3, rows, dtype=dtype)
    expected = linear_24_dx(grad, packed.values, packed.codes, columns)
    assert torch.equal(linear_24_dx(grad, values, codes, columns, rows), expected)


@pytest.mark.parametrize("rows", [0, 4])
def test_a_weight_without_rows_or_columns(rows: int) -> None:
    packed = pack_semi_structured(torch.zeros(rows, 0))
    assert torch.equal(
        linear_24(torch.zeros(3, 0), packed.values, packed.codes), torch.zeros(3, rows)
    )
    packed = pack_semi_structured(torch.zeros(0, 8))
    x = torch.zeros(3, 8, requires_grad=True)
    linear_24(x, packed.values, packed.codes, torch.zeros(0)).sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 8)) if x.grad is not None else False


@pytest.mark.parametrize(
    "x",
    [
        random_tensor(20, 6).T,
        random_tensor(3, 2, 20).transpose(0, 1),
        random_tensor(4, 40)[:, ::2],
        random_tensor(20).expand(3, 20),
    ],
)
def test_strides_of_x_do_not_matter(x: Tensor) -> None:
    weight = random_weight(7, 20)
    packed = pack_semi_structured(weight)
    assert not x.is_contiguous()
    expected = F.linear(x.contiguous(), weight)
    torch.testing.assert_close(linear_24(x, packed.values, packed.codes), expected)
    torch.library.opcheck(linear_24, (x.clone(), packed.values, packed.codes))


@pytest.mark.parametrize("shape", [(5, 20), (2, 3, 20), (0, 20)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    packed = pack_semi_structured(random_weight(7, 20))
    x, bias = random_tensor(*shape), random_tensor(7)
    torch.library.opcheck(linear_24, (x, packed.values, packed.codes))
    operands = (x.requires_grad_(), packed.values, packed.codes, bias.requires_grad_())
    torch.library.opcheck(linear_24, operands)
    trained = packed.values.clone().requires_grad_()
    torch.library.opcheck(linear_24, (x, trained, packed.codes, None, 7))
    grad = random_tensor(*shape[:-1], 7).requires_grad_()
    torch.library.opcheck(linear_24_dx, (grad, trained, packed.codes, 20))


def test_opcheck_of_fragments() -> None:
    values, codes = to_fragments(pack_semi_structured(random_weight(21, 68, torch.bfloat16)))
    x = random_tensor(3, 68, dtype=torch.bfloat16).requires_grad_()
    torch.library.opcheck(linear_24, (x, values, codes, None, 21))


def through_dense(x: Tensor, packed: SemiStructuredWeight, values: Tensor, bias: Tensor) -> Tensor:
    """The same product by operators of PyTorch, which differentiate it twice."""
    pairs = torch.zeros(packed.rows, packed.columns).masked_scatter(packed.keep(), values)
    return F.linear(x, pairs, bias)


@pytest.mark.parametrize("shape", [(5, 20), (2, 3, 20), (20,), (0, 20)])
def test_gradients_are_those_of_the_dense_weight(shape: tuple[int, ...]) -> None:
    packed = pack_semi_structured(random_weight(7, 20))
    leaves = (random_tensor(*shape), packed.values.clone(), random_tensor(7))
    for leaf in leaves:
        leaf.requires_grad_()
    x, values, bias = leaves
    ours = linear_24(x, values, packed.codes, bias)
    theirs = through_dense(x, packed, values, bias)
    found = torch.autograd.grad(ours.square().sum(), leaves, create_graph=True)
    expected = torch.autograd.grad(theirs.square().sum(), leaves, create_graph=True)
    torch.testing.assert_close(found, expected)
    again = torch.autograd.grad(found[0].square().sum(), leaves)
    torch.testing.assert_close(
        again, torch.autograd.grad(expected[0].square().sum(), leaves), rtol=1e-4, atol=1e-3
    )


def test_no_gradient_of_fragments_but_of_their_input() -> None:
    packed = pack_semi_structured(random_weight(16, 32, torch.bfloat16))
    values, codes = to_fragments(packed)
    x = random_tensor(3, 32, dtype=torch.bfloat16).requires_grad_()
    linear_24(x, values, codes, None, 16).sum().backward()
    gradient, x.grad = x.grad, None
    linear_24(x, packed.values, packed.codes).sum().backward()
    assert torch.equal(gradient, x.grad) if gradient is not None and x.grad is not None else False
    y = linear_24(x, values.clone().requires_grad_(), codes, None, 16)
    with pytest.raises(LoweringError, match="fragment form have no gradient"):
        y.sum().backward()


def test_what_does_not_go_together_is_refused() -> None:
    packed = pack_semi_structured(random_weight(7, 20))
    values, codes = packed.values, packed.codes
    x = random_tensor(3, 20)
    with pytest.raises(TypeError, match=r"x is torch\.bfloat16, values torch\.float32"):
        linear_24(x.bfloat16(), values, codes)
    with pytest.raises(TypeError, match=r"x is torch\.float32, bias torch\.float16"):
        linear_24(x, values, codes, torch.zeros(7).half())
    with pytest.raises(TypeError, match=r"codes are torch\.int32 \(7, 3\), not torch\.uint8"):
        linear_24(x, values, codes.int())
    with pytest.raises(TypeError, match=r"codes are torch\.uint8 \(7, 2\)"):
        linear_24(x, values, codes[:, :2])
    with pytest.raises(ValueError, match="x is 24 wide, the weight 20"):
        linear_24(random_tensor(3, 24), values, codes)
    with pytest.raises(ValueError, match="rows is 8, the weight has 7"):
        linear_24(x, values, codes, None, 8)
    with pytest.raises(ValueError, match=r"bias is \(6,\), the weight has 7 rows"):
        linear_24(x, values, codes, torch.zeros(6))
    with pytest.raises(ValueError, match="values have 3 dimensions"):
        linear_24(x, values[None], codes)
    with pytest.raises(ValueError, match="grad is 20 wide, the weight has 7 rows"):
        linear_24_dx(x, values, codes, 20)
    with pytest.raises(LoweringError, match="no two columns"):
        linear_24(x, values, torch.zeros_like(codes))


def test_fragments_that_do_not_go_together_are_refused() -> None:
    values, codes = to_fragments(pack_semi_structured(random_weight(21, 68, torch.float16)))
    x = random_tensor(3, 68, dtype=torch.float16)
    with pytest.raises(ValueError, match="rows is 0, the fragments"):
        linear_24(x, values, codes)
    with pytest.raises(ValueError, match="rows is 33, the fragments"):
        linear_24(x, values, codes, None, 33)
    for width in (64, 70, 100):
        with pytest.raises(ValueError, match=f"x is {width} wide, the weight at most 96"):
            linear_24(random_tensor(3, width, dtype=torch.float16), values, codes, None, 21)
    with pytest.raises(TypeError, match=r"codes are torch\.int64"):
        linear_24(x, values, codes.long(), None, 21)
    with pytest.raises(TypeError, match="fragments are float16 or bfloat16"):
        linear_24(x.float(), values.float(), codes, None, 21)


@pytest.mark.parametrize("part", ["values", "codes", "bias"])
def test_operands_on_another_device_are_named(part: str) -> None:
    packed = pack_semi_structured(random_weight(7, 20))
    operands = {"values": packed.values, "codes": packed.codes, "bias": torch.zeros(7)}
    operands[part] = operands[part].to("meta")
    with pytest.raises(ValueError, match=f"x is on cpu, {part} on meta"):
        linear_24(random_tensor(3, 20), **operands)


def test_shapes_without_data() -> None:
    packed = pack_semi_structured(random_weight(21, 68, torch.float16))
    values, codes = to_fragments(packed)
    x = random_tensor(2, 3, 68, dtype=torch.float16)
    for operands in ((x, packed.values, packed.codes), (x, values, codes, None, 21)):
        meta = [o.to("meta") if isinstance(o, Tensor) else o for o in operands]
        assert linear_24(*meta).shape == (2, 3, 21)  # type: ignore[arg-type]
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(o) if isinstance(o, Tensor) else o for o in operands]
            assert linear_24(*fake).shape == (2, 3, 21)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="x is 100 wide"):
                linear_24(torch.empty(2, 100, dtype=torch.float16), *fake[1:])  # type: ignore[arg-type]
    assert linear_24_dx(x.new_empty(2, 21, device="meta"), *meta[1:3], 68, 21).shape == (2, 68)  # type: ignore[arg-type]


class Layers(nn.Module):
    """Two products with something between, as parameters or as buffers."""

    values: Tensor
    codes: Tensor

    def __init__(self, trained: bool = False) -> None:
        super().__init__()
        first = pack_semi_structured(random_weight(16, 20))
        second = pack_semi_structured(random_weight(7, 16))
        self.first, self.second = (
            nn.Parameter(first.values, trained),
            nn.Parameter(second.values, trained),
        )
        self.bias = nn.Parameter(random_tensor(16))
        self.register_buffer("first_codes", first.codes)
        self.register_buffer("second_codes", second.codes)

    def forward(self, x: Tensor) -> Tensor:
        y = linear_24(x, self.first, self.first_codes, self.bias)
        return linear_24(y.relu(), self.second, self.second_codes)


@pytest.mark.parametrize("trained", [False, True])
def test_compiles_forward_and_backward(trained: bool) -> None:
    layers = Layers(trained)
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        gradients = []
        for module in (layers, compiled):
            x = random_tensor(rows, 20).requires_grad_()
            layers.zero_grad()
            module(x).square().sum().backward()
            gradients.append([x.grad, *(p.grad for p in layers.parameters())])
        torch.testing.assert_close(gradients[1], gradients[0])
        assert torch.equal(compiled(x), layers(x))


def test_compiles_with_inductor() -> None:
    layers = Layers()
    compiled = torch.compile(layers, fullgraph=True, dynamic=True, options=QUICK)
    with torch.no_grad():
        for rows in (3, 5):
            x = random_tensor(rows, 20)
            torch.testing.assert_close(compiled(x), layers(x))


def exported_layers() -> torch.export.ExportedProgram:
    dims = {0: torch.export.Dim("rows", max=1024), 1: torch.export.Dim("tokens", max=1024)}
    example = (random_tensor(2, 3, 20),)
    return torch.export.export(Layers().eval(), example, dynamic_shapes=(dims,))


def test_exports_as_one_operator(tmp_path: Path) -> None:
    exported = exported_layers()
    for program in (exported, exported.run_decompositions()):
        targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        assert targets.count("zeroskip.linear_24.default") == 2
        assert len(targets) == 3
    torch.export.save(exported, tmp_path / "layers.pt2")
    loaded = torch.export.load(tmp_path / "layers.pt2").module()
    x = random_tensor(4, 7, 20)
    assert torch.equal(loaded(x), Layers()(x))


def test_compiles_ahead_of_time(tmp_path: Path) -> None:
    path = torch._inductor.aoti_compile_and_package(
        exported_layers(), package_path=str(tmp_path / "layers.pt2"), inductor_configs=AHEAD
    )
    x = random_tensor(4, 7, 20)
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), Layers()(x))


def test_a_lowered_program_may_hold_it() -> None:
    program = capture(Layers().eval(), {"x": random_tensor(3, 20)})
    assert "zeroskip.linear_24" in str(program.graph)
    verify(dataclasses.replace(program, level="lowered"))
    with pytest.raises(VerifyError, match=r"calls zeroskip::linear_24 at level captured"):
        verify(program)
