"""Channels of a tensor: to which hidden channel each entry belongs, and which channels turn out to move together.

Every hidden channel has an id, a number. A tensor with hidden channels has an array of ids that broadcasts to its shape: an
axis along which the ids do not change has length one. Layout operations move the ids as they move the entries of the tensor,
so that concatenation, slicing, shuffling and flattening need no bookkeeping of their own.

A channel may have several entries: after a flatten, one for each pixel. An entry's *position* says which of them it is. To
move one channel onto another is to move each entry onto the one with the same position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PINNED", "ChannelClasses", "Channels", "broadcast_axes", "coordinates", "mix", "stretched"]

Array = NDArray[Any]

PINNED = 0
"""Id of entries that do not move."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)


def mix(*parts: Array | int) -> Array:
    """Hash of the parts, in this order, element by element (``uint64``)."""
    result: Any = np.uint64(0x51ED270B)
    with np.errstate(over="ignore"):
        for part in parts:
            word = np.asarray(part).astype(np.uint64) + np.uint64(1)
            result = (result ^ (word * _MULTIPLIER)) * _MULTIPLIER
            result = result ^ (result >> _SHIFT)
    return np.asarray(result)


def coordinates(shape: Sequence[int], axes: Sequence[int]) -> Array:
    """Number of each place along ``axes``; it broadcasts to ``shape``, and is 0 if there are no axes."""
    result = np.zeros([1] * len(shape), dtype=np.int64)
    for axis in axes:
        along = np.arange(shape[axis]).reshape([-1 if k == axis else 1 for k in range(len(shape))])
        result = result * shape[axis] + along
    return result


def stretched(array: Array, shape: tuple[int, ...]) -> Array:
    """Array broadcast to ``shape``. Most arrays have that shape already, and numpy takes long to find that out."""
    return array if array.shape == shape else np.broadcast_to(array, shape)


def broadcast_axes(array: Array) -> tuple[int, ...]:
    """Axes along which an array changes."""
    return tuple(axis for axis, size in enumerate(array.shape) if size != 1)


@dataclass(frozen=True, eq=False)
class Channels:
    """Channels of a tensor; ``ids`` and ``positions`` broadcast to its shape.

    Attributes:
        ids: Channel of each entry.
        positions: Position of each entry within its channel; 0 where a channel has one entry for each place on the other axes.
        sign: +1, or -1 if the entries move by the dual of what moves the channels.
    """

    ids: Array
    positions: Array
    sign: int = 1

    @classmethod
    def along(cls, ids: Array, axis: int, rank: int, positions: Array | None = None, sign: int = 1) -> Channels:
        """Make channels that change along one axis of a tensor with ``rank`` axes."""
        shape = [-1 if k == axis else 1 for k in range(rank)]
        positions = np.zeros_like(ids, dtype=np.uint64) if positions is None else positions
        return cls(ids.reshape(shape), positions.reshape(shape), sign)

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """Axes along which the channels change."""
        return broadcast_axes(self.ids)

    @property
    def rank(self) -> int:
        """Number of axes of the tensor."""
        return self.ids.ndim

    def dual(self) -> Channels:
        """Return the same channels with the opposite sign."""
        return Channels(self.ids, self.positions, -self.sign)

    def map(self, function: Callable[[Array], Array]) -> Channels:
        """Apply ``function`` to both arrays."""
        return Channels(function(self.ids), function(self.positions), self.sign)

    def spread(self, shape: Sequence[int], axes: Sequence[int]) -> Channels:
        """Let the channels change along ``axes`` of a tensor of ``shape`` too; the place there becomes part of the position."""
        new = [axis for axis in axes if self.ids.shape[axis] == 1 and shape[axis] != 1]
        if not new:
            return self
        full = [shape[k] if k in new else size for k, size in enumerate(self.ids.shape)]
        positions = mix(self.positions, coordinates(shape, new))
        return Channels(np.broadcast_to(self.ids, full), np.broadcast_to(positions, full), self.sign)

    def simplified(self) -> Channels:
        """Leave out the axes along which ids stay the same and on which alone positions depend.

        There each channel has the same positions in the same order, so that the place on the axis tells as much.
        """
        constant = [
            k for k in self.axes if np.array_equal(self.ids, np.broadcast_to(_first(self.ids, [k]), self.ids.shape))
        ]
        if not constant or 0 in self.ids.shape:
            return self
        others = [k for k in self.axes if k not in constant]
        if not np.array_equal(self.positions, np.broadcast_to(_first(self.positions, others), self.positions.shape)):
            return self
        ids = _first(self.ids, constant)
        return Channels(ids, np.zeros_like(ids, dtype=np.uint64), self.sign)

    def permute(self, order: Sequence[int]) -> Channels:
        """Put the axes into another order."""
        return self.map(lambda array: array.transpose(order))

    def reshape(self, old: Sequence[int], new: Sequence[int]) -> Channels | None:
        """Follow a reshape of the tensor from shape ``old`` to ``new``; None if that is not possible."""
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
        return full.map(lambda array: array.reshape(result_shape)).simplified()


