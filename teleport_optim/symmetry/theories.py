"""What each group demands of the channels of a model, operation by operation.

A :class:`Theory` follows one group through the model. It keeps the labels of every tensor's channels, and learns from each
operation which channels must move together, which may not move at all and which parameters move along. There are two kinds:
in one channels are exchanged, in the other each is multiplied by a number of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from teleport_optim.symmetry.labels import Array, Labels, Units, coordinates, mix

__all__ = [
    "EVEN",
    "HOMOGENEOUS",
    "LINEAR",
    "MASK",
    "NOTHING",
    "ODD",
    "Exchange",
    "Multiplication",
    "Slot",
    "Theory",
    "Value",
]

LINEAR = frozenset({"linear", "scaling", "sign"})
"""What commutes with multiplication by one number."""
MASK = frozenset({"scaling", "sign"})
"""What commutes with an independent factor for each entry, as dropout has."""
HOMOGENEOUS = frozenset({"scaling"})
"""What commutes with f where f(s x) = s f(x) for positive s."""
ODD = frozenset({"sign"})
"""What commutes with f where f(-x) = -f(x)."""
EVEN = frozenset({"even"})
"""What is known of f where f(-x) = f(x)."""
NOTHING: frozenset[str] = frozenset()
"""Element-wise, and no more."""


class Source(NamedTuple):
    """A parameter, or a view of one that only reorders its axes: the parameter's axis for each axis of the view."""

    name: str
    axes: tuple[int | None, ...]


@dataclass
class Value:
    """What is known of a tensor.

    Attributes:
        shape: Its shape.
        labels: For each theory, by name, the labels of its channels; none where nothing moves.
        source: The parameter that it is, if it is one.
        fill: The number that all its entries are, if they are one.
        data: Its entries where they depend neither on inputs nor on parameters (index tensors among the buffers).
    """

    shape: tuple[int, ...]
    labels: dict[str, tuple[Labels, ...]] = field(default_factory=dict)
    source: Source | None = None
    fill: float | None = None
    data: Any = None

    @property
    def is_still(self) -> bool:
        """Whether nothing about the tensor moves, in any theory."""
        return self.source is None and not any(self.labels.values())


class Slot(NamedTuple):
    """Entries of a parameter that move with units: those of ``axis``, in the slice ``within`` of another axis."""

    name: str
    axis: int
    within: tuple[int, int, int] | None
    units: Array
    roles: Array
    degree: int


Letters = Sequence[Any]
"""A name for each axis of a tensor; axes of two tensors with the same name are the same index."""


