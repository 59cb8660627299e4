"""Experiment 2: does teleportation resemble Newton's method, and what happens where the function is not convex?

For a point with gradient ``g`` and Hessian ``H``, Newton's step ``v = -H^-1 g`` has a part ``w = v + (g'H^-1 g / g'g) g``
orthogonal to the gradient. Along it the squared gradient norm has the slope ``2 w'H g``, which is
``2 ((g'H^-1 g)(g'H g) - (g'g)^2) / g'g`` and not negative where ``H > 0``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.paper.families import FAMILIES, label, tested_schedule
from benchmarks.paper.figures import line_figure
from benchmarks.paper.functions import FunctionProblem
from benchmarks.paper.harness import Study, gradient_descent
from benchmarks.paper.tables import markdown, number, percent
from teleport_optim.rng import generator_for

__all__ = ["counterexample", "lemma", "run", "symmetry_slope", "tables"]

_NUM_MATRICES = 1000
_NUM_NETWORKS = 50
_NETWORK_RATE = 0.05
_LEARNED = (("update+teleport", False), ("update+teleport", True), ("lr+teleport", False))
_FUNCTIONS = ("convex_quadratic", "ellipse", "rosenbrock_fixed", "rosenbrock", "indefinite_quadratic")


def symmetry_slope(hessian: Tensor, gradient: Tensor) -> Tensor:
    """``(g'H^-1 g)(g'H g) / (g'g)^2 - 1``: at least 0 where ``H > 0``, by the lemma.

    Args:
        hessian: ``[..., n, n]``.
        gradient: ``[..., n]``.
    """
    newton = torch.linalg.solve(hessian, gradient)
    image = (hessian @ gradient[..., None])[..., 0]
    squared = gradient.square().sum(dim=-1)
    slope: Tensor = (gradient * newton).sum(dim=-1) * (gradient * image).sum(dim=-1) / squared.square() - 1.0
    return slope


def lemma() -> dict[str, float]:
    """The lemma on random matrices: with eigenvalues of one sign, and of both."""
    generator = generator_for("paper", "lemma")
    results = {"matrices": float(_NUM_MATRICES), "counterexample": float(_symmetry_slope_of_the_counterexample())}
    for name, definite in (("definite", True), ("indefinite", False)):
        square = torch.randn(_NUM_MATRICES, 6, 6, generator=generator, dtype=torch.float64)
        axes = torch.linalg.qr(square).Q
        eigenvalues = torch.exp(2.0 * torch.randn(_NUM_MATRICES, 6, generator=generator, dtype=torch.float64))
        if not definite:
            eigenvalues[:, :2] *= -1.0
        matrices = axes @ torch.diag_embed(eigenvalues) @ axes.mT
        vectors = torch.randn(_NUM_MATRICES, 6, generator=generator, dtype=torch.float64)
        slopes = symmetry_slope(matrices, vectors)
        results[f"{name}_lowest"] = float(slopes.min())
        results[f"{name}_negative"] = float((slopes < 0.0).double().mean())
    return results


def _symmetry_slope_of_the_counterexample() -> Tensor:
    return symmetry_slope(torch.diag(torch.tensor([1.0, -1.0])), torch.ones(2))


def counterexample() -> dict[str, list[float]]:
    """The orbit of ``(x1^2 - x2^2) / 2`` through ``(1, 0.5)``: gradient norm and distance to the stationary point along it."""
    rapidity = torch.linspace(-1.5, 1.5, 31)
    x = torch.tensor([1.0, 0.5])
    moved = torch.stack(
        [
            rapidity.cosh() * x[0] + rapidity.sinh() * x[1],
            rapidity.sinh() * x[0] + rapidity.cosh() * x[1],
        ],
        dim=-1,
    ).requires_grad_()
    values = (moved[:, 0].square() - moved[:, 1].square()) / 2.0
    (gradient,) = torch.autograd.grad(values.sum(), moved)
    return {
        "rapidity": rapidity.tolist(),
        "value": values.tolist(),
        "gradient_norm": gradient.norm(dim=-1).tolist(),
        "distance": moved.detach().norm(dim=-1).tolist(),
    }


class _Local(NamedTuple):
    """Gradient, Hessian and an orthonormal basis of the orbit's tangent space at many points."""

    gradient: Tensor
    hessian: Tensor
    tangents: Tensor


def _measure(local: _Local, generator: torch.Generator) -> dict[str, dict[str, float]]:
    """Angles of Newton's step to the gradient and to the teleport that raises its norm fastest, by convexity at the point."""
    gradient, hessian, tangents = local
    eigenvalues = torch.linalg.eigvalsh(hessian)
    is_sound = torch.isfinite(eigenvalues).all(dim=-1)
    is_sound &= eigenvalues.abs().amin(dim=-1) > 1e-9 * eigenvalues.abs().amax(dim=-1)
    is_sound &= gradient.norm(dim=-1) > 1e-9
    gradient, hessian, tangents, eigenvalues = (part[is_sound] for part in (gradient, hessian, tangents, eigenvalues))
    newton = -torch.linalg.solve(hessian, gradient)
    ascent = (hessian @ gradient[..., None])[..., 0]
    teleport = (tangents @ (tangents.mT @ ascent[..., None]))[..., 0]
    random = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
    random = random - _along(random, gradient)
    measured = {
        "slope": symmetry_slope(hessian, gradient),
        "gradient": _cosine(-gradient, newton),
        "teleport": _cosine(teleport, newton - _along(newton, gradient)),
        "both": _best_cosine(newton, gradient, teleport),
        "random": _best_cosine(newton, gradient, random),
    }
    is_convex = eigenvalues[:, 0] > 0.0
    results = {}
    for name, chosen in (("convex", is_convex), ("not convex", ~is_convex)):
        if not chosen.any():
            continue
        results[name] = {key: float(values[chosen].median()) for key, values in measured.items()}
        results[name]["points"] = float(chosen.sum())
        results[name]["slope_positive"] = float((measured["slope"][chosen] > -1e-6).double().mean())
        results[name]["teleport_positive"] = float((measured["teleport"][chosen] > 0.0).double().mean())
    return results


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    cosine: Tensor = (a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return cosine


def _along(x: Tensor, direction: Tensor) -> Tensor:
    return (x * direction).sum(dim=-1, keepdim=True) / direction.square().sum(dim=-1, keepdim=True) * direction


def _best_cosine(newton: Tensor, gradient: Tensor, other: Tensor) -> Tensor:
    """The largest cosine with Newton's step of any sum, with positive weights, of ``-gradient`` and ``other``, orthogonal."""
    cosines = torch.stack([_cosine(-gradient, newton), _cosine(other, newton)]).clamp(min=0.0)
    return torch.where(cosines.isnan(), 0.0, cosines).square().sum(dim=0).sqrt()


# ------------------------------------------------------------------------------------------------------------ functions


def _local_of_functions(problem: FunctionProblem, points: Tensor) -> _Local:
    """At ``points`` ``[functions, points, 2]`` of functions in the plane, where the orbit is the level set."""
    per_function = points.shape[1]
    inputs, _ = problem.sample_batch(torch.Generator())
    coefficients = inputs.double().repeat_interleave(per_function, dim=0)
    x = points.double().flatten(0, 1).requires_grad_()
    targets = torch.zeros(len(x), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(problem.losses({"x": x}, coefficients, targets).sum(), x, create_graph=True)
    rows = [torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in gradient.unbind(-1)]
    gradient = gradient.detach()
    tangent = torch.stack([-gradient[:, 1], gradient[:, 0]], dim=-1) / gradient.norm(dim=-1, keepdim=True)
    return _Local(gradient, torch.stack(rows, dim=1), tangent[..., None])


def _functions(study: Study) -> dict[str, Any]:
    results = {}
    for task in _FUNCTIONS:
        problem = study.problem(task)
        rate = study.best_rate(task) if task != "indefinite_quadratic" else 0.01
        points = gradient_descent(problem, rate, study.num_steps).points[:, ::4]
        results[task] = _measure(_local_of_functions(problem, points), generator_for("paper", "random", task))
    return results


# ------------------------------------------------------------------------------------------------------------- networks


class _Network(NamedTuple):
    """A small network of two layers with a symmetry, as a function of all its parameters."""

    sizes: tuple[int, int, int]
    activation: Callable[[Tensor], Tensor]
    is_linear: bool

    @property
    def num_parameters(self) -> int:
        num_inputs, num_hidden, num_outputs = self.sizes
        return num_hidden * (num_inputs + num_outputs)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        num_inputs, num_hidden, num_outputs = self.sizes
        first, second = torch.tensor_split(x, [num_hidden * num_inputs])
        return first.reshape(num_hidden, num_inputs), second.reshape(num_outputs, num_hidden)

    def loss(self, x: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        first, second = self.split(x)
        return (self.activation(inputs @ first.T) @ second.T - targets).square().mean()

    def tangents(self, x: Tensor) -> Tensor:
        """An orthonormal basis of the directions in which the group moves ``x``, ``[num_parameters, dim]``.

        Every generator ``T`` moves the first layer by ``T W1`` and the second by ``-W2 T``: all matrices for a linear
        network, diagonal ones for a positively homogeneous activation.
        """
        first, second = self.split(x)
        num_hidden = self.sizes[1]
        basis = torch.eye(num_hidden**2, dtype=x.dtype).reshape(-1, num_hidden, num_hidden)
        if not self.is_linear:
            basis = basis[:: num_hidden + 1]
        moves = [torch.cat([(t @ first).flatten(), -(second @ t).flatten()]) for t in basis]
        orthonormal: Tensor = torch.linalg.qr(torch.stack(moves, dim=1)).Q
        return orthonormal


_NETWORKS = {
    "linear 3-2-3, GL(2)": _Network((3, 2, 3), lambda x: x, True),
    "leaky ReLU 2-4-1, scaling": _Network((2, 4, 1), lambda x: F.leaky_relu(x, 0.1), False),
}


def _networks(network_steps: Sequence[int]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, network in _NETWORKS.items():
        generator = generator_for("paper", "network", name)
        results[name] = {
            f"{steps} steps": _measure(local, generator_for("paper", "random", name, steps))
            for steps, local in _descend(network, generator, network_steps).items()
        }
    return results


def _descend(network: _Network, generator: torch.Generator, network_steps: Sequence[int]) -> dict[int, _Local]:
    """Gradient descent on random regressions, with what is local after ``network_steps``."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(_NUM_NETWORKS, *shape, generator=generator, dtype=torch.float64)

    data = normal(20, network.sizes[0]), normal(20, network.sizes[2])
    x = 0.5 * normal(network.num_parameters)
    gradient_of = torch.func.vmap(torch.func.grad(network.loss))
    hessian_of = torch.func.vmap(torch.func.jacrev(torch.func.grad(network.loss)))
    by_steps = {}
    for step in range(max(network_steps) + 1):
        gradient = gradient_of(x, *data)
        if step in network_steps:
            by_steps[step] = _Local(gradient, hessian_of(x, *data), torch.stack([network.tangents(each) for each in x]))
        x = x - _NETWORK_RATE * gradient
    return by_steps


# -------------------------------------------------------------------------------------------------------- learned steps


def _learned(study: Study) -> dict[str, Any]:
    """Cosine with Newton's step of what a learned step moves at the teleports, before and after the teleport."""
    results: dict[str, Any] = {}
    for task in FAMILIES:
        problem, steps = study.problem(task), tested_schedule(study)
        for variant, theta in _LEARNED:
            path = study.few.test(study.config(task, variant, theta_gradient=theta))
            start, middle, end = path.points[:, :, steps], path.before[:, :, steps], path.points[:, :, 1:][:, :, steps]
            locals_ = [_local_of_functions(problem, points) for points in start]
            newton = torch.cat([-torch.linalg.solve(local.hessian, local.gradient) for local in locals_])
            convex = torch.cat([torch.linalg.eigvalsh(local.hessian)[:, 0] > 0.0 for local in locals_])
            update, whole = ((part - start).double().flatten(0, 2) for part in (middle, end))
            measured = {"update": _cosine(update, newton), "update+teleport": _cosine(whole, newton)}
            is_finite = torch.isfinite(measured["update"] + measured["update+teleport"])
            entry = results.setdefault(task, {}).setdefault(label(variant, theta), {})
            for name, chosen in (("convex", convex & is_finite), ("not convex", ~convex & is_finite)):
                if chosen.any():
                    entry[name] = {key: float(values[chosen].median()) for key, values in measured.items()}
                    entry[name]["steps"] = float(chosen.sum())
    return results


def run(study: Study) -> dict[str, Any]:
    """The lemma, the counterexample, and Newton's step on functions, networks and learned trajectories."""
    orbit = counterexample()
    lines = {
        name: (torch.tensor(orbit["rapidity"]), torch.tensor(orbit[key]))
        for name, key in (
            ("gradient norm", "gradient_norm"),
            ("distance to the stationary point", "distance"),
            ("loss", "value"),
        )
    }
    line_figure(study.out / "counterexample.png", "rapidity", "", {"orbit of (x1² - x2²)/2 through (1, 0.5)": lines})
    return {
        "lemma": lemma(),
        "counterexample": orbit,
        "functions": _functions(study),
        "networks": _networks(study.network_steps),
        "learned": _learned(study),
    }


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the report."""
    entries = dict(results["functions"])
    for name, by_steps in results["networks"].items():
        entries |= {f"{name}, after {steps}": entry for steps, entry in by_steps.items()}
    rows = [
        [
            name,
            convexity,
            str(int(entry["points"])),
            percent(entry["slope_positive"]),
            percent(entry["teleport_positive"]),
            number(entry["gradient"]),
            number(entry["both"]),
            number(entry["random"]),
        ]
        for name, by_convexity in entries.items()
        for convexity, entry in by_convexity.items()
    ]
    learned = [
        [task, variant, convexity, str(int(entry["steps"])), number(entry["update"]), number(entry["update+teleport"])]
        for task, variants in results["learned"].items()
        for variant, by_convexity in variants.items()
        for convexity, entry in by_convexity.items()
    ]
    return {
        "newton": markdown(
            [
                "function",
                "Hessian",
                "points",
                "lemma holds",
                "teleport toward Newton",
                "gradient",
                "gradient + teleport",
                "gradient + random",
            ],
            rows,
        ),
        "newton_learned": markdown(
            ["family", "LSTM emits", "Hessian", "steps", "update alone", "update and teleport"], learned
        ),
    }
