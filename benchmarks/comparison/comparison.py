"""Comparison of all optimizers on all tasks with several seeds; kept on disk run by run, so that it can be interrupted."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.comparison.ablations import ABLATIONS
from benchmarks.comparison.baselines import LIGHT, OURS, REFERENCE, Baseline, baselines, tune_lr
from benchmarks.comparison.task import EvaluationTask
from benchmarks.comparison.training import (
    FASTEST,
    SLOWEST,
    Run,
    horizon_speed,
    milliseconds_per_step,
    peak_megabytes,
    run_training,
    speed_up,
)
from teleport_optim.cli.training import Recipe
from teleport_optim.controller.checkpoints import find_checkpoint

__all__ = ["Comparison", "Score", "TaskResult"]

_PARAMETERS = " (parameters)"
"""Follows the name of an optimizer that averages, in the key of a run in which it did not."""

TUNING_SEED = 1000
"""Seed on which learning rates are tuned; those that are reported are 0, 1, 2, ..."""


@dataclass(frozen=True)
class TaskResult:
    """Result of one task.

    Attributes:
        task: Its name.
        runs: By optimizer, one run for each seed: of the parameters as they are, where the optimizer has a horizon speed.
        averaged: The same of optimizers that average, measured in the average.
        horizon_speeds: By optimizer, one for each of the first seeds; nothing of optimizers for which it is not measured.
        lrs: Tuned learning rates, by optimizer.
        milliseconds: Of a training step, by optimizer, all in one run, of half the length: what is done ever less often counts
            for more than it should.
        megabytes: The most memory that a training step takes, by optimizer.
    """

    task: str
    runs: dict[str, list[Run]]
    lrs: dict[str, float]
    milliseconds: dict[str, float]
    megabytes: dict[str, float]
    averaged: dict[str, list[Run]] = field(default_factory=dict)
    horizon_speeds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, optimizer: str, quantity: Callable[[Run], float]) -> float:
        """Median of a number over seeds."""
        return statistics.median(map(quantity, self.runs[optimizer]))

    def horizon_speed(self, optimizer: str) -> float | None:
        """Median over seeds of how many times shorter a run may be that ends where the reference does."""
        speeds = self.horizon_speeds.get(optimizer)
        return statistics.median(speeds) if speeds else None

    def open_ended_speed(self, optimizer: str) -> float:
        """Median over seeds of how many times sooner one run is where the reference ends."""
        runs = self.averaged.get(optimizer, self.runs[optimizer])
        return statistics.median(map(speed_up, runs, self.runs[REFERENCE]))

    def cost(self, optimizer: str) -> float:
        """Time of a training step over that of the reference."""
        return self.milliseconds[optimizer] / self.milliseconds[REFERENCE]

    def outcome(self, optimizer: str) -> int:
        """1 where the final loss is lower than the reference's at every seed, -1 where it is higher at every seed, else 0."""
        signs = {
            math.copysign(1.0, reference.final_loss - run.final_loss) if run.final_loss != reference.final_loss else 0.0
            for run, reference in zip(self.runs[optimizer], self.runs[REFERENCE])
        }
        return int(signs.pop()) if len(signs) == 1 else 0

    def is_worse_held_out(self, optimizer: str) -> bool:
        """Whether the best held-out loss is higher than the reference's at every seed."""
        return all(run.held_out > ref.held_out for run, ref in zip(self.runs[optimizer], self.runs[REFERENCE]))


