"""The demo: one network, trained by four optimizers from the same initial values on the same minibatches.

The network and its data take no part in meta-training. It is trained from two starts: the usual one, and one where every
hidden unit was multiplied by a random factor and what reads it divided by it. Both are the same function.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from teleport_optim.action import act
from teleport_optim.groups import GROUPS
from teleport_optim.meta_optimizer import MetaOptimizer
from teleport_optim.optimizer import LearnedTeleportOptimizer
from teleport_optim.symmetry import find_symmetries
from teleport_optim.tasks.data import digits

__all__ = [
    "LEARNING_RATES",
    "NUM_RUNS",
    "WIDTHS",
    "Contender",
    "Recipe",
    "TrainingRun",
    "adamw",
    "compare",
    "learned",
    "make_network",
    "plot",
    "prior",
    "run_training",
    "steps_to_target",
]

WIDTHS = (64, 128, 96, 128, 10)
"""Widths of the perceptron's layers. Meta-training's hidden layers have at most 64 units."""
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Where AdamW's learning rate is looked for."""
NUM_RUNS = len(LEARNING_RATES) + 3
"""Training runs of one comparison, for each seed."""

_BATCH_SIZE = 64
_NOISE = 0.5
"""Standard deviation of the noise on every minibatch's inputs, which keeps the training loss away from zero."""
_SMOOTHING = 0.95

Recipe = Callable[[nn.Module, int], tuple[Optimizer, LRScheduler | None]]
"""A model and the number of steps to an optimizer, and its schedule if it has one."""


@dataclass(frozen=True)
class TrainingRun:
    """What one training run gave.

    Attributes:
        losses: Minibatch loss before every step, ``[steps]``.
        teleport_sizes: RMS log-scale of every step's teleport, ``[steps]``; zeros for other optimizers.
        accuracy: Share of the test digits that are classified correctly at the end.
        milliseconds: Mean time of a whole training step: forward, backward and optimizer.
    """

    losses: Tensor
    teleport_sizes: Tensor
    accuracy: float
    milliseconds: float

    @property
    def final_loss(self) -> float:
        """Mean of the last 5 % of the losses; infinite if the run diverged."""
        last = self.losses[-max(1, len(self.losses) // 20) :]
        return float(last.mean().nan_to_num(nan=math.inf))

    @property
    def smoothed(self) -> Tensor:
        """Exponential moving average of the losses, ``[steps]``."""
        average, curve = self.losses[0], []
        for loss in self.losses:
            average = torch.lerp(loss, average, _SMOOTHING)
            curve.append(average)
        return torch.stack(curve)


@dataclass(frozen=True)
class Contender:
    """An optimizer under its name, and its runs, one for each seed."""

    name: str
    runs: tuple[TrainingRun, ...]

    def median(self, quantity: Callable[[TrainingRun], float]) -> float:
        """The median over seeds of a number."""
        return statistics.median(quantity(run) for run in self.runs)

    @property
    def final_loss(self) -> float:
        """Median over seeds of the final training loss."""
        return self.median(lambda run: run.final_loss)

    @property
    def curve(self) -> Tensor:
        """Median over seeds of the smoothed losses, ``[steps]``."""
        return torch.stack([run.smoothed for run in self.runs]).quantile(0.5, dim=0)


def steps_to_target(run: TrainingRun, reference: TrainingRun) -> float:
    """Steps after which ``run`` is as good as ``reference`` ever gets; infinite if it never is.

    Both curves are running minima of the smoothed losses, so that a lucky minibatch does not count.

    Example:
        >>> steps = torch.arange(100.0)
        >>> slow, fast = (TrainingRun(torch.exp(-rate * steps), steps, 1.0, 1.0) for rate in (0.01, 0.02))
        >>> steps_to_target(slow, slow), steps_to_target(fast, slow) < 70, steps_to_target(slow, fast)
        (100.0, True, inf)
    """
    reached = torch.nonzero(run.smoothed.nan_to_num(nan=math.inf) <= reference.smoothed.nan_to_num(nan=math.inf).min())
    return float(reached[0]) + 1.0 if len(reached) else math.inf


def adamw(lr: float, *, is_scheduled: bool = True) -> Recipe:
    """AdamW with torch's other defaults; the schedule is 5 % linear warmup, then a cosine to zero."""

    def recipe(model: nn.Module, steps: int) -> tuple[Optimizer, LRScheduler | None]:
        optimizer = AdamW(model.parameters(), lr=lr)
        warmup = max(1, steps // 20)

        def factor(step: int) -> float:
            progress = max(0, step - warmup) / max(1, steps - warmup)
            return min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * progress))

        return optimizer, LambdaLR(optimizer, factor) if is_scheduled else None

    return recipe


def prior() -> Recipe:
    """The update rule with nothing learned in it and no teleports."""

    def recipe(model: nn.Module, steps: int) -> tuple[Optimizer, LRScheduler | None]:
        options = {"checkpoint": MetaOptimizer(), "teleport": False}
        return LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=steps, **options), None

    return recipe


def learned(checkpoint: str | Path = "default") -> Recipe:
    """The learned optimizer as a user would take it, with nothing set."""

    def recipe(model: nn.Module, steps: int) -> tuple[Optimizer, LRScheduler | None]:
        return LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=steps, checkpoint=checkpoint), None

    return recipe


