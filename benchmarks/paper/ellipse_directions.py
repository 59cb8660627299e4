"""Experiment 1: do teleports on an ellipse point along its short axis?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.paper.families import label, tested_schedule
from benchmarks.paper.figures import line_figure
from benchmarks.paper.harness import Study, gradient_descent, gradients, largest_gradient, orbit_points
from benchmarks.paper.tables import markdown, number, percent
from teleport_optim.tasks.problem import InnerProblem

__all__ = ["run", "short_axis", "tables"]

_FAMILIES = ("ellipse_fixed", "ellipse")
_VARIANTS = (("update+teleport", False), ("update+teleport", True))
_SMALLEST_MOVE = 1e-3


def short_axis(problem: InnerProblem) -> Tensor:
    """Unit vectors along the short axes of the level sets of ``|A x + b|^2``, ``[functions, 2]``."""
    coefficients, _ = problem.sample_batch(torch.Generator())
    matrix = coefficients[:, :4].reshape(-1, 2, 2)
    axis: Tensor = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, :, 1]
    return axis


def alignment(vectors: Tensor, axis: Tensor) -> Tensor:
    """``|cos|`` of the angle between vectors ``[..., 2]`` and axes; NaN for vectors of no length."""
    cosine: Tensor = (vectors * axis).sum(dim=-1) / vectors.norm(dim=-1)
    return cosine.abs()


def run(study: Study) -> dict[str, Any]:
    """The directions of learned, random and exact teleports, from the same kind of points."""
    results: dict[str, Any] = {}
    histograms = {}
    for task in _FAMILIES:
        problem, steps = study.problem(task), tested_schedule(study)
        axis = short_axis(problem)
        entries, cosines = {}, {}
        for variant, theta in _VARIANTS:
            path = study.test(study.config(task, variant, theta_gradient=theta))
            before, after = path.before[:, :, steps], path.points[:, :, 1:][:, :, steps]
            scale = (before - problem.optimum[:, None]).norm(dim=-1) if problem.optimum is not None else 1.0
            measured, directions = _measure(problem, before, after, axis, scale)
            entries[label(variant, theta)], cosines[label(variant, theta)] = measured, directions
        path = gradient_descent(problem, study.best_rate(task), study.num_steps)
        points = path.points[:, steps]
        origin = problem.optimum[:, None] if problem.optimum is not None else 0.0
        scale = (points - origin).norm(dim=-1)
        exact = torch.stack([largest_gradient(problem, x) for x in points.unbind(1)], dim=1)
        entries["exact"], _ = _measure(problem, points[None], exact[None], axis, scale[None])
        random = torch.stack([orbit_points(problem, x, 24)[:, 1:] for x in points.unbind(1)], dim=1).flatten(1, 2)
        repeated = points.repeat_interleave(23, dim=1)
        entries["random"], cosines["random angle"] = _measure(
            problem, repeated[None], random[None], axis, scale.repeat_interleave(23, dim=1)[None]
        )
        results[task] = entries
        shares = torch.linspace(0.0, 1.0, 101)
        histograms[task] = {
            name: (torch.quantile(values, shares), shares) for name, values in cosines.items() if len(values)
        }
    line_figure(
        study.out / "ellipse_directions.png", "|cos| with the short axis", "share of teleports below", histograms
    )
    return results


def _measure(
    problem: InnerProblem, before: Tensor, after: Tensor, axis: Tensor, scale: Tensor | float
) -> tuple[dict[str, float], Tensor]:
    """Of teleports ``[seeds, functions, teleports, 2]``: medians, and the alignments of those that moved."""
    axis = axis[:, None]
    length = (after - before).norm(dim=-1) / scale
    moved = torch.isfinite(length) & (length > _SMALLEST_MOVE)
    directions = alignment(after - before, axis)[moved]
    tangents = torch.stack([gradients(problem, x) for x in before]).flip(-1) * torch.tensor([1.0, -1.0])
    gradient_before = alignment(torch.stack([gradients(problem, x) for x in before]), axis)
    gradient_after = alignment(torch.stack([gradients(problem, x) for x in after]), axis)
    return {
        "moved": float(moved.double().mean()),
        "length": _median(length[torch.isfinite(length)]),
        "direction": _median(directions),
        "tangent": _median(alignment(tangents, axis)[moved]),
        "gradient_before": _median(gradient_before[moved]),
        "gradient_after": _median(gradient_after[moved]),
    }, directions


def _median(x: Tensor) -> float:
    x = x[torch.isfinite(x)]
    return float(x.median()) if len(x) else float("nan")


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The table of the report."""
    rows = [
        [
            task,
            name,
            percent(entry["moved"]),
            number(entry["length"]),
            number(entry["direction"]),
            number(entry["tangent"]),
            number(entry["gradient_before"]),
            number(entry["gradient_after"]),
        ]
        for task, entries in results.items()
        for name, entry in entries.items()
    ]
    columns = ["family", "teleport", "moved", "length", "direction", "tangent", "gradient before", "gradient after"]
    return {"ellipse_directions": markdown(columns, rows)}
