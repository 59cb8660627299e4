"""What a run of meta-training costs."""

from __future__ import annotations

import dataclasses

import pytest

from teleport_optim.meta_training.config import PRESETS, Config
from teleport_optim.meta_training.cost import Cost, TaskCost, bytes_between_processes, mean_window, num_runs, total_cost
from teleport_optim.meta_training.run_folder import OuterStep, Session, core_minutes

pytestmark = pytest.mark.private_torch


def test_cost_of_a_run() -> None:
    """Ten outer steps of two batches of 24 runs over 50 steps, three validations on top of that of the untrained rule."""
    config = Config(
        tasks=("digits_mlp", "digits_cnn"),
        num_outer_steps=10,
        num_tasks=2,
        num_problems=2,
        num_pairs=6,
        min_horizon=50,
        max_horizon=50,
        validate_every=4,
        num_validation=3,
    )
    tasks = [
        TaskCost("digits_mlp", 0.75, 0.1, 0.010, 0.001, 1000),
        TaskCost("digits_cnn", 0.25, 0.5, 0.030, 0.002, 3000),
    ]
    cost = total_cost(config, tasks, 5000)
    assert num_runs(config) == 24
    assert cost == Cost(
        inner_steps=10 * 2 * 24 * 50,
        training_seconds=pytest.approx(10 * 2 * (50 * 0.015 + 0.2)),
        validation_seconds=pytest.approx(4 * 3 * 50 * 0.003),
        num_bytes=6000,
        num_parameters=5000,
        bytes_between_processes=24 * 12,
    )
    assert cost.seconds == cost.training_seconds + cost.validation_seconds
    once = total_cost(dataclasses.replace(config, validate_every=0), tasks, 5000)
    assert once.validation_seconds == pytest.approx(2 * 3 * 50 * 0.003)
    mixed = total_cost(Config(estimator="pes+tbptt", num_validation=0), tasks, 5000)
    assert mixed.validation_seconds == 0.0
    assert mixed.bytes_between_processes == bytes_between_processes(Config(), 0) + 8 * 5003


def test_the_cost_follows_the_curriculum() -> None:
    config = Config(min_horizon=40, max_horizon=400, num_outer_steps=100, curriculum=0.5)
    windows = [mean_window(config, step) for step in range(100)]
    assert windows[0] == 40.0
    assert windows == sorted(windows)
    assert windows[99] == pytest.approx((400 - 40) / 2.302585, rel=1e-2)
    assert mean_window(Config(estimator="pes", truncation=20), 0) == 20.0


def test_core_minutes_count_what_was_taken_again_once() -> None:
    log = [OuterStep(step, 0.0, 0.0, 0.0, 1, None, seconds=60.0) for step in (1, 2, 3)]
    sessions = [Session(0, 8, 2, "cpu"), Session(1, 3, 1, "cpu"), Session(1, 2, 4, "cuda")]
    assert core_minutes(log, sessions) == [16.0, 18.0, 20.0]
    assert core_minutes([], []) == []


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_have_a_cost(name: str) -> None:
    config = PRESETS[name]
    tasks = [TaskCost(task, 1 / len(config.tasks), 0.1, 0.01, 0.001, 1000) for task in config.tasks]
    assert total_cost(config, tasks, 5000).seconds > 0.0
