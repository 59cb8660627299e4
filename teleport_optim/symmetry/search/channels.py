"""Labels: which hidden channel each entry of a tensor belongs to, and which channels have turned out to be the same.

Every channel that some tensor of the model writes is a *unit*, a number. A tensor with hidden channels carries an array of
units that broadcasts to its shape: an axis along which the units do not change has length one. Layout operations move the
entries of the array as they move those of the tensor, so that concatenation, slicing, shuffling and flattening need no
bookkeeping of their own. An entry also has a *role* within its unit: after a flatten, the pixel. Whoever moves a unit onto
another moves each entry onto the one with the same role.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FIXED", "Labels", "Units", "broadcast_axes", "coordinates", "mix", "stretched"]

Array = NDArray[Any]

FIXED = 0
"""The unit of entries that do not move."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)


def mix(*parts: Array | int) -> Array:
    """A hash of the parts, in this order, element by element (``uint64``); used for roles and for what channels pass through."""
    result: Any = np.uint64(0x51ED270B)
    with np.errstate(over="ignore"):
        for part in parts:
            word = np.asarray(part).astype(np.uint64) + np.uint64(1)
            result = (result ^ (word * _MULTIPLIER)) * _MULTIPLIER
            result = result ^ (result >> _SHIFT)
    return np.asarray(result)


def coordinates(shape: Sequence[int], axes: Sequence[int]) -> Array:
    """A number for each position along ``axes``, which broadcasts to ``shape``; 0 if there are none."""
    result = np.zeros([1] * len(shape), dtype=np.int64)
    for axis in axes:
        along = np.arange(shape[axis]).reshape([-1 if k == axis else 1 for k in range(len(shape))])
        result = result * shape[axis] + along
    return result


def stretched(array: Array, shape: tuple[int, ...]) -> Array:
    """An array broadcast to ``shape``; most often it has that shape, and numpy takes long to find that out."""
    return array if array.shape == shape else np.broadcast_to(array, shape)


def broadcast_axes(array: Array) -> tuple[int, ...]:
    """The axes along which an array changes."""
    return tuple(axis for axis, size in enumerate(array.shape) if size != 1)


@dataclass(frozen=True, eq=False)
class Labels:
    """The units of a tensor, ``units`` and ``roles`` broadcast to its shape.

    Attributes:
        units: Unit of each entry.
        roles: Role of each entry within its unit, 0 where a unit has one entry at each position of the other axes.
        sign: +1, or -1 if the entries move by the dual of what moves the units.
    """

    units: Array
    roles: Array
    sign: int = 1

    @classmethod
    def along(cls, units: Array, axis: int, rank: int, roles: Array | None = None, sign: int = 1) -> Labels:
        """Labels that change along one axis of a tensor with ``rank`` axes."""
        shape = [-1 if k == axis else 1 for k in range(rank)]
        roles = np.zeros_like(units, dtype=np.uint64) if roles is None else roles
        return cls(units.reshape(shape), roles.reshape(shape), sign)

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """The axes along which the labels change."""
        return broadcast_axes(self.units)

    @property
    def rank(self) -> int:
        """Number of axes of the tensor."""
        return self.units.ndim

    def dual(self) -> Labels:
        """The same labels with the opposite sign."""
        return Labels(self.units, self.roles, -self.sign)

    def map(self, function: Callable[[Array], Array]) -> Labels:
        """The labels with ``function`` applied to both arrays."""
        return Labels(function(self.units), function(self.roles), self.sign)

    def spread(self, shape: Sequence[int], axes: Sequence[int]) -> Labels:
        """The labels made to change along ``axes`` of a tensor of ``shape`` too; the position there becomes part of the role."""
        new = [axis for axis in axes if self.units.shape[axis] == 1 and shape[axis] != 1]
        if not new:
            return self
        full = [shape[k] if k in new else size for k, size in enumerate(self.units.shape)]
        roles = mix(self.roles, coordinates(shape, new))
        return Labels(np.broadcast_to(self.units, full), np.broadcast_to(roles, full), self.sign)

    def settled(self) -> Labels:
        """The labels without the axes along which units stay the same and roles depend on nothing else.

        There each unit has the same roles in the same order, so that the position tells as much as the role does.
        """
        constant = [
            k
            for k in self.axes
            if np.array_equal(self.units, np.broadcast_to(_first(self.units, [k]), self.units.shape))
        ]
        if not constant or 0 in self.units.shape:
            return self
        others = [k for k in self.axes if k not in constant]
        if not np.array_equal(self.roles, np.broadcast_to(_first(self.roles, others), self.roles.shape)):
            return self
        units = _first(self.units, constant)
        return Labels(units, np.zeros_like(units, dtype=np.uint64), self.sign)

    def permute(self, order: Sequence[int]) -> Labels:
        """The labels of the tensor with its axes in another order."""
        return self.map(lambda array: array.transpose(order))

    def reshape(self, old: Sequence[int], new: Sequence[int]) -> Labels | None:
        """The labels of a tensor of shape ``old`` after a reshape to ``new``; None if they cannot be followed."""
        result_shape = [1] * len(new)
        inner_old: list[int] = []
        for old_axes, new_axes in _blocks(old, new):
            if not any(axis in self.axes for axis in old_axes):
                continue
            inner_old += old_axes
            for axis in new_axes:
                result_shape[axis] = new[axis]
        if 0 in old:
            return None if inner_old else self.map(lambda array: array.reshape(result_shape))
        full = self.spread(old, inner_old)
        return full.map(lambda array: array.reshape(result_shape)).settled()


