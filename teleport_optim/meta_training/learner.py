"""The learner: the loop that follows the meta-gradient and keeps the best weights by validation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teleport_optim.controller.checkpoints import save_checkpoint
from teleport_optim.controller.network import MetaOptimizer
from teleport_optim.meta_training.config import Config
from teleport_optim.meta_training.episodes import Episodes
from teleport_optim.meta_training.estimators import ESTIMATORS
from teleport_optim.meta_training.process_group import ProcessGroup
from teleport_optim.meta_training.rules import ControllerRule, Rule
from teleport_optim.meta_training.run_folder import OuterStep, RunFolder
from teleport_optim.meta_training.sampling import check_tasks
from teleport_optim.meta_training.validation import Validation
from teleport_optim.rng import generator_for

__all__ = ["Learner"]


class Learner:
    """Meta-training of a rule: training runs are drawn, AdamW follows the meta-gradient, and the best average is kept.

    The state is written to the run's folder after every outer step, atomically, so that a run can be interrupted at any moment
    and goes on bit for bit. Without a folder nothing is written.

    Args:
        config: The run.
        group: The processes that share the work; this one alone by default.
        rule: The rule to train, with untrained weights; by default that of the optimizer, with a controller as the
            configuration says.
        resume: Go on from the state in the run's folder; the number of processes may have changed.

    Attributes:
        theta: The weights, ``[num_parameters]``.
        average: Their average, which is validated.
        best: The best average by validation.
        untrained: The weights at the start.

    Raises:
        FileExistsError: if the folder holds a run and ``resume`` is False.
        FileNotFoundError: if there is nothing to resume.
        ValueError: if the folder was made by another configuration, the rule cannot train a task, a frozen pattern matches
            nothing, or the loss of a task is not finite at the start.

    Example:
        >>> config = Config(tasks=("teacher_regression",), num_outer_steps=2, num_tasks=1, num_pairs=1, max_horizon=40)
        >>> learner = Learner(config)
        >>> [report.step for report in learner.run()]
        [1, 2]
    """

    def __init__(
        self,
        config: Config,
        group: ProcessGroup | None = None,
        *,
        rule: Rule | None = None,
        resume: bool = False,
    ) -> None:
        self.config, self.group = config, group or ProcessGroup()
        self.rule = rule or _controller_rule(config)
        check_tasks(config, self.rule)
        self.rule.network.to(config.device)
        self.estimator = ESTIMATORS[config.estimator](self.rule, config, self.group)
        self.episodes = Episodes(config)
        self.untrained = self.rule.flatten()
        self.validate = Validation(config, self.rule, self.untrained, self.group)
        self.theta = self.untrained.clone().requires_grad_()
        self.average = self.untrained.clone()
        self.best = self.untrained.clone()
        self.best_validation = 1.0
        self.step = 0
        self.seconds = 0.0
        self._optimizer = torch.optim.AdamW(
            [self.theta], lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, foreach=False
        )
        self._folder = RunFolder(Path(config.run_dir), self.group) if config.run_dir else None
        if self._folder and resume:
            if found := self._folder.resume(config):
                self._load(*found)
        elif self._folder:
            self._folder.create(config)

    def run(self) -> Iterator[OuterStep]:
        """Take the remaining outer steps, yielding a report after each.

        Raises:
            WorkerLostError: if another process of the run ends; the run can be resumed.
        """
        while self.step < self.config.num_outer_steps:
            report = self._take_step()
            if self._folder:
                local_state = self.episodes.local_state(self.estimator.local_candidates)
                self._folder.save(report, self._state(), local_state)
            yield report

    def export(self, path: str | Path, **card: Any) -> float:
        """Write the best weights by validation, or the last average if there was none on the way, as a checkpoint with its card.

        Returns:
            The validation of what is written.

        Raises:
            ValueError: if the rule that was trained is not that of the optimizer class.
        """
        if not isinstance(self.rule.network, MetaOptimizer):
            raise ValueError(
                f"{type(self.rule).__name__} is not the rule of the optimizer class, so there is nothing that could load "
                f"a checkpoint of it: its weights are in 'best' and 'average'"
            )
        is_validated = self.config.validate_every > 0
        weights = self.best if is_validated else self.average
        validation = self.best_validation if is_validated else self.validate(self.average)
        self.rule.network.load_state_dict(self.rule.unflatten(weights), strict=False)
        description = {
            "meta_training": self.config.identity | {"num_outer_steps_taken": self.step},
            "meta_training_minutes": round(self.seconds / 60, 1),
            "validation_ratio_to_prior": round(validation, 4),
        }
        save_checkpoint(self.rule.network, path, description | card)
        return validation

    def _take_step(self) -> OuterStep:
        config, start = self.config, time.perf_counter()
        longest_horizon = config.longest_horizon(self.step)
        self.episodes.renew(self.step)
        estimate = self.estimator.estimate(self.theta.detach(), self.episodes.running, self.step)
        self.episodes.count_steps(self.estimator.window_length)
        gradient_norm = float(estimate.gradient.norm())
        self._follow(estimate.gradient)
        self.step += 1
        validation = None
        is_last = self.step == config.num_outer_steps
        if config.validate_every and (self.step % config.validate_every == 0 or is_last):
            validation = self.validate(self.average)
            if validation < self.best_validation:
                self.best, self.best_validation = self.average.clone(), validation
        seconds = time.perf_counter() - start
        self.seconds += seconds
        return OuterStep(
            self.step,
            estimate.objective,
            gradient_norm,
            estimate.exploded,
            longest_horizon,
            validation,
            round(seconds, 3),
        )

    def _follow(self, gradient: Tensor) -> None:
        """Take one step of AdamW, and move the average."""
        config = self.config
        progress = self.step / config.num_outer_steps
        decay = config.decay_to + (1.0 - config.decay_to) * 0.5 * (1.0 + math.cos(math.pi * progress))
        self._optimizer.param_groups[0]["lr"] = config.learning_rate * decay
        self.theta.grad = gradient
        if config.clip:
            torch.nn.utils.clip_grad_norm_(self.theta, config.clip)
        self._optimizer.step()
        with torch.no_grad():  # Weight decay would move what is frozen.
            self.theta.lerp_(self.untrained, 1.0 - self.estimator.is_trained.to(self.theta))
        # The average starts as a plain mean: a fixed decay would hold on to the untrained weights.
        self.average = torch.lerp(
            self.theta.detach(), self.average, min(config.averaging, self.step / (self.step + 10))
        )

    def _state(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "theta": self.theta.detach(),
            "average": self.average,
            "best": self.best,
            "best_validation": self.best_validation,
            "optimizer": self._optimizer.state_dict(),
            "episodes": self.episodes.state(),
        }

    def _load(self, state: dict[str, Any], local_states: list[Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        with torch.no_grad():
            self.theta.copy_(state["theta"])
        device = self.config.device
        self.average, self.best = state["average"].to(device), state["best"].to(device)
        self.best_validation = state["best_validation"]
        self._optimizer.load_state_dict(state["optimizer"])
        self.episodes.load(state["episodes"], local_states, self.rule, self.estimator.local_candidates)


def _controller_rule(config: Config) -> ControllerRule:
    generator = generator_for("weights", config.seed)
    return ControllerRule(MetaOptimizer(config.hidden_size, generator, block_rows=config.block_rows))
