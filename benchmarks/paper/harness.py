"""Following rules and baselines over test functions: all runs are kept, and every teleport with where it began and ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.paper.functions import FUNCTIONS, FunctionProblem, task_path
from benchmarks.paper.orbits import Orbit
from benchmarks.paper.training import PAPER, PaperConfig, family_of, rule_of, train
from teleport_optim.meta_training.unroll import EXPLOSION, init_unroll, unroll
from teleport_optim.rng import generator_for

__all__ = [
    "NEVER",
    "RATES",
    "Study",
    "Teleports",
    "Trajectory",
    "adam",
    "comparison",
    "distance",
    "follow",
    "gradient_descent",
    "gradients",
    "largest_gradient",
    "orbit_points",
    "random_angle",
    "summary",
    "teleport_facts",
]

NEVER = (-1,)
"""The teleport steps of a rule whose teleports are off."""

RATES: tuple[float, ...] = tuple(10.0 ** (k / 4) for k in range(-16, 3))
"""Four to a decade, from 1e-4 to 3."""


Teleports = Literal["learned", "off", "random"]
"""Uses of the teleports of trained weights."""


class Trajectory(NamedTuple):
    """Runs of one rule; the leading axes are those of the runs."""

    points: Tensor
    """Before the first and after every step, ``[..., steps + 1, dim]``."""
    losses: Tensor
    """At the points, ``[..., steps + 1]``; infinite once a run has exploded."""
    before: Tensor
    """Point where the teleport of a step began, ``[..., steps, dim]``; the point after the step if there was none."""

    @property
    def final(self) -> Tensor:
        """The last losses, ``[...]``."""
        return self.losses[..., -1]


class _Watched(Orbit):
    """An orbit that keeps where its last move began and ended, and can be told where to go.

    Attributes:
        ordered: Coordinates that replace those of moves that are not differentiated.
    """

    def __init__(self, orbit: Orbit) -> None:
        self.orbit, self.num_coordinates = orbit, orbit.num_coordinates
        self.before = self.after = torch.empty(0)
        self.ordered: Tensor | None = None

    def move(self, coordinates: Tensor, x: Tensor, coefficients: Tensor) -> Tensor:
        if self.ordered is not None and not coordinates.requires_grad:
            coordinates = self.ordered
        after = self.orbit.move(coordinates, x, coefficients)
        self.before, self.after = x.detach(), after.detach()
        return after


def follow(
    config: PaperConfig, flat: Tensor, problem: FunctionProblem, num_steps: int, angles: torch.Generator | None = None
) -> Trajectory:
    """Run the rule of a configuration with the weights ``flat`` on all functions of a problem.

    Args:
        config: The configuration.
        flat: Its weights, ``[num_parameters]``.
        problem: The functions.
        num_steps: How many steps.
        angles: Draws the angles of SO(2) that replace what the rule emits, uniformly.

    Raises:
        RuntimeError: if the point after a step is not where its teleport ended.
    """
    watched = _Watched(problem.orbit)
    rule, problem = rule_of(config, problem), replace(problem, orbit=watched)
    runs = init_unroll(rule, problem, 1)
    weights = rule.unflatten(flat)
    points, losses, before = [runs.params["x"]], [_losses(problem, runs.params["x"])], []
    teleports = "teleport" in config.variant
    with torch.no_grad():
        for step in range(num_steps):
            if angles is not None:
                watched.ordered = 2.0 * math.pi * torch.rand(problem.num_problems, 1, generator=angles)
            result = unroll(rule, weights, problem, runs, 1, lambda step: torch.Generator())
            runs = result.runs
            point = runs.params["x"]
            is_moved = teleports and (not config.teleport_steps or step in config.teleport_steps)
            if is_moved:
                if not torch.equal(watched.after.nan_to_num(), point.nan_to_num()):
                    raise RuntimeError(f"the teleport of step {step} was not applied")
                before.append(watched.before)
            else:
                before.append(point)
            points.append(point)
            losses.append(result.losses[:, 0])
    return Trajectory(torch.stack(points, dim=1), torch.stack(losses, dim=1), torch.stack(before, dim=1))


def _coefficients(problem: FunctionProblem) -> tuple[Tensor, Tensor]:
    return problem.sample_batch(torch.Generator())


def _losses(problem: FunctionProblem, x: Tensor) -> Tensor:
    return problem.losses({"x": x}, *_coefficients(problem))


def gradients(problem: FunctionProblem, x: Tensor) -> Tensor:
    """Gradients at ``x`` of shape ``[functions, dim]`` or, for several points of every function, ``[functions, ..., dim]``."""
    inputs, targets = _coefficients(problem)
    per_function = math.prod(x.shape[1:-1])
    inputs, targets = inputs.repeat_interleave(per_function, dim=0), targets.repeat_interleave(per_function, dim=0)
    grads, _ = problem.gradients({"x": x.reshape(-1, x.shape[-1])}, inputs, targets)
    return grads["x"].reshape(x.shape)


def orbit_points(problem: FunctionProblem, x: Tensor, num_angles: int = 360) -> Tensor:
    """Points of the SO(2) orbit through ``x``, at equal angles from 0: ``[functions, num_angles, 2]``."""
    angles = torch.arange(num_angles) * (2.0 * math.pi / num_angles)
    inputs, _ = _coefficients(problem)
    return problem.orbit.move(angles[None, :, None], x[:, None], inputs[:, None])


def largest_gradient(problem: FunctionProblem, x: Tensor) -> Tensor:
    """The point of the SO(2) orbit through ``x`` with the largest gradient: the teleport that the theory asks for."""
    orbit = orbit_points(problem, x)
    norms = gradients(problem, orbit).norm(dim=-1).nan_to_num(nan=-1.0, posinf=-1.0)
    best = norms.argmax(dim=1)
    return orbit[torch.arange(len(x)), best]


Teleport = Callable[[FunctionProblem, Tensor], Tensor]
"""Where the points ``[functions, dim]`` of a problem go."""


def random_angle(generator: torch.Generator) -> Teleport:
    """Teleports by uniform angles of SO(2)."""

    def move(problem: FunctionProblem, x: Tensor) -> Tensor:
        angles = 2.0 * math.pi * torch.rand(len(x), 1, generator=generator)
        return problem.orbit.move(angles, x, _coefficients(problem)[0])

    return move


def gradient_descent(
    problem: FunctionProblem,
    rate: float,
    num_steps: int,
    teleport_steps: Sequence[int] = NEVER,
    teleport: Teleport = largest_gradient,
) -> Trajectory:
    """Gradient descent that teleports after ``teleport_steps``."""

    def step(x: Tensor, number: int) -> Tensor:
        return x - rate * gradients(problem, x)

    return _iterate(problem, step, num_steps, teleport_steps, teleport)


def adam(problem: FunctionProblem, rate: float, num_steps: int) -> Trajectory:
    """Adam with the usual constants."""
    first = second = torch.zeros_like(problem.params["x"])

    def step(x: Tensor, number: int) -> Tensor:
        nonlocal first, second
        grad = gradients(problem, x)
        first, second = torch.lerp(grad, first, 0.9), torch.lerp(grad.square(), second, 0.999)
        corrected = (second / (1.0 - 0.999 ** (number + 1))).sqrt() + 1e-8
        return x - rate * first / (1.0 - 0.9 ** (number + 1)) / corrected

    return _iterate(problem, step, num_steps, NEVER, largest_gradient)


def _iterate(
    problem: FunctionProblem,
    step: Callable[[Tensor, int], Tensor],
    num_steps: int,
    teleport_steps: Sequence[int],
    teleport: Teleport,
) -> Trajectory:
    x = problem.params["x"]
    points, before, losses = [x], [], [_losses(problem, x)]
    for number in range(num_steps):
        x = step(x, number)
        before.append(x)
        if number in teleport_steps:
            x = teleport(problem, x)
        points.append(x)
        loss = _losses(problem, x)
        is_exploded = losses[-1].isinf() | ~(loss <= EXPLOSION * losses[0].abs())
        losses.append(torch.where(is_exploded, torch.inf, loss))
    return Trajectory(torch.stack(points, dim=1), torch.stack(losses, dim=1), torch.stack(before, dim=1))


@dataclass(frozen=True)
class Study:
    """Size of the experiments: how much is trained and tested.

    Attributes:
        seeds: Meta-seeds.
        num_functions: Test functions of a family.
        num_steps: Length of a test run.
        network_steps: Steps of gradient descent after which small networks are looked at.
        rates: What the rate of gradient descent is chosen from.
        base: What every meta-training has in common.
        cache: Folder of trained weights.
        out: Folder of figures and results.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    num_functions: int = 200
    num_steps: int = 12
    network_steps: tuple[int, ...] = (0, 30, 300, 3000)
    rates: tuple[float, ...] = RATES
    base: PaperConfig = PAPER
    cache: Path = Path("runs/paper")
    out: Path = Path("docs/paper")

    @property
    def few(self) -> Study:
        """The same with three meta-seeds at most."""
        return replace(self, seeds=self.seeds[:3])

    @classmethod
    def quick(cls, cache: Path, out: Path) -> Study:
        """Far too small to mean anything: to see that everything runs."""
        return cls((0,), 6, 12, (0, 30), RATES[::6], replace(PAPER, num_outer_steps=5, hidden_size=4), cache, out)

    def config(self, task: str, variant: str, **changes: Any) -> PaperConfig:
        """The configuration of a variant on a family."""
        if "teleport" not in variant:
            changes["teleport_steps"] = ()
        return replace(self.base, tasks=(task_path(task),), variant=variant, **changes)

    def problem(self, task: str, split: str = "test") -> FunctionProblem:
        """The functions of a split: the same for every rule."""
        horizons = (self.num_steps, self.num_steps)
        return FUNCTIONS[task].sample(self.num_functions, horizons, split, generator_for("paper", split, task))

    def weights(self, config: PaperConfig) -> Tensor:
        """The trained weights of all meta-seeds, trained now if they are not in the cache."""
        return train(config, self.seeds, self.cache)

    def test(self, config: PaperConfig, teleport: Teleports = "learned") -> Trajectory:
        """The runs of all meta-seeds on all test functions, ``[num_seeds, num_functions]``.

        Args:
            config: The meta-training.
            teleport: The same weights can be tested with all teleports off, or with random angles of SO(2) in their place.
        """
        task, weights = family_of(config).name, self.weights(config)
        problem = self.problem(task)
        if teleport == "off":
            config = replace(config, teleport_steps=NEVER)
        angles = generator_for("paper", "angles", task) if teleport == "random" else None
        by_seed = [follow(config, flat, problem, self.num_steps, angles) for flat in weights]
        return Trajectory(*(torch.stack(parts) for parts in zip(*by_seed)))

    def best_rate(
        self, task: str, teleport_steps: Sequence[int] = NEVER, teleport: Teleport = largest_gradient
    ) -> float:
        """The rate of gradient descent with the lowest median of final losses on validation functions."""
        problem = self.problem(task, "validation")
        medians = {
            rate: float(gradient_descent(problem, rate, self.num_steps, teleport_steps, teleport).final.median())
            for rate in self.rates
        }
        return min(medians, key=lambda rate: medians[rate])


