"""Experiment 1: do teleports on an ellipse point along its short axis?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.paper.families import label, tested_schedule
from benchmarks.paper.figures import line_figure
from benchmarks.paper.functions import FunctionProblem
from benchmarks.paper.harness import Study, gradients, largest_gradient, orbit_points
from benchmarks.paper.tables import markdown, number, percent

__all__ = ["alignment", "run", "short_axis", "tables"]

_FAMILIES = ("ellipse_fixed", "ellipse")
_VARIANTS = (("update+teleport", False), ("update+teleport", True), ("lr+teleport", False))
_SMALLEST_MOVE = 1e-3
_NUM_RANDOM = 16


def short_axis(problem: FunctionProblem) -> Tensor:
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
    """The directions of learned teleports, and of random and exact ones from the same points."""
    results: dict[str, Any] = {}
    cosines: dict[str, Any] = {}
    for task in _FAMILIES:
        problem, steps = study.problem(task), tested_schedule(study)
        for variant, theta in _VARIANTS:
            path = study.few.test(study.config(task, variant, theta_gradient=theta))
            # All meta-seeds and steps of a function side by side: [functions, points, 2].
            before, learned = (
                part[:, :, steps].transpose(0, 1).flatten(1, 2) for part in (path.before, path.points[:, :, 1:])
            )
            exact = torch.stack([largest_gradient(problem, x) for x in before.unbind(1)], dim=1)
            random = torch.cat([orbit_points(problem, x, _NUM_RANDOM + 1)[:, 1:] for x in before.unbind(1)], dim=1)
            repeated = before.repeat_interleave(_NUM_RANDOM, dim=1)
            name = f"{task}: {label(variant, theta)}"
            results[name], cosines[name] = {}, {}
            for kind, start, end in (
                ("learned", before, learned),
                ("exact", before, exact),
                ("random angle", repeated, random),
            ):
                results[name][kind], cosines[name][kind] = _measure(problem, start, end)
    shares = torch.linspace(0.0, 1.0, 101)
    lines = {
        name: {kind: (torch.quantile(values, shares), shares) for kind, values in kinds.items() if len(values)}
        for name, kinds in cosines.items()
    }
    line_figure(study.out / "ellipse_directions.png", "|cos| with the short axis", "share of teleports below", lines)
    return results


def _measure(problem: FunctionProblem, before: Tensor, after: Tensor) -> tuple[dict[str, float], Tensor]:
    """Of teleports ``[functions, points, 2]``: medians, and the alignments of those that moved, at most 100000."""
    assert problem.optimum is not None
    axis = short_axis(problem)[:, None]
    length = (after - before).norm(dim=-1) / (before - problem.optimum[:, None]).norm(dim=-1)
    grads = [gradients(problem, points) for points in (before, after)]
    moved = torch.isfinite(length) & (length > _SMALLEST_MOVE)
    directions = alignment(after - before, axis)[moved]
    tangent = grads[0].flip(-1) * torch.tensor([1.0, -1.0])
    return {
        "teleports": float(moved.numel()),
        "moved": float(moved.double().mean()),
        "length": _median(length),
        "direction": _median(directions),
        "tangent": _median(alignment(tangent, axis)[moved]),
        "gradient_before": _median(alignment(grads[0], axis)[moved]),
        "gradient_after": _median(alignment(grads[1], axis)[moved]),
        "raised": float((grads[1].norm(dim=-1) > grads[0].norm(dim=-1))[moved].double().mean()),
    }, directions[:100_000]


def _median(x: Tensor) -> float:
    x = x[torch.isfinite(x)]
    return float(x.median()) if len(x) else float("nan")


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The table of the report."""
    rows = [
        [
            name,
            kind,
            percent(entry["moved"]),
            number(entry["length"]),
            number(entry["direction"]),
            number(entry["tangent"]),
            number(entry["gradient_before"]),
            number(entry["gradient_after"]),
            percent(entry["raised"]),
        ]
        for name, kinds in results.items()
        for kind, entry in kinds.items()
    ]
    columns = ["family: LSTM emits", "teleport", "moved", "length", "direction", "tangent"]
    columns += ["gradient before", "gradient after", "raised the gradient"]
    return {"ellipse_directions": markdown(columns, rows)}
