"""Every kernel for GPUs in the interpreter; `test_interpreted.py` says how this is run."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.gpu import checks
from tests.kernels.gpu.interpreter import repair

repair()

NAMES = list(checks.KERNELS)
CASES = [(name, shape) for name in NAMES for shape in checks.shapes(name)]


@pytest.mark.parametrize("dtype", checks.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize(("kernel", "shape"), CASES, ids=str)
def test_shapes(kernel: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    checks.check_shape(kernel, shape, dtype, "cpu", every_config=False)


@pytest.mark.parametrize("kernel", NAMES)
def test_every_configuration(kernel: str) -> None:
    checks.check_shape(kernel, checks.SHAPES[1], torch.bfloat16, "cpu", every_config=True)


@pytest.mark.parametrize("kernel", NAMES)
def test_operands_given(kernel: str) -> None:
    checks.check_operands_given(kernel, torch.bfloat16, "cpu")


@pytest.mark.parametrize("kernel", NAMES)
def test_nan_stays_in_its_token(kernel: str) -> None:
    checks.check_nan_stays_in_its_token(kernel, torch.float16, "cpu")


@pytest.mark.parametrize("kernel", NAMES)
def test_no_tokens_and_no_rows(kernel: str) -> None:
    checks.check_no_tokens_and_no_rows(kernel, "cpu")


@pytest.mark.parametrize("dtype", checks.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("shape", checks.SHAPES, ids=str)
def test_dense_weight_of_decompress24(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    checks.check_decompressed(shape, dtype, "cpu")


def test_split_sum() -> None:
    checks.check_split_sum("cpu")
