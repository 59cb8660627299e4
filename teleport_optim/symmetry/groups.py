"""The groups that move hidden channels: permutations, positive scalings, sign flips and general linear maps.

A group element is plain data, one tensor per element, and a group is a small stateless object that knows how to
compose, invert, draw and apply such elements. Nothing here knows about networks.

The action on an axis of a tensor has a *degree*. With degree ``k`` a scaling by ``s`` multiplies by ``s ** k``: a
tensor that writes into a channel has degree +1, one that reads from it has degree -1 (the dual), a variance has +2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["GROUPS", "GeneralLinear", "Group", "Permutation", "PositiveScaling", "SignFlip"]


class Group(ABC):
    """A group that acts on the ``size`` channels of one hidden site.

    Elements are tensors with ``size`` entries, or matrices. The laws, which the tests hold every group to::

        compose(identity, a) == a == compose(a, identity)
        compose(a, inverse(a)) == identity
        act(compose(a, b), x) == act(a, act(b, x))
    """

    name: ClassVar[str]

    def shape(self, size: int) -> tuple[int, ...]:
        """The shape of an element."""
        return (size,)

    @abstractmethod
    def identity(self, size: int) -> Tensor:
        """The neutral element."""

    @abstractmethod
    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        """The element that acts like ``second`` followed by ``first``."""

    @abstractmethod
    def inverse(self, element: Tensor) -> Tensor:
        """The element that undoes ``element``."""

    @abstractmethod
    def random(self, size: int, generator: torch.Generator) -> Tensor:
        """An element drawn with ``generator``."""

    @abstractmethod
    def act(self, element: Tensor, x: Tensor, degree: int) -> Tensor:
        """Apply ``element`` with ``degree`` to the first axis of ``x`` (shape ``[size, ...]``)."""

    @abstractmethod
    def problem(self, element: Tensor) -> str | None:
        """Why ``element`` is not in the group, or None if it is."""

    def exp(self, algebra: Tensor) -> Tensor:
        """The group element ``exp(algebra)``, for groups that are continuous.

        Raises:
            TypeError: if the group is discrete and so has no Lie algebra.
        """
        raise TypeError(f"{self.name} is a discrete group: it has no Lie algebra to exponentiate")

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Permutation(Group):
    """The symmetric group S_n: channel ``i`` of the result is channel ``element[i]`` of the input."""

    name = "permutation"

    def identity(self, size: int) -> Tensor:
        return torch.arange(size)

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        return second[first]

    def inverse(self, element: Tensor) -> Tensor:
        return torch.argsort(element)

    def random(self, size: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(size, generator=generator)

    def act(self, element: Tensor, x: Tensor, degree: int) -> Tensor:
        if degree == 0:
            return x
        return x.index_select(0, element.to(x.device))

    def problem(self, element: Tensor) -> str | None:
        if element.dtype != torch.int64:
            return f"its dtype is {element.dtype}, a permutation is int64"
        if not torch.equal(element.sort().values.cpu(), torch.arange(element.numel())):
            return f"it does not hold each of 0 to {element.numel() - 1} exactly once"
        return None


class PositiveScaling(Group):
    """The group R_+^n of one positive factor per channel; ``exp`` takes log-factors, of any sign."""

    name = "scaling"

    def identity(self, size: int) -> Tensor:
        return torch.ones(size, dtype=torch.float64)

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        return first * second

    def inverse(self, element: Tensor) -> Tensor:
        return element.reciprocal()

    def random(self, size: int, generator: torch.Generator) -> Tensor:
        return self.exp(torch.randn(size, generator=generator, dtype=torch.float64))

    def exp(self, algebra: Tensor) -> Tensor:
        return algebra.exp()

    def act(self, element: Tensor, x: Tensor, degree: int) -> Tensor:
        if degree == 0:
            return x
        factor = element.pow(degree).to(device=x.device, dtype=x.dtype)
        return x * factor.reshape(-1, *[1] * (x.dim() - 1))

    def problem(self, element: Tensor) -> str | None:
        if not element.is_floating_point():
            return f"its dtype is {element.dtype}, scale factors are floating point"
        if not bool((torch.isfinite(element) & (element > 0)).all()):
            return "its factors are not all positive and finite"
        return None


class SignFlip(Group):
    """The group {+1, -1}^n of one sign per channel."""

    name = "sign"

    def identity(self, size: int) -> Tensor:
        return torch.ones(size, dtype=torch.float64)

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        return first * second

    def inverse(self, element: Tensor) -> Tensor:
        return element.clone()

    def random(self, size: int, generator: torch.Generator) -> Tensor:
        return 2.0 * torch.randint(2, (size,), generator=generator).to(torch.float64) - 1.0

    def act(self, element: Tensor, x: Tensor, degree: int) -> Tensor:
        if degree % 2 == 0:
            return x
        return x * element.to(device=x.device, dtype=x.dtype).reshape(-1, *[1] * (x.dim() - 1))

    def problem(self, element: Tensor) -> str | None:
        if not bool((element.abs() == 1).all()):
            return "its entries are not all +1 or -1"
        return None


class GeneralLinear(Group):
    """The group GL(n) of invertible matrices, which mix channels that only linear layers see (the queries of a head, say).

    The dual is the inverse transpose. Elements are kept well conditioned: those that are drawn have condition number at most
    ``e ** 2``, and one beyond :attr:`MAX_CONDITION` counts as no member, since it would cost too many digits.
    """

    name = "linear"
    MAX_CONDITION: ClassVar[float] = 1e4

    def shape(self, size: int) -> tuple[int, ...]:
        return (size, size)

    def identity(self, size: int) -> Tensor:
        return torch.eye(size, dtype=torch.float64)

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        return first @ second

    def inverse(self, element: Tensor) -> Tensor:
        inverse: Tensor = torch.linalg.inv(element)
        return inverse

    def random(self, size: int, generator: torch.Generator) -> Tensor:
        normal = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
        left, right = torch.linalg.qr(normal).Q
        log_factors = 2.0 * torch.rand(size, generator=generator, dtype=torch.float64) - 1.0
        element: Tensor = left @ (log_factors.exp().unsqueeze(1) * right)
        return element

    def exp(self, algebra: Tensor) -> Tensor:
        element: Tensor = torch.linalg.matrix_exp(algebra)
        return element

    def act(self, element: Tensor, x: Tensor, degree: int) -> Tensor:
        if degree == 0:
            return x
        if abs(degree) != 1:
            raise ValueError(
                f"a general linear map cannot act with degree {degree}: what is squared entry by entry cannot be moved, reset it"
            )
        matrix = element if degree == 1 else torch.linalg.inv(element).mT
        wide = torch.promote_types(x.dtype, torch.float32)
        moved = matrix.to(device=x.device, dtype=wide) @ x.reshape(len(x), -1).to(wide)
        return moved.to(x.dtype).reshape(x.shape)

    def problem(self, element: Tensor) -> str | None:
        if not element.is_floating_point():
            return f"its dtype is {element.dtype}, matrices are floating point"
        if not bool(torch.isfinite(element).all()):
            return "its entries are not all finite"
        if element.numel() and not torch.linalg.cond(element) <= self.MAX_CONDITION:
            return f"its condition number is above {self.MAX_CONDITION:g}, so that moving by it would lose digits"
        return None


GROUPS: dict[str, Group] = {
    group.name: group for group in (Permutation(), PositiveScaling(), SignFlip(), GeneralLinear())
}
"""Every group by name; the names are those that a saved spec holds."""
