"""Training runs of a comparison, and the figures that are read from them."""

from __future__ import annotations

import copy
import math
import os
import statistics
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile

from benchmarks.comparison.task import EvaluationTask
from teleport_optim.cli.training import Recipe, Stepper, train
from teleport_optim.meta_training.tasks.data import Data, add_noise, minibatches

__all__ = [
    "FASTEST",
    "SLOWEST",
    "Run",
    "horizon_speed",
    "milliseconds_per_step",
    "peak_megabytes",
    "run_training",
    "speed_up",
]

_MAX_MEASURED = 512
"""Most examples on which a loss is measured during a run."""

_TAIL = 0.95
"""Share of a run after which the losses count for its final loss."""

_FASTER = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
_SLOWER = (1.0, 1 / 1.5, 1 / 2)
"""Length of the usual run over that of the runs from which a horizon speed is read."""

FASTEST, SLOWEST = _FASTER[-1], _SLOWER[-1]
"""Horizon speeds beyond these are not measured and count as these."""


class Run(NamedTuple):
    """Result of one training run.

    Attributes:
        steps: Steps taken at each measurement of the training loss, from 0 on.
        losses: The training loss there, on the same examples in all runs; infinite where it is not finite.
        held_out: The least loss on test examples that was seen on the way, at a tenth of the run each.
        setup_seconds: Time of the first step above that of a later one, as for a search for symmetries.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    held_out: float
    setup_seconds: float

    @property
    def final_loss(self) -> float:
        """Mean loss over the last twentieth of the run."""
        last = [loss for step, loss in zip(self.steps, self.losses) if step >= _TAIL * self.steps[-1]]
        return statistics.fmean(last)


def run_training(task: EvaluationTask, recipe: Recipe, *, steps: int, seed: int, only_end: bool = False) -> Run:
    """Train the network of a task once.

    Losses are of the parameters as they are, or, for an optimizer that has ``eval()`` and ``train()``, of what they are between
    these two.

    Args:
        task: Network and data.
        recipe: Makes the optimizer.
        steps: Length of the run.
        seed: Decides the initial values and the minibatches, which are the same for every optimizer.
        only_end: Measure nothing but what the final loss needs, which is faster and does not change the training.
    """
    data = task.make_data()
    model = task.make_model(seed)
    optimizer = recipe(model, steps)
    fixed = torch.Generator().manual_seed(2**32)
    rows = torch.randperm(len(data.inputs), generator=fixed)[:_MAX_MEASURED]
    measured = (add_noise(data.inputs[rows], data.noise, fixed), data.targets[rows])
    every = max(1, steps // 80)
    seconds: list[float] = []
    marks: list[int] = []
    losses: list[float] = []
    held_out = math.inf

    def measure(step: int) -> None:
        nonlocal held_out
        if only_end and step < _TAIL * steps:
            return
        if step % every == 0 or step == steps:
            marks.append(step)
            losses.append(_loss(model, optimizer, data, *measured, training=True))
        if step > 0 and step % max(1, steps // 10) == 0:
            held_out = min(held_out, _loss(model, optimizer, data, data.test_inputs, data.test_targets, training=False))

    measure(0)
    batches = minibatches(data, task.batch_size, torch.Generator().manual_seed(seed))
    for step, spent in zip(range(1, steps + 1), train(model, optimizer, data.loss, batches)):
        seconds.append(spent)
        measure(step)
    setup = max(0.0, seconds[0] - statistics.median(seconds))
    return Run(tuple(marks), tuple(losses), held_out, setup)


def milliseconds_per_step(
    task: EvaluationTask, recipes: Mapping[str, Recipe], *, steps: int, repeats: int = 2
) -> dict[str, float]:
    """Time a whole training step (minibatch, forward, backward, optimizer) of every recipe; recipes take turns step by step.

    Every step counts with the least time that it took in ``repeats`` runs, so that a busy machine does not. The result is the
    mean over all steps of a run but the first, so that rare work of the optimizer counts.
    """
    data = task.make_data()
    seconds: dict[str, list[list[float]]] = {name: [] for name in recipes}
    for _ in range(repeats):
        models = {name: task.make_model(0) for name in recipes}
        optimizers = {name: recipe(models[name], steps) for name, recipe in recipes.items()}
        batches = minibatches(data, task.batch_size, torch.Generator().manual_seed(0))
        loops = {name: train(models[name], optimizers[name], data.loss, batches) for name in recipes}
        for own in seconds.values():
            own.append([])
        for _ in range(steps):
            for name, loop in loops.items():
                seconds[name][-1].append(next(loop))
    return {name: 1e3 * statistics.fmean(map(min, list(zip(*own))[1:])) for name, own in seconds.items()}


def peak_megabytes(task: EvaluationTask, recipe: Recipe, *, steps: int) -> float:
    """Measure the most memory that a training step takes beside the parameters: activations, gradients, state, all of torch's.

    The second and the third step are measured, so that setting up does not count.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # Without a GPU the profiler says so on every use.
    data, model = task.make_data(), task.make_model(0)
    batches = minibatches(data, task.batch_size, torch.Generator().manual_seed(0))
    with profile(profile_memory=True) as first:
        loop = train(model, recipe(model, steps), data.loss, batches)
        next(loop)
    with profile(profile_memory=True) as later:
        next(loop)
        next(loop)
    return (sum(_allocations(first)) + max(accumulate(_allocations(later)))) / 1e6


