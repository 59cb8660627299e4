"""Meta-training in the settings of the paper: several meta-seeds side by side, and trained weights kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teleport_optim.checkpoints import write_atomically
from teleport_optim.meta_training.config import Config
from teleport_optim.meta_training.estimators import meta_loss
from teleport_optim.meta_training.learner import Learner
from teleport_optim.meta_training.rules import Rule, RuleOptions, make_rule
from teleport_optim.meta_training.tasks import find_task
from teleport_optim.meta_training.tasks.problem import InnerProblem
from teleport_optim.meta_training.unroll import advance, begin
from teleport_optim.streams import stream

__all__ = ["PAPER", "SCHEDULE", "join_problems", "rule_of", "train"]

SCHEDULE = (2, 5, 8, 11, 14, 17)
"""The paper's set Z: the steps after which a teleport follows, counted from 0."""

PAPER = Config(
    variant="update",
    estimator="tbptt_first_order",
    objective="plain",
    tasks=("ellipse_fixed",),
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


def rule_of(config: Config, problem: InnerProblem) -> Rule:
    """The rule that a configuration trains, with its initial weights."""
    options = RuleOptions(config.hidden_size, config.block_rows, config.theta_gradient, config.teleport_steps)
    return make_rule(config.variant, options, stream("weights", config.seed), problem)


def join_problems(problems: Sequence[InnerProblem]) -> InnerProblem:
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


def train(config: Config, seeds: Sequence[int], folder: Path) -> Tensor:
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


def _decisive(config: Config) -> dict[str, Any]:
    """The settings that a training depends on: others, such as those of validation, may change without a new one."""
    names = [*_SETTINGS] if config.estimator.startswith("tbptt") else [*_SETTINGS, *_MORE_SETTINGS]
    return {name: config.identity[name] for name in names}


def _key(config: Config) -> str:
    return hashlib.sha256(json.dumps(_decisive(config), sort_keys=True).encode()).hexdigest()[:16]


def _learn(config: Config, seeds: Sequence[int]) -> Tensor:
    """By any estimator, one meta-seed after another."""
    trained = []
    for seed in seeds:
        learner = Learner(replace(config, seed=seed))
        for _ in learner.run():
            pass
        trained.append(learner.average)
    return torch.stack(trained)


def _backpropagate(config: Config, seeds: Sequence[int]) -> Tensor:
    """By truncated backpropagation and Adam, all meta-seeds at once: each has its own weights and functions.

    A window whose gradient is not finite changes nothing for its meta-seed but what Adam's momentum does.
    """
    task, horizon = find_task(config.tasks[0]), config.max_horizon

    def functions(number: int) -> InnerProblem:
        streams = (stream("paper", "train", seed, number) for seed in seeds)
        return join_problems([task.sample(1, (horizon, horizon), "train", each) for each in streams])

    rules = [rule_of(replace(config, seed=seed), functions(0)) for seed in seeds]
    rule, weights = rules[0], torch.stack([each.flat() for each in rules]).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=config.learning_rate, fused=True)
    num_updates = number = 0
    while num_updates < config.num_outer_steps:
        problem = functions(number)
        number += 1
        runs = begin(rule, problem, 1)
        while runs.step < horizon and num_updates < config.num_outer_steps:
            window = advance(
                rule,
                rule.named(weights),
                problem,
                runs,
                min(config.truncation, horizon - runs.step),
                lambda step: torch.Generator(),
                second_order=config.estimator == "tbptt",
            )
            losses = meta_loss(problem, window, config.objective, config.distance_weight)
            weights.grad = _gradients(losses, weights, config.clip)
            optimizer.step()
            runs = window.runs.detach()
            num_updates += 1
    return weights.detach()


def _gradients(losses: Tensor, weights: Tensor, clip: float) -> Tensor:
    """The gradient of every meta-seed's loss, zero where it is not finite, no longer than ``clip`` if that is positive."""
    is_usable = torch.isfinite(losses.detach())
    (gradients,) = torch.autograd.grad(torch.where(is_usable, losses, 0.0).sum(), weights)
    gradients[~(is_usable & torch.isfinite(gradients.sum(dim=1)))] = 0.0
    if clip:
        gradients = gradients * (clip / gradients.norm(dim=1, keepdim=True).clamp(min=clip))
    return gradients
