"""`zeroskip inspect --scales`: the channel scales that a model does not feel, and why no others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from zeroskip.ir.scale_groups import Member, Refusal, ScaleGroup, ScaleGroups
from zeroskip.linear_table import common_name, table, without_numbers

# A node in a reason: `silu_1` in "silu at silu_1: not known to keep them".
_NODE = re.compile(r"(?<= at )(\w+?)(_\d+)?(?=$|[:;, )])")


def scales_json(found: ScaleGroups) -> dict[str, Any]:
    """Returns every group and every refusal as plain values."""
    return {
        "groups": [
            {
                "name": group.name,
                "channels": group.size,
                "sign": "positive" if group.positive else "any",
                "inputs_of": [consumer.linear for consumer in group.consumers],
                "parameters": list(group.parameters),
                "members": [_member_json(member) for member in group.members],
                "shift": [shift.parameter for shift in group.shifts],
            }
            for group in found.groups.values()
        ],
        "refusals": [
            {"linear": each.linear, "side": each.side, "reason": each.reason}
            for each in found.refusals
        ],
    }


def _member_json(member: Member) -> dict[str, Any]:
    used = member.exponents[member.exponents != 0]
    return {
        "parameter": member.parameter,
        "axis": member.axis,
        "exponents": sorted(set(used.tolist())),
    }


def scales_table(found: ScaleGroups) -> str:
    """Returns the same as two tables in plain text; what differs in numbers alone shares a line."""
    alike: dict[tuple[object, ...], list[ScaleGroup]] = {}
    for group in found.groups.values():
        alike.setdefault(_kind(group), []).append(group)
    refused: dict[tuple[object, ...], list[Refusal]] = {}
    for each in found.refusals:
        key = (without_numbers(each.linear), each.side, _NODE.sub(r"\1", each.reason))
        refused.setdefault(key, []).append(each)
    head = ["group", "count", "channels", "sign", "scales the inputs of", "shifted by"]
    lines = table(head, [_group_cells(groups) for groups in alike.values()])
    lines += ["", f"{len(found.groups)} groups"]
    if refused:
        head = ["not scaled", "count", "side", "because of"]
        lines += ["", *table(head, [_refusal_cells(each) for each in refused.values()])]
    return "\n".join(lines)


def _kind(group: ScaleGroup) -> tuple[object, ...]:
    return (
        without_numbers(group.name),
        group.size,
        group.positive,
        _linears(group),
        tuple(without_numbers(shift.parameter) for shift in group.shifts),
    )


def _group_cells(groups: Sequence[ScaleGroup]) -> list[str]:
    first = groups[0]
    return [
        common_name([group.name.replace(".weight", "") for group in groups]),
        _count(groups),
        str(first.size),
        "> 0" if first.positive else "any",
        ", ".join(_linears(first)) or "-",
        ", ".join(_last(shift.parameter, 2) for shift in first.shifts) or "-",
    ]


def _linears(group: ScaleGroup) -> tuple[str, ...]:
    """The last part of the name of each linear whose inputs are scaled; experts share one."""
    names: dict[str, list[str]] = {}
    for consumer in group.consumers:
        name = _last(consumer.linear.removesuffix(".weight"))
        names.setdefault(name.partition("[")[0], []).append(name)
    return tuple(common_name(same) for same in names.values())


def _refusal_cells(refusals: Sequence[Refusal]) -> list[str]:
    nodes = [node[0] for each in refusals if (node := _NODE.search(each.reason))]
    unlike = list(dict.fromkeys(nodes))
    reason = refusals[0].reason
    if len(unlike) > 1:
        between = ", " if len(unlike) == 2 else ", ..., "
        reason = _NODE.sub(f"{unlike[0]}{between}{unlike[-1]}", reason, count=1)
    names = [each.linear.replace(".weight", "") for each in refusals]
    return [common_name(names), _count(refusals), refusals[0].side, reason]


def _count(same: Sequence[object]) -> str:
    return f"x {len(same)}" if len(same) > 1 else ""


def _last(name: str, parts: int = 1) -> str:
    return ".".join(name.split(".")[-parts:])