def _allocations(profiler: profile) -> list[int]:
    """Bytes that were allocated, or, negative, freed, one after the other."""
    results: Any = profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def horizon_speed(final_loss: Callable[[float], float], target: float) -> float:
    """Estimate how many times shorter than the reference's a run may be that ends where the reference does.

    Runs of 1/1.5, 1/2, 1/2.5, 1/3 and 1/4 of the length are tried, each told its length, as long as they end at the target or
    below it, so that a short run that is lucky after a longer one that was not does not count. Where the run of full length
    misses the target, runs of 1.5 and 2 times the length are tried. Between the last run that gets there and its neighbour that
    does not, the logarithm of the length is interpolated linearly in that of the loss. No run is asked for that cannot matter.

    Args:
        final_loss: Speed to the final loss of a run whose length is the reference's divided by it.
        target: Final loss of the reference.

    Returns:
        The speed; 4 if a quarter of the length is enough, and 1/2 if twice the length is not.

    Example:
        >>> horizon_speed(lambda speed: speed, 2.25), horizon_speed(lambda speed: speed, 0.6)
        (2.25, 0.6)
        >>> horizon_speed(lambda speed: 0.1, 1.0), horizon_speed(lambda speed: 3.0, 1.0)
        (4.0, 0.5)
    """
    if final_loss(1.0) <= target:
        for reached, missed in pairwise(_FASTER):
            if not final_loss(missed) <= target:
                return _between(reached, missed, final_loss, target)
        return FASTEST
    for missed, reached in pairwise(_SLOWER):
        if final_loss(reached) <= target:
            return _between(reached, missed, final_loss, target)
    return SLOWEST


def _between(reached: float, missed: float, final_loss: Callable[[float], float], target: float) -> float:
    """Interpolate the speed at which the loss would be the target."""
    low, middle, high = (math.log(max(loss, 1e-12)) for loss in (final_loss(reached), target, final_loss(missed)))
    share = (middle - low) / (high - low) if high > low else 0.0
    return float(reached * (missed / reached) ** share)


def speed_up(run: Run, reference: Run) -> float:
    """Count how many times fewer steps ``run`` takes than ``reference`` to the final loss of ``reference``.

    The steps counted are those after which the loss stays at the target or below it, so that a lucky dip does not count; the
    reference against itself gives 1. Where ``run`` never gets there it is the share of its steps that the reference takes
    to the final loss of ``run``.

    Example:
        >>> slow = Run((0, 10, 20, 30, 40), (5.0, 4.0, 3.0, 2.0, 1.0), 1.0, 0.0)
        >>> fast = Run((0, 10, 20, 30, 40), (5.0, 1.5, 1.0, 0.5, 0.4), 1.0, 0.0)
        >>> speed_up(fast, slow), speed_up(slow, fast), speed_up(slow, slow)
        (2.0, 0.5, 1.0)
    """
    own, others = _steps_to(run, reference.losses[-1]), _steps_to(reference, reference.losses[-1])
    if math.isfinite(own):
        return max(others, 1) / max(own, 1)
    return max(_steps_to(reference, run.losses[-1]), 1) / run.steps[-1]


def _steps_to(run: Run, target: float) -> float:
    reached = math.inf
    for step, loss in zip(reversed(run.steps), reversed(run.losses)):
        if not loss <= target:
            break
        reached = step
    return reached


@torch.no_grad()
def _loss(
    model: nn.Module, optimizer: Stepper, data: Data, inputs: Tensor, targets: Tensor, *, training: bool
) -> float:
    """Mean loss; buffers stay as they are."""
    if hasattr(optimizer, "eval"):  # Schedule-Free keeps other weights for evaluation.
        optimizer.eval()
    buffers = copy.deepcopy(dict(model.named_buffers()))
    model.train(training)
    loss = data.loss(model(inputs), targets).item()
    model.train()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    if hasattr(optimizer, "train"):
        optimizer.train()
    return loss if math.isfinite(loss) else math.inf