class Theory(ABC):
    """One group, followed through a model.

    Attributes:
        name: Name of the theory.
        passes: What an element-wise function must be known to commute with to let the group through.
        units: The channels.
        slots: The parameters that move, and with which channels.
    """

    def __init__(self, name: str, units: Units) -> None:
        self.name = name
        self.units = units
        self.slots: list[Slot] = []
        self._parameters: dict[str, list[tuple[Labels, ...] | None]] = {}
        self._blocked: dict[tuple[str, int], Labels] = {}

    # ------------------------------------------------------------------------------------------------ parameters

    def add_parameter(self, name: str, rank: int) -> None:
        """Take up a parameter about whose axes nothing is known yet."""
        self._parameters[name] = [None] * rank

    def is_free(self, value: Value, axis: int) -> bool:
        """Whether an axis is one of a parameter of which nothing is known yet, so that it can be made to fit."""
        if value.source is None:
            return False
        own_axis = value.source.axes[axis]
        return own_axis is not None and self._parameters[value.source.name][own_axis] is None

    def bind(self, value: Value, axis: int, labels: Iterable[Labels], *, power: int = 1) -> None:
        """Let a free axis move as ``labels`` say, which change along one axis at most; a variance has power 2."""
        name, own_axis = self._locate(value, axis)
        bound = []
        for one in labels:
            units, roles = (np.broadcast_to(array.ravel(), value.shape[axis]) for array in (one.units, one.roles))
            self.slots.append(Slot(name, own_axis, None, units, roles, power * one.sign))
            bound.append(Labels(units, roles, one.sign))
        self._parameters[name][own_axis] = tuple(bound)

    def close(self, value: Value) -> None:
        """Let the axes that are still free move no more: an operation has used them, and nothing moved there."""
        for axis in range(len(value.shape)):
            if self.is_free(value, axis):
                self.bind(value, axis, [])

    @staticmethod
    def _locate(value: Value, axis: int) -> tuple[str, int]:
        assert value.source is not None
        own_axis = value.source.axes[axis]
        assert own_axis is not None
        return value.source.name, own_axis

    def bind_blocks(self, value: Value, axis: int, across: int, labels: Labels) -> None:
        """Let a parameter's ``axis``, in the k-th block of its axis ``across``, move as ``labels[k]`` say.

        ``labels`` has two axes: blocks and entries.
        """
        key = (value.source.name, axis) if value.source else ("", axis)
        if key in self._blocked:
            self.units.unite(labels, self._blocked[key])
            return
        if not self.is_free(value, axis):
            self.freeze(value)
            self.units.fix(labels.units)
            return
        self._blocked[key] = labels
        length = value.shape[across] // len(labels.units)
        for block, (units, roles) in enumerate(zip(labels.units, labels.roles)):
            within = (across, block * length, length)
            self.slots.append(Slot(key[0], axis, within, units, roles, labels.sign))
        self._parameters[key[0]][axis] = ()

    def write(self, value: Value, axis: int) -> tuple[Labels, ...]:
        """The one-dimensional labels of an axis of a parameter; new channels if it is free."""
        if self.is_free(value, axis):
            units = self.units.new(value.shape[axis])
            self.bind(value, axis, [Labels(units, np.zeros_like(units, dtype=np.uint64))])
        name, own_axis = self._locate(value, axis)
        return self._parameters[name][own_axis] or ()

    def blocks(self, value: Value, axis: int) -> Labels | None:
        """What :meth:`bind_blocks` made of an axis, if it did."""
        return self._blocked.get((value.source.name, axis)) if value.source else None

    def known(self, value: Value) -> tuple[Labels, ...]:
        """The labels of a tensor; those of a parameter's free axes are left out."""
        if value.source is None:
            return value.labels.get(self.name, ())
        name, axes = value.source
        rank = len(axes)
        if self._is_in_blocks(name):
            self._dissolve(name)
        result = []
        for axis, own in enumerate(axes):
            for one in (self._parameters[name][own] or ()) if own is not None else ():
                result.append(Labels.along(one.units, axis, rank, one.roles, one.sign))
        return tuple(result)

    def settle(self, value: Value) -> tuple[Labels, ...]:
        """The labels of a tensor; the free axes of a parameter get new channels."""
        if value.source is not None:
            for axis in range(len(value.shape)):
                if self.is_free(value, axis):
                    self.write(value, axis)
        return self.known(value)

    def _is_in_blocks(self, name: str) -> bool:
        return any(key[0] == name for key in self._blocked)

    def _dissolve(self, name: str) -> None:
        """Fix the channels of a parameter that is used both in blocks and as a whole."""
        for key, labels in self._blocked.items():
            if key[0] == name:
                self.units.fix(labels.units)

    def freeze(self, value: Value) -> None:
        """Let nothing about a tensor move."""
        for labels in self.settle(value):
            self.units.fix(labels.units)

    # ------------------------------------------------------------------------------------------------ operations

    @abstractmethod
    def add(
        self, node: int, values: Sequence[Value], shape: tuple[int, ...], tags: frozenset[str]
    ) -> tuple[Labels, ...]:
        """A sum, or another function of several tensors that has the properties ``tags`` in all of them together."""

    @abstractmethod
    def product(
        self, node: int, one: Value, letters_one: Letters, other: Value, letters_other: Letters, letters: Letters
    ) -> tuple[Labels, ...]:
        """The sum over all indices that are not among ``letters`` of a product of two tensors."""

    @abstractmethod
    def reduce(self, node: int, value: Value, axes: Sequence[int], tags: frozenset[str]) -> tuple[Labels, ...]:
        """A symmetric function over ``axes``, which keep length one."""

    @abstractmethod
    def confine(self, labels: Labels, axes: Sequence[int], shape: Sequence[int]) -> Labels:
        """``labels`` that no longer change along ``axes``, along which the operation mixes entries in ways of its own."""

    @abstractmethod
    def normalise(self, node: int, value: Value, axes: Sequence[int], tags: frozenset[str]) -> tuple[Labels, ...]:
        """Subtract a mean over ``axes`` and divide by a norm over them, or only divide."""

    @abstractmethod
    def hold(self, node: int, labels: Labels, axes: Sequence[int], shape: Sequence[int]) -> None:
        """Let channels move only where their position along ``axes`` stays the same."""

    def elementwise(self, node: int, value: Value, tags: frozenset[str]) -> tuple[Labels, ...]:
        """A function of each entry."""
        labels = self.settle(value)
        if self._lets_through(tags):
            return labels
        if not ("even" in tags and self.name == "sign"):
            self._fix(labels)
        return ()

    def multiply(self, node: int, one: Value, other: Value, shape: tuple[int, ...]) -> tuple[Labels, ...]:
        """The product, entry by entry, of tensors that broadcast to ``shape``."""
        letters = [_broadcast_letters(value, shape, side) for side, value in enumerate((one, other))]
        return self.product(node, one, letters[0], other, letters[1], range(len(shape)))

    def record(self, node: int, labels: Labels) -> None:  # noqa: B027 - only where channels are exchanged
        """Remember that channels pass through a node of the graph."""

    def _lets_through(self, tags: frozenset[str]) -> bool:
        return self.name in tags

    def _fix(self, labels: Iterable[Labels]) -> None:
        for one in labels:
            self.units.fix(one.units)


