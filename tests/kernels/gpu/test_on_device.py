"""Every kernel for GPUs on a device, with the checks that the interpreter runs, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.gpu import checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NAMES = list(checks.KERNELS)
LARGE = (
    # tokens, rows, columns
    (1, 300, 4096),
    (4, 130, 11008),
    (64, 200, 4096),
    (200, 130, 2048),
)
CASES = [(name, shape) for name in NAMES for shape in checks.shapes(name)]


# A shape takes a compile of each configuration: all of them only where sizes are those of models.
@pytest.mark.parametrize("dtype", checks.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize(("kernel", "shape"), CASES, ids=str)
def test_shapes(kernel: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    checks.check_shape(kernel, shape, dtype, "cuda", every_config=False)


@pytest.mark.parametrize("dtype", checks.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("kernel", NAMES)
def test_every_configuration(kernel: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    checks.check_shape(kernel, shape, dtype, "cuda", every_config=True)


@pytest.mark.parametrize("dtype", checks.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("kernel", NAMES)
def test_operands_given(kernel: str, dtype: torch.dtype) -> None:
    checks.check_operands_given(kernel, dtype, "cuda")


@pytest.mark.parametrize("kernel", NAMES)
def test_nan_stays_in_its_token(kernel: str) -> None:
    checks.check_nan_stays_in_its_token(kernel, torch.float16, "cuda")


@pytest.mark.parametrize("kernel", NAMES)
def test_no_tokens_and_no_rows(kernel: str) -> None:
    checks.check_no_tokens_and_no_rows(kernel, "cuda")


@pytest.mark.parametrize("dtype", checks.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("shape", checks.SHAPES, ids=str)
def test_dense_weight_of_decompress24(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    checks.check_decompressed(shape, dtype, "cuda")


def test_split_sum() -> None:
    checks.check_split_sum("cuda")


@pytest.mark.parametrize("kernel", NAMES)
def test_cuda_graph(kernel: str) -> None:
    """A graph replays with new activations, and a launch with all operands given allocates nothing."""
    shape, dtype = (4, 70, 512), torch.bfloat16
    tokens, rows, columns = shape
    given = checks.problem(kernel, shape, dtype, "cuda")
    operands = checks.KERNELS[kernel].pack(given.weight, given.keep)
    launch, x = checks.KERNELS[kernel].launch, given.x.clone()
    out = torch.empty(tokens, rows, dtype=dtype, device="cuda")
    for config in checks.KERNELS[kernel].configs:
        split = getattr(config, "split", 0)
        kind, size = (torch.float32, split * tokens * rows) if split else (dtype, rows * columns)
        workspace = torch.empty(size, dtype=kind, device="cuda")
        x.zero_()
        launch(x, operands, given.bias, config, out, workspace)
        torch.cuda.synchronize()
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
        launch(x, operands, given.bias, config, out, workspace)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated, config
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch(x, operands, given.bias, config, out, workspace)
        x.copy_(given.x)
        graph.replay()
        torch.cuda.synchronize()
        given.compare(out, True, config)
