"""Markdown tables and pictures of a comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparison.baselines import LIGHT, OURS, REFERENCE
from benchmarks.comparison.comparison import Score, TaskResult
from benchmarks.comparison.training import FASTEST, SLOWEST

__all__ = ["brief_table", "plot", "score_table", "task_table"]

BRIEF = (REFERENCE, "Muon + AdamW cosine, tuned", "Schedule-Free AdamW, tuned", LIGHT, OURS)
"""Optimizers of the table for readers in a hurry."""


def score_table(results: Sequence[TaskResult], *, with_horizon: bool = True) -> str:
    """Table with one row for every optimizer over all tasks; for ablations without the horizon speed and its wall-clock.

    A mean with a task that counts as 4 because it is beyond is marked "≥", one with a task that counts as 1/2 because it is
    below "≤", one with both "≈".
    """
    kind = "open-ended speed" if with_horizon else "speed of one run"
    headings = ["optimizer", "horizon speed", "in wall-clock", f"{kind} (in the average)", "final loss, ratio"]
    headings += ["held-out loss, ratio", "ahead / behind", "diverged"]
    rows = []
    for name in results[0].runs:
        score = Score.of(name, results)
        mark = _mark(is_least=score.beyond > 0, is_most=score.below > 0)
        rows.append(
            [
                name,
                "-" if score.horizon_speed is None else f"{mark}{score.horizon_speed:.2f}",
                "-" if score.wall_clock is None else f"{mark}{score.wall_clock:.2f}",
                f"{score.open_ended_speed:.2f}",
                f"{score.loss_ratio:.3f}",
                f"{score.held_out_ratio:.3f}",
                f"{score.wins} / {score.defeats}",
                str(score.diverged),
            ]
        )
    if not with_horizon:
        headings, *rows = [row[:1] + row[3:] for row in (headings, *rows)]
    return _markdown(headings, rows)


def brief_table(results: Sequence[TaskResult]) -> str:
    """Table of the optimizers with a horizon speed, and of the reference's closest rivals; for readers in a hurry."""
    rows = []
    for name in BRIEF:
        score = Score.of(name, results)
        mark = _mark(is_least=score.beyond > 0, is_most=score.below > 0)
        speeds = (score.horizon_speed, score.wall_clock)
        shown = ["-" if speed is None else f"{mark}{speed:.2f}" for speed in speeds]
        rows.append([name, *shown, f"{score.loss_ratio:.2f}", f"{score.held_out_ratio:.2f}"])
    return _markdown(["optimizer", "horizon speed", "in wall-clock", "final loss", "held-out loss"], rows)


def _mark(*, is_least: bool, is_most: bool) -> str:
    return {(True, False): "≥ ", (False, True): "≤ ", (True, True): "≈ "}.get((is_least, is_most), "")


def task_table(result: TaskResult) -> str:
    """Table with one row for every optimizer on one task; medians over seeds, and the lowest and highest final loss."""
    headings = ["optimizer", "rate", "final loss", "lowest to highest", "held-out loss"]
    headings += ["horizon speed", "open-ended speed", "ms per step", "peak memory, MB", "set-up, s"]
    rows = []
    for name, runs in result.runs.items():
        finals = [run.final_loss for run in runs]
        speed = result.horizon_speed(name)
        rows.append(
            [
                name,
                f"{result.lrs[name]:.3g}" if name in result.lrs else "",
                f"{statistics.median(finals):.4g}",
                f"{min(finals):.4g} to {max(finals):.4g}",
                f"{result.median(name, lambda run: run.held_out):.4g}",
                "-" if speed is None else f"{_mark(is_least=speed >= FASTEST, is_most=speed <= SLOWEST)}{speed:.2f}",
                f"{result.open_ended_speed(name):.2f}",
                f"{result.milliseconds[name]:.2f}",
                f"{result.megabytes[name]:.2f}",
                f"{result.median(name, lambda run: run.setup_seconds):.2f}",
            ]
        )
    return _markdown(headings, rows)


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def plot(results: Sequence[TaskResult], path: Path) -> None:
    """Draw the median training loss on every task, and the performance profile: on how many a horizon speed is reached."""
    from matplotlib.figure import Figure

    columns = min(4, len(results) + 1)
    rows = math.ceil((len(results) + 1) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    names = list(results[0].runs)
    for axes, result in zip(grid, results):
        for index, name in enumerate(names):
            runs = result.runs[name]
            curve = [statistics.median(losses) for losses in zip(*(run.losses for run in runs))]
            axes.plot(runs[0].steps, curve, label=name, **_style(name, index))
        axes.set(title=result.task, yscale="log", xlabel="steps")
        lowest = min(result.median(name, lambda run: min(run.losses)) for name in names)
        axes.set_ylim(bottom=0.8 * lowest if lowest > 0 else None, top=1.3 * result.runs[REFERENCE][0].losses[0])
    profile = grid[len(results)]
    for index, name in enumerate(names):
        measured = [speed for result in results if (speed := result.horizon_speed(name)) is not None]
        if not measured:
            continue
        speeds = sorted(measured, reverse=True)
        shares = [(rank + 1) / len(speeds) for rank in range(len(speeds))]
        profile.step([*speeds, 0.1], [*shares, 1.0], where="post", label=name, **_style(name, index))
    profile.set(title="share of tasks with at least this speed", xscale="log", xlabel="horizon speed")
    ticks = (0.5, 1, 2, 4)
    profile.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    profile.set_xticks([], minor=True)
    profile.set_xlim(0.45, 4.4)
    for axes in grid[len(results) + 1 :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=90)


def _style(name: str, index: int) -> dict[str, Any]:
    return {
        "color": f"C{index}",
        "linewidth": 2.2 if name == OURS else 1.1,
        "linestyle": "--" if name == REFERENCE else "-",
    }
