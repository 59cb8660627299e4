"""How much faster one run is than another, by steps and by lengths of runs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.comparison.training import horizon_speed, speed_up
from tests.helpers.evaluation import run_of

positive = st.floats(1e-3, 1e3)


@given(st.lists(positive, min_size=2, max_size=20), st.lists(positive, min_size=2, max_size=20))
def test_speed_ups_are_1_for_the_reference_and_bounded(losses: list[float], others: list[float]) -> None:
    size = min(len(losses), len(others))
    run, reference = run_of(losses[:size]), run_of(others[:size])
    assert speed_up(reference, reference) == 1.0
    value = speed_up(run, reference)
    assert 1.0 / run.steps[-1] <= value <= run.steps[-1]
    assert (value < 1.0) <= (run.losses[-1] > reference.losses[-1] or value < 1.0)
    if run.losses[-1] > reference.losses[-1]:
        assert value <= 1.0
    better = run_of([0.5 * loss for loss in run.losses])
    assert speed_up(better, reference) >= value


def test_a_lucky_dip_does_not_count() -> None:
    reference = run_of([5.0, 4.0, 3.0, 2.0, 1.0])
    assert speed_up(run_of([5.0, 0.9, 3.0, 0.9, 0.8]), reference) == pytest.approx(4 / 3)
    assert speed_up(run_of([5.0, 0.9, 0.8, 0.9, math.inf]), reference) == pytest.approx(1 / 40)


LENGTHS = (0.5, 1 / 1.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


def ends(*losses: float) -> Callable[[float], float]:
    """Final losses of runs of 2 T, 1.5 T, T, T/1.5, ..., T/4 steps."""
    return dict(zip(LENGTHS, losses, strict=True)).__getitem__


@given(st.lists(positive, min_size=5, max_size=5), positive)
def test_the_reference_is_as_fast_as_itself(shorter: list[float], final: float) -> None:
    """Where its shorter runs end higher, as they do but for noise; longer ones are not asked for."""
    losses = (math.nan, math.nan, final, *(final * (1.0 + 1e-6) + loss for loss in shorter))
    assert horizon_speed(ends(*losses), final) == 1.0


@given(st.floats(0.51, 3.99), st.floats(0.1, 3.0), positive)
def test_powers_of_the_length_are_interpolated_exactly(speed: float, power: float, target: float) -> None:
    """A loss that is a power of the length is a line in logarithms."""
    found = horizon_speed(lambda k: target * (k / speed) ** power, target)
    assert found == pytest.approx(speed, rel=1e-6)
    off_by_a_percent = horizon_speed(lambda k: target * (k / speed) ** power, 1.01 * target)
    assert off_by_a_percent > found * (1.0 + 1e-4)


def test_between_two_runs_both_scales_are_logarithmic() -> None:
    found = horizon_speed(ends(9.0, 9.0, 1.0, 1.0, 2.0, 8.0, 9.0, 9.0), 4.0)
    assert found == pytest.approx(math.sqrt(2.0 * 2.5))
    linear_in_the_loss = 2.0 * (2.5 / 2.0) ** (1 / 3)
    assert abs(found - linear_in_the_loss) > 0.05


def test_what_is_beyond_either_end_counts_as_the_end() -> None:
    assert horizon_speed(ends(*8 * [1.0]), 1.0) == 4.0
    assert horizon_speed(ends(*8 * [1.0]), 0.99) == 0.5
    assert 3.0 < horizon_speed(ends(*7 * [1.0], 1.1), 1.05) < 4.0
    assert 0.5 < horizon_speed(ends(0.9, *7 * [1.1]), 1.0) < 1 / 1.5
    assert horizon_speed(ends(*8 * [math.inf]), 1.0) == 0.5
    assert horizon_speed(ends(*3 * [0.5], *5 * [math.inf]), 1.0) == 1.0


def test_a_short_run_that_is_lucky_does_not_count() -> None:
    lucky = ends(9.0, 9.0, 1.0, 1.0, 2.0, 0.5, 0.5, 0.5)
    assert 1.5 <= horizon_speed(lucky, 1.5) < 2.0
    assert horizon_speed(ends(9.0, 9.0, 1.0, 1.0, 1.5, 0.5, 0.5, 0.5), 1.5) == 4.0


def test_no_run_is_made_that_cannot_matter() -> None:
    asked: set[float] = set()

    def final_loss(speed: float) -> float:
        asked.add(speed)
        return speed

    horizon_speed(final_loss, 1.7)
    assert asked == {1.0, 1.5, 2.0}
    asked.clear()
    horizon_speed(final_loss, 0.8)
    assert asked == {1.0, 1 / 1.5}
