"""The learner: follows the meta-gradient, validates, and writes what it needs to go on after an interruption."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teleport_optim.checkpoints import save_checkpoint, write_atomically
from teleport_optim.meta_optimizer import MetaOptimizer
from teleport_optim.meta_training.estimators import evolution_strategies, meta_loss
from teleport_optim.meta_training.unroll import unroll
from teleport_optim.tasks import TASKS, InnerProblem

__all__ = ["Config", "Learner", "OuterStep"]

_STATE_FILE = "state.pt"
_CONFIG_FILE = "config.json"
_LOG_FILE = "log.jsonl"


@dataclass(frozen=True)
class Config:
    """Everything that decides a meta-training run; two runs with equal configurations agree bit for bit on CPU.

    Raises:
        ValueError: if a value is out of its range or a task is unknown.
    """

    seed: int = 0
    num_outer_steps: int = 600
    num_tasks: int = 3
    """Problem batches per outer step, each of one family and architecture."""
    num_problems: int = 2
    """Problems in a batch, which differ in data and initial values."""
    num_pairs: int = 12
    """Antithetic perturbation pairs per batch."""
    max_horizon: int = 200
    sigma: float = 0.02
    learning_rate: float = 4e-3
    averaging: float = 0.98
    """Decay of the average of the weights, which is what is validated and kept."""
    hidden_size: int = 12
    validate_every: int = 20
    tasks: tuple[str, ...] = field(default=tuple(TASKS))

    def __post_init__(self) -> None:
        for name in ("num_outer_steps", "num_tasks", "num_problems", "num_pairs", "max_horizon", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("sigma", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.averaging < 1:
            raise ValueError(f"averaging must lie in [0, 1), got {self.averaging}")
        if unknown := sorted(set(self.tasks) - set(TASKS)):
            raise ValueError(f"unknown tasks {unknown}; there are {sorted(TASKS)}")

    def with_settings(self, settings: list[str]) -> Config:
        """This configuration with ``key=value`` settings applied.

        Raises:
            ValueError: for an unknown key or a value that cannot be read.

        Example:
            >>> Config().with_settings(["sigma=0.1", "tasks=digits_mlp,digits_cnn"]).tasks
            ('digits_mlp', 'digits_cnn')
        """
        defaults = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values: dict[str, Any] = {}
        for setting in settings:
            key, separator, text = setting.partition("=")
            if not separator or key not in defaults:
                raise ValueError(f"unknown setting {setting!r}: write key=value, with a key of {sorted(defaults)}")
            try:
                values[key] = tuple(text.split(",")) if key == "tasks" else type(defaults[key])(text)
            except ValueError as error:
                raise ValueError(f"cannot read {text!r} as the {type(defaults[key]).__name__} that {key} is") from error
        return replace(self, **values)


class OuterStep(NamedTuple):
    """What one outer step reports."""

    step: int
    objective: float
    gradient_norm: float
    validation: float | None
    """Geometric mean, over fixed problems, of the final loss relative to that of the untrained prior."""
    seconds: float


class Learner:
    """Meta-trains a meta-optimizer with evolution strategies over full horizons.

    Every outer step draws ``num_tasks`` problem batches and follows the averaged meta-gradient with Adam. The state is
    written to ``run_dir`` after every outer step, atomically, so that a run can be interrupted at any moment.

    Args:
        config: The run.
        run_dir: Folder of the run; created if missing.
        resume: Go on from the state in ``run_dir``.

    Raises:
        FileExistsError: if ``run_dir`` holds a run and ``resume`` is False.
        FileNotFoundError: if there is nothing to resume.
        ValueError: if ``run_dir`` was made by another configuration.
    """

    def __init__(self, config: Config, run_dir: str | Path, *, resume: bool = False) -> None:
        self.config = config
        self.run_dir = Path(run_dir)
        self.meta_optimizer = MetaOptimizer(config.hidden_size, torch.Generator().manual_seed(config.seed))
        self._shapes = {name: p.shape for name, p in self.meta_optimizer.named_parameters()}
        self.theta = torch.cat([p.detach().reshape(-1) for p in self.meta_optimizer.parameters()])
        self.average = self.theta.clone()
        self.best = self.theta.clone()
        self.best_validation = 1.0
        self.step = 0
        self.seconds = 0.0
        self._adam = _Adam.initial(self.theta)
        self._start(resume)
        self._validation_problems = self._draw_validation_problems()

    def run(self) -> Iterator[OuterStep]:
        """Take the remaining outer steps, yielding a report after each."""
        baselines = [
            self._validation_objective(torch.zeros_like(self.theta), problem) for problem in self._validation_problems
        ]
        while self.step < self.config.num_outer_steps:
            start = time.perf_counter()
            gradient, objective = self._meta_gradient()
            rate = self.config.learning_rate * _schedule(self.step / self.config.num_outer_steps)
            self._adam, move = self._adam.advance(gradient)
            self.theta = self.theta - rate * move
            self.average = torch.lerp(
                self.theta, self.average, min(self.config.averaging, self.step / (self.step + 10))
            )
            self.step += 1
            validation = None
            if self.step % self.config.validate_every == 0 or self.step == self.config.num_outer_steps:
                objectives = [
                    self._validation_objective(self.average, problem) for problem in self._validation_problems
                ]
                validation = math.exp(sum(o - b for o, b in zip(objectives, baselines)) / len(baselines))
                if validation < self.best_validation:
                    self.best, self.best_validation = self.average.clone(), validation
            seconds = time.perf_counter() - start
            self.seconds += seconds
            report = OuterStep(self.step, objective, float(gradient.norm()), validation, seconds)
            self._save(report)
            yield report

    def export(self, path: str | Path, **card: Any) -> None:
        """Write the best weights by validation as a checkpoint with its card."""
        self.meta_optimizer.load_state_dict(self._named(self.best))
        description = {
            "meta_training": asdict(self.config) | {"num_outer_steps_taken": self.step},
            "meta_training_minutes": round(self.seconds / 60, 1),
            "validation_ratio_to_prior": round(self.best_validation, 4),
        }
        save_checkpoint(self.meta_optimizer, path, description | card)

    def _meta_gradient(self) -> tuple[Tensor, float]:
        config = self.config
        generator = _generator(config.seed, self.step)
        shares = torch.tensor([TASKS[task].share for task in config.tasks])
        gradient, objective = torch.zeros_like(self.theta), 0.0
        for _ in range(config.num_tasks):
            task = config.tasks[int(torch.multinomial(shares, 1, generator=generator))]
            problem = TASKS[task].sample(config.num_problems, config.max_horizon, "train", generator)

            def mean_meta_loss(candidates: Tensor, problem: InnerProblem = problem) -> Tensor:
                with torch.no_grad():
                    losses = unroll(self.meta_optimizer, self._named(candidates), problem, generator).losses
                return meta_loss(losses).mean(dim=1)

            estimate = evolution_strategies(
                mean_meta_loss, self.theta, num_pairs=config.num_pairs, sigma=config.sigma, generator=generator
            )
            gradient += estimate.gradient / config.num_tasks
            objective += estimate.objective / config.num_tasks
        return gradient, objective

    def _draw_validation_problems(self) -> list[InnerProblem]:
        generator = torch.Generator().manual_seed(2**40)
        horizon = self.config.max_horizon
        return [TASKS[task].sample(4, horizon, "validation", generator) for task in self.config.tasks for _ in range(3)]

    def _validation_objective(self, theta: Tensor, problem: InnerProblem) -> float:
        generator = torch.Generator().manual_seed(2**41)
        with torch.no_grad():
            losses = unroll(self.meta_optimizer, self._named(theta[None]), problem, generator).losses
        return float(meta_loss(losses).mean())

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        """Flat weights ``[..., num_parameters]`` by name."""
        parts = torch.split(flat, [shape.numel() for shape in self._shapes.values()], dim=-1)
        return {
            name: part.reshape(*flat.shape[:-1], *shape) for (name, shape), part in zip(self._shapes.items(), parts)
        }

    def _start(self, resume: bool) -> None:
        state_file = self.run_dir / _STATE_FILE
        if not resume:
            if state_file.exists():
                raise FileExistsError(f"{self.run_dir} holds a run: resume it, or choose another folder")
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(self.run_dir / _CONFIG_FILE, json.dumps(asdict(self.config), indent=1).encode())
            return
        if not state_file.exists():
            raise FileNotFoundError(f"there is no run to resume in {self.run_dir}: {_STATE_FILE} is missing")
        state = torch.load(state_file, weights_only=True)
        if state["config"] != asdict(self.config):
            differing = sorted(key for key, value in asdict(self.config).items() if state["config"].get(key) != value)
            raise ValueError(f"the run in {self.run_dir} has another configuration; these settings differ: {differing}")
        self.theta, self.average, self.best = state["theta"], state["average"], state["best"]
        self._adam = _Adam(**state["adam"])
        self.step, self.seconds, self.best_validation = state["step"], state["seconds"], state["best_validation"]

    def _save(self, report: OuterStep) -> None:
        state = {
            "config": asdict(self.config),
            "theta": self.theta,
            "average": self.average,
            "best": self.best,
            "adam": self._adam._asdict(),
            "step": self.step,
            "seconds": self.seconds,
            "best_validation": self.best_validation,
        }
        stream = io.BytesIO()
        torch.save(state, stream)
        write_atomically(self.run_dir / _STATE_FILE, stream.getvalue())
        with (self.run_dir / _LOG_FILE).open("a") as log:
            log.write(json.dumps(report._asdict()) + "\n")


class _Adam(NamedTuple):
    """Adam on the flat weights, as a value."""

    mean: Tensor
    square: Tensor
    num_steps: int

    @classmethod
    def initial(cls, theta: Tensor) -> _Adam:
        return cls(torch.zeros_like(theta), torch.zeros_like(theta), 0)

    def advance(self, gradient: Tensor) -> tuple[_Adam, Tensor]:
        mean, square, count = (
            0.9 * self.mean + 0.1 * gradient,
            0.99 * self.square + 0.01 * gradient**2,
            self.num_steps + 1,
        )
        move = (mean / (1 - 0.9**count)) / ((square / (1 - 0.99**count)).sqrt() + 1e-8)
        return _Adam(mean, square, count), move


def _schedule(progress: float) -> float:
    """Cosine from 1 to 0.1."""
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * progress))


def _generator(seed: int, step: int) -> torch.Generator:
    """A generator of its own for every outer step, so that a resumed run draws what it would have drawn."""
    return torch.Generator().manual_seed((seed << 32) + step)
