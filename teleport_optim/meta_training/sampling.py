"""Problems of a configuration: drawn by name, and checked before any work is done."""

from __future__ import annotations

import torch

from teleport_optim.meta_training.config import Config
from teleport_optim.meta_training.rules import Rule
from teleport_optim.meta_training.tasks import InnerProblem, find_task
from teleport_optim.rng import generator_for

__all__ = ["check_tasks", "draw_problem"]


def draw_problem(config: Config, task: str, split: str, *keys: int | str, horizon: int | None = None) -> InnerProblem:
    """Draw a problem batch of a task; equal names give equal problems.

    Args:
        config: The run. Its seed is part of the name, except for validation, which is the same for all seeds.
        task: Name or import path of the task.
        split: As for :meth:`Task.sample`.
        keys: The rest of the name.
        horizon: Length of the training run; the longest of the configuration by default.

    Raises:
        ValueError: if the task draws another number of problems or another horizon than it is asked for.
    """
    horizons = (horizon or config.max_horizon,) * 2
    seed = () if split == "validation" else (config.seed,)
    problem = find_task(task).sample(
        config.num_problems, horizons, split, generator_for("problem", split, *seed, *keys)
    )
    if problem.num_problems != config.num_problems:
        raise ValueError(
            f"the task {task} was asked for {config.num_problems} problems and drew {problem.num_problems}: "
            f"the first axis of its params must be as long as asked for"
        )
    if problem.horizon != horizons[0]:
        raise ValueError(
            f"the task {task} was asked for a horizon from {horizons[0]} to {horizons[1]} steps and drew "
            f"{problem.horizon}: draw it between the two"
        )
    return problem.to(config.device)


def check_tasks(config: Config, rule: Rule) -> None:
    """Draw one problem batch of every task, and refuse those that cannot be trained.

    Raises:
        ValueError: if the rule cannot train a task, or its loss is not one finite number at the initial parameters.
    """
    for index, task in enumerate(config.tasks):
        problem = draw_problem(config, task, "train", "check", index)
        rule.check(problem)
        inputs, targets = problem.sample_batch(generator_for("check", task))
        with torch.no_grad():
            losses = problem.losses(problem.params, inputs, targets)
        if losses.shape != (problem.num_problems,):
            raise ValueError(
                f"the loss of the task {task} has the shape {list(losses.shape[1:])} for one problem: it must be a single "
                f"number"
            )
        if not bool(torch.isfinite(losses).all()):
            raise ValueError(
                f"the loss of the task {task} is {losses.tolist()} at the initial parameters: it must be finite there"
            )
