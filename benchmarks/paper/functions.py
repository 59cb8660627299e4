"""Low-dimensional test functions with known group actions, those of arXiv 2504.15399 among them.

A problem has one parameter ``x``, and the function's coefficients are the inputs of its model, the same for every step. To
the learner these are tasks like those that users write, and are named by their import paths.

Their splits differ in the coefficients and in where they start, not in architecture. The functions that are called
fixed have one set of coefficients, and there only the starts differ.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from benchmarks.paper.orbits import (
    AffineMap,
    ChannelScaling,
    CoordinatePermutation,
    HyperbolicRotation,
    Orbit,
    PlaneMap,
    QuadraticMap,
    Rotation,
)
from teleport_optim.meta_training.tasks.draws import Draw
from teleport_optim.meta_training.tasks.problem import InnerProblem, Task, bounded, log_relative
from teleport_optim.symmetry import SymmetrySpec

__all__ = [
    "FUNCTIONS",
    "ConvexQuadratic",
    "Ellipse",
    "FixedEllipse",
    "FixedRosenbrock",
    "FunctionProblem",
    "FunctionTask",
    "IndefiniteQuadratic",
    "PowerSums",
    "Rosenbrock",
    "ScaledProducts",
    "asinh_relative",
    "task_path",
]

_SMALLEST_DETERMINANT = 1e-6
_LARGEST_RATIO = 1e6


def asinh_relative(losses: Tensor, initial: Tensor) -> Tensor:
    """The normaliser of functions without lower bound: like a logarithm on both sides, and finite.

    Args:
        losses: ``[..., steps]``, of any sign.
        initial: ``[..., 1]``, of any sign.
    """
    return bounded(torch.asinh(torch.clamp(losses / initial.abs(), -_LARGEST_RATIO, _LARGEST_RATIO)))


@dataclass(frozen=True, kw_only=True)
class FunctionProblem(InnerProblem):
    """Functions of one family, with what is known of them.

    Attributes:
        orbit: The group action; the inputs of ``model`` are the coefficients that it takes.
        optimum: Where the minimum lies, ``[num_problems, dim]``, if there is one.
    """

    orbit: Orbit
    optimum: Tensor | None

    def to(self, device: torch.device | str) -> Self:
        moved = super().to(device)
        return moved if self.optimum is None else replace(moved, optimum=self.optimum.to(device))


class _FunctionModel(nn.Module):
    """A function of the parameter ``x`` whose coefficients are its input."""

    def __init__(self, value: Callable[[Tensor, Tensor], Tensor], dim: int) -> None:
        super().__init__()
        self.value = value
        self.x = nn.Parameter(torch.zeros(dim))

    def forward(self, coefficients: Tensor) -> Tensor:
        return self.value(self.x, coefficients)


def _output(output: Tensor, target: Tensor) -> Tensor:
    """The loss of a problem whose model computes it; the target is not used."""
    return output


class FunctionTask(Task):
    """A family of functions of ``dim`` variables.

    Points ``[..., dim]`` and coefficients ``[..., num_coefficients]`` may have leading axes, which broadcast.
    """

    dim: ClassVar[int]
    orbit: ClassVar[Orbit]

    @abstractmethod
    def value(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """The function, ``[...]``."""

    @abstractmethod
    def draw_coefficients(self, num_problems: int, draw: Draw) -> Tensor:
        """Coefficients of ``num_problems`` functions, ``[num_problems, num_coefficients]``."""

    def draw_start(self, num_problems: int, draw: Draw) -> Tensor:
        """Initial points, ``[num_problems, dim]``."""
        return draw.normal(num_problems, self.dim)

    def optimum(self, coefficients: Tensor) -> Tensor | None:
        """A point where the function has its minimum 0, ``[..., dim]``, or None if it has no minimum."""
        return None

    def normalise(self, losses: Tensor, initial: Tensor) -> Tensor:
        """As :attr:`InnerProblem.normalise`."""
        return log_relative(losses, initial)

    def sample(
        self, num_problems: int, horizons: tuple[int, int], split: str, generator: torch.Generator
    ) -> FunctionProblem:
        draw = Draw(generator, self.name, split)
        coefficients = self.draw_coefficients(num_problems, draw)
        start = self.draw_start(num_problems, draw)
        targets = torch.zeros(num_problems)
        horizon = draw.horizon(*horizons)
        numbers = " ".join(f"{number:.2g}" for number in [*coefficients[0].tolist(), *start[0].tolist()])
        return FunctionProblem(
            model=_FunctionModel(self.value, self.dim),
            params={"x": start},
            loss=_output,
            sample_batch=lambda generator: (coefficients, targets),
            horizon=horizon,
            description=f"{self.name} {numbers} steps={horizon}",
            architecture=self.name,
            normalise=self.normalise,
            orbit=self.orbit,
            symmetries=SymmetrySpec(),
            optimum=self.optimum(coefficients),
        )


# ---------------------------------------------------------------------------------------------- functions in the plane


class _PlaneFunction(FunctionTask):
    """``f(x) = h1^2 + h2^2`` with ``h = plane_map(x)``."""

    dim = 2
    plane_map: ClassVar[PlaneMap]

    def value(self, x: Tensor, coefficients: Tensor) -> Tensor:
        return self.plane_map.forward(x, coefficients).square().sum(dim=-1)

    def draw_coefficients(self, num_problems: int, draw: Draw) -> Tensor:
        """All ``N(0, 1)``, drawn again where the map is singular."""
        coefficients = draw.normal(num_problems, self.plane_map.num_coefficients)
        while (is_singular := self.plane_map.determinant(coefficients).abs() < _SMALLEST_DETERMINANT).any():
            coefficients[is_singular] = draw.normal(int(is_singular.sum()), self.plane_map.num_coefficients)
        return coefficients

    def optimum(self, coefficients: Tensor) -> Tensor | None:
        return self.plane_map.inverse(torch.zeros_like(coefficients[..., :2]), coefficients)


class Ellipse(_PlaneFunction):
    """The generalised Booth function ``|A x + b|^2``, entries of ``A`` and ``b`` from ``N(0, 1)``."""

    name = "ellipse"
    plane_map = AffineMap()
    orbit: ClassVar[Orbit] = Rotation(plane_map)


class FixedEllipse(Ellipse):
    """``|A x|^2`` with ``A = diag(0.5, 3)``."""

    name = "ellipse_fixed"

    def draw_coefficients(self, num_problems: int, draw: Draw) -> Tensor:
        return torch.tensor([0.5, 0.0, 0.0, 3.0, 0.0, 0.0]).repeat(num_problems, 1)


class Rosenbrock(_PlaneFunction):
    """The generalised Rosenbrock function ``(c x2 + d2 x1^2 + d1 x1 + d0)^2 + (a x1 + b)^2``, all from ``N(0, 1)``."""

    name = "rosenbrock"
    plane_map = QuadraticMap()
    orbit: ClassVar[Orbit] = Rotation(plane_map)


class FixedRosenbrock(Rosenbrock):
    """``(0.4 x1^2 - 2 x2)^2 + (x1 - 1)^2``."""

    name = "rosenbrock_fixed"

    def draw_coefficients(self, num_problems: int, draw: Draw) -> Tensor:
        return torch.tensor([1.0, -1.0, -2.0, 0.0, 0.0, 0.4]).repeat(num_problems, 1)


class _Quadratic(_PlaneFunction):
    """Quadratic forms with eigenvalues of absolute values up to 1000 apart and axes at random.

    The coefficients are those of ``h(x) = (diag(|eigenvalues|) / 2)^(1/2) R x`` with a rotation ``R``.
    """

    plane_map = AffineMap()

    def draw_coefficients(self, num_problems: int, draw: Draw) -> Tensor:
        angle = math.pi * draw.uniforms(num_problems)
        log_condition = math.log(1000.0) * torch.rand(num_problems, generator=draw.generator)
        first, second = (torch.exp(sign * log_condition / 4.0) / math.sqrt(2.0) for sign in (1.0, -1.0))
        cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros(num_problems)
        return torch.stack([first * cos, -first * sin, second * sin, second * cos, zero, zero], dim=-1)


class ConvexQuadratic(_Quadratic):
    """``x' A x / 2`` with positive eigenvalues, so that SO(2) acts through ``A^(1/2)``."""

    name = "convex_quadratic"
    orbit: ClassVar[Orbit] = Rotation(_Quadratic.plane_map)


