"""Equations between unknown scales: what must be equal, opposite or zero, and why."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroskip.ir.scale_equations import (
    ScaleEquations,
    broadcast,
    count_runs,
    find_repeats,
    squeeze_repeats,
)


def labels(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def solved(equations: ScaleEquations, *values: int) -> list[int]:
    """What variables are known to equal, after all that was demanded."""
    equations.solve()
    return equations.canonical(labels(*values)).tolist()


def with_variables(count: int) -> ScaleEquations:
    equations = ScaleEquations()
    assert equations.new_variables(count).tolist() == list(range(1, count + 1))
    return equations


# Equations


def test_variables_are_free_until_told_otherwise() -> None:
    equations = with_variables(3)
    assert not equations.solve()
    assert solved(equations, 1, -2, 3, 0) == [1, -2, 3, 0]


def test_equal_variables_are_named_after_the_first_of_them() -> None:
    equations = with_variables(5)
    equations.equate(labels(5, 3), labels(3, 2), "linear at a")
    assert equations.solve()
    assert solved(equations, 1, 2, 3, 4, 5) == [1, 2, 2, 4, 2]


def test_signs_multiply_along_a_chain() -> None:
    equations = with_variables(4)
    equations.equate(labels(1, 2, 3), labels(-2, -3, -4), "linear at a")
    assert solved(equations, 1, 2, 3, 4) == [1, -1, 1, -1]
    assert solved(equations, -4) == [1]


def test_both_sides_may_be_negative() -> None:
    equations = with_variables(2)
    equations.equate(labels(-1), labels(-2), "add at a")
    assert solved(equations, 1, 2) == [1, 1]


def test_what_would_have_to_grow_and_shrink_is_fixed_without_a_reason() -> None:
    equations = with_variables(4)
    equations.equate(labels(1), labels(2), "add at a")
    equations.equate(labels(2), labels(-3), "linear at b")
    equations.equate(labels(3), labels(1), "add at c")
    assert solved(equations, 1, 2, 3, 4) == [0, 0, 0, 4]
    assert equations.why_pinned(labels(1, 2, 3)) == []


def test_its_own_opposite_is_fixed_by_the_operator_that_demands_it() -> None:
    equations = with_variables(2)
    equations.equate(labels(1), labels(-1), "linear at a")
    assert solved(equations, 1, 2) == [0, 2]
    assert equations.why_pinned(labels(1)) == ["linear at a"]


def test_what_equals_a_fixed_scale_is_fixed() -> None:
    equations = with_variables(4)
    equations.equate(labels(1, 2), labels(2, 3), "add at a")
    equations.equate(labels(0), labels(-3), "add at b")
    assert solved(equations, 1, 2, 3, 4) == [0, 0, 0, 4]
    assert equations.why_pinned(labels(1)) == ["add at b"]


def test_rounds_add_up() -> None:
    equations = with_variables(4)
    equations.equate(labels(1), labels(-2), "a")
    assert equations.solve()
    equations.equate(labels(3), labels(-4), "b")
    assert equations.solve()
    equations.equate(labels(2), labels(3), "c")
    assert equations.solve()
    assert solved(equations, 1, 2, 3, 4) == [1, -1, -1, 1]
    equations.equate(labels(4), labels(1), "known already")
    assert not equations.solve()


def test_later_variables_join_earlier_ones() -> None:
    equations = with_variables(1)
    equations.equate(labels(1), labels(-1), "a")
    equations.solve()
    more = equations.new_variables(5000)  # More than there is room for at first.
    assert (int(more[0]), int(more[-1])) == (2, 5001)
    equations.equate(more[:1], more[-1:], "b")
    equations.require_positive(more[-1:])
    assert solved(equations, 1, 2, 5000, 5001) == [0, 2, 5000, 2]
    assert equations.is_positive(more[[0, 1]]).tolist() == [True, False]


# Reasons


def test_the_first_reason_given_counts_for_all_that_it_fixes() -> None:
    equations = with_variables(3)
    equations.equate(labels(1), labels(-2), "linear at a")
    equations.pin(labels(2), "softmax at b")
    equations.pin(labels(1, 3), "topk at c")
    assert solved(equations, 1, 2, 3) == [0, 0, 0]
    assert equations.why_pinned(labels(1)) == ["softmax at b"]
    assert equations.why_pinned(labels(-2)) == ["softmax at b"]
    assert equations.why_pinned(labels(3)) == ["topk at c"]


def test_reasons_come_in_order_of_how_many_they_fix() -> None:
    equations = with_variables(6)
    equations.pin(labels(1), "a")
    equations.pin(labels(2, 3, -4), "b")
    equations.solve()
    assert equations.why_pinned(labels(1, 2, 3, 4, 5)) == ["b", "a"]


def test_a_reason_does_not_change_later() -> None:
    equations = with_variables(2)
    equations.pin(labels(1), "a")
    equations.solve()
    equations.equate(labels(2), labels(1), "b")
    equations.solve()
    assert equations.why_pinned(labels(1)) == ["a"]
    assert equations.why_pinned(labels(2)) == ["b"]


def test_fixing_what_is_fixed_tells_nothing_new() -> None:
    equations = with_variables(2)
    equations.pin(labels(0), "nothing")
    assert not equations.solve()
    equations.pin(labels(1), "a")
    assert equations.solve()
    equations.pin(labels(-1, 0), "b")
    equations.equate(labels(1), labels(0), "c")
    assert not equations.solve()


# Positive scales


def test_a_demand_for_a_positive_scale_holds_for_all_that_equal_it() -> None:
    equations = with_variables(4)
    equations.require_positive(labels(-2))
    equations.equate(labels(1), labels(-2), "linear at a")
    equations.solve()
    assert equations.is_positive(labels(1, 2, 3, 4, -1)).tolist() == [
        True,
        True,
        False,
        False,
        True,
    ]
    equations.equate(labels(4), labels(2), "add at b")
    equations.solve()
    assert equations.is_positive(labels(3, 4)).tolist() == [False, True]


def test_a_fixed_scale_makes_no_other_positive() -> None:
    equations = with_variables(3)
    equations.require_positive(labels(0, 1))
    equations.pin(labels(1), "a")
    equations.solve()
    assert equations.is_positive(labels(2, 3)).tolist() == [False, False]


# Labels that repeat


def test_repeats_are_found_and_cost_one_row() -> None:
    written_out = labels(1, 2, 3).expand(4, 5, 3).contiguous()
    found = find_repeats(written_out)
    assert torch.equal(found, written_out)
    assert found.stride() == (0, 0, 1)
    assert squeeze_repeats(found).shape == (1, 1, 3)


def test_only_dimensions_that_do_not_vary_are_repeats() -> None:
    varies = torch.arange(6).reshape(2, 1, 3).expand(2, 4, 3).contiguous()
    found = find_repeats(varies)
    assert torch.equal(found, varies)
    assert squeeze_repeats(found).shape == (2, 1, 3)
    assert torch.equal(find_repeats(torch.arange(6)), torch.arange(6))


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 0), (1, 1)])
def test_labels_of_few_elements(shape: tuple[int, ...]) -> None:
    few = torch.ones(shape, dtype=torch.long)
    assert torch.equal(find_repeats(few), few)
    assert squeeze_repeats(few).dim() == few.dim()
    equations = with_variables(1)
    equations.equate(few, labels(0), "a")
    equations.pin(few, "b")
    assert equations.canonical(few).shape == shape


def test_canonical_labels_keep_their_repeats() -> None:
    equations = with_variables(3)
    equations.equate(labels(3), labels(-1), "a")
    equations.solve()
    found = equations.canonical(labels(1, 2, 3).expand(7, 3))
    assert torch.equal(found, labels(1, 2, -1).expand(7, 3))
    assert found.stride(0) == 0


def test_equations_hold_for_all_repeats() -> None:
    equations = with_variables(4)
    equations.equate(labels(1, 2).expand(6, 2), labels(3, 4).expand(6, 2).contiguous(), "a")
    assert solved(equations, 3, 4) == [1, 2]


def test_equations_broadcast() -> None:
    equations = with_variables(4)
    column = labels(1, 2)[:, None]
    first, second = broadcast(column, labels(3, 4))
    assert first.shape == second.shape == (2, 2)
    equations.equate(column, labels(3, 4), "a")  # Each of a column equals each of a row.
    assert solved(equations, 1, 2, 3, 4) == [1, 1, 1, 1]


def test_runs_of_a_sorted_vector() -> None:
    values, begins, counts = count_runs(labels(-1, -1, 0, 4, 4, 4))
    assert values.tolist() == [-1, 0, 4]
    assert begins.tolist() == [0, 2, 3]
    assert counts.tolist() == [2, 1, 3]
    assert [part.tolist() for part in count_runs(labels())] == [[], [], []]


# Against brute force


class Reference:
    """The same by exhaustive relabelling: each variable has a name and a sign."""

    def __init__(self, count: int) -> None:
        self.known = list(range(count + 1))

    def value(self, label: int) -> int:
        return self.known[abs(label)] * (1 if label > 0 else -1)

    def equate(self, first: int, second: int) -> None:
        a, b = self.value(first), self.value(second)
        if a == b:
            return
        if a == -b:
            self._replace(abs(a), 0)
        elif abs(a) > abs(b):
            self._replace(abs(a), b if a > 0 else -b)
        else:
            self._replace(abs(b), a if b > 0 else -a)

    def _replace(self, name: int, by: int) -> None:
        self.known = [by * (1 if v > 0 else -1) if abs(v) == name else v for v in self.known]


COUNT = 12
_label = st.integers(-COUNT, COUNT)
_step = st.one_of(
    st.tuples(st.just("equate"), st.lists(st.tuples(_label, _label), min_size=1, max_size=6)),
    st.tuples(st.just("pin"), st.lists(st.tuples(_label, _label), min_size=1, max_size=1)),
    st.tuples(st.just("solve"), st.just([(0, 0)])),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_step, max_size=12))
def test_solutions_are_those_of_brute_force(steps: list[tuple[str, list[tuple[int, int]]]]) -> None:
    equations, reference = with_variables(COUNT), Reference(COUNT)
    for kind, pairs in steps:
        first, second = (labels(*side) for side in zip(*pairs, strict=True))
        if kind == "solve":
            equations.solve()
        elif kind == "pin":
            equations.pin(first, "pinned")
            reference.equate(int(first), 0)
        else:
            equations.equate(first, second, "equated")
            for pair in pairs:
                reference.equate(*pair)
    everything = range(-COUNT, COUNT + 1)
    assert solved(equations, *everything) == [reference.value(v) for v in everything]
    assert not equations.solve()


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 400), st.integers(0, 2**31))
def test_a_long_chain_in_any_order_is_one_class(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    equations = with_variables(length)
    order = torch.randperm(length, generator=generator) + 1
    signs = torch.randint(0, 2, (length,), generator=generator) * 2 - 1
    chain = order * signs
    shuffled = torch.randperm(length - 1, generator=generator)
    equations.equate(chain[:-1][shuffled], chain[1:][shuffled], "a")
    equations.solve()
    values = equations.canonical(chain)
    assert (values == values[0]).all()
    assert int(values[0].abs()) == 1
