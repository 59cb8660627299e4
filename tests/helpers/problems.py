"""Inner problems in double precision."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from teleport_optim.meta_training import InnerProblem


def in_float64(problem: InnerProblem) -> InnerProblem:
    """The same problem with double parameters and data, so that rounding does not grow over the steps."""

    def double(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    def sample_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs, targets = problem.sample_batch(generator)
        return double(inputs), double(targets)

    params = {name: value.double() for name, value in problem.params.items()}
    return dataclasses.replace(problem, model=problem.model.double(), params=params, sample_batch=sample_batch)
