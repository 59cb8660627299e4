"""Inner problems: batches of small networks of one architecture, to be trained side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from teleport_optim.layout import Layout
from teleport_optim.symmetry import find_symmetries

__all__ = ["InnerProblem", "Task"]


@dataclass(frozen=True)
class InnerProblem:
    """``num_problems`` optimization problems that differ in data and initial values and share an architecture.

    Attributes:
        model: The architecture; its own values are not used.
        params: Initial parameters by name, each ``[num_problems, ...]``.
        loss: Output and target of one problem's minibatch to a scalar loss.
        sample_batch: Draws inputs and targets for all problems, each ``[num_problems, batch, ...]``.
        horizon: Number of steps of the training run.
        description: What was drawn, for logs.
    """

    model: nn.Module
    params: dict[str, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    sample_batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    horizon: int
    description: str

    @property
    def num_problems(self) -> int:
        """Number of problems in the batch."""
        return next(iter(self.params.values())).shape[0]

    @cached_property
    def layout(self) -> Layout:
        """Shapes and symmetries of one problem's parameters."""
        return Layout.of({name: param[0] for name, param in self.params.items()}, find_symmetries(self.model))


class Task(ABC):
    """A family of inner problems with a sampler over its own variety.

    A task is a class without state; everything that it draws comes from the generator it is given. The split
    ``"train"`` is for meta-training and ``"validation"`` for choosing checkpoints: they draw from disjoint data.
    """

    name: ClassVar[str]
    share: ClassVar[float] = 1.0
    """How often meta-training draws the task, relative to others."""

    @abstractmethod
    def sample(self, num_problems: int, max_horizon: int, split: str, generator: torch.Generator) -> InnerProblem:
        """Draw an architecture, ``num_problems`` data sets and initialisations, and a horizon up to ``max_horizon``."""
