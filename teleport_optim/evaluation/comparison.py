"""A comparison: all tasks, all optimizers, several seeds; kept on disk run by run, so that it can be interrupted."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from teleport_optim.checkpoints import find_checkpoint
from teleport_optim.evaluation.problem import EvaluationTask
from teleport_optim.evaluation.rivals import ABLATIONS, LIGHT, OURS, REFERENCE, Rival, rivals, tuned_rate
from teleport_optim.evaluation.training import (
    Recipe,
    Run,
    milliseconds_per_step,
    peak_megabytes,
    run_training,
    speed_up,
)

__all__ = ["Comparison", "Score", "TaskResult"]

TUNING_SEED = 1000
"""The seed on which rates are tuned; those that are reported are 0, 1, 2, ..."""


@dataclass(frozen=True)
class TaskResult:
    """What one task gave.

    Attributes:
        task: Its name.
        runs: By optimizer, one run for each seed.
        rates: The tuned rates, by optimizer.
        milliseconds: Of a training step, by optimizer, all in one run, of half the length: what is done ever less often counts
            for more than it should.
        megabytes: The most memory that a training step takes, by optimizer.
    """

    task: str
    runs: dict[str, list[Run]]
    rates: dict[str, float]
    milliseconds: dict[str, float]
    megabytes: dict[str, float]

    def median(self, optimizer: str, quantity: Callable[[Run], float]) -> float:
        """The median over seeds of a number."""
        return statistics.median(map(quantity, self.runs[optimizer]))

    def speed_up(self, optimizer: str) -> float:
        """Median over seeds of the speed-up in steps over the reference."""
        return statistics.median(map(speed_up, self.runs[optimizer], self.runs[REFERENCE]))

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
    """What one optimizer reached over all tasks; speed-ups and ratios are geometric means over the reference's.

    Attributes:
        speed_up: In steps.
        wall_clock: In time: speed-up times what a step of the reference costs beside one of this optimizer.
        loss_ratio: Final training loss.
        held_out_ratio: Least held-out loss.
        wins, defeats: Tasks on which it is ahead or behind at every seed in final training loss.
        held_out_defeats: Tasks on which it is behind at every seed in held-out loss.
        diverged: Runs that ended with a loss that is not finite.
    """

    speed_up: float
    wall_clock: float
    loss_ratio: float
    held_out_ratio: float
    wins: int
    defeats: int
    held_out_defeats: int
    diverged: int

    @classmethod
    def of(cls, optimizer: str, results: Iterable[TaskResult]) -> Score:
        """The score of an optimizer."""
        results = list(results)

        def ratio(quantity: Callable[[Run], float]) -> float:
            return _geometric_mean(
                max(result.median(optimizer, quantity), 1e-12) / max(result.median(REFERENCE, quantity), 1e-12)
                for result in results
            )

        outcomes = [result.outcome(optimizer) for result in results]
        return cls(
            _geometric_mean(result.speed_up(optimizer) for result in results),
            _geometric_mean(result.speed_up(optimizer) / result.cost(optimizer) for result in results),
            ratio(lambda run: run.final_loss),
            ratio(lambda run: run.held_out),
            outcomes.count(1),
            outcomes.count(-1),
            sum(result.is_worse_held_out(optimizer) for result in results),
            sum(not math.isfinite(run.losses[-1]) for result in results for run in result.runs[optimizer]),
        )


def _digest(checkpoint: str | Path) -> str:
    return hashlib.sha256(find_checkpoint(checkpoint).read_bytes()).hexdigest()[:12]


def _geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) if value > 0 else -math.inf for value in values))


@dataclass
class Comparison:
    """Runs what is not yet in a folder, and reads what is.

    Attributes:
        folder: Where every run is kept, as a line of JSON.
        tasks: What is trained.
        checkpoint: What the learned optimizer loads.
        num_seeds: Runs of every optimizer on every task.
        share: Length of the runs as a share of the usual.
        others: More optimizers, by name.
        report: Told what is being run.
    """

    folder: Path
    tasks: Mapping[str, EvaluationTask]
    checkpoint: str | Path = "default"
    num_seeds: int = 5
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
    def rivals(self) -> dict[str, Rival]:
        """The optimizers by name."""
        extra = {name: Rival(lambda lr, recipe=recipe: recipe) for name, recipe in self.others.items()}  # type: ignore[misc]
        return rivals(self.checkpoint) | extra

    def results(self) -> list[TaskResult]:
        """Every task's result; what is missing is run."""
        return [self._result(task) for task in self.tasks.values()]

    def ablations(self) -> list[TaskResult]:
        """The learned optimizer with one part taken away at a time, beside the reference; no times."""
        recipes = {name: make(self.checkpoint) for name, make in ABLATIONS.items()}
        results = []
        for task in self.tasks.values():
            full = self._result(task)
            runs = {name: [self._run(task, name, r, seed, 0.0) for seed in self._seeds] for name, r in recipes.items()}
            runs = {REFERENCE: full.runs[REFERENCE], OURS: full.runs[OURS], **runs}
            results.append(TaskResult(task.name, runs, {}, *2 * [dict.fromkeys(runs, 1.0)]))
        return results

    @property
    def _seeds(self) -> range:
        return range(self.num_seeds)

    def _result(self, task: EvaluationTask) -> TaskResult:
        runs: dict[str, list[Run]] = {}
        rates: dict[str, float] = {}
        recipes: dict[str, Recipe] = {}
        for name, rival in self.rivals.items():
            rate = 0.0
            if rival.first_rate is not None:
                rate = rates[name] = self._tuned(task, name, rival, rival.first_rate)
            recipes[name] = rival.make(rate)
            runs[name] = [self._run(task, name, recipes[name], seed, rate) for seed in self._seeds]
        self.report(f"{task.name}: time of a step")
        key = f"{task.name} {self._sha256} {self._light_sha256} {' '.join(sorted(self.others))}"
        steps = self._steps(task)
        milliseconds = self._kept(f"time {key}", lambda: milliseconds_per_step(task, recipes, steps=steps // 2))
        megabytes = self._kept(
            f"memory {key}", lambda: {name: peak_megabytes(task, r, steps=steps) for name, r in recipes.items()}
        )
        return TaskResult(task.name, runs, rates, milliseconds, megabytes)

    def _steps(self, task: EvaluationTask) -> int:
        return max(20, round(self.share * task.steps))

    def _tuned(self, task: EvaluationTask, name: str, rival: Rival, first: float) -> float:
        def score(rate: float) -> float:
            return self._run(task, name, rival.make(rate), TUNING_SEED, rate).final_loss

        return tuned_rate(score, first)

    def _run(self, task: EvaluationTask, name: str, recipe: Recipe, seed: int, rate: float) -> Run:
        steps = self._steps(task)
        known = dict.fromkeys(rivals(), "") | {OURS: self._sha256, LIGHT: self._light_sha256}
        digest = known.get(name, self._sha256)  # of what the run depends on
        key = f"{task.name} {steps} | {name} {rate:.4g} {digest} | {seed}"
        self.report(f"{task.name}: {name}, seed {seed}" + (f", rate {rate:.4g}" if rate else ""))
        marks, losses, *rest = self._kept(key, lambda: run_training(task, recipe, steps=steps, seed=seed))
        return Run(tuple(marks), tuple(losses), *rest)

    def _kept(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            value = make()
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")
            self._known[key] = value
        return self._known[key]
