"""The report names the groups of scales that were folded, and why others were not."""

from __future__ import annotations

import json
import warnings

from tests.zoo import ZOO
from zeroskip import compile_sparse
from zeroskip.passes import (
    ApplyMasks,
    FindScaleGroups,
    FoldScales,
    InduceSparsity,
    Observe,
    Pass,
    PruneMagnitude,
    PruneWanda,
)
from zeroskip.report import Report


def report_of(*passes: Pass) -> Report:
    entry = ZOO["llama"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compile_sparse(
            entry.model(),
            [FindScaleGroups(), *passes, ApplyMasks()],
            example_inputs=entry.inputs(),
            calibration=[entry.inputs(2, 12), entry.inputs(3, 9)],
        ).report


def test_folded_groups() -> None:
    report = report_of(Observe(), FoldScales("activation"), PruneMagnitude("2:4"))
    folded = [group for group in report.groups if group.folded]
    assert folded
    assert all(0 < group.smallest < 1 < group.largest for group in folded)
    assert f"scales folded into {len(folded)} of {len(report.groups)} groups" in str(report)
    document = json.loads(json.dumps(report.to_json()))
    assert [group["name"] for group in document["scale_groups"]] == [g.name for g in report.groups]


def test_refused_groups_by_reason() -> None:
    report = report_of(InduceSparsity("2:4", "wanda"), Observe(), PruneWanda("2:4"))
    assert len(report.groups) > 2
    assert not any(group.folded for group in report.groups)
    text = str(report)
    assert f"scales folded into 0 of {len(report.groups)} groups" in text
    others = f"{report.groups[0].name} and {len(report.groups) - 1} others: a scale cancels out"
    assert f"  not {others}" in text


def test_learned_groups_say_what_they_are_worth() -> None:
    report = report_of(InduceSparsity("2:4", epochs=1, guard=False), PruneMagnitude("2:4"))
    assert any("with scales, by" in group.note for group in report.groups if group.folded)


def test_no_groups_no_lines() -> None:
    report = report_of(PruneMagnitude("2:4"))
    assert report.groups == []
    assert "scales folded" not in str(report)
