"""The learner: follows the meta-gradient, validates, and writes what it needs to go on after an interruption."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from teleport_optim.checkpoints import save_checkpoint, write_atomically
from teleport_optim.meta_optimizer import MetaOptimizer
from teleport_optim.meta_training.config import Config
from teleport_optim.meta_training.estimators import ESTIMATORS, Episode, meta_loss
from teleport_optim.meta_training.rules import RuleOptions, make_rule
from teleport_optim.meta_training.tasks import find_task
from teleport_optim.meta_training.tasks.problem import InnerProblem
from teleport_optim.meta_training.unroll import Runs, advance, begin
from teleport_optim.meta_training.world import World
from teleport_optim.streams import stream

__all__ = ["CONFIG_FILE", "LOG_FILE", "Learner", "OuterStep"]

CONFIG_FILE = "config.json"
LOG_FILE = "log.jsonl"
_STATE_FILE = "state.pt"


class OuterStep(NamedTuple):
    """What one outer step reports."""

    step: int
    objective: float
    """Mean meta-loss of the training runs."""
    gradient_norm: float
    exploded: float
    """Share of training runs that have exploded; they are part of the objective."""
    longest_horizon: int
    validation: float | None
    """Geometric mean, over fixed problems, of the final loss relative to that of the untrained rule."""
    seconds: float


class Learner:
    """Meta-trains a rule: draws training runs, follows the meta-gradient with AdamW, keeps the best average by validation.

    The state is written to the run's folder after every outer step, atomically, so that a run can be interrupted at any moment
    and goes on bit for bit. Without a folder nothing is written.

    Args:
        config: The run.
        world: The processes that share the work.
        resume: Go on from the state in the run's folder; the number of processes may have changed.

    Raises:
        FileExistsError: if the folder holds a run and ``resume`` is False.
        FileNotFoundError: if there is nothing to resume.
        ValueError: if the folder was made by another configuration, a variant cannot train a task, a frozen pattern matches
            nothing, or the loss of a task is not finite at the start.
    """

    def __init__(self, config: Config, world: World | None = None, *, resume: bool = False) -> None:
        self.config = config
        self.world = world or World()
        self.run_dir = Path(config.run_dir) if config.run_dir else None
        samples = [self._sample(task, "train", "check", index) for index, task in enumerate(config.tasks)]
        options = RuleOptions(config.hidden_size, config.block_rows, config.theta_gradient, config.teleport_steps)
        self.rule = make_rule(config.variant, options, stream("weights", config.seed), samples[0])
        for task, problem in zip(config.tasks, samples):
            self.rule.check(problem)
            _check_start(task, problem)
        self.rule.network.to(config.device)
        self.estimator = ESTIMATORS[config.estimator](self.rule, config, self.world)
        self.untrained = self.rule.flat()
        self.theta = self.untrained.clone().requires_grad_()
        self.average = self.untrained.clone()
        self.best = self.untrained.clone()
        self.best_validation = 1.0
        self.step = 0
        self.seconds = 0.0
        self.episodes = [self._new_episode(slot, 0) for slot in range(config.num_tasks)]
        self._optimizer = torch.optim.AdamW(
            [self.theta], lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, foreach=False
        )
        self._start(resume)

    def run(self) -> Iterator[OuterStep]:
        """Take the remaining outer steps, yielding a report after each.

        Raises:
            WorkerLostError: if another process of the run ends; the run can be resumed.
        """
        config = self.config
        while self.step < config.num_outer_steps:
            start = time.perf_counter()
            self._renew_episodes()
            estimate = self.estimator.estimate(self.theta.detach(), self.episodes, self.step)
            for episode in self.episodes:
                episode.step += self.estimator.window(episode)
            norm = float(estimate.gradient.norm())
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
            longest = config.longest_horizon(self.step - 1)
            report = OuterStep(
                self.step, estimate.objective, norm, estimate.exploded, longest, validation, round(seconds, 3)
            )
            self._save(report)
            yield report

    def validate(self, flat: Tensor) -> float:
        """How weights do on the fixed validation problems: final losses relative to the untrained rule's, geometric mean."""
        if not self.config.num_validation:
            return 1.0
        ratios = self._validation_losses(flat) - self._baseline
        return math.exp(float(ratios.mean()))

    def export(self, path: str | Path, **card: Any) -> float:
        """Write the best weights by validation, or the last average if there was none on the way, as a checkpoint with its card.

        Returns:
            The validation of what is written, as :meth:`validate` tells it.

        Raises:
            ValueError: if the variant is one of the paper's, whose networks fit one kind of test function only.
        """
        if not isinstance(self.rule.network, MetaOptimizer):
            raise ValueError(
                f"the variant {self.config.variant!r} trains a network for test functions, which no optimizer class runs: "
                f"checkpoints are of the variant 'controller'"
            )
        is_validated = self.config.validate_every > 0
        weights = self.best if is_validated else self.average
        validation = self.best_validation if is_validated else self.validate(self.average)
        self.rule.network.load_state_dict(self.rule.named(weights), strict=False)
        description = {
            "meta_training": self.config.identity | {"num_outer_steps_taken": self.step},
            "meta_training_minutes": round(self.seconds / 60, 1),
            "validation_ratio_to_prior": round(validation, 4),
        }
        save_checkpoint(self.rule.network, path, description | card)
        return validation

    def _follow(self, gradient: Tensor) -> None:
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
        self.average = torch.lerp(
            self.theta.detach(), self.average, min(config.averaging, self.step / (self.step + 10))
        )

    # Episodes

    def _sample(self, task: str, split: str, *keys: int | str, horizon: int | None = None) -> InnerProblem:
        config = self.config
        horizons = (horizon or config.max_horizon,) * 2
        seed = () if split == "validation" else (config.seed,)
        problem = find_task(task).sample(config.num_problems, horizons, split, stream("problem", split, *seed, *keys))
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

    def _new_episode(self, slot: int, number: int, horizon: int | None = None) -> Episode:
        """The episode ``number`` of a slot; its horizon is drawn up to the longest at the present outer step."""
        config = self.config
        generator = stream("episode", config.seed, slot, number)
        shares = torch.tensor([find_task(task).share for task in config.tasks])
        task = config.tasks[int(torch.multinomial(shares, 1, generator=generator))]
        low, high = math.log(config.min_horizon), math.log(config.longest_horizon(self.step))
        drawn = round(math.exp(low + (high - low) * float(torch.rand((), generator=generator))))
        horizon = horizon or drawn
        draw = partial(self._sample, task, "train", slot, number, horizon=horizon)
        return Episode(slot, number, horizon, draw, partial(stream, "batch", config.seed, slot, number))

    def _renew_episodes(self) -> None:
        for slot, episode in enumerate(self.episodes):
            if episode.is_over:
                self.episodes[slot] = self._new_episode(slot, episode.number + 1)

    # Validation

    @cached_property
    def _validation_problems(self) -> list[tuple[int, InnerProblem]]:
        """The problems that are this process's, with their numbers."""
        count = self.config.num_validation
        everything = [(task, number) for task in self.config.tasks for number in range(count)]
        return [
            (index, self._sample(task, "validation", task, number))
            for index, (task, number) in enumerate(everything)
            if index in self.world.share(len(everything))
        ]

    @cached_property
    def _baseline(self) -> Tensor:
        return self._validation_losses(self.untrained)

    def _validation_losses(self, flat: Tensor) -> Tensor:
        values = torch.zeros(len(self.config.tasks) * self.config.num_validation, dtype=torch.float64)
        for index, problem in self._validation_problems:
            batches = partial(stream, "validation", index)
            weights = self.rule.named(flat.expand(problem.num_problems, -1))
            with torch.no_grad():
                runs = begin(self.rule, problem, 1)
                window = advance(self.rule, weights, problem, runs, problem.horizon, batches)
            values[index] = float(meta_loss(problem, window).mean())
        return self.world.sum(values)

    # Saving and resuming

    def _start(self, resume: bool) -> None:
        if self.run_dir is None:
            return
        state_file = self.run_dir / _STATE_FILE
        if not resume:
            if (self.run_dir / CONFIG_FILE).exists():
                raise FileExistsError(f"{self.run_dir} holds a run: resume it, or choose another folder")
            self.world.wait()
            if self.world.is_first:
                self.run_dir.mkdir(parents=True, exist_ok=True)
                write_atomically(self.run_dir / CONFIG_FILE, json.dumps(self.config.identity, indent=1).encode())
            self.world.wait()
            return
        if not (self.run_dir / CONFIG_FILE).exists():
            raise FileNotFoundError(f"there is no run to resume in {self.run_dir}: {CONFIG_FILE} is missing")
        identity, saved = self.config.identity, json.loads((self.run_dir / CONFIG_FILE).read_text())
        if differing := sorted(key for key in identity | saved if saved.get(key) != identity.get(key)):
            raise ValueError(f"the run in {self.run_dir} has another configuration; these settings differ: {differing}")
        if state_file.exists():
            self._load(torch.load(state_file, map_location="cpu", weights_only=True))
        if self.world.is_first:
            self._cut_log()

    def _cut_log(self) -> None:
        """Drop what the log says of steps whose state was not written."""
        assert self.run_dir is not None
        log = self.run_dir / LOG_FILE
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        write_atomically(log, "".join(lines[: self.step]).encode())

    def _save(self, report: OuterStep) -> None:
        """The state of this process's runs first, then, in the first process, the log and the state that names them."""
        if self.run_dir is None:
            return
        runs = {
            str(episode.slot): {key: pytree.tree_leaves(runs) for key, runs in episode.runs.items()}
            for episode in self.episodes
            if not episode.is_over
        }
        if runs:
            shares = {str(episode.slot): self.estimator.share(episode.slot) for episode in self.episodes}
            starts = {slot: {key: candidates.start for key, candidates in s.items()} for slot, s in shares.items()}
            _write_tensors(self._runs_file(self.step, self.world.rank), {"runs": runs, "starts": starts})
            self.world.wait()
        if not self.world.is_first:
            return
        with (self.run_dir / LOG_FILE).open("a") as log:
            log.write(json.dumps(report._asdict()) + "\n")
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "num_processes": self.world.size,
            "theta": self.theta.detach(),
            "average": self.average,
            "best": self.best,
            "best_validation": self.best_validation,
            "optimizer": self._optimizer.state_dict(),
            "episodes": [
                {
                    "number": episode.number,
                    "horizon": episode.horizon,
                    "step": episode.step,
                    "displacement": None if episode.is_over else episode.displacement,
                }
                for episode in self.episodes
            ],
        }
        _write_tensors(self.run_dir / _STATE_FILE, state)
        for file in self.run_dir.glob("runs-*.pt"):
            if not file.name.startswith(f"runs-{self.step}-"):
                file.unlink()

    def _load(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        with torch.no_grad():
            self.theta.copy_(state["theta"])
        device = self.config.device
        self.average, self.best = state["average"].to(device), state["best"].to(device)
        self.best_validation = state["best_validation"]
        self._optimizer.load_state_dict(state["optimizer"])
        files = [self._runs_file(self.step, rank) for rank in range(state["num_processes"])]
        parts = [torch.load(file, map_location="cpu", weights_only=True) for file in files if file.exists()]
        for slot, saved in enumerate(state["episodes"]):
            episode = self._new_episode(slot, saved["number"], saved["horizon"])
            episode.step = saved["step"]
            episode.displacement = None if saved["displacement"] is None else saved["displacement"].to(device)
            if not episode.is_over:
                for key, candidates in self.estimator.share(slot).items():
                    if candidates:
                        episode.runs[key] = self._join_runs(episode, key, candidates, parts)
            self.episodes[slot] = episode

    def _join_runs(self, episode: Episode, key: str, candidates: range, parts: list[dict[str, Any]]) -> Runs:
        """The runs of these candidates, out of what each of the processes wrote that had a share of them."""
        slot, num_problems = str(episode.slot), self.config.num_problems
        found = sorted(
            (
                (part["starts"][slot][key], part["runs"][slot][key])
                for part in parts
                if key in part["runs"].get(slot, {})
            ),
            key=lambda entry: entry[0],
        )
        rows = slice(candidates.start * num_problems, candidates.stop * num_problems)
        leaves = [
            torch.cat(pieces)[rows].to(self.config.device) if isinstance(pieces[0], Tensor) else pieces[0]
            for pieces in zip(*(pieces for _, pieces in found))
        ]
        structure = pytree.tree_structure(begin(self.rule, episode.problem, len(candidates)))
        runs: Runs = pytree.tree_unflatten(leaves, structure)
        return runs

    def _runs_file(self, step: int, rank: int) -> Path:
        assert self.run_dir is not None
        return self.run_dir / f"runs-{step}-{rank}.pt"


def _check_start(task: str, problem: InnerProblem) -> None:
    inputs, targets = problem.sample_batch(stream("check", task))
    with torch.no_grad():
        losses = problem.losses(problem.params, inputs, targets)
    if losses.shape != (problem.num_problems,):
        raise ValueError(
            f"the loss of the task {task} has the shape {list(losses.shape[1:])} for one problem: it must be a single number"
        )
    if not bool(torch.isfinite(losses).all()):
        raise ValueError(
            f"the loss of the task {task} is {losses.tolist()} at the initial parameters: it must be finite there"
        )


def _write_tensors(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())
