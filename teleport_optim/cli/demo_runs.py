"""Training runs of the demo: one network, trained by four optimizers from the same initial values on the same minibatches.

The network and its data take no part in meta-training. It is trained from two starts: the usual one, and one where
every hidden unit was multiplied by a random factor and what reads it divided by it. Both are the same function.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from teleport_optim.cli.training import Recipe, adamw, learned, train
from teleport_optim.controller.network import MetaOptimizer
from teleport_optim.meta_training.tasks.data import Data, add_noise, digits, minibatches
from teleport_optim.meta_training.tasks.networks import perceptron, rescale, seeded

__all__ = [
    "LEARNING_RATES",
    "NUM_RUNS",
    "WIDTHS",
    "Contender",
    "TrainingRun",
    "compare",
    "demo_data",
    "make_network",
    "run_training",
    "steps_to_target",
]

WIDTHS = (64, 128, 96, 128, 10)
"""Widths of the perceptron's layers. Meta-training's hidden layers have at most 56 units."""
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Learning rates that are tried for AdamW."""
NUM_RUNS = len(LEARNING_RATES) + 3
"""Training runs of one comparison, for each seed."""

_BATCH_SIZE = 64
_MEASURE_EVERY = 5


@dataclass(frozen=True)
class TrainingRun:
    """Result of one training run.

    Attributes:
        steps: Steps taken at each measurement of the loss, increasing.
        losses: Training loss there; infinite where it has diverged.
        teleport_sizes: RMS log-scale of every step's teleport; zeros for other optimizers.
        accuracy: Share of the test examples that are classified correctly at the end; NaN for regression.
        milliseconds: Mean time of a whole training step: minibatch, forward, backward and optimizer.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    teleport_sizes: tuple[float, ...]
    accuracy: float
    milliseconds: float


def demo_data() -> Data:
    """Digits that no meta-training sees; noise on every minibatch keeps the training loss away from zero."""
    return Data(*digits("demo"), *digits("test"), noise=0.5)


@dataclass(frozen=True)
class Contender:
    """Name of an optimizer, and its runs, one for each seed."""

    name: str
    runs: tuple[TrainingRun, ...]
    is_reference: bool = False
    """Whether it is the one that others are measured against."""

    def median(self, quantity: Callable[[TrainingRun], float]) -> float:
        """Median of a number over seeds."""
        return statistics.median(quantity(run) for run in self.runs)

    @property
    def final_loss(self) -> float:
        """Median over seeds of the final training loss."""
        return self.median(lambda run: run.losses[-1])

    @property
    def curve(self) -> list[float]:
        """Median over seeds of the losses."""
        return [statistics.median(losses) for losses in zip(*(run.losses for run in self.runs))]


def steps_to_target(run: TrainingRun, target: float) -> float:
    """Steps after which the loss of ``run`` was first seen at ``target`` or below; infinite if it never was.

    Example:
        >>> run = TrainingRun((5, 10, 15), (1.0, 0.5, 0.3), (), accuracy=1.0, milliseconds=1.0)
        >>> steps_to_target(run, 0.5), steps_to_target(run, 0.1)
        (10, inf)
    """
    return next((step for step, loss in zip(run.steps, run.losses) if loss <= target), math.inf)


def make_network(seed: int, rescaling: float = 0.0) -> nn.Sequential:
    """Make a ReLU perceptron with torch's initial values.

    Args:
        seed: Decides the initial values; torch's global generator is left as it was.
        rescaling: Standard deviation of the log-factors by which hidden units are multiplied, without a change of the
            function.
    """
    model = seeded(partial(perceptron, WIDTHS, nn.ReLU))(seed)
    if rescaling:
        rescale(model, torch.zeros(2, WIDTHS[0]), rescaling, seed)
    return model


def run_training(
    model: nn.Module,
    recipe: Recipe,
    data: Data,
    *,
    steps: int,
    seed: int,
    report: Callable[[float], None] = lambda loss: None,
) -> TrainingRun:
    """Train a copy of ``model``.

    The training loss is measured every few steps on all examples trained on, with noise that is the same in all runs and
    is no minibatch's.

    Args:
        model: Initial network; it is not changed.
        recipe: Makes the optimizer.
        data: Examples.
        steps: Length of the run.
        seed: Decides the minibatches and their noise, which are the same for every optimizer.
        report: Called after every step with the training loss last measured.
    """
    model = copy.deepcopy(model)
    optimizer = recipe(model, steps)
    measured_inputs = add_noise(data.inputs, data.noise, torch.Generator().manual_seed(2**32))
    batches = minibatches(data, _BATCH_SIZE, torch.Generator().manual_seed(seed))
    measured, losses, sizes, seconds = [0], [_loss(model, measured_inputs, data)], [], 0.0
    for step, spent in zip(range(1, steps + 1), train(model, optimizer, data.loss, batches)):
        seconds += spent
        sizes.append(getattr(optimizer, "teleport_size", 0.0))
        if step % _MEASURE_EVERY == 0 or step == steps:
            measured.append(step)
            losses.append(_loss(model, measured_inputs, data))
        report(losses[-1])
    return TrainingRun(tuple(measured), tuple(losses), tuple(sizes), _accuracy(model, data), 1e3 * seconds / steps)


@torch.no_grad()
def _loss(model: nn.Module, inputs: Tensor, data: Data) -> float:
    loss = data.loss(model(inputs), data.targets).item()
    return loss if math.isfinite(loss) else math.inf


@torch.no_grad()
def _accuracy(model: nn.Module, data: Data) -> float:
    if data.test_targets.is_floating_point():
        return math.nan
    model.eval()
    return float((model(data.test_inputs).argmax(dim=1) == data.test_targets).double().mean())


def compare(
    networks: Sequence[nn.Module],
    data: Data,
    *,
    steps: int,
    checkpoint: str | Path = "default",
    report: Callable[[str, float], None] = lambda name, loss: None,
) -> tuple[Contender, ...]:
    """Train networks with every optimizer.

    AdamW's learning rate is the one of ``LEARNING_RATES`` with the lowest median of the final training loss, chosen on the very
    runs that are reported.

    Args:
        networks: Initial networks, one for each seed; the position in the list is the seed of the minibatches.
        data: Examples.
        steps: Length of every run.
        checkpoint: Weights of the learned optimizer: shipped name, path, or hf:// address.
        report: Called after every step with the name of the optimizer and the training loss last measured.

    Returns:
        Default AdamW, AdamW tuned, the rule with nothing learned, and the learned optimizer.
    """

    def contender(name: str, recipe: Recipe, *, is_reference: bool = False) -> Contender:
        def report_loss(loss: float) -> None:
            report(name, loss)

        return Contender(
            name,
            tuple(
                run_training(network, recipe, data, steps=steps, seed=seed, report=report_loss)
                for seed, network in enumerate(networks)
            ),
            is_reference,
        )

    default = contender("AdamW default", adamw(1e-3, is_scheduled=False))
    swept = [contender(f"AdamW tuned ({lr:g})", adamw(lr), is_reference=True) for lr in LEARNING_RATES]
    return (
        default,
        min(swept, key=lambda candidate: candidate.final_loss),
        contender("prior, not learned", learned(MetaOptimizer(), teleport=False)),
        contender("learned, untuned", learned(checkpoint)),
    )