class IndefiniteQuadratic(_Quadratic):
    """``x' A x / 2`` with one positive and one negative eigenvalue, a saddle: the further down, the better."""

    name = "indefinite_quadratic"
    orbit: ClassVar[Orbit] = HyperbolicRotation(_Quadratic.plane_map)

    def value(self, x: Tensor, coefficients: Tensor) -> Tensor:
        h1, h2 = self.plane_map.forward(x, coefficients).unbind(-1)
        return h1.square() - h2.square()

    def optimum(self, coefficients: Tensor) -> Tensor | None:
        return None

    def normalise(self, losses: Tensor, initial: Tensor) -> Tensor:
        return asinh_relative(losses, initial)


# --------------------------------------------------------------------------------------------------- other groups


class PowerSums(FunctionTask):
    """Distance of the power sums of four numbers from those of a hidden solution, in any order of the numbers.

    ``f(x) = sum_k w_k (mean_i x_i^k - mean_i y_i^k)^2`` for k from 1 to 4; the coefficients are ``(y, w)``.
    """

    name = "power_sums"
    dim = 4
    orbit: ClassVar[Orbit] = CoordinatePermutation(4)

    def value(self, x: Tensor, coefficients: Tensor) -> Tensor:
        solution, weights = coefficients.chunk(2, dim=-1)
        powers = torch.arange(1, self.dim + 1, device=x.device)
        sums, wanted = (point[..., None].pow(powers).mean(dim=-2) for point in (x, solution))
        return (weights * (sums - wanted).square()).sum(dim=-1)

    def draw_coefficients(self, num_problems: int, draw: Draw) -> Tensor:
        solution = draw.normal(num_problems, self.dim)
        weights = torch.exp(draw.normal(num_problems, self.dim)) / torch.tensor([1.0, 2.0, 15.0, 96.0])
        return torch.cat([solution, weights], dim=-1)

    def optimum(self, coefficients: Tensor) -> Tensor | None:
        return coefficients[..., : self.dim]


