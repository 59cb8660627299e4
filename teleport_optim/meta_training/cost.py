"""Cost of a meta-training run: a few inner steps of every task are measured, and scaled to the whole run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from teleport_optim.meta_training.config import Config, log_uniform_horizon
from teleport_optim.meta_training.episodes import Episode
from teleport_optim.meta_training.learner import Learner
from teleport_optim.meta_training.sampling import draw_problem
from teleport_optim.meta_training.tasks import find_task
from teleport_optim.meta_training.unroll import Runs, init_unroll, unroll
from teleport_optim.rng import generator_for

__all__ = [
    "Cost",
    "TaskCost",
    "bytes_between_processes",
    "mean_window",
    "measure_task",
    "num_runs",
    "total_cost",
]

_FEWEST_STEPS, _MOST_STEPS = 5, 20
_NUM_QUANTILES = 200
_MAX_DRAWS = 4


class TaskCost(NamedTuple):
    """Cost of the problem batches of one task, on average over a few draws."""

    task: str
    share: float
    """Share of the problem batches that are of this task."""
    seconds_per_draw: float
    """Drawing a batch of problems."""
    seconds_per_step: float
    """One inner step of all runs of a batch."""
    seconds_per_validation_step: float
    """One inner step of a batch under one set of weights."""
    num_bytes: int
    """Parameters and state of all runs of a batch; the most seen."""


class Cost(NamedTuple):
    """Cost of a whole run in one process."""

    inner_steps: float
    """Expected number of optimizer steps of single networks in training."""
    training_seconds: float
    validation_seconds: float
    num_bytes: int
    """Parameters and state of all runs that are kept at one time, at most."""
    num_parameters: int
    """Meta-parameters."""
    bytes_between_processes: int
    """Sent by each process in one outer step."""

    @property
    def seconds(self) -> float:
        """Training and validations."""
        return self.training_seconds + self.validation_seconds


def num_runs(config: Config) -> int:
    """Training runs of one problem batch: candidates times problems.

    Example:
        >>> num_runs(Config(estimator="es", num_pairs=12, num_problems=2))
        48
    """
    perturbed = 0 if config.estimator.startswith("tbptt") else 2 * config.num_pairs
    return (perturbed + ("tbptt" in config.estimator)) * config.num_problems


def mean_window(config: Config, outer_step: int) -> float:
    """Expected steps that a training run takes in an outer step, the curriculum at ``outer_step`` being that of its start.

    Example:
        >>> mean_window(Config(min_horizon=40, max_horizon=40), 0)
        40.0
        >>> mean_window(Config(min_horizon=40, max_horizon=40, estimator="pes", truncation=15), 0)
        13.333333333333334
    """
    truncation = config.max_horizon if config.estimator == "es" else config.truncation
    return _mean_window(config.min_horizon, config.longest_horizon(outer_step), truncation)


@cache
def _mean_window(shortest: int, longest: int, truncation: int) -> float:
    """Mean of log-uniform horizons over the mean number of windows that they take."""
    quantiles = [(index + 0.5) / _NUM_QUANTILES for index in range(_NUM_QUANTILES)]
    horizons = [log_uniform_horizon(shortest, longest, quantile) for quantile in quantiles]
    return sum(horizons) / sum(math.ceil(horizon / truncation) for horizon in horizons)


def bytes_between_processes(config: Config, num_parameters: int) -> int:
    """Bytes that every process sends in one outer step: three numbers per pair, or the whole gradient, in float64.

    Example:
        >>> bytes_between_processes(Config(estimator="es", num_tasks=4, num_pairs=12), 5000)
        1152
        >>> bytes_between_processes(Config(estimator="tbptt"), 5000)
        40024
    """
    pairs = 0 if config.estimator.startswith("tbptt") else 24 * config.num_tasks * config.num_pairs
    return pairs + (8 * (num_parameters + 3) if "tbptt" in config.estimator else 0)


def total_cost(config: Config, tasks: Sequence[TaskCost], num_parameters: int) -> Cost:
    """The cost of a run from that of its tasks."""
    steps = sum(mean_window(config, step) for step in range(config.num_outer_steps))
    mean_seconds = sum(task.share * task.seconds_per_step for task in tasks)
    mean_draw = sum(task.share * task.seconds_per_draw for task in tasks)
    num_episodes = steps / statistics.fmean(
        _mean_window(config.min_horizon, config.longest_horizon(step), config.max_horizon)
        for step in range(config.num_outer_steps)
    )
    return Cost(
        inner_steps=steps * config.num_tasks * num_runs(config),
        training_seconds=config.num_tasks * (steps * mean_seconds + num_episodes * mean_draw),
        validation_seconds=_num_validations(config)
        * config.num_validation
        * config.max_horizon
        * sum(task.seconds_per_validation_step for task in tasks),
        num_bytes=config.num_tasks * max(task.num_bytes for task in tasks),
        num_parameters=num_parameters,
        bytes_between_processes=bytes_between_processes(config, num_parameters),
    )


def _num_validations(config: Config) -> int:
    """Validations of a run, that of the untrained rule included."""
    return (math.ceil(config.num_outer_steps / config.validate_every) if config.validate_every else 1) + 1


def measure_task(learner: Learner, task: str, seconds: float = 0.5) -> TaskCost:
    """Draw a few problem batches of a task and take some inner steps of each, for about so many seconds."""
    config = learner.config
    *_, first, _ = _measure(learner, task, 0, 1)
    num_steps = max(_FEWEST_STEPS, min(_MOST_STEPS, int(seconds / first)))
    start = time.perf_counter()
    measured: list[tuple[float, float, float, int]] = []
    while len(measured) < _MAX_DRAWS and (not measured or time.perf_counter() - start < seconds):
        measured.append(_measure(learner, task, len(measured), num_steps))
    draws, validation_steps, steps, num_bytes = zip(*measured)
    shares = [find_task(name).share for name in config.tasks]
    return TaskCost(
        task,
        find_task(task).share / sum(shares),
        statistics.fmean(draws),
        statistics.fmean(steps),
        statistics.fmean(validation_steps),
        max(num_bytes),
    )


def _measure(learner: Learner, task: str, number: int, num_steps: int) -> tuple[float, float, float, int]:
    """For one problem batch: seconds to draw it, per step of a validation, and per step; bytes of its runs."""
    draw = partial(draw_problem, learner.config, task, "train", "cost", number, horizon=num_steps)
    batches = partial(generator_for, "cost batch", number)
    episode = Episode(0, number, num_steps, draw, batches)
    start = time.perf_counter()
    problem = episode.problem
    assert problem.table.names  # Finding the symmetries is a part of drawing.
    drawn = time.perf_counter()
    weights = learner.rule.unflatten(learner.untrained.expand(problem.num_problems, -1))
    with torch.no_grad():
        result = unroll(learner.rule, weights, problem, init_unroll(learner.rule, problem, 1), num_steps, batches)
    float(result.losses.sum())  # Waits for the device.
    validated = time.perf_counter()
    length = learner.estimator.window_length(episode)
    learner.estimator.estimate(learner.theta.detach(), [episode], 0)
    done = time.perf_counter()
    return (
        drawn - start,
        (validated - drawn) / num_steps,
        (done - validated) / length,
        sum(_num_bytes(runs) for runs in episode.runs.values()),
    )


def _num_bytes(runs: Runs) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(runs) if isinstance(leaf, Tensor))
