"""The comparison itself: what counts as different, and how a difference is reported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from onnx_models import Exported
from zoo import ZOO

from zeroskip.ir.errors import ParityError
from zeroskip.runtime.onnx.parity import (
    CacheCase,
    CaseResult,
    Parity,
    check_parity,
    distance,
    plain_cases,
)
from zeroskip.runtime.onnx.session import OnnxModel


@pytest.fixture
def mlp(exported: Callable[[str], Exported]) -> OnnxModel:
    return OnnxModel(exported("mlp").artifact.path, threads=1)


def reference(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [ZOO["mlp"].model()(**inputs)]


def test_distance_is_relative_to_the_reference() -> None:
    assert distance(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert distance(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5
    assert distance(torch.empty(0), torch.empty(0)) == 0.0


def test_distance_handles_numbers_that_are_none() -> None:
    inf = torch.tensor([math.inf, 1.0])
    assert distance(inf, inf) == 0.0
    assert not distance(torch.tensor([1.0, 1.0]), inf) <= 1.0
    assert math.isnan(distance(torch.tensor([math.nan]), torch.tensor([1.0])))


def test_distance_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="differ"):
        distance(torch.ones(2), torch.ones(3))


def test_cases_resample_the_example_along_every_dynamic_axis(mlp: OnnxModel) -> None:
    example = ZOO["mlp"].inputs()
    cases = plain_cases(mlp, example)
    shapes = [tuple(case["features"].shape[:2]) for case in cases]
    assert shapes == [(2, 9), (1, 5), (3, 17), (2, 1)]
    assert set(cases[2]["features"].flatten().tolist()) <= set(
        example["features"].flatten().tolist()
    )


def test_an_equal_reference_passes_and_is_recorded(mlp: OnnxModel) -> None:
    parity = check_parity(mlp, reference, cases=plain_cases(mlp, ZOO["mlp"].inputs()))
    record = json.loads(parity.to_json())
    assert record["worst"] == parity.worst <= parity.limit
    assert record["cases"][0]["case"] == "features[2, 9, 13]"


@pytest.mark.parametrize("wrong", [lambda y: y * 1.001, lambda y: y * math.nan])
def test_a_different_reference_is_refused(
    mlp: OnnxModel, wrong: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    with pytest.raises(ParityError, match=r"output '\w+' differs by .* in features\[2, 9, 13\]"):
        check_parity(
            mlp,
            lambda inputs: [wrong(y) for y in reference(inputs)],
            cases=[ZOO["mlp"].inputs()],
        )


def test_a_reference_with_other_outputs_is_refused(mlp: OnnxModel) -> None:
    with pytest.raises(ParityError, match="returns 2 outputs, the file 1"):
        check_parity(mlp, lambda i: reference(i) * 2, cases=[ZOO["mlp"].inputs()])


def test_a_case_that_cannot_run_is_named(mlp: OnnxModel) -> None:
    with pytest.raises(ParityError, match=r"features\[2, 3, 12\] cannot be run"):
        check_parity(mlp, reference, cases=[{"features": torch.ones(2, 3, 12)}])
    with pytest.raises(ParityError, match=r"CacheCase.* cannot be run"):
        check_parity(mlp, reference, cases=[CacheCase(1, 0, 1)])


def test_worst_is_over_cases_and_outputs() -> None:
    cases = (CaseResult("a", {"x": 0.1, "y": 0.3}), CaseResult("b", {"x": 0.2}))
    assert Parity(cases).worst == 0.3
    assert Parity().worst == 0.0