@dataclass(frozen=True)
class Score:
    """Figures of one optimizer over all tasks; speeds and ratios are geometric means over the reference's.

    Attributes:
        horizon_speed: How many times shorter a run may be that ends where the reference does; None where it is not measured.
        wall_clock: The same in time: times what a step of the reference costs beside one of this optimizer.
        open_ended_speed: How many times sooner one run is where the reference ends.
        loss_ratio: Final training loss.
        held_out_ratio: Least held-out loss.
        wins, defeats: Tasks on which it is ahead or behind at every seed in final training loss.
        held_out_defeats: Tasks on which it is behind at every seed in held-out loss.
        diverged: Runs that ended with a loss that is not finite.
        beyond: Tasks on which the horizon speed is 4 or more, which counts as 4.
        below: Tasks on which it is 1/2 or less, which counts as 1/2.
    """

    horizon_speed: float | None
    wall_clock: float | None
    open_ended_speed: float
    loss_ratio: float
    held_out_ratio: float
    wins: int
    defeats: int
    held_out_defeats: int
    diverged: int
    beyond: int = 0
    below: int = 0

    @classmethod
    def of(cls, optimizer: str, results: Iterable[TaskResult]) -> Score:
        """Score of an optimizer."""
        results = list(results)

        def ratio(quantity: Callable[[Run], float]) -> float:
            return _geometric_mean(
                max(result.median(optimizer, quantity), 1e-12) / max(result.median(REFERENCE, quantity), 1e-12)
                for result in results
            )

        outcomes = [result.outcome(optimizer) for result in results]
        measured = [(result.horizon_speed(optimizer), result) for result in results]
        speeds = [(speed, result.cost(optimizer)) for speed, result in measured if speed is not None]
        return cls(
            _geometric_mean(speed for speed, _ in speeds) if speeds else None,
            _geometric_mean(speed / cost for speed, cost in speeds) if speeds else None,
            _geometric_mean(result.open_ended_speed(optimizer) for result in results),
            ratio(lambda run: run.final_loss),
            ratio(lambda run: run.held_out),
            outcomes.count(1),
            outcomes.count(-1),
            sum(result.is_worse_held_out(optimizer) for result in results),
            sum(not math.isfinite(run.losses[-1]) for result in results for run in result.runs[optimizer]),
            sum(speed >= FASTEST for speed, _ in speeds),
            sum(speed <= SLOWEST for speed, _ in speeds),
        )


def _digest(checkpoint: str | Path) -> str:
    return hashlib.sha256(find_checkpoint(checkpoint).read_bytes()).hexdigest()[:12]


def _geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) if value > 0 else -math.inf for value in values))


