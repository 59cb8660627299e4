"""Random choices from one generator, so that samplers read as a list of what they vary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from teleport_optim.meta_training.tasks.splits import check_split
from teleport_optim.rng import generator_for

__all__ = ["Draw"]

_Item = TypeVar("_Item")


class Draw:
    """Random choices of one task in one split.

    The stream is named by the task, by the split and by a number from ``source``: a generator that stands at the same
    place gives unrelated problems in different splits.

    Args:
        source: The generator that a task was given; it moves on by one number.
        task: Name of the task.
        split: Name of the split.

    Raises:
        ValueError: if there is no such split.

    Example:
        >>> draw = Draw(torch.Generator().manual_seed(0), "mine", "train")
        >>> draw.choice([16, 32]) in (16, 32), draw.horizon(10, 20) in range(10, 21)
        (True, True)
    """

    def __init__(self, source: torch.Generator, task: str, split: str) -> None:
        check_split(split)
        self.task, self.split = task, split
        self.generator = generator_for("task", task, split, int(torch.randint(2**62, (), generator=source)))

    def uniform(self, low: float, high: float) -> float:
        """A number from ``[low, high)``."""
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def log_uniform(self, low: float, high: float) -> float:
        """A positive number from ``[low, high)`` whose logarithm is uniform."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def integer(self, low: int, high: int) -> int:
        """An integer from ``low`` to ``high`` inclusive."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform(0.0, 1.0) < probability

    def choice(self, items: Sequence[_Item], weights: Sequence[float] | None = None) -> _Item:
        """One of ``items``, all equally likely without ``weights``."""
        shares = torch.tensor(weights or [1.0] * len(items))
        return items[int(torch.multinomial(shares, 1, generator=self.generator))]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator)

    def uniforms(self, *shape: int) -> Tensor:
        """Numbers from ``[-1, 1)``."""
        return 2.0 * torch.rand(shape, generator=self.generator) - 1.0

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers from 0 to ``high - 1``."""
        return torch.randint(high, shape, generator=self.generator)

    def horizon(self, shortest: int, longest: int) -> int:
        """A number of steps from ``shortest`` to ``longest`` inclusive, whose logarithm is uniform.

        Raises:
            ValueError: if the two are not in order, or not positive.
        """
        if not 1 <= shortest <= longest:
            raise ValueError(f"horizons must be a shortest and a longest number of steps, got {(shortest, longest)}")
        return min(int(self.log_uniform(shortest, longest + 1)), longest)