def _first(array: Array, axes: Sequence[int]) -> Array:
    """The first entry along ``axes``, which keep length one."""
    return array[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(array.ndim))]


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes of two shapes that hold the same entries; axes of length one stay alone."""
    blocks: list[tuple[list[int], list[int]]] = []
    left = [axis for axis, size in enumerate(old) if size != 1]
    right = [axis for axis, size in enumerate(new) if size != 1]
    while left and right:
        one, other = [left.pop(0)], [right.pop(0)]
        while (a := prod(old[k] for k in one)) != (b := prod(new[k] for k in other)) and (left if a < b else right):
            if a < b:
                one.append(left.pop(0))
            else:
                other.append(right.pop(0))
        blocks.append((one, other))
    return blocks


class Units:
    """Which units move together: a union-find whose members have a role and a sign within their class.

    Attributes:
        parity_matters: Whether a unit that would have to equal its own dual is thereby fixed.
        use_roles: Whether roles tell the members of a class apart. Where each unit is only multiplied they do not matter.
    """

    def __init__(self, *, parity_matters: bool, use_roles: bool) -> None:
        self.parity_matters = parity_matters
        self.use_roles = use_roles
        self._parent = np.zeros(1, dtype=np.int64)
        self._prefix = np.zeros(1, dtype=np.uint64)
        self._sign = np.ones(1, dtype=np.int8)
        self._is_fixed = np.ones(1, dtype=bool)
        self._is_inexact = np.zeros(1, dtype=bool)
        self._count = 1

    def __len__(self) -> int:
        return self._count

    def new(self, count: int) -> Array:
        """``count`` new units, each a class of its own."""
        start, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            extra = max(count, len(self._parent))
            end = len(self._parent) + extra
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), end)])
            self._prefix = np.concatenate([self._prefix, np.zeros(extra, np.uint64)])
            self._sign = np.concatenate([self._sign, np.ones(extra, np.int8)])
            self._is_fixed = np.concatenate([self._is_fixed, np.zeros(extra, bool)])
            self._is_inexact = np.concatenate([self._is_inexact, np.zeros(extra, bool)])
        return np.arange(start, self._count)

    def find(self, units: Array, roles: Array | None = None) -> tuple[Array, Array, Array]:
        """The class of each entry, its role there and its sign relative to the class."""
        self._shorten(units)
        roots, prefix = self._parent[units], self._prefix[units]
        return roots, prefix if roles is None else _within(prefix, roles), self._sign[units]

    def _shorten(self, units: Array) -> None:
        """Let ``units`` hang from the roots of their classes directly."""
        roots, prefix, signs = self._parent[units], self._prefix[units], self._sign[units]
        while True:
            above = self._parent[roots]
            moved = above != roots
            if not moved.any():
                break
            prefix = np.where(moved, _within(self._prefix[roots], prefix), prefix)
            signs = np.where(moved, signs * self._sign[roots], signs)
            roots = above
        self._parent[units], self._prefix[units], self._sign[units] = roots, prefix, signs

    def fix(self, units: Array) -> None:
        """Let the classes of ``units`` move no more."""
        self._is_fixed[self.find(np.unique(units))[0]] = True

    def blur(self, units: Array) -> None:
        """Let the classes of ``units`` hold only approximately."""
        self._is_inexact[self.find(np.unique(units))[0]] = True

    def are_fixed(self, units: Array) -> bool:
        """Whether none of ``units`` may move."""
        if units.size == 0:
            return True
        first = units.item(0)  # most often, one tells
        while (above := self._parent.item(first)) != first:
            first = above
        return bool(self._is_fixed.item(first)) and bool(self._is_fixed[self.find(np.unique(units))[0]].all())

    def is_fixed(self, roots: Array) -> Array:
        """Whether classes, given by their roots, may not move."""
        return self._is_fixed[roots]

    def is_inexact(self, roots: Array) -> Array:
        """Whether classes, given by their roots, hold only approximately."""
        return self._is_inexact[roots]

    def unite(self, one: Labels, other: Labels) -> None:
        """Let the entries of two labels, whose shapes broadcast, move alike."""
        shape = np.broadcast_shapes(one.units.shape, other.units.shape)
        first, second = ([stretched(array, shape).ravel() for array in (x.units, x.roles)] for x in (one, other))
        sign = one.sign * other.sign
        roots_a, roles_a, signs_a = self.find(*first)
        roots_b, roles_b, signs_b = self.find(*second)
        relative = (sign * signs_a * signs_b).astype(np.int8)
        is_settled = (roots_a == FIXED) | (roots_b == FIXED)
        self._is_fixed[roots_a[is_settled]] = True
        self._is_fixed[roots_b[is_settled]] = True
        same = roots_a == roots_b
        if same.any():
            wrong = same & (relative < 0) if self.parity_matters else np.zeros_like(same)
            if self.use_roles:
                wrong = wrong | (same & (roles_a != roles_b))
            self._is_fixed[roots_a[wrong]] = True
        todo = np.flatnonzero(~(same | is_settled))
        if not len(todo):
            return
        a, p, b, q, parity = (array[todo] for array in (roots_a, roles_a, roots_b, roles_b, relative))
        if not self.use_roles or np.array_equal(p, q):
            self._unite_roots(a, b, parity)
            return
        for child, role, parent, parent_role in ((a, p, b, q), (b, q, a, p)):
            is_own = role == parent_role
            are_all_new = len(np.unique(child)) == len(child) and not np.isin(child, parent).any()
            if are_all_new and (is_own | (role == 0)).all():
                self._attach(child, parent, np.where(is_own, 0, parent_role), parity)
                return
        for entry in zip(a, p, b, q, parity):
            self._unite_one(*entry)

    def _unite_roots(self, a: Array, b: Array, relative: Array) -> None:
        """Unite classes whose members keep their roles, all at once: the newer root of each pair hangs from the older one."""
        while len(a):
            child, parent = np.maximum(a, b), np.minimum(a, b)
            _, first = np.unique(child, return_index=True)
            self._attach(child[first], parent[first], 0, relative[first])
            a, _, signs_a = self.find(a)
            b, _, signs_b = self.find(b)
            relative = (relative * signs_a * signs_b).astype(np.int8)
            same = a == b
            if self.parity_matters:
                self._is_fixed[a[same & (relative < 0)]] = True
            a, b, relative = a[~same], b[~same], relative[~same]

    def _unite_one(self, a: Any, p: Any, b: Any, q: Any, relative: Any) -> None:
        (root_a,), (role_a,), (sign_a,) = self.find(np.array([a]), np.array([p]))
        (root_b,), (role_b,), (sign_b,) = self.find(np.array([b]), np.array([q]))
        relative = relative * sign_a * sign_b
        if root_a == root_b:
            if (self.parity_matters and relative < 0) or role_a != role_b:
                self._is_fixed[root_a] = True
        elif role_a == role_b:
            self._attach(root_a, root_b, 0, relative)
        elif role_a == 0:
            self._attach(root_a, root_b, role_b, relative)
        elif role_b == 0:
            self._attach(root_b, root_a, role_a, relative)
        else:
            self._is_fixed[[root_a, root_b]] = True

    def _attach(self, child: Any, parent: Any, prefix: Any, relative: Any) -> None:
        self._parent[child] = parent
        self._prefix[child] = prefix
        self._sign[child] = relative
        for flags in (self._is_fixed, self._is_inexact):
            np.logical_or.at(flags, parent, flags[child])


def _within(prefix: Array, roles: Array) -> Array:
    """The role of an entry in a larger class, from that of its unit there and its own in the unit."""
    joined = np.where(prefix == 0, roles, prefix)
    is_nested = (prefix != 0) & (roles != 0)
    if is_nested.any():
        joined[is_nested] = mix(prefix[is_nested], roles[is_nested])
    return joined
