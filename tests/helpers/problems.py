"""Inner problems: of every task, and in double precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from benchmarks.paper.functions import FUNCTIONS
from teleport_optim.meta_training.tasks import TASKS as NETWORKS
from teleport_optim.meta_training.tasks import InnerProblem, Task
from teleport_optim.meta_training.tasks.splits import SPLITS
from teleport_optim.rng import generator_for


def in_float64(problem: InnerProblem) -> InnerProblem:
    """The same problem with double parameters and data, so that rounding does not grow over the steps."""

    def double(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    def sample_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs, targets = problem.sample_batch(generator)
        return double(inputs), double(targets)

    params = {name: value.double() for name, value in problem.params.items()}
    return dataclasses.replace(problem, model=problem.model.double(), params=params, sample_batch=sample_batch)


HORIZONS = (5, 50)
TASKS: dict[str, Task] = {**NETWORKS, **FUNCTIONS}
FUNCTION_TASKS, NETWORK_TASKS = list(FUNCTIONS), list(NETWORKS)
each_split = pytest.mark.parametrize("split", SPLITS)
each_function = pytest.mark.parametrize("name", FUNCTION_TASKS)


def draw_problem(name: str, split: str, seed: int, num_problems: int = 2) -> InnerProblem:
    return TASKS[name].sample(num_problems, HORIZONS, split, generator_for(split, seed))
