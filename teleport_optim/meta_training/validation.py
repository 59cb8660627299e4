"""Validation: final losses on fixed problems, relative to those of the untrained rule."""

from __future__ import annotations

import math
from functools import cached_property, partial

import torch
from torch import Tensor

from teleport_optim.meta_training.config import Config
from teleport_optim.meta_training.estimators import meta_loss
from teleport_optim.meta_training.process_group import ProcessGroup
from teleport_optim.meta_training.rules import Rule
from teleport_optim.meta_training.sampling import draw_problem
from teleport_optim.meta_training.tasks import InnerProblem
from teleport_optim.meta_training.unroll import init_unroll, unroll
from teleport_optim.rng import generator_for

__all__ = ["Validation"]


class Validation:
    """Comparison of weights with the untrained ones on problems that depend on neither seed nor state of the training.

    Problems are drawn, and untrained weights are run, when they are needed first.

    Args:
        config: The run.
        rule: The rule whose weights are compared.
        untrained: Its untrained weights, ``[num_parameters]``.
        group: The processes that share the work.
    """

    def __init__(self, config: Config, rule: Rule, untrained: Tensor, group: ProcessGroup) -> None:
        self._config, self._rule, self._untrained, self._group = config, rule, untrained, group

    def __call__(self, flat: Tensor) -> float:
        """Final losses with weights ``flat`` relative to those with the untrained ones, geometric mean; 1 without problems."""
        if not self._config.num_validation:
            return 1.0
        return math.exp(float((self._losses(flat) - self._baseline).mean()))

    @cached_property
    def _problems(self) -> list[tuple[int, InnerProblem]]:
        """The problems that fall to this process, with their numbers."""
        numbers = range(self._config.num_validation)
        names = [(task, number) for task in self._config.tasks for number in numbers]
        return [
            (index, draw_problem(self._config, task, "validation", task, number))
            for index, (task, number) in enumerate(names)
            if index in self._group.local_range(len(names))
        ]

    @cached_property
    def _baseline(self) -> Tensor:
        return self._losses(self._untrained)

    def _losses(self, flat: Tensor) -> Tensor:
        """Log of the final loss relative to the first one, of every problem: ``[num_problems]``."""
        values = torch.zeros(len(self._config.tasks) * self._config.num_validation, dtype=torch.float64)
        for index, problem in self._problems:
            batches = partial(generator_for, "validation", index)
            weights = self._rule.unflatten(flat.expand(problem.num_problems, -1))
            with torch.no_grad():
                runs = init_unroll(self._rule, problem, 1)
                result = unroll(self._rule, weights, problem, runs, problem.horizon, batches)
            values[index] = float(meta_loss(problem, result).mean())
        return self._group.sum(values)
