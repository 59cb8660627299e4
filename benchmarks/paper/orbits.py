"""Group actions on the variables of test functions.

The functions in the plane are ``f(x) = h1^2 + h2^2`` or ``h1^2 - h2^2`` with an invertible map ``h(x) = (h1, h2)``, and the
group that keeps such a form acts through ``h``: ``g . x = h^-1(g h(x))``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

__all__ = [
    "AffineMap",
    "ChannelScaling",
    "CoordinatePermutation",
    "HyperbolicRotation",
    "Orbit",
    "PlaneMap",
    "QuadraticMap",
    "Rotation",
    "bounded_log",
]

_LARGEST_LOG = 3.0


def bounded_log(coordinates: Tensor) -> Tensor:
    """Logarithms of factors between ``-3`` and ``3``, equal to the coordinates to first order."""
    return _LARGEST_LOG * torch.tanh(coordinates / _LARGEST_LOG)


class Orbit(ABC):
    """Action of a group on the variables of a test function, along its level sets. One subclass for each action.

    For networks the symmetries of :mod:`teleport_optim.symmetry` play this part; an action on test functions depends on the
    coefficients of the function.
    """

    group: ClassVar[str]
    """Name of the group."""
    num_coordinates: int
    """Length of the vector that names a group element: one angle, one log-scale per channel, one score per channel."""
    is_differentiable: ClassVar[bool] = True

    @abstractmethod
    def move(self, coordinates: Tensor, x: Tensor, coefficients: Tensor) -> Tensor:
        """``x`` moved by the element with these coordinates; zeros are the identity.

        Args:
            coordinates: ``[..., num_coordinates]``.
            x: ``[..., dim]``.
            coefficients: What defines the function, ``[..., num_coefficients]``.
        """


class PlaneMap(ABC):
    """An invertible map of the plane for every choice of ``num_coefficients`` coefficients.

    Both directions broadcast over the leading axes of points ``[..., 2]`` and coefficients ``[..., num_coefficients]``.
    """

    num_coefficients: ClassVar[int]

    @abstractmethod
    def forward(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """``h(x)``."""

    @abstractmethod
    def inverse(self, h: Tensor, coefficients: Tensor) -> Tensor:
        """The point whose image is ``h``."""

    @abstractmethod
    def determinant(self, coefficients: Tensor) -> Tensor:
        """Zero where the map is not invertible, ``[...]``."""


class AffineMap(PlaneMap):
    """``h(x) = A x + b`` with coefficients ``(A11, A12, A21, A22, b1, b2)``."""

    num_coefficients = 6

    def forward(self, x: Tensor, coefficients: Tensor) -> Tensor:
        x1, x2 = x.unbind(-1)
        a11, a12, a21, a22, b1, b2 = coefficients.unbind(-1)
        return torch.stack([a11 * x1 + a12 * x2 + b1, a21 * x1 + a22 * x2 + b2], dim=-1)

    def inverse(self, h: Tensor, coefficients: Tensor) -> Tensor:
        a11, a12, a21, a22, b1, b2 = coefficients.unbind(-1)
        h1, h2 = h[..., 0] - b1, h[..., 1] - b2
        moved = torch.stack([a22 * h1 - a12 * h2, a11 * h2 - a21 * h1], dim=-1)
        return moved / self.determinant(coefficients)[..., None]

    def determinant(self, coefficients: Tensor) -> Tensor:
        a11, a12, a21, a22 = coefficients[..., :4].unbind(-1)
        return a11 * a22 - a12 * a21


class QuadraticMap(PlaneMap):
    """``h(x) = (c x2 + d2 x1^2 + d1 x1 + d0, a x1 + b)`` with coefficients ``(a, b, c, d0, d1, d2)``."""

    num_coefficients = 6

    def forward(self, x: Tensor, coefficients: Tensor) -> Tensor:
        x1, x2 = x.unbind(-1)
        a, b, c, d0, d1, d2 = coefficients.unbind(-1)
        return torch.stack([c * x2 + (d2 * x1 + d1) * x1 + d0, a * x1 + b], dim=-1)

    def inverse(self, h: Tensor, coefficients: Tensor) -> Tensor:
        h1, h2 = h.unbind(-1)
        a, b, c, d0, d1, d2 = coefficients.unbind(-1)
        x1 = (h2 - b) / a
        return torch.stack([x1, (h1 - (d2 * x1 + d1) * x1 - d0) / c], dim=-1)

    def determinant(self, coefficients: Tensor) -> Tensor:
        return -coefficients[..., 0] * coefficients[..., 2]


class Rotation(Orbit):
    """SO(2): keeps ``h1^2 + h2^2``. The coordinate is the angle."""

    group = "SO(2)"
    num_coordinates = 1

    def __init__(self, plane_map: PlaneMap) -> None:
        self.plane_map = plane_map

    def move(self, coordinates: Tensor, x: Tensor, coefficients: Tensor) -> Tensor:
        h1, h2 = self.plane_map.forward(x, coefficients).unbind(-1)
        cos, sin = torch.cos(coordinates[..., 0]), torch.sin(coordinates[..., 0])
        return self.plane_map.inverse(torch.stack([cos * h1 - sin * h2, sin * h1 + cos * h2], dim=-1), coefficients)


class HyperbolicRotation(Orbit):
    """SO(1, 1): keeps ``h1^2 - h2^2``. The rapidity is bounded, as for a scaling: it is one, of ``h1 + h2``."""

    group = "SO(1,1)"
    num_coordinates = 1

    def __init__(self, plane_map: PlaneMap) -> None:
        self.plane_map = plane_map

    def move(self, coordinates: Tensor, x: Tensor, coefficients: Tensor) -> Tensor:
        h1, h2 = self.plane_map.forward(x, coefficients).unbind(-1)
        rapidity = bounded_log(coordinates[..., 0])
        cosh, sinh = torch.cosh(rapidity), torch.sinh(rapidity)
        return self.plane_map.inverse(torch.stack([cosh * h1 + sinh * h2, sinh * h1 + cosh * h2], dim=-1), coefficients)


class CoordinatePermutation(Orbit):
    """S_n: the variables in the order of their scores, the lowest first; equal scores keep their order."""

    group = "permutation"
    is_differentiable = False

    def __init__(self, num_coordinates: int) -> None:
        self.num_coordinates = num_coordinates

    def move(self, coordinates: Tensor, x: Tensor, coefficients: Tensor) -> Tensor:
        values: Tensor
        order: Tensor
        values, order = torch.broadcast_tensors(x, coordinates.argsort(dim=-1, stable=True))  # type: ignore[no-untyped-call]
        return values.gather(-1, order)


class ChannelScaling(Orbit):
    """R_+^n on ``x = (u, v)``: multiplies ``u_i`` and divides ``v_i`` by a factor whose bounded logarithm is coordinate i."""

    group = "scaling"

    def __init__(self, num_coordinates: int) -> None:
        self.num_coordinates = num_coordinates

    def move(self, coordinates: Tensor, x: Tensor, coefficients: Tensor) -> Tensor:
        u, v = x.chunk(2, dim=-1)
        logs = bounded_log(coordinates)
        return torch.cat([u * torch.exp(logs), v * torch.exp(-logs)], dim=-1)