def make_network(seed: int, rescaling: float = 0.0) -> nn.Sequential:
    """A ReLU perceptron with torch's initial values.

    Args:
        seed: Decides the initial values; torch's global generator is left as it was.
        rescaling: Standard deviation of the log-factors by which hidden units are multiplied, without a change of the
            function.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for num_inputs, num_outputs in zip(WIDTHS, WIDTHS[1:]):
            layers += [nn.Linear(num_inputs, num_outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    if rescaling:
        generator = torch.Generator().manual_seed(seed)
        spec = find_symmetries(model).of_group("scaling")
        noise = {s.id: torch.randn(s.size, generator=generator, dtype=torch.float64) for s in spec}
        element = {site: GROUPS["scaling"].exp(rescaling * values) for site, values in noise.items()}
        model.load_state_dict(act(spec, element, model.state_dict()))
    return model


def run_training(
    model: nn.Module,
    recipe: Recipe,
    *,
    steps: int,
    seed: int,
    report: Callable[[float], None] = lambda loss: None,
) -> TrainingRun:
    """Train a copy of ``model`` on the demo's digits.

    Args:
        model: A classifier of inputs ``[batch, 64]``; it is not changed.
        recipe: The optimizer.
        steps: Length of the run.
        seed: Decides the minibatches and their noise, which are the same for every optimizer.
        report: Called with the loss after every step.
    """
    model = copy.deepcopy(model)
    optimizer, scheduler = recipe(model, steps)
    inputs, labels = digits("demo")
    generator = torch.Generator().manual_seed(seed)
    losses, sizes, seconds = [], [], 0.0
    for _ in range(steps):
        rows = torch.randint(len(inputs), (_BATCH_SIZE,), generator=generator)
        batch = inputs[rows] + _NOISE * torch.randn(_BATCH_SIZE, inputs.shape[1], generator=generator)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch), labels[rows])
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        seconds += time.perf_counter() - start
        losses.append(loss.item())
        sizes.append(optimizer.teleport_size if isinstance(optimizer, LearnedTeleportOptimizer) else 0.0)
        report(losses[-1])
    with torch.no_grad():
        test_inputs, test_labels = digits("test")
        accuracy = float((model(test_inputs).argmax(dim=1) == test_labels).double().mean())
    return TrainingRun(torch.tensor(losses), torch.tensor(sizes), accuracy, 1e3 * seconds / steps)


def compare(
    *,
    steps: int,
    num_seeds: int,
    rescaling: float = 0.0,
    checkpoint: str | Path = "default",
    report: Callable[[str, float], None] = lambda name, loss: None,
) -> tuple[Contender, ...]:
    """Train the network with every optimizer.

    AdamW's rate is the one of ``LEARNING_RATES`` with the lowest median of the final training loss, chosen on the very
    runs that are reported.

    Args:
        steps: Length of every run.
        num_seeds: Seeds, which decide initial values and minibatches.
        rescaling: See :func:`make_network`.
        checkpoint: What the learned optimizer loads.
        report: Called with the name of the optimizer and the loss after every step.

    Returns:
        AdamW as it comes, AdamW tuned, the unlearned prior, and the learned optimizer.
    """
    networks = [make_network(seed, rescaling) for seed in range(num_seeds)]

    def contender(name: str, recipe: Recipe) -> Contender:
        def report_loss(loss: float) -> None:
            report(name, loss)

        return Contender(
            name,
            tuple(
                run_training(network, recipe, steps=steps, seed=seed, report=report_loss)
                for seed, network in enumerate(networks)
            ),
        )

    default = contender("AdamW, default", adamw(1e-3, is_scheduled=False))
    swept = [contender(f"AdamW, tuned ({lr:g})", adamw(lr)) for lr in LEARNING_RATES]
    return (
        default,
        min(swept, key=lambda candidate: candidate.final_loss),
        contender("the rule, not learned", prior()),
        contender("learned, untuned", learned(checkpoint)),
    )


_COLOURS = ("#9aa0a6", "#1f5fbf", "#e08a1e", "#c2185b")


def plot(comparisons: Sequence[tuple[str, Sequence[Contender]]], path: str | Path) -> None:
    """Draw the loss curves of comparisons, each under its title, and below them the learned optimizer's teleports.

    Args:
        comparisons: Titles, each with what :func:`compare` gave.
        path: The picture to write; its suffix decides the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(comparisons), 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(comparisons), squeeze=False, sharex=True, sharey="row", height_ratios=(4, 1))
    for (title, contenders), (upper, lower) in zip(comparisons, axes.T):
        for contender, colour in zip(contenders, _COLOURS):
            is_last = contender is contenders[-1]
            upper.plot(contender.curve, color=colour, linewidth=2.4 if is_last else 1.6, label=contender.name)
        upper.set(yscale="log", title=title)
        upper.legend(frameon=False, fontsize=9)
        sizes = torch.stack([run.teleport_sizes for run in contenders[-1].runs]).quantile(0.5, dim=0)
        moments = torch.nonzero(sizes).flatten()
        lower.vlines(moments, 0, sizes[moments], color=_COLOURS[-1], linewidth=1.2)
        lower.set(xlabel="step", ylim=(0, None))
        for panel in (upper, lower):
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.25, linewidth=0.6)
    axes[0, 0].set_ylabel("training loss (smoothed)")
    axes[1, 0].set_ylabel("teleport\nRMS log s")
    figure.savefig(path, dpi=150)
