"""How products of `mma24` are cut: every unit once, every part added, nothing out of bounds."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroskip.runtime.kernels.gpu.mma24_launch import CONFIGS, Config, Cut, cut

H200 = (132, 233472)


def parts_of(plan: Cut) -> dict[int, list[tuple[int, int]]]:
    """Returns who works on each tile: (program, units), by the arithmetic of the kernel."""
    found: dict[int, list[tuple[int, int]]] = {}
    for program in range(plan.programs):
        first = program * plan.per
        for unit in range(first, min(first + plan.per, plan.tiles * plan.chunks)):
            tile = unit // plan.chunks
            found.setdefault(tile, [])
            if not found[tile] or found[tile][-1][0] != program:
                found[tile].append((program, 0))
            found[tile][-1] = (program, found[tile][-1][1] + 1)
    return found


configs = st.builds(
    Config,
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(2, 6),
    st.sampled_from([4, 8]),
    st.integers(0, 8),
)


@settings(deadline=None, max_examples=300)
@given(configs, st.integers(1, 300), st.integers(1, 700), st.integers(1, 200), st.integers(1, 132))
def test_every_unit_is_done_once(
    config: Config, tokens: int, rows: int, steps: int, processors: int
) -> None:
    plan = cut(config, tokens, rows, 32 * steps, processors, H200[1])
    assert plan.blocks * config.tokens >= tokens > (plan.blocks - 1) * config.tokens
    assert plan.tiles * config.rows >= rows > (plan.tiles - 1) * config.rows
    assert plan.chunks * config.steps * config.warps_k >= plan.steps
    assert plan.programs * plan.per >= plan.tiles * plan.chunks > (plan.programs - 1) * plan.per
    parts = parts_of(plan)
    assert set(parts) == set(range(plan.tiles))
    places: set[int] = set()
    for tile, shared in parts.items():
        assert sum(units for _, units in shared) == plan.chunks
        if len(shared) == 1:
            continue
        assert plan.shared_tiles
        # The last to arrive counts the others by these bounds, and finds their parts by this rule.
        low = tile * plan.chunks // plan.per
        high = (tile * plan.chunks + plan.chunks - 1) // plan.per
        assert [program for program, _ in shared] == list(range(low, high + 1))
        for program, _ in shared:
            place = 2 * program + (program * plan.per // plan.chunks != tile)
            assert place not in places, "two parts in one place"
            places.add(place)
    assert max(places, default=-1) < 2 * plan.programs
    if plan.shared_tiles:
        assert plan.floats == 2 * plan.programs * plan.blocks * plan.part
        assert plan.counters == plan.tiles * plan.blocks


@pytest.mark.parametrize("split", [0, 1, 2, 4])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_shipped_configurations_fit(config: Config, split: int) -> None:
    config = dataclasses.replace(config, split=split)
    assert config.shared_bytes <= 232448
    plan = cut(config, 64, 4096, 4096, *H200)
    assert plan.shared_tiles == (split != 1) or plan.per % plan.chunks == 0
    if split == 1:
        assert (plan.floats, plan.counters) == (0, 0)


def test_small_devices_have_a_configuration_for_every_number_of_tokens() -> None:
    small = [config for config in CONFIGS if config.shared_bytes <= 101376]
    assert {config.token_tiles for config in small} == {c.token_tiles for c in CONFIGS}


def test_units_are_spread_over_the_device() -> None:
    plan = cut(Config(4, 1, 2, 8, 3, 4, split=0), 64, 14336, 4096, *H200)
    assert plan.programs <= 2 * H200[0]
    assert plan.programs > 1.9 * H200[0]
