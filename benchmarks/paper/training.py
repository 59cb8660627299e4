"""Meta-training in the settings of the paper: several meta-seeds side by side, and trained weights kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.paper.functions import FunctionProblem, FunctionTask, task_path
from benchmarks.paper.rules import VARIANTS, PaperRule
from teleport_optim.controller.checkpoints import write_atomically
from teleport_optim.meta_training import Config, InnerProblem, Learner, ProcessGroup, find_task
from teleport_optim.meta_training.estimators import meta_loss, step_weights
from teleport_optim.meta_training.rules import Rule, Tensors
from teleport_optim.meta_training.sampling import draw_problem
from teleport_optim.meta_training.unroll import Runs, init_unroll, unroll
from teleport_optim.rng import generator_for

__all__ = ["PAPER", "SCHEDULE", "PaperConfig", "family_of", "join_problems", "learner_of", "rule_of", "train", "window"]

SCHEDULE = (2, 5, 8, 11, 14, 17)
"""The paper's set Z: the steps after which a teleport follows, counted from 0."""


@dataclass(frozen=True)
class PaperConfig(Config):
    """Configuration of a meta-training of one of the paper's rules.

    Raises:
        ValueError: as ``Config``, and for an unknown variant.
    """

    variant: str = "update"
    """One of ``VARIANTS``."""
    theta_gradient: bool = False
    """Give the network the derivative of the squared gradient norm along the orbit as an input."""
    teleport_steps: tuple[int, ...] = ()
    """The set Z of steps after which a teleport follows; empty for every step."""
    distance_weight: float = 0.0
    """Weight of the distance to the optimum in the meta-loss of every step; for truncated backpropagation only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"unknown variant {self.variant!r}: there are {', '.join(VARIANTS)}")


PAPER = PaperConfig(
    variant="update",
    estimator="tbptt_first_order",
    objective="plain",
    tasks=(task_path("ellipse_fixed"),),
    num_outer_steps=2500,
    num_tasks=1,
    num_problems=1,
    min_horizon=21,
    max_horizon=21,
    truncation=5,
    learning_rate=4e-4,
    decay_to=1.0,
    clip=0.0,
    averaging=0.0,
    hidden_size=100,
    teleport_steps=SCHEDULE,
    validate_every=0,
)
"""500 trajectories of 21 steps, one function each; an update after every 5 steps and after the 21st makes 2500."""

_SETTINGS = (
    "seed",
    "variant",
    "estimator",
    "objective",
    "distance_weight",
    "tasks",
    "num_outer_steps",
    "max_horizon",
    "truncation",
    "learning_rate",
    "clip",
    "hidden_size",
    "theta_gradient",
    "teleport_steps",
)
_MORE_SETTINGS = (
    "num_tasks",
    "num_problems",
    "num_pairs",
    "sigma",
    "mix",
    "min_horizon",
    "curriculum",
    "decay_to",
    "weight_decay",
    "averaging",
    "frozen",
)
"""Those that decide truncated backpropagation, and those that decide other estimators too."""


def family_of(config: Config) -> FunctionTask:
    """The family of functions that a configuration trains on.

    Raises:
        TypeError: if its task is not one of functions.
    """
    task = find_task(config.tasks[0])
    if not isinstance(task, FunctionTask):
        raise TypeError(f"the task {task.name!r} is no family of functions")
    return task


def rule_of(config: PaperConfig, problem: InnerProblem) -> PaperRule:
    """The rule that a configuration trains, for problems of the kind of ``problem``, with its initial weights."""
    return PaperRule(
        config.variant,
        config.hidden_size,
        generator_for("weights", config.seed),
        problem,
        theta_gradient=config.theta_gradient,
        teleport_steps=config.teleport_steps,
    )


def learner_of(config: PaperConfig, group: ProcessGroup | None = None, *, resume: bool = False) -> Learner:
    """The learner of the library, which trains one of the paper's rules.

    Raises:
        ValueError: as ``Learner``, and if the distance to the optimum is to be a part of the meta-loss.
    """
    if config.distance_weight:
        raise ValueError("distance_weight is for truncated backpropagation in the paper's settings: set it to 0")
    problem = draw_problem(config, config.tasks[0], "train", "kind")
    return Learner(config, group, rule=rule_of(config, problem), resume=resume)


def join_problems(problems: Sequence[FunctionProblem]) -> FunctionProblem:
    """Functions of one family as one batch."""
    first = problems[0]
    batches = [problem.sample_batch(torch.Generator()) for problem in problems]
    inputs, targets = (torch.cat(parts) for parts in zip(*batches))
    optima = [problem.optimum for problem in problems if problem.optimum is not None]
    return replace(
        first,
        params={name: torch.cat([problem.params[name] for problem in problems]) for name in first.params},
        sample_batch=lambda generator: (inputs, targets),
        optimum=torch.cat(optima) if optima else None,
    )


def train(config: PaperConfig, seeds: Sequence[int], folder: Path) -> Tensor:
    """The trained weights of every meta-seed, ``[num_seeds, num_parameters]``.

    A meta-seed decides the initial weights and the training functions. What is in ``folder`` already is read from there.
    """
    configs = {seed: replace(config, seed=seed) for seed in seeds}
    files = {seed: folder / f"{_key(each)}.pt" for seed, each in configs.items()}
    missing = [seed for seed in seeds if not files[seed].exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        by_backpropagation = config.estimator.startswith("tbptt")
        trained = _backpropagate(config, missing) if by_backpropagation else _learn(config, missing)
        for seed, weights in zip(missing, trained):
            temporary = files[seed].with_suffix(".new")
            torch.save(weights.clone(), temporary)
            write_atomically(files[seed], temporary.read_bytes())
            temporary.unlink()
            write_atomically(files[seed].with_suffix(".json"), json.dumps(_decisive(configs[seed]), indent=1).encode())
    return torch.stack([torch.load(files[seed], weights_only=True) for seed in seeds])


def _decisive(config: PaperConfig) -> dict[str, Any]:
    """The settings that a training depends on: others, such as those of validation, may change without a new one."""
    names = [*_SETTINGS] if config.estimator.startswith("tbptt") else [*_SETTINGS, *_MORE_SETTINGS]
    return {name: config.identity[name] for name in names}


def _key(config: PaperConfig) -> str:
    return hashlib.sha256(json.dumps(_decisive(config), sort_keys=True).encode()).hexdigest()[:16]


def _learn(config: PaperConfig, seeds: Sequence[int]) -> Tensor:
    """By any estimator, one meta-seed after another."""
    trained = []
    for seed in seeds:
        learner = learner_of(replace(config, seed=seed))
        for _ in learner.run():
            pass
        trained.append(learner.average)
    return torch.stack(trained)


def _backpropagate(config: PaperConfig, seeds: Sequence[int]) -> Tensor:
    """By truncated backpropagation and Adam, all meta-seeds at once: each has its own weights and functions.

    A window whose gradient is not finite changes nothing for its meta-seed but what Adam's momentum does.
    """
    task, horizon = family_of(config), config.max_horizon

    def functions(number: int) -> FunctionProblem:
        streams = (generator_for("paper", "train", seed, number) for seed in seeds)
        return join_problems([task.sample(1, (horizon, horizon), "train", each) for each in streams])

    rules = [rule_of(replace(config, seed=seed), functions(0)) for seed in seeds]
    rule, weights = rules[0], torch.stack([each.flatten() for each in rules]).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=config.learning_rate, fused=True)
    num_updates = number = 0
    while num_updates < config.num_outer_steps:
        problem = functions(number)
        number += 1
        runs = init_unroll(rule, problem, 1)
        while runs.step < horizon and num_updates < config.num_outer_steps:
            losses, runs = window(config, rule, rule.unflatten(weights), problem, runs)
            weights.grad = _gradients(losses, weights, config.clip)
            optimizer.step()
            runs = runs.detach()
            num_updates += 1
    return weights.detach()


def window(
    config: PaperConfig, rule: Rule, weights: Tensors, problem: FunctionProblem, runs: Runs
) -> tuple[Tensor, Runs]:
    """The meta-losses of the next window, ``[num_runs]``, and the runs after it.

    The distance to the optimum is that of single steps, which are then taken one by one.
    """
    length = min(config.truncation, problem.horizon - runs.step)
    step_weight = step_weights(config.objective, problem.horizon)
    total = torch.zeros(len(runs.initial))
    for part in [1] * length if config.distance_weight else [length]:
        result = unroll(
            rule,
            weights,
            problem,
            runs,
            part,
            lambda step: torch.Generator(),
            second_order=config.estimator == "tbptt",
        )
        runs = result.runs
        total = total + meta_loss(problem, result, config.objective)
        if config.distance_weight and problem.optimum is not None:
            distance = (runs.params["x"] - problem.optimum).square().sum(dim=-1).sqrt()
            total = total + config.distance_weight * step_weight[runs.step - 1] * distance
    return total, runs


def _gradients(losses: Tensor, weights: Tensor, clip: float) -> Tensor:
    """The gradient of every meta-seed's loss, zero where it is not finite, no longer than ``clip`` if that is positive."""
    is_usable = torch.isfinite(losses.detach())
    (gradients,) = torch.autograd.grad(torch.where(is_usable, losses, 0.0).sum(), weights)
    gradients[~(is_usable & torch.isfinite(gradients.sum(dim=1)))] = 0.0
    if clip:
        gradients = gradients * (clip / gradients.norm(dim=1, keepdim=True).clamp(min=clip))
    return gradients
