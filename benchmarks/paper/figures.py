"""Trajectories on level sets, and loss curves with bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.paper.functions import FunctionProblem
from benchmarks.paper.harness import Trajectory

__all__ = ["draw_curves", "draw_trajectories", "line_figure"]

_DPI = 100
_LOWEST = 1e-12


def draw_curves(path: Path, panels: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Medians of losses ``[..., steps + 1]`` over all runs, with the middle half shaded; one panel for each family.

    A curve whose name ends in "off" is drawn as the one before it, dashed and without a band.
    """
    import matplotlib.pyplot as plt

    num_rows = (len(panels) + 1) // 2
    figure, axes = plt.subplots(num_rows, 2, figsize=(9.0, 3.4 * num_rows), squeeze=False, sharex=True)
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        number = -1
        for name, losses in curves.items():
            is_off = name.endswith(" off")
            number += not is_off
            ordered = losses.reshape(-1, losses.shape[-1]).sort(dim=0).values.clamp(min=_LOWEST)
            low, median, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
            steps, color = np.arange(len(median)), f"C{number}"
            axis.plot(steps, median, "--" if is_off else "-", color=color, label=name, linewidth=1.4)
            if not is_off:
                shown = torch.isfinite(high).numpy()
                axis.fill_between(steps, low, high, where=shown, color=color, alpha=0.1, linewidth=0)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("loss")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes.flat[0].legend(fontsize=7)
    _save(path, figure)


def draw_trajectories(
    path: Path,
    panels: Mapping[str, tuple[FunctionProblem, int, Mapping[str, Trajectory]]],
    corners: Sequence[float] = (),
) -> None:
    """Paths over the level sets of one function each; teleports are dashed, the dots are points between steps.

    Args:
        path: The file.
        panels: By title: functions, the number of the one that is drawn, and trajectories ``[num_functions]`` by name.
        corners: Left, right, bottom and top; by default what the paths need.
    """
    import matplotlib.pyplot as plt

    num_rows = (len(panels) + 1) // 2
    figure, axes = plt.subplots(num_rows, 2, figsize=(8.0, 3.7 * num_rows), squeeze=False)
    for axis, (title, (problem, index, paths)) in zip(axes.flat, panels.items()):
        points = {name: (path.points[index], path.before[index]) for name, path in paths.items()}
        box = list(corners) or _box(torch.cat([part for pair in points.values() for part in pair]))
        _draw_levels(axis, problem, index, box)
        for number, (name, (ends, before)) in enumerate(points.items()):
            color = f"C{number}"
            axis.plot(*ends.T, ".", color=color, markersize=4, label=name)
            for start, middle, end in zip(ends[:-1], before, ends[1:]):
                axis.plot(*torch.stack([start, middle]).T, "-", color=color, linewidth=0.9)
                axis.plot(*torch.stack([middle, end]).T, "--", color=color, linewidth=0.9)
        if problem.optimum is not None:
            axis.plot(*problem.optimum[index], "k*", markersize=8)
        axis.set_xlim(box[0], box[1])
        axis.set_ylim(box[2], box[3])
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=7)
    _save(path, figure)


def line_figure(
    path: Path, x_label: str, y_label: str, panels: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]
) -> None:
    """Plain lines ``(x, y)`` by name, one panel for each title."""
    import matplotlib.pyplot as plt

    num_columns = min(2, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=(4.5 * num_columns, 3.2 * num_rows), squeeze=False)
    for axis, (title, lines) in zip(axes.flat, panels.items()):
        for name, (x, y) in lines.items():
            axis.plot(x, y, label=name, linewidth=1.4)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=7)
    _save(path, figure)


def _box(points: Tensor) -> list[float]:
    points = points[torch.isfinite(points).all(dim=1)].clamp(-20.0, 20.0)
    low, high = points.min(dim=0).values, points.max(dim=0).values
    margin = 0.15 * (high - low).clamp(min=1.0)
    low, high = low - margin, high + margin
    return [float(low[0]), float(high[0]), float(low[1]), float(high[1])]


def _draw_levels(axis: object, problem: FunctionProblem, index: int, box: Sequence[float]) -> None:
    grid = torch.cartesian_prod(torch.linspace(box[0], box[1], 120), torch.linspace(box[2], box[3], 120))
    inputs, targets = problem.sample_batch(torch.Generator())
    inputs, targets = inputs[index].expand(len(grid), -1), targets[index].expand(len(grid))
    values = problem.losses({"x": grid}, inputs, targets).reshape(120, 120)
    x, y = (part.reshape(120, 120) for part in grid.unbind(-1))
    levels = np.geomspace(1e-2, 1e3, 8)
    axis.contour(x, y, values, levels=levels, colors="0.8", linewidths=0.6)  # type: ignore[attr-defined]


def _save(path: Path, figure: object) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()  # type: ignore[attr-defined]
    figure.savefig(path, dpi=_DPI)  # type: ignore[attr-defined]
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # A third of the size.
    plt.close(figure)  # type: ignore[arg-type]
