"""What the CUDA operator does around its kernels, tried with the dense candidate on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from zeroskip.ir.fragments import to_fragments
from zeroskip.ir.linear_24 import linear_24
from zeroskip.ir.semi_structured import SemiStructuredWeight, pack_semi_structured
from zeroskip.runtime.candidates24 import DENSE, KERNELS, Choice
from zeroskip.runtime.gpu_dispatch import Entry, Table, key_of
from zeroskip.runtime.kernels import linear_24 as operator

ROWS, COLUMNS = 48, 96


@pytest.fixture
def weight() -> SemiStructuredWeight:
    torch.manual_seed(0)
    dense = torch.randn(ROWS, COLUMNS // 4, 4)
    dense[..., 2:] = 0
    dense[3] = 0
    return pack_semi_structured(dense.view(ROWS, COLUMNS).bfloat16())


@pytest.fixture(autouse=True)
def no_tables() -> Iterator[None]:
    operator.forget_tables()
    yield
    operator.forget_tables()


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), (0,), (2, 0), ()])
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_the_reference(
    weight: SemiStructuredWeight, shape: tuple[int, ...], has_bias: bool
) -> None:
    x = torch.randn(*shape, COLUMNS).bfloat16()
    bias = torch.randn(ROWS).bfloat16() if has_bias else None
    found = operator.multiply(x, weight.values, weight.codes, bias)
    expected = linear_24(x, weight.values, weight.codes, bias)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


def test_fragments_and_strided_activations(weight: SemiStructuredWeight) -> None:
    values, codes = to_fragments(weight)
    x = torch.randn(COLUMNS, 7).bfloat16().T
    found = operator.multiply(x, values, codes, None, ROWS)
    torch.testing.assert_close(found, x @ weight.unpack().T)


def test_forms_are_made_once(weight: SemiStructuredWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    read = operator.read_weight
    monkeypatch.setattr(operator, "read_weight", lambda *a: made.append(1) or read(*a))
    x = torch.randn(2, COLUMNS).bfloat16()
    for _ in range(3):
        operator.multiply(x, weight.values, weight.codes)
    assert len(made) == 1


def test_a_weight_written_in_place_is_read_again(weight: SemiStructuredWeight) -> None:
    x = torch.randn(2, COLUMNS).bfloat16()
    before = operator.multiply(x, weight.values, weight.codes)
    weight.values.mul_(2)
    torch.testing.assert_close(operator.multiply(x, weight.values, weight.codes), 2 * before)
    weight.codes.fill_(0b11101110)
    expected = linear_24(x, weight.values, weight.codes)
    torch.testing.assert_close(operator.multiply(x, weight.values, weight.codes), expected)


def test_other_codes_with_the_same_values(weight: SemiStructuredWeight) -> None:
    x = torch.randn(2, COLUMNS).bfloat16()
    operator.multiply(x, weight.values, weight.codes)
    other = torch.full_like(weight.codes, 0b11101110)
    expected = linear_24(x, weight.values, other)
    torch.testing.assert_close(operator.multiply(x, weight.values, other), expected)


def test_forms_die_with_their_values(weight: SemiStructuredWeight) -> None:
    values, codes = weight.values.clone(), weight.codes.clone()
    operator.multiply(torch.randn(2, COLUMNS).bfloat16(), values, codes)
    gc.collect()
    known = len(operator._forms)
    del values
    gc.collect()
    assert len(operator._forms) == known - 1


def test_a_kernel_that_refuses_the_device_leaves_it_to_dense(weight: SemiStructuredWeight) -> None:
    table = Table()
    key = key_of(ROWS, COLUMNS, torch.bfloat16, torch.device("cpu"))
    table.put(key, {8: Entry(Choice("cusparselt", {"least": 8}), 2.0, 1.0)})
    operator.use_table(table)
    assert KERNELS["cusparselt"].refuse(torch.bfloat16, ROWS, COLUMNS, torch.device("cpu"))
    x = torch.randn(3, COLUMNS).bfloat16()
    expected = linear_24(x, weight.values, weight.codes)
    torch.testing.assert_close(operator.multiply(x, weight.values, weight.codes), expected)


def test_the_last_table_decides(
    weight: SemiStructuredWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Named(Table):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            key = key_of(ROWS, COLUMNS, torch.bfloat16, torch.device("cpu"))
            self.put(key, {8: Entry(DENSE, 1.0, 1.0)})

        def find(self, *arguments: object) -> Choice:
            asked.append(self.name)
            return DENSE

    operator.use_table(Named("first"))
    operator.use_table(Named("second"))
    operator.multiply(torch.randn(3, COLUMNS).bfloat16(), weight.values, weight.codes)
    assert asked == ["second"]


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.zeros(1, COLUMNS), TypeError, "float32"),
        (torch.zeros(1, COLUMNS + 4, dtype=torch.bfloat16), ValueError, "100 wide"),
        (torch.zeros(1, COLUMNS, dtype=torch.bfloat16, device="meta"), ValueError, "meta"),
    ],
)
def test_operands_that_do_not_go_together(
    weight: SemiStructuredWeight, x: torch.Tensor, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        operator.multiply(x, weight.values, weight.codes)
