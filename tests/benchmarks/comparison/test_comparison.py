"""Scores of a comparison, the runs that are kept, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.comparison import comparison as comparison_module
from benchmarks.comparison.__main__ import main
from benchmarks.comparison.baselines import REFERENCE, Baseline, baselines
from benchmarks.comparison.comparison import Comparison, Score, TaskResult
from benchmarks.comparison.report import plot, score_table, task_table
from benchmarks.comparison.task import EvaluationTask
from benchmarks.comparison.training import Run, run_training
from teleport_optim import LearnedTeleportOptimizer
from tests.helpers.evaluation import TASK, run_of


def few(*names: str) -> dict[str, Baseline]:
    return {name: baseline for name, baseline in baselines().items() if name in names}


def test_what_was_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted comparison goes on where it was, a second one runs nothing, and other weights are run anew."""
    calls: list[int] = []

    def counted(*args: object, **kwargs: object) -> Run:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return run_training(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(comparison_module, "run_training", counted)
    monkeypatch.setattr(comparison_module, "baselines", lambda *_: few(REFERENCE, "AdamW default", "learned, untuned"))
    make = lambda **options: Comparison(tmp_path, {"blobs": TASK}, num_seeds=3, **options)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        make().results()
    (result,) = make().results()
    assert set(result.runs) == {REFERENCE, "AdamW default", "learned, untuned"}
    assert all(len(runs) == 3 for runs in result.runs.values())
    num_calls = len(calls)
    (again,) = make().results()
    assert len(calls) == num_calls
    assert again == result
    make(checkpoint="light").results()
    own = len(calls) - num_calls
    assert own >= 6, "three of the parameters, three of their average, others for the horizon speed"
    other = make(others={"mine": lambda model, steps: torch.optim.Adagrad(model.parameters(), lr=0.05)})
    assert list(other.results()[0].runs)[-1] == "mine"
    assert len(calls) >= num_calls + own + 3
    num_calls = len(calls)
    other.results()
    assert len(calls) == num_calls


def test_horizon_speeds_are_those_of_runs_that_are_told_their_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of optimizers whose final loss is a constant over the length; who is not told one has no such speed."""
    constants = {"reference": 40.0, "fast": 20.0, "slow": 50.0, "open": 8.0}
    made: list[tuple[str, int, int]] = []

    def made_up(task: EvaluationTask, recipe: Any, *, steps: int, seed: int, only_end: bool = False) -> Run:
        made.append((recipe, steps, seed))
        return Run((0, steps // 2, steps), tuple(constants[recipe] / step for step in (1, steps / 2, steps)), 1.0, 0.0)

    entrants = {
        REFERENCE: Baseline(lambda lr: "reference", has_horizon=True),
        "fast": Baseline(lambda lr: "fast", has_horizon=True, averaged=lambda lr: "open"),
        "slow": Baseline(lambda lr: "slow", has_horizon=True),
        "endless": Baseline(lambda lr: "open"),
    }
    monkeypatch.setattr(comparison_module, "run_training", made_up)
    monkeypatch.setattr(comparison_module, "baselines", lambda *_: entrants)
    for name in ("milliseconds_per_step", "peak_megabytes"):
        monkeypatch.setattr(comparison_module, name, lambda *args, **options: dict.fromkeys(entrants, 1.0))
    task = dataclasses.replace(TASK, steps=60)
    (result,) = Comparison(tmp_path, {"blobs": task}, num_seeds=5, num_horizon_seeds=2).results()
    assert result.horizon_speeds == {REFERENCE: [1.0, 1.0], "fast": [2.0, 2.0], "slow": [pytest.approx(0.8)] * 2}
    assert [result.horizon_speed(name) for name in entrants] == [1.0, 2.0, pytest.approx(0.8), None]
    assert {name: len(runs) for name, runs in result.averaged.items()} == {"fast": 5}
    assert result.open_ended_speed("fast") == 2.0
    assert sorted({steps for recipe, steps, _ in made if recipe == "fast"}) == [24, 30, 40, 60]
    assert sorted({steps for recipe, steps, _ in made if recipe == "slow"}) == [60, 90]
    assert {steps for recipe, steps, _ in made if recipe == "open"} == {60}
    num_runs = len(made)
    (again,) = Comparison(tmp_path, {"blobs": task}, num_seeds=5, num_horizon_seeds=2).results()
    assert (again, len(made)) == (result, num_runs)


def result_of(name: str, losses: dict[str, list[list[float]]]) -> TaskResult:
    runs = {key: [run_of(values) for values in seeds] for key, seeds in losses.items()}
    return TaskResult(name, runs, {REFERENCE: 0.01}, {key: float(len(key)) for key in runs}, dict.fromkeys(runs, 1.0))


def test_scores_are_geometric_means_and_count_what_is_beyond_noise() -> None:
    reference = [[5.0, 4.0, 3.0, 2.0, 1.0]] * 3
    results = [
        result_of("first", {REFERENCE: reference, "ours": [[5.0, 2.0, 1.0, 0.5, 0.4]] * 3}),
        result_of("second", {REFERENCE: reference, "ours": [[5.0, 4.5, 4.0, 3.5, 3.0]] * 3}),
        result_of("third", {REFERENCE: reference, "ours": [[5.0, 4.0, 3.0, 2.0, 0.9], *reference[1:]]}),
        result_of("fourth", {REFERENCE: reference, "ours": [[5.0, 4.0, 3.0, 2.0, math.inf], *reference[1:]]}),
    ]
    score = Score.of("ours", results[:3])
    assert score.open_ended_speed == pytest.approx((2.0 * 0.5 * 1.0) ** (1 / 3))
    assert (score.horizon_speed, score.wall_clock) == (None, None)
    assert (score.wins, score.defeats, score.held_out_defeats, score.diverged) == (1, 1, 1, 0)
    assert Score.of(REFERENCE, results) == Score(None, None, 1.0, 1.0, 1.0, 0, 0, 0, 0)
    assert Score.of("ours", results).diverged == 1
    table = score_table(results[:3])
    assert f"| ours | - | - | {score.open_ended_speed:.2f} |" in table
    assert "horizon speed" not in score_table(results[:3], with_horizon=False)
    assert f"| ours | {score.open_ended_speed:.2f} |" in score_table(results[:3], with_horizon=False)
    assert "| 0.01 |" in task_table(results[0])


@pytest.mark.parametrize(
    ("speeds", "mark"),
    [([2.0, 3.0], ""), ([4.0, 3.0], "≥ "), ([0.5, 2.0], "≤ "), ([4.0, 0.5], "≈ ")],
)
def test_horizon_speeds_come_first_and_what_is_beyond_is_marked(speeds: list[float], mark: str) -> None:
    runs = {REFERENCE: [[5.0, 1.0]] * 3, "ours": [[5.0, 0.5]] * 3, "endless": [[5.0, 0.5]] * 3}
    results = [
        dataclasses.replace(
            result_of(str(speed), runs), horizon_speeds={REFERENCE: [1.0] * 3, "ours": [0.1, speed, 9.0]}
        )
        for speed in speeds
    ]
    score, mean = Score.of("ours", results), math.sqrt(math.prod(speeds))
    assert score.horizon_speed == pytest.approx(mean)
    assert score.wall_clock == pytest.approx(mean * len(REFERENCE) / len("ours"))
    assert (score.beyond, score.below) == (speeds.count(4.0), speeds.count(0.5))
    table = score_table(results)
    assert f"| ours | {mark}{score.horizon_speed:.2f} | {mark}{score.wall_clock:.2f} | " in table
    assert f"| {REFERENCE} | 1.00 | 1.00 | 1.00 |" in table
    assert "| endless | - | - | " in table
    own = {4.0: "≥ 4.00", 0.5: "≤ 0.50"}.get(speeds[0], f"{speeds[0]:.2f}")
    assert f"| {own} | " in task_table(results[0])


def test_reports_are_drawn(tmp_path: Path) -> None:
    losses = {REFERENCE: [[5.0, 1.0]], "learned, untuned": [[5.0, 0.5]], "endless": [[5.0, 0.6]]}
    speeds = {REFERENCE: [1.0], "learned, untuned": [2.0]}
    results = [dataclasses.replace(result_of(name, losses), horizon_speeds=speeds) for name in ("a", "b")]
    plot(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def my_optimizer(model: nn.Module, steps: int) -> LearnedTeleportOptimizer:
    return LearnedTeleportOptimizer.for_model(model, total_steps=steps, teleport=False)


OWN = f"{__name__}:my_optimizer"


@pytest.mark.slow
def test_the_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--task", "ill_conditioned", "--output", str(tmp_path)]
    assert main([*arguments, "--ablations", "--optimizer", OWN]) == 0
    report = (tmp_path / "report.md").read_text()
    assert OWN in report
    assert "linear controller" in report
    scores = json.loads((tmp_path / "results.json").read_text())
    assert scores["All tasks"][REFERENCE]["horizon_speed"] == 1.0
    assert scores["All tasks"][REFERENCE]["open_ended_speed"] == 1.0
    assert scores["All tasks"]["AdamW default"]["horizon_speed"] is None
    assert scores["All tasks"][OWN]["horizon_speed"] >= 0.5
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "curves.png",
        "report.md",
        "results.json",
        "runs.jsonl",
    ]
    assert "horizon speed" in capsys.readouterr().out


def test_mistakes_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--task", "nothing"], "no task 'nothing': there are"),
        (["--optimizer", "math:pi"], "math:pi is not callable, but float"),
        (["--checkpoint", "nothing"], "no checkpoint"),
        (["--suite", "images", "--data", str(tmp_path)], "the data set MNIST is not in"),
    ):
        assert main(["--quick", "--output", str(tmp_path / "report"), *arguments]) == 2
        assert message in capsys.readouterr().err
