"""A comparison as Markdown tables and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from teleport_optim.evaluation.comparison import Score, TaskResult
from teleport_optim.evaluation.rivals import OURS, REFERENCE

__all__ = ["plot", "score_table", "task_table"]


def score_table(results: Sequence[TaskResult], *, with_times: bool = True) -> str:
    """One row for every optimizer over all tasks."""
    headings = ["optimizer", "speed-up in steps", "in wall-clock", "final loss, ratio", "held-out loss, ratio"]
    headings += ["ahead / behind", "behind held-out", "diverged runs"]
    rows = []
    for name in results[0].runs:
        score = Score.of(name, results)
        rows.append(
            [
                name,
                f"{score.speed_up:.2f}",
                f"{score.wall_clock:.2f}",
                f"{score.loss_ratio:.3f}",
                f"{score.held_out_ratio:.3f}",
                f"{score.wins} / {score.defeats}",
                str(score.held_out_defeats),
                str(score.diverged),
            ]
        )
    if not with_times:
        headings, rows = headings[:2] + headings[3:], [row[:2] + row[3:] for row in rows]
    return _markdown(headings, rows)


def task_table(result: TaskResult) -> str:
    """One row for every optimizer on one task; medians over seeds, and the lowest and highest final loss."""
    headings = ["optimizer", "rate", "final loss", "lowest to highest", "held-out loss", "speed-up in steps"]
    headings += ["ms per step", "peak memory, MB", "set-up, s"]
    rows = []
    for name, runs in result.runs.items():
        finals = [run.final_loss for run in runs]
        rows.append(
            [
                name,
                f"{result.rates[name]:.3g}" if name in result.rates else "",
                f"{statistics.median(finals):.4g}",
                f"{min(finals):.4g} to {max(finals):.4g}",
                f"{result.median(name, lambda run: run.held_out):.4g}",
                f"{result.speed_up(name):.2f}",
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
    """Median training loss over steps on every task, and the performance profile: on how many tasks a speed-up is reached."""
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
        speeds = sorted((result.speed_up(name) for result in results), reverse=True)
        shares = [(rank + 1) / len(speeds) for rank in range(len(speeds))]
        profile.step([*speeds, 0.1], [*shares, 1.0], where="post", label=name, **_style(name, index))
    profile.set(title="share of tasks with at least this speed-up", xscale="log", xlabel="speed-up in steps")
    ticks = (0.25, 0.5, 1, 2, 4, 8)
    profile.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    profile.set_xticks([], minor=True)
    profile.set_xlim(0.2, 8.0)
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