class ScaledProducts(FunctionTask):
    """A linear system in the products of three pairs: ``f(u, v) = |M (u v - w)|^2``, ``u v`` channel by channel.

    The smallest model of a network with hidden units that can be rescaled. The coefficients are ``M`` and ``w``. The start
    is out of balance: ``u`` is multiplied and ``v`` divided by ``exp(N(0, 1))``, channel by channel.
    """

    name = "scaled_products"
    num_channels: ClassVar[int] = 3
    dim = 2 * num_channels
    orbit: ClassVar[Orbit] = ChannelScaling(num_channels)

    def value(self, x: Tensor, coefficients: Tensor) -> Tensor:
        u, v = x.chunk(2, dim=-1)
        flat, wanted = coefficients.tensor_split([self.num_channels**2], dim=-1)
        matrix = flat.reshape(*flat.shape[:-1], self.num_channels, self.num_channels)
        residuals: Tensor = matrix @ (u * v - wanted)[..., None]
        return residuals.square().sum(dim=(-2, -1))

    def draw_coefficients(self, num_problems: int, draw: Draw) -> Tensor:
        coupling = torch.eye(self.num_channels) + 0.5 * draw.normal(num_problems, self.num_channels, self.num_channels)
        return torch.cat([coupling.flatten(1), draw.normal(num_problems, self.num_channels)], dim=-1)

    def draw_start(self, num_problems: int, draw: Draw) -> Tensor:
        imbalance = torch.exp(draw.normal(num_problems, self.num_channels))
        return draw.normal(num_problems, self.dim) * torch.cat([imbalance, 1.0 / imbalance], dim=-1)

    def optimum(self, coefficients: Tensor) -> Tensor | None:
        wanted = coefficients[..., self.num_channels**2 :]
        size = wanted.abs().sqrt()
        return torch.cat([size, size * wanted.sign()], dim=-1)


FUNCTIONS: dict[str, FunctionTask] = {
    task.name: task
    for task in (
        Ellipse(),
        FixedEllipse(),
        Rosenbrock(),
        FixedRosenbrock(),
        ConvexQuadratic(),
        IndefiniteQuadratic(),
        PowerSums(),
        ScaledProducts(),
    )
}
"""Every family by name."""


def task_path(name: str) -> str:
    """Import path of a family of ``FUNCTIONS``, by which a configuration names it.

    Example:
        >>> task_path("ellipse")
        'benchmarks.paper.functions:Ellipse'
    """
    return f"{__name__}:{type(FUNCTIONS[name]).__name__}"