def summary(final: Tensor) -> dict[str, Any]:
    """Statistics of final losses ``[num_seeds, num_functions]`` (or ``[num_functions]``), every run counted.

    Returns:
        ``median``, ``lowest`` and ``highest``: of the medians of the meta-seeds, which are in ``medians``; ``quarter`` and
        ``three_quarters``: quantiles of all runs; ``runs`` and how many of them ``exploded``.
    """
    final = final.reshape(-1, final.shape[-1])
    medians = final.median(dim=1).values
    ordered = final.flatten().sort().values
    return {
        "median": float(medians.median()),
        "lowest": float(medians.min()),
        "highest": float(medians.max()),
        "quarter": float(ordered[len(ordered) // 4]),
        "three_quarters": float(ordered[(3 * len(ordered)) // 4]),
        "medians": medians.tolist(),
        "runs": final.numel(),
        "exploded": int((~torch.isfinite(final)).sum()),
    }


def comparison(mine: Tensor, other: Tensor, *, is_paired: bool) -> dict[str, Any]:
    """Comparison of final losses ``mine`` with ``other``, both ``[num_seeds, num_functions]``.

    Returns:
        ``ratio``: median of ``other`` over median of ``mine``, above 1 where ``mine`` is better, the median over pairs of
        meta-seeds, with ``lowest`` and ``highest``; ``wins``: of how many ``pairs`` of meta-seeds ``mine`` has the lower
        median. Paired runs have the same weights: then only equal meta-seeds are pairs, and ``functions`` is the share of
        functions on which ``mine`` ends lower.
    """
    a, b = (final.median(dim=1).values for final in (mine, other))
    ratios = b / a if is_paired else (b[None, :] / a[:, None]).flatten()
    result = {
        "ratio": float(ratios.median()),
        "lowest": float(ratios.min()),
        "highest": float(ratios.max()),
        "wins": int((ratios > 1.0).sum()),
        "pairs": len(ratios),
    }
    if is_paired:
        result["functions"] = float((mine < other).double().mean())
    return result


def separation(on: Trajectory, off: Trajectory, vanilla: Trajectory) -> dict[str, Any]:
    """Effect of teleports on runs of the same weights, and of meta-training with teleports on the weights."""
    return {
        "on": summary(on.final),
        "off": summary(off.final),
        "effect_of_teleport": comparison(on.final, off.final, is_paired=True),
        "effect_of_meta_training": comparison(off.final, vanilla.final, is_paired=False),
        "against_vanilla": comparison(on.final, vanilla.final, is_paired=False),
    }


def teleport_facts(problem: FunctionProblem, trajectory: Trajectory, steps: Sequence[int]) -> dict[str, float]:
    """Effects of the teleports after ``steps``, over all runs ``[num_seeds, num_functions]`` where they are finite.

    Returns:
        ``teleports`` in the runs and how many are ``finite``; the share that ``raised`` the gradient's norm, its median
        ``gradient_ratio``, and the median ``length``, relative to the distance to the optimum; the share that went ``away``
        from the optimum and the median ``distance_ratio``. Without a known optimum lengths are relative to the norm of the
        point, and nothing is said about distances.
    """
    before, after = trajectory.before[:, :, steps], trajectory.points[:, :, 1:][:, :, steps]
    norms = [torch.stack([gradients(problem, each) for each in points]).norm(dim=-1) for points in (before, after)]
    optimum = torch.zeros_like(before[0, :, 0]) if problem.optimum is None else problem.optimum
    distances = [(points - optimum[:, None]).norm(dim=-1) for points in (before, after)]
    length = (after - before).norm(dim=-1) / distances[0]
    gradient_ratio, distance_ratio = norms[1] / norms[0], distances[1] / distances[0]
    is_finite = torch.isfinite(gradient_ratio + distance_ratio + length)
    gradient_ratio, distance_ratio, length = gradient_ratio[is_finite], distance_ratio[is_finite], length[is_finite]
    facts = {
        "teleports": float(is_finite.numel()),
        "finite": float(is_finite.sum()),
        "raised": float((gradient_ratio > 1.0).double().mean()),
        "gradient_ratio": float(gradient_ratio.median()),
        "length": float(length.median()),
    }
    if problem.optimum is not None:
        facts["away"] = float((distance_ratio > 1.0).double().mean())
        facts["distance_ratio"] = float(distance_ratio.median())
    return facts


def distance(problem: FunctionProblem, trajectory: Trajectory) -> Tensor:
    """Distance of the last points to the optimum, ``[...]``; infinite where they are not finite."""
    assert problem.optimum is not None
    distances: Tensor = (trajectory.points[..., -1, :] - problem.optimum).norm(dim=-1)
    return distances.nan_to_num(nan=math.inf)