def _first(array: Array, axes: Sequence[int]) -> Array:
    """First entry along ``axes``, which keep length one."""
    return array[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(array.ndim))]


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of axes of two shapes that hold the same entries; axes of length one are left out."""
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


class ChannelClasses:
    """Classes of channels that move together: a union-find whose members have a position and a sign within their class.

    Attributes:
        parity_matters: Whether a channel that would have to equal its own dual is pinned.
        use_positions: Whether positions tell the members of a class apart. They do not matter where channels are multiplied.
    """

    def __init__(self, *, parity_matters: bool, use_positions: bool) -> None:
        self.parity_matters = parity_matters
        self.use_positions = use_positions
        self._parent = np.zeros(1, dtype=np.int64)
        self._prefix = np.zeros(1, dtype=np.uint64)
        self._sign = np.ones(1, dtype=np.int8)
        self._is_pinned = np.ones(1, dtype=bool)
        self._is_approximate = np.zeros(1, dtype=bool)
        self._count = 1

    def __len__(self) -> int:
        return self._count

    def new(self, count: int) -> Array:
        """Make ``count`` new channels, each a class of its own; returns their ids."""
        start, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            extra = max(count, len(self._parent))
            end = len(self._parent) + extra
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), end)])
            self._prefix = np.concatenate([self._prefix, np.zeros(extra, np.uint64)])
            self._sign = np.concatenate([self._sign, np.ones(extra, np.int8)])
            self._is_pinned = np.concatenate([self._is_pinned, np.zeros(extra, bool)])
            self._is_approximate = np.concatenate([self._is_approximate, np.zeros(extra, bool)])
        return np.arange(start, self._count)

    def find(self, ids: Array, positions: Array | None = None) -> tuple[Array, Array, Array]:
        """Look up the class of each entry, its position there and its sign relative to the class."""
        self._shorten(ids)
        roots, prefix = self._parent[ids], self._prefix[ids]
        return roots, prefix if positions is None else _within(prefix, positions), self._sign[ids]

    def _shorten(self, ids: Array) -> None:
        """Let channels hang directly from the roots of their classes."""
        roots, prefix, signs = self._parent[ids], self._prefix[ids], self._sign[ids]
        while True:
            above = self._parent[roots]
            moved = above != roots
            if not moved.any():
                break
            prefix = np.where(moved, _within(self._prefix[roots], prefix), prefix)
            signs = np.where(moved, signs * self._sign[roots], signs)
            roots = above
        self._parent[ids], self._prefix[ids], self._sign[ids] = roots, prefix, signs

    def pin(self, ids: Array) -> None:
        """Let the classes of these channels move no more."""
        self._is_pinned[self.find(np.unique(ids))[0]] = True

    def mark_approximate(self, ids: Array) -> None:
        """Let the symmetry of these channels hold only approximately."""
        self._is_approximate[self.find(np.unique(ids))[0]] = True

    def are_pinned(self, ids: Array) -> bool:
        """Whether none of these channels may move."""
        if ids.size == 0:
            return True
        first = ids.item(0)  # most often, one tells
        while (above := self._parent.item(first)) != first:
            first = above
        return bool(self._is_pinned.item(first)) and bool(self._is_pinned[self.find(np.unique(ids))[0]].all())

    def is_pinned(self, roots: Array) -> Array:
        """Whether classes, given by their roots, may not move."""
        return self._is_pinned[roots]

    def is_approximate(self, roots: Array) -> Array:
        """Whether classes, given by their roots, hold only approximately."""
        return self._is_approximate[roots]

    def unite(self, one: Channels, other: Channels) -> None:
        """Let the entries of two tensors, whose shapes broadcast, move alike."""
        shape = np.broadcast_shapes(one.ids.shape, other.ids.shape)
        first, second = ([stretched(array, shape).ravel() for array in (x.ids, x.positions)] for x in (one, other))
        sign = one.sign * other.sign
        roots_a, positions_a, signs_a = self.find(*first)
        roots_b, positions_b, signs_b = self.find(*second)
        relative = (sign * signs_a * signs_b).astype(np.int8)
        meets_pinned = (roots_a == PINNED) | (roots_b == PINNED)
        self._is_pinned[roots_a[meets_pinned]] = True
        self._is_pinned[roots_b[meets_pinned]] = True
        same = roots_a == roots_b
        if same.any():
            wrong = same & (relative < 0) if self.parity_matters else np.zeros_like(same)
            if self.use_positions:
                wrong = wrong | (same & (positions_a != positions_b))
            self._is_pinned[roots_a[wrong]] = True
        todo = np.flatnonzero(~(same | meets_pinned))
        if not len(todo):
            return
        a, p, b, q, parity = (array[todo] for array in (roots_a, positions_a, roots_b, positions_b, relative))
        if not self.use_positions or np.array_equal(p, q):
            self._unite_roots(a, b, parity)
            return
        for child, position, parent, parent_position in ((a, p, b, q), (b, q, a, p)):
            is_own = position == parent_position
            are_all_new = len(np.unique(child)) == len(child) and not np.isin(child, parent).any()
            if are_all_new and (is_own | (position == 0)).all():
                self._attach(child, parent, np.where(is_own, 0, parent_position), parity)
                return
        for entry in zip(a, p, b, q, parity):
            self._unite_one(*entry)

    def _unite_roots(self, a: Array, b: Array, relative: Array) -> None:
        """Unite classes whose members keep their positions, all at once; the newer root of a pair hangs from the older one."""
        while len(a):
            child, parent = np.maximum(a, b), np.minimum(a, b)
            _, first = np.unique(child, return_index=True)
            self._attach(child[first], parent[first], 0, relative[first])
            a, _, signs_a = self.find(a)
            b, _, signs_b = self.find(b)
            relative = (relative * signs_a * signs_b).astype(np.int8)
            same = a == b
            if self.parity_matters:
                self._is_pinned[a[same & (relative < 0)]] = True
            a, b, relative = a[~same], b[~same], relative[~same]

    def _unite_one(self, a: Any, p: Any, b: Any, q: Any, relative: Any) -> None:
        (root_a,), (position_a,), (sign_a,) = self.find(np.array([a]), np.array([p]))
        (root_b,), (position_b,), (sign_b,) = self.find(np.array([b]), np.array([q]))
        relative = relative * sign_a * sign_b
        if root_a == root_b:
            if (self.parity_matters and relative < 0) or position_a != position_b:
                self._is_pinned[root_a] = True
        elif position_a == position_b:
            self._attach(root_a, root_b, 0, relative)
        elif position_a == 0:
            self._attach(root_a, root_b, position_b, relative)
        elif position_b == 0:
            self._attach(root_b, root_a, position_a, relative)
        else:
            self._is_pinned[[root_a, root_b]] = True

    def _attach(self, child: Any, parent: Any, prefix: Any, relative: Any) -> None:
        self._parent[child] = parent
        self._prefix[child] = prefix
        self._sign[child] = relative
        for flags in (self._is_pinned, self._is_approximate):
            np.logical_or.at(flags, parent, flags[child])


def _within(prefix: Array, positions: Array) -> Array:
    """Position of an entry in a class, from that of its channel in the class and its own in the channel."""
    joined = np.where(prefix == 0, positions, prefix)
    is_nested = (prefix != 0) & (positions != 0)
    if is_nested.any():
        joined[is_nested] = mix(prefix[is_nested], positions[is_nested])
    return joined
