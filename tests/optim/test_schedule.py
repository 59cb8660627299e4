"""The schedule: rates and weights of the average, and a length of the run that changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.optim.schedule import Horizon, averaging_weight, prior_rate
from tests.helpers.averages import trained
from tests.helpers.classification import network, train
from tests.helpers.comparing import same_weights, weights_of
from tests.helpers.expected_warnings import OPEN_ENDED_SAVED
from tests.helpers.perceptrons import generator

pytestmark = OPEN_ENDED_SAVED


@pytest.mark.parametrize("total_steps", [1, 10, 300, 1200])
def test_prior_rate(total_steps: int) -> None:
    rates = [prior_rate(step, Horizon(total_steps), 4)[0] for step in range(total_steps + 3)]
    endless = [prior_rate(step, Horizon(), 4)[0] for step in range(1200)]
    assert rates[-1] == rates[total_steps - 1] > 0
    assert all(later <= earlier for earlier, later in pairwise(rates))
    assert endless[0] == pytest.approx(0.22 / 4**0.7)
    assert endless[80] == pytest.approx(0.11 / 4**0.7)
    assert prior_rate(0, Horizon(), 11) == prior_rate(0, Horizon(), 60) < prior_rate(0, Horizon(), 10)
    same = int(0.7 * total_steps)
    assert rates[:same] == endless[:same]
    assert rates[total_steps - 1] == pytest.approx(endless[total_steps - 1] * min(1.0, 1 / (0.3 * total_steps)))


@pytest.mark.parametrize("total_steps", [1, 2, 10, 300])
def test_the_average_ends_where_the_parameters_do(total_steps: int) -> None:
    horizon = Horizon(total_steps)
    kept = [1.0 - averaging_weight(step, horizon.steps_left(step)) for step in range(total_steps + 2)]
    assert all(0.0 <= share < 1.0 for share in kept)
    assert kept[0] == 0.0  # the point before the first step does not count
    assert kept[max(total_steps - 3, 0) :] == [0.0] * (min(total_steps, 3) + 2)


def test_iterates_are_averaged_with_the_sixth_power_of_their_number() -> None:
    """With rising factorials for powers, which makes the weights exact."""
    values, weights = torch.randn(40, generator=generator()).tolist(), [1.0]
    for step in range(1, 40):
        weights.append(weights[-1] * (step + 6) / step)
    average = 0.0
    for step, value in enumerate(values):
        average += averaging_weight(step) * (value - average)
    expected = sum(weight * value for weight, value in zip(weights, values)) / sum(weights)
    assert average == pytest.approx(expected)


# A length of the run that changes.


def rates(optimizer: LearnedTeleportOptimizer) -> float:
    return optimizer.stats().tensors["0.weight"].rate


def change_in_groups(optimizer: LearnedTeleportOptimizer, total_steps: int | None) -> None:
    for group in optimizer.param_groups:
        group["total_steps"] = total_steps


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(st.none(), st.integers(1, 300)),
    st.lists(st.tuples(st.integers(0, 400), st.one_of(st.none(), st.integers(1, 300))), max_size=4),
)
def test_no_change_of_the_horizon_makes_the_rate_jump(first: int | None, changes: list[tuple[int, int | None]]) -> None:
    horizon, step = Horizon(first), 0
    for until, left in [*sorted(changes, key=lambda change: change[0]), (400, None)]:
        levels = [horizon.annealing(number) for number in range(step, until + 1)]
        slope = max((abs(a - b) for a, b in pairwise(levels)), default=0.0)
        total = horizon.total_steps
        assert all(0.0 < level <= 1.0 for level in levels)
        if total is not None and until < total:
            assert slope <= max(1.0 / (0.3 * total), horizon.level / max(total - horizon.changed_at, 1)) + 1e-9
        step = until
        changed = horizon.changed(None if left is None else step + left, step)
        assert changed.annealing(step) == pytest.approx(horizon.annealing(step))
        horizon = changed


@pytest.mark.parametrize("change", [LearnedTeleportOptimizer.set_total_steps, change_in_groups])
@pytest.mark.parametrize(("first", "then"), [(50, 120), (None, 60), (100, 48), (100, None)])
def test_a_running_optimizer_takes_another_length(
    change: Callable[[LearnedTeleportOptimizer, int | None], None], first: int | None, then: int | None
) -> None:
    model, optimizer = trained(45, total_steps=first)
    before, average = rates(optimizer), optimizer.averaged_parameters()
    change(optimizer, then)
    assert same_weights(optimizer.averaged_parameters(), average)
    train(model, optimizer, 1)
    assert rates(optimizer) == pytest.approx(before, rel=0.35)
    if then is not None:
        train(model, optimizer, then - 46)
        assert same_weights(optimizer.averaged_parameters(), weights_of(model))
        assert rates(optimizer) < 0.5 * before


def test_a_change_is_in_the_state() -> None:
    model, optimizer = trained(45, total_steps=50)
    change_in_groups(optimizer, 120)
    other = network(seed=3)
    resumed = LearnedTeleportOptimizer.for_model(other, total_steps=50)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 20)
    train(other, resumed, 20)
    assert same_weights(weights_of(model), weights_of(other))


def test_a_run_can_be_finished() -> None:
    model, optimizer = trained(30)
    optimizer.finish_in(20)
    train(model, optimizer, 20)
    assert same_weights(optimizer.averaged_parameters(), weights_of(model))


@pytest.mark.parametrize("total_steps", [0, 12, -3, 1.5, True, "many"])
def test_lengths_that_cannot_be_are_refused(total_steps: object) -> None:
    _, optimizer = trained(12, total_steps=40)
    with pytest.raises(ValueError, match="total_steps"):
        optimizer.set_total_steps(total_steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="total_steps"):
        optimizer.finish_in(0)
    assert optimizer.param_groups[0]["total_steps"] == 40


def test_a_schedule_on_top_is_warned_about_once() -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=30)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    train(model, optimizer, 1)
    schedule.step()
    with pytest.warns(UserWarning, match="a scheduler multiplies with that. Leave the scheduler out"):
        train(model, optimizer, 1)
    schedule.step()
    train(model, optimizer, 1)


@pytest.mark.parametrize("total_steps", [30, None])
def test_a_constant_schedule_and_one_without_horizon_are_fine(total_steps: int | None) -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=total_steps)
    factor = 1.0 if total_steps else 0.99
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor**step)
    for _ in range(5):
        train(model, optimizer, 1)
        schedule.step()