def _broadcast_letters(value: Value, shape: Sequence[int], side: int) -> list[Any]:
    """The axes of the result with which the axes of a tensor are aligned; those that are broadcast get a name of their own."""
    offset = len(shape) - len(value.shape)
    return [
        offset + axis if size == shape[offset + axis] else ("broadcast", side, axis)
        for axis, size in enumerate(value.shape)
    ]


def _place(labels: Labels, letters: Letters, target: Letters) -> Labels:
    """Labels whose axes are named ``letters``, on a tensor whose axes are named ``target``."""
    target = list(target)
    order = [letters.index(letter) if letter in letters else None for letter in target]
    kept = [axis for axis in order if axis is not None]
    dropped = [axis for axis in range(labels.rank) if axis not in kept]

    def move(array: Array) -> Array:
        array = array.transpose([*kept, *dropped]).reshape([array.shape[axis] for axis in kept])
        return np.expand_dims(array, [k for k, axis in enumerate(order) if axis is None])

    return labels.map(move)


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
        self._is_linear = name == "linear"
        self.moves_heads = name == "heads"

    def _lets_through(self, tags: frozenset[str]) -> bool:
        return not self._is_linear or "linear" in tags

    def record(self, node: int, labels: Labels) -> None:
        self.records.append((node, labels.units, labels.roles, np.zeros([1] * labels.rank, np.uint64)))

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
        rows, roles, places = (_in_rows(array, gone) for array in (labels.units, labels.roles, tied.spread(shape, gone).roles))
        _, first, inverse = np.unique(rows[0], return_index=True, return_inverse=True)
        # a unit may lie in several places (pixels), but in the same for each row
        is_alike = np.array_equal(rows, rows[:, first][:, inverse]) and np.array_equal(roles, np.broadcast_to(roles[:1], roles.shape))
        if is_alike and (np.diff(np.sort(rows[:, first], axis=1), axis=1) != 0).all():
            own = Labels(rows[:, first], np.zeros_like(rows[:, first], dtype=np.uint64), labels.sign)
            whole = np.broadcast_to(tied.units.reshape(-1, 1), own.units.shape)
            self.units.unite(own, Labels(whole, np.broadcast_to(places[:1, first], whole.shape), labels.sign))
        else:
            self._fix([labels, tied])
        return tied

    def add(
        self, node: int, values: Sequence[Value], shape: tuple[int, ...], tags: frozenset[str]
    ) -> tuple[Labels, ...]:
        if not self._lets_through(tags):
            for value in values:
                self.freeze(value)
            return ()
        if self._is_linear:
            values = [value for value in values if value.fill != 0.0] or values[:1]
            if any(value.source is None and not self.known(value) for value in values):
                for value in values:
                    self._fix(self.known(value))
                return ()
        result = values[0]
        for value in values[1:]:
            letters = [_broadcast_letters(one, shape, side) for side, one in enumerate((result, value))]
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
                met = [second for second in sides[1 - number] if _names(entry) & _names(second)]
                rivals = [first for first in side if met and _names(first) & _names(met[0])]
                if not met:
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
            met = [labels for labels in self.known(other) if there in labels.axes]
            if len(met) == 1 and met[0].axes == (there,):
                self.bind(value, axis, [met[0] if letter in letters else met[0].dual()])
            elif met:
                self.write(value, axis)

    def _alone(self, node: int, entry: Any, other: Value, others: list[Any], letters: list[Any]) -> list[Labels]:
        """What becomes of labels that meet nothing that moves in the other tensor."""
        labels, value, own = entry
        names = _names(entry)
        if other.fill is None or self._is_linear:
            met = [own.index(name) for name in names if name in others]
            self.hold(node, labels, met, value.shape)
        kept = names & set(letters)
        if kept == names:
            return [_place(labels, own, letters)]
        return self._sum_out(node, labels, [own.index(name) for name in names - kept], value.shape, own, letters)

    def _sum_out(
        self, node: int, labels: Labels, axes: list[int], shape: Sequence[int], own: list[Any], letters: list[Any]
    ) -> list[Labels]:
        """What is left of labels after a sum over ``axes``."""
        kept = [axis for axis in labels.axes if axis not in axes]
        if kept and self.moves_heads:
            tied = self._tie(labels, axes, shape)
            self.tied.append(tied.units.ravel())
            return [_place(tied, own, letters)]
        self.hold(node, labels, kept, shape)
        return []

    def _pair(self, node: int, first: Any, second: Any, letters: list[Any], *, is_sum: bool) -> list[Labels]:
        """Let the labels of two tensors move alike, and tell what becomes of them."""
        names = [_names(entry) for entry in (first, second)]
        if not (names[0] <= names[1] or names[1] <= names[0]):
            self._fix([first[0], second[0]])
            return []
        large, small = (first, second) if names[1] <= names[0] else (second, first)
        labels, value, own = large
        extra = [own.index(name) for name in _names(large) - _names(small)]
        spread = _place(small[0], small[2], own).spread(value.shape, extra)
        contracted = [own.index(name) for name in _names(large) if name not in letters]
        is_contraction = bool(_names(small) - set(letters))
        self.units.unite(labels, spread.dual() if is_contraction else spread)
        if self._is_linear and not is_sum and not is_contraction:
            self._fix([labels])
        if not contracted:
            return [_place(labels, own, letters)]
        return self._sum_out(node, labels, contracted, value.shape, own, letters)

    def reduce(self, node: int, value: Value, axes: Sequence[int], tags: frozenset[str]) -> tuple[Labels, ...]:
        result: list[Labels] = []
        own = list(range(len(value.shape)))
        for labels in self.settle(value):
            gone = [axis for axis in labels.axes if axis in axes]
            if self._is_linear and (gone or "linear" not in tags):
                self._fix([labels])
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
                self._fix([labels])
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


