"""One training loop, and the optimizers that the demo puts into it; comparisons use both, too."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from teleport_optim.controller.network import MetaOptimizer
from teleport_optim.learned import LearnedTeleportOptimizer

__all__ = ["Recipe", "Scheduled", "Stepper", "adamw", "cosine", "learned", "train"]


class Stepper(Protocol):
    """Optimizer, schedule included, as far as a training loop needs it."""

    def zero_grad(self) -> object:
        """Forget the gradients."""
        ...

    def step(self) -> object:
        """Take one step."""
        ...


Recipe = Callable[[nn.Module, int], Stepper]
"""Function of a model and the number of steps that returns an optimizer."""


def train(
    model: nn.Module,
    optimizer: Stepper,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> Iterator[float]:
    """Take one step for each minibatch; the caller measures what it likes in between.

    Args:
        model: Module that is trained.
        optimizer: Its optimizer.
        loss: Output and target to a loss.
        batches: Inputs and targets, one pair for each step; it may be endless.

    Yields:
        After every step, the seconds that it took: minibatch, forward, backward and optimizer.

    Example:
        >>> import torch
        >>> model, batch = nn.Linear(1, 1), (torch.ones(2, 1), torch.ones(2, 1))
        >>> steps = train(model, torch.optim.SGD(model.parameters(), lr=0.25), nn.functional.mse_loss, [batch] * 40)
        >>> len(list(steps)), model(torch.ones(1)).round(decimals=4).item()
        (40, 1.0)
    """
    start = time.perf_counter()
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        del inputs, targets  # else they would still be in memory while the next ones are drawn
        yield time.perf_counter() - start
        start = time.perf_counter()


class Scheduled:
    """Optimizers that step together, each with its schedule.

    Args:
        optimizers: The optimizers.
        factor: Step to the factor on their learning rates; None for constant ones.
    """

    def __init__(self, optimizers: Sequence[Optimizer], factor: Callable[[int], float] | None) -> None:
        self._optimizers = optimizers
        self._schedules = [LambdaLR(optimizer, factor) for optimizer in optimizers] if factor else []

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Take one step, then move the learning rates."""
        for optimizer in self._optimizers:
            optimizer.step()
        for schedule in self._schedules:
            schedule.step()


def cosine(steps: int) -> Callable[[int], float]:
    """Factor on the learning rate by step: 5 % linear warm-up, then a cosine to zero."""
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        progress = max(0, step - warmup) / max(1, steps - warmup)
        return min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))

    return factor


def adamw(lr: float, *, is_scheduled: bool = True) -> Recipe:
    """AdamW with torch's other defaults, along :func:`cosine` or at a constant learning rate."""
    return lambda model, steps: Scheduled(
        [AdamW(model.parameters(), lr=lr, fused=True)], cosine(steps) if is_scheduled else None
    )


def learned(
    checkpoint: str | Path | MetaOptimizer = "default",
    *,
    teleport: bool = True,
    horizon: bool = True,
    average: bool = True,
) -> Recipe:
    """The learned optimizer as a user would take it, with nothing tuned.

    Args:
        checkpoint: Shipped name, path, or weights.
        teleport: Whether it teleports.
        horizon: Whether it is told the length of the run.
        average: Whether it keeps an average of the iterates.
    """

    def recipe(model: nn.Module, steps: int) -> Stepper:
        return LearnedTeleportOptimizer(
            model.parameters(),
            model=model,
            total_steps=steps if horizon else None,
            checkpoint=checkpoint,
            teleport=teleport,
            average=average,
        )

    return recipe
