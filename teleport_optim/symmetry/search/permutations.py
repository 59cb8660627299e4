"""Groups that exchange channels or mix them: permutations and general linear maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from teleport_optim.symmetry.search.analysis import (
    MAX_LABELS,
    Letters,
    Theory,
    Value,
    broadcast_letters,
    place,
    varying,
)
from teleport_optim.symmetry.search.channels import Array, Labels, Units, coordinates, mix

__all__ = ["Exchange"]


class Exchange(Theory):
    """Channels are exchanged or mixed: permutations, permutations of whole heads, and general linear maps.

    Two channels can be exchanged if they pass through the same nodes of the graph, with the same roles. So each node that
    channels pass through is recorded, and where an operation tells positions apart, the position too.

    Args:
        name: ``"permutation"``, ``"heads"`` or ``"linear"``.

    Attributes:
        records: Of each node, its number, the units and roles that pass, and the positions that it tells apart.
        tied: Units that stand for whole heads.
        moves_heads: Whether heads are exchanged instead of the channels within them.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, Units(parity_matters=name == "linear", use_roles=True))
        self.records: list[tuple[int, Array, Array, Array]] = []
        self.tied: list[Array] = []
        self._recorded: set[tuple[bytes, bytes]] = set()
        self._is_linear = self.changes_numbers = name == "linear"
        self.moves_heads = name == "heads"

    def lets_through(self, tags: frozenset[str]) -> bool:
        return not self._is_linear or "linear" in tags

    def record(self, node: int, labels: tuple[Labels, ...]) -> tuple[Labels, ...]:
        moving = tuple(one for one in labels if one.axes)
        self.fix(
            one for one in labels if not one.axes
        )  # a channel that is a tensor by itself has no other to change with
        for number, one in enumerate(moving):
            key = (one.units.tobytes(), one.roles.tobytes())
            if key in self._recorded:  # they have passed a place together before: this one tells no two of them apart
                continue
            self._recorded.add(key)
            nowhere = np.zeros([1] * one.rank, np.uint64)
            self.records.append((node * MAX_LABELS + number, one.units, one.roles, nowhere))
        return moving

    def hold(self, node: int, labels: Labels, axes: Sequence[int], shape: Sequence[int]) -> None:
        where = [axis for axis in axes if axis in labels.axes]
        if where:
            self.records.append(
                (node, labels.units, labels.roles, mix(*where, coordinates(shape, where)) | np.uint64(1))
            )

    def confine(self, labels: Labels, axes: Sequence[int], shape: Sequence[int]) -> Labels:
        if not set(axes) & set(labels.axes):
            return labels
        return self._tie(labels, axes, shape)

    def _tie(self, labels: Labels, axes: Sequence[int], shape: Sequence[int]) -> Labels:
        """Let the entries along ``axes`` move as one, each in its place."""
        gone = [axis for axis in labels.axes if axis in axes]
        kept = [1 if axis in gone else size for axis, size in enumerate(labels.units.shape)]
        tied = Labels(self.units.new(int(np.prod(kept))).reshape(kept), np.zeros(kept, np.uint64), labels.sign)
        rows, roles, places = (
            _in_rows(array, gone) for array in (labels.units, labels.roles, tied.spread(shape, gone).roles)
        )
        _, first, inverse = np.unique(rows[0], return_index=True, return_inverse=True)
        # a unit may lie in several places (pixels), but in the same for each row
        is_alike = np.array_equal(rows, rows[:, first][:, inverse]) and np.array_equal(
            roles, np.broadcast_to(roles[:1], roles.shape)
        )
        if is_alike and (np.diff(np.sort(rows[:, first], axis=1), axis=1) != 0).all():
            own = Labels(rows[:, first], np.zeros_like(rows[:, first], dtype=np.uint64), labels.sign)
            whole = np.broadcast_to(tied.units.reshape(-1, 1), own.units.shape)
            self.units.unite(own, Labels(whole, np.broadcast_to(places[:1, first], whole.shape), labels.sign))
        else:
            self.fix([labels, tied])
        return tied

    def add(
        self, node: int, values: Sequence[Value], shape: tuple[int, ...], tags: frozenset[str]
    ) -> tuple[Labels, ...]:
        if not self.lets_through(tags):
            for value in values:
                self.freeze(value)
            return ()
        if self._is_linear:  # zero is the one constant that a linear map keeps
            values = [value for value in values if value.fill != 0.0] or values[:1]
        result = values[0]
        for value in values[1:]:
            letters = [broadcast_letters(one, shape, side) for side, one in enumerate((result, value))]
            labels = self._combine(node, result, letters[0], value, letters[1], range(len(shape)), is_sum=True)
            result = Value(shape, {self.name: labels}, fill=None)
        return self.settle(result)

    def product(
        self, node: int, one: Value, letters_one: Letters, other: Value, letters_other: Letters, letters: Letters
    ) -> tuple[Labels, ...]:
        return self._combine(node, one, letters_one, other, letters_other, letters)

    def _combine(
        self,
        node: int,
        one: Value,
        letters_one: Letters,
        other: Value,
        letters_other: Letters,
        letters: Letters,
        *,
        is_sum: bool = False,
    ) -> tuple[Labels, ...]:
        letters_one, letters_other, letters = list(letters_one), list(letters_other), list(letters)
        self._fit(one, letters_one, other, letters_other, letters)
        self._fit(other, letters_other, one, letters_one, letters)
        sides = [
            [(labels, value, own) for labels in self.known(value)]
            for value, own in ((one, letters_one), (other, letters_other))
        ]
        opposites = ((other, letters_other), (one, letters_one))
        result = []
        for number, side in enumerate(sides):
            for entry in side:
                met = [second for second in sides[1 - number] if varying(entry) & varying(second)]
                rivals = [first for first in side if met and varying(first) & varying(met[0])]
                if not met and is_sum and self._is_linear:
                    self.fix([entry[0]])
                elif not met:
                    result += self._alone(node, entry, *opposites[number], letters)
                elif len(met) > 1 or len(rivals) > 1:
                    self.units.fix(entry[0].units)
                elif number == 0:
                    result += self._pair(node, entry, met[0], letters, is_sum=is_sum)
        return tuple(result)

    def _fit(self, value: Value, own: list[Any], other: Value, others: list[Any], letters: list[Any]) -> None:
        """Make the free axes of a parameter fit the tensor that it meets."""
        if value.source is None:
            return
        for axis, letter in enumerate(own):
            if value.shape[axis] == 1 or not self.is_free(value, axis):
                continue
            if letter not in others:
                if letter in letters:
                    self.write(value, axis)
                continue
            there = others.index(letter)
            if self.is_free(other, there):
                self.write(other, there)
                if not self.is_free(value, axis):  # they are one parameter
                    continue
            met = [labels for labels in self.known(other) if there in labels.axes]
            if len(met) == 1 and met[0].axes == (there,):
                self.bind(value, axis, [met[0] if letter in letters else met[0].dual()])
            elif met:
                self.write(value, axis)

    def _alone(self, node: int, entry: Any, other: Value, others: list[Any], letters: list[Any]) -> list[Labels]:
        """What becomes of labels that meet nothing that moves in the other tensor."""
        labels, value, own = entry
        names = varying(entry)
        if other.fill is None or self._is_linear:
            met = [own.index(name) for name in names if name in others]
            self.hold(node, labels, met, value.shape)
        kept = names & set(letters)
        if kept == names:
            return [place(labels, own, letters)]
        return self._sum_out(node, labels, [own.index(name) for name in names - kept], value.shape, own, letters)

    def _sum_out(
        self, node: int, labels: Labels, axes: list[int], shape: Sequence[int], own: list[Any], letters: list[Any]
    ) -> list[Labels]:
        """What is left of labels after a sum over ``axes``."""
        kept = [axis for axis in labels.axes if axis not in axes]
        if kept and self.moves_heads:
            tied = self._tie(labels, axes, shape)
            self.tied.append(tied.units.ravel())
            return [place(tied, own, letters)]
        self.hold(node, labels, kept, shape)
        return []

    def _pair(self, node: int, first: Any, second: Any, letters: list[Any], *, is_sum: bool) -> list[Labels]:
        """Let the labels of two tensors move alike, and tell what becomes of them."""
        names = [varying(entry) for entry in (first, second)]
        if not (names[0] <= names[1] or names[1] <= names[0]):
            self.fix([first[0], second[0]])
            return []
        large, small = (first, second) if names[1] <= names[0] else (second, first)
        labels, value, own = large
        extra = [own.index(name) for name in varying(large) - varying(small)]
        spread = place(small[0], small[2], own).spread(value.shape, extra)
        contracted = [own.index(name) for name in varying(large) if name not in letters]
        is_contraction = bool(varying(small) - set(letters))
        self.units.unite(labels, spread.dual() if is_contraction else spread)
        if self._is_linear and not is_sum and not is_contraction:
            self.fix([labels])
        if not contracted:
            return [place(labels, own, letters)]
        return self._sum_out(node, labels, contracted, value.shape, own, letters)

    def reduce(self, node: int, value: Value, axes: Sequence[int], tags: frozenset[str]) -> tuple[Labels, ...]:
        result: list[Labels] = []
        own = list(range(len(value.shape)))
        for labels in self.settle(value):
            gone = [axis for axis in labels.axes if axis in axes]
            if self._is_linear and (gone or "linear" not in tags):
                self.fix([labels])
            elif not gone:
                result.append(labels)
            else:
                result += self._sum_out(node, labels, gone, value.shape, own, own)
        return tuple(result)

    def normalise(self, node: int, value: Value, axes: Sequence[int], tags: frozenset[str]) -> tuple[Labels, ...]:
        result = []
        for labels in self.settle(value):
            inside = set(labels.axes) & set(axes)
            if self._is_linear:
                self.fix([labels])
            elif inside and inside != set(labels.axes):
                result += self._regroup(node, labels, sorted(inside), value.shape)
            else:
                result.append(labels)
        return tuple(result)

    def _regroup(self, node: int, labels: Labels, inside: list[int], shape: Sequence[int]) -> list[Labels]:
        """Keep channels within the group with which they are normalised, or exchange whole groups."""
        outside = [axis for axis in labels.axes if axis not in inside]
        if self.moves_heads:
            tied = self._tie(labels, inside, shape)
            self.tied.append(tied.units.ravel())
        else:
            self.hold(node, labels, outside, shape)
        return [labels]


def _in_rows(array: Array, axes: Sequence[int]) -> Array:
    """An array with ``axes`` flattened into columns and all others into rows."""
    others = [axis for axis in range(array.ndim) if axis not in axes]
    return array.transpose([*others, *axes]).reshape(int(np.prod([array.shape[axis] for axis in others])), -1)