def _names(entry: Any) -> set[Any]:
    """The names of the axes along which labels change."""
    return {entry[-1][axis] for axis in entry[0].axes}


class Multiplication(Theory):
    """Each channel is multiplied by a number of its own: positive scalings and sign flips.

    Several labels of one tensor multiply each other.

    Args:
        name: ``"scaling"`` or ``"sign"``.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, Units(parity_matters=name == "scaling", use_roles=False))

    def hold(self, node: int, labels: Labels, axes: Sequence[int], shape: Sequence[int]) -> None:
        """Factors do not move from place to place."""

    def confine(self, labels: Labels, axes: Sequence[int], shape: Sequence[int]) -> Labels:
        if not set(axes) & set(labels.axes):
            return labels
        index = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(labels.rank))
        level = labels.map(lambda array: array[index])
        self.units.unite(labels, level)
        return level

    def add(
        self, node: int, values: Sequence[Value], shape: tuple[int, ...], tags: frozenset[str]
    ) -> tuple[Labels, ...]:
        moving = sorted((v for v in values if v.fill != 0.0), key=lambda value: value.source is not None)
        if not self._lets_through(tags):
            for value in moving:
                self.freeze(value)
            return ()
        if not moving or any(value.source is None and not self.known(value) for value in moving):
            for value in moving:
                self._fix(self.known(value))
            return ()
        result = _widen(self.settle(moving[0]), len(shape))
        for value in moving[1:]:
            result = self._agree(result, value, shape)
        return tuple(result)

    def _agree(self, reference: list[Labels], value: Value, shape: tuple[int, ...]) -> list[Labels]:
        """Let the factors of ``value`` be those of ``reference``; returns those that are left."""
        offset = len(shape) - len(value.shape)
        free = [axis for axis in range(len(value.shape)) if self.is_free(value, axis)]
        others = _widen(self.known(value), len(shape))
        absorbed: list[Labels] = []
        for axis in free:
            fitting = [one for one in reference if one.axes == (offset + axis,) or (axis == free[0] and not one.axes)]
            self.bind(value, axis, fitting)
            absorbed += fitting
        result = list(absorbed)
        for one in _without(reference, absorbed):
            partner = self._partner(one, others, sign=1)
            if partner is None:
                self._fix([one])
                continue
            others = _without(others, [partner])
            self.units.unite(one, partner)
            result.append(one if len(one.axes) <= len(partner.axes) else partner)
        self._fix(others)
        return result

    def _partner(self, one: Labels, others: Sequence[Labels], *, sign: int) -> Labels | None:
        """Which of ``others`` to set equal to ``one``: the one that is equal, else one that changes along the same axes."""
        equal = [other for other in others if self._are_equal(one, other, sign)]
        alike = [other for other in others if other.axes == one.axes]
        overlapping = [other for other in others if set(other.axes) & set(one.axes)]
        return next(iter([*equal, *alike, *overlapping]), None)

    def _are_equal(self, one: Labels, other: Labels, sign: int) -> bool:
        if one.units.shape != other.units.shape:
            return False
        roots, _, signs = self.units.find(one.units)
        other_roots, _, other_signs = self.units.find(other.units)
        is_same = np.array_equal(roots, other_roots)
        return is_same and bool((one.sign * other.sign * signs * other_signs == sign).all())

    def product(
        self, node: int, one: Value, letters_one: Letters, other: Value, letters_other: Letters, letters: Letters
    ) -> tuple[Labels, ...]:
        values, own = (one, other), (list(letters_one), list(letters_other))
        factors: list[list[tuple[Labels, list[Any]]]] = [[(x, o) for x in self.known(v)] for v, o in zip(values, own)]
        for side in sorted((0, 1), key=lambda k: values[k].source is None):
            if values[side].source is not None:
                factors[side] += self._fit(values[side], own[side], own[1 - side], factors[1 - side], list(letters))
        return tuple(self._contract(factors, list(letters)))

    def _fit(
        self,
        value: Value,
        own: list[Any],
        others: list[Any],
        factors: list[tuple[Labels, list[Any]]],
        letters: list[Any],
    ) -> list[tuple[Labels, list[Any]]]:
        """Let free axes of a parameter write new factors and undo those of the other tensor, which are taken from ``factors``.

        Returns the new factors.
        """
        written = []
        free = [axis for axis in range(len(own)) if self.is_free(value, axis)]
        shared = [axis for axis in free if own[axis] in others]
        # a factor of the whole tensor is undone once, best where it is summed over
        first = min(shared, key=lambda axis: (own[axis] in letters, -value.shape[axis]), default=None)
        for axis in free:
            letter = own[axis]
            undone = [
                entry
                for entry in factors
                if letter in others and (_names(entry) == {letter} or (not _names(entry) and axis == first))
            ]
            new: list[Labels] = []
            if letter in letters and (value.shape[axis] > 1 or letter not in others or axis == first):
                units = self.units.new(value.shape[axis])
                new = [Labels(units, np.zeros_like(units, dtype=np.uint64))]
                written.append((Labels.along(units, axis, len(own)), own))
            self.bind(value, axis, [*new, *(entry[0].dual() for entry in undone)])
            factors[:] = [entry for entry in factors if not any(entry is taken for taken in undone)]
        return written

    def _contract(self, factors: list[list[tuple[Labels, list[Any]]]], letters: list[Any]) -> list[Labels]:
        """The factors of a product that are left after the sum over what is not among ``letters``."""
        names = list(dict.fromkeys(name for side in factors for _, own in side for name in own))
        summed = [index for index, name in enumerate(names) if name not in letters]
        placed = [[_place(labels, own, names) for labels, own in side] for side in factors]
        for one in list(placed[0]):
            undoing = next((other for other in placed[1] if self._are_equal(one, other, -1)), None)
            if undoing is not None:
                placed = [_without(placed[0], [one]), _without(placed[1], [undoing])]
        result = []
        for one in [*placed[0], *placed[1]]:
            if not set(one.axes) & set(summed):
                result.append(_place(one, names, letters))
        reads = [[one for one in side if set(one.axes) & set(summed)] for side in placed]
        for one in reads[0]:
            partner = next((other for other in reads[1] if other.axes == one.axes), None)
            if partner is None:
                self._fix([one])
                continue
            reads[1] = _without(reads[1], [partner])
            self.units.unite(one, partner.dual())
        self._fix(reads[1])
        return result

    def reduce(self, node: int, value: Value, axes: Sequence[int], tags: frozenset[str]) -> tuple[Labels, ...]:
        labels = self.settle(value)
        if not self._lets_through(tags):
            self._fix(labels)
            return ()
        return tuple(self.confine(one, axes, value.shape) for one in labels)

    def normalise(self, node: int, value: Value, axes: Sequence[int], tags: frozenset[str]) -> tuple[Labels, ...]:
        result = []
        for labels in self.settle(value):
            if self.name == "sign" and ("sign" in tags or not set(labels.axes) & set(axes)):
                result.append(labels)
            elif self.name == "scaling" and not set(labels.axes) & set(axes):
                self.units.blur(labels.units)
            else:
                self._fix([labels])
        return tuple(result)


def _widen(labels: Iterable[Labels], rank: int) -> list[Labels]:
    """Labels of a tensor that is broadcast to ``rank`` axes."""
    return [one.map(lambda array: array.reshape((1,) * (rank - array.ndim) + array.shape)) for one in labels]


def _without(labels: Sequence[Labels], gone: Sequence[Labels]) -> list[Labels]:
    return [one for one in labels if not any(one is other for other in gone)]