@dataclass
class Comparison:
    """Comparison in a folder: runs that are there are read, others are made.

    Attributes:
        folder: Where every run is kept, as a line of JSON.
        tasks: Networks with their data, by name.
        checkpoint: Weights of the learned optimizer: shipped name, path, or hf:// address.
        num_seeds: Runs of every optimizer on every task.
        num_horizon_seeds: On how many of these seeds runs of other lengths are made, for the horizon speed.
        share: Length of the runs as a share of the usual.
        others: More optimizers, by name.
        report: Called with a line of text before every run.
    """

    folder: Path
    tasks: Mapping[str, EvaluationTask]
    checkpoint: str | Path = "default"
    num_seeds: int = 5
    num_horizon_seeds: int = 3
    share: float = 1.0
    others: Mapping[str, Recipe] = field(default_factory=dict)
    report: Callable[[str], None] = lambda message: None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / "runs.jsonl"
        self._known: dict[str, Any] = {}
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                entry = json.loads(line)
                self._known[entry["key"]] = entry["value"]
        self._sha256 = _digest(self.checkpoint)
        self._light_sha256 = _digest("light")

    @property
    def baselines(self) -> dict[str, Baseline]:
        """Optimizers by name."""
        extra = {
            name: Baseline(lambda lr, recipe=recipe: recipe, has_horizon=True)  # type: ignore[misc]
            for name, recipe in self.others.items()
        }
        return baselines(self.checkpoint) | extra

    def results(self) -> list[TaskResult]:
        """Results of all tasks; what is missing is run."""
        return [self._result(task) for task in self.tasks.values()]

    def ablations(self) -> list[TaskResult]:
        """Results of the learned optimizer with one part taken away at a time, beside the reference; no times.

        What is measured at every moment of a run is the average of the iterates, where there is one.
        """
        recipes = {name: make(self.checkpoint) for name, make in ABLATIONS.items()}
        results = []
        for task in self.tasks.values():
            full = self._result(task)
            runs = {name: [self._run(task, name, r, seed, 0.0) for seed in self._seeds] for name, r in recipes.items()}
            runs = {REFERENCE: full.runs[REFERENCE], OURS: full.averaged[OURS], **runs}
            ones = dict.fromkeys(runs, 1.0)
            results.append(TaskResult(task.name, runs, lrs={}, milliseconds=ones, megabytes=ones))
        return results

    @property
    def _seeds(self) -> range:
        return range(self.num_seeds)

    def _result(self, task: EvaluationTask) -> TaskResult:
        runs: dict[str, list[Run]] = {}
        averaged: dict[str, list[Run]] = {}
        horizon_speeds: dict[str, list[float]] = {}
        lrs: dict[str, float] = {}
        recipes: dict[str, Recipe] = {}
        for name, baseline in self.baselines.items():
            lr = 0.0
            if baseline.first_lr is not None:
                lr = lrs[name] = self._tune(task, name, baseline, baseline.first_lr)
            recipes[name] = baseline.make(lr)
            form = _PARAMETERS if baseline.averaged else ""
            runs[name] = [self._run(task, name, recipes[name], seed, lr, form) for seed in self._seeds]
            if baseline.averaged:
                recipes[name] = baseline.averaged(lr)  # what is timed keeps the average, as it does by default
                averaged[name] = [self._run(task, name, recipes[name], seed, lr) for seed in self._seeds]
        for name, baseline in self.baselines.items():
            if baseline.has_horizon:
                horizon_speeds[name] = self._horizon_speeds(task, name, baseline, lrs.get(name, 0.0), runs)
        self.report(f"{task.name}: time of a step")
        key = f"{task.name} {self._sha256} {self._light_sha256} {' '.join(sorted(self.others))}"
        steps = self._steps(task)
        milliseconds = self._kept(f"time {key}", lambda: milliseconds_per_step(task, recipes, steps=steps // 2))
        megabytes = self._kept(
            f"memory {key}", lambda: {name: peak_megabytes(task, r, steps=steps) for name, r in recipes.items()}
        )
        return TaskResult(task.name, runs, lrs, milliseconds, megabytes, averaged, horizon_speeds)

    def _steps(self, task: EvaluationTask) -> int:
        return max(20, round(self.share * task.steps))

    def _tune(self, task: EvaluationTask, name: str, baseline: Baseline, first: float) -> float:
        def score(lr: float) -> float:
            return self._run(task, name, baseline.make(lr), TUNING_SEED, lr).final_loss

        return tune_lr(score, first)

    def _run(self, task: EvaluationTask, name: str, recipe: Recipe, seed: int, lr: float, form: str = "") -> Run:
        steps = self._steps(task)
        key = self._key(task, steps, name, seed, lr, form)
        marks, losses, *rest = self._kept(key, lambda: run_training(task, recipe, steps=steps, seed=seed))
        return Run(tuple(marks), tuple(losses), *rest)

    def _horizon_speeds(
        self, task: EvaluationTask, name: str, baseline: Baseline, lr: float, runs: Mapping[str, list[Run]]
    ) -> list[float]:
        """Horizon speed on each of the first seeds; of runs of other lengths no more than the final loss is kept."""
        recipe, form = baseline.make(lr), _PARAMETERS if baseline.averaged else ""

        def final_loss(speed: float, seed: int) -> float:
            if speed == 1.0:
                return runs[name][seed].final_loss
            steps = max(1, round(self._steps(task) / speed))
            key = f"{self._key(task, steps, name, seed, lr, form)} | final loss"
            run = partial(run_training, task, recipe, steps=steps, seed=seed, only_end=True)
            return float(self._kept(key, lambda: run().final_loss))

        return [
            horizon_speed(partial(final_loss, seed=seed), reference.final_loss)
            for seed, reference in zip(self._seeds[: self.num_horizon_seeds], runs[REFERENCE])
        ]

    def _key(self, task: EvaluationTask, steps: int, name: str, seed: int, lr: float, form: str) -> str:
        """Key under which a run is kept; reports that the run comes next."""
        known = dict.fromkeys(baselines(), "") | {OURS: self._sha256, LIGHT: self._light_sha256}
        digest = known.get(name, self._sha256)  # of what the run depends on
        self.report(f"{task.name}: {name}{form}, {steps} steps, seed {seed}" + (f", lr {lr:.4g}" if lr else ""))
        return f"{task.name} {steps} | {name}{form} {lr:.4g} {digest} | {seed}"

    def _kept(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            value = make()
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")
            self._known[key] = value
        return self._known[key]
