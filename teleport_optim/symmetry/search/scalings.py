"""Groups that multiply each channel by a number of its own: positive scalings and sign flips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from teleport_optim.symmetry.search.analysis import MAX_LABELS, Letters, Theory, Value, place, varying
from teleport_optim.symmetry.search.channels import Labels, Units

__all__ = ["Multiplication"]


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

    def record(self, node: int, labels: tuple[Labels, ...]) -> tuple[Labels, ...]:
        if len(labels) <= MAX_LABELS:
            return labels
        self.fix(labels)  # a tensor that was multiplied with itself over and over
        return ()

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
        if not self.lets_through(tags):
            for value in moving:
                self.freeze(value)
            return ()
        if not moving or any(value.source is None and not self.known(value) for value in moving):
            for value in moving:
                self.fix(self.known(value))
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
            is_broadcast = value.shape[axis] != shape[offset + axis]
            fitting = [
                one
                for one in reference
                if (not one.axes and axis == free[0]) or (one.axes == (offset + axis,) and not is_broadcast)
            ]
            self.bind(value, axis, fitting)
            absorbed += fitting
        result = list(absorbed)
        for one in _without(reference, absorbed):
            partner = self._partner(one, others, sign=1)
            if partner is None:
                self.fix([one])
                continue
            others = _without(others, [partner])
            self.units.unite(one, partner)
            result.append(one if len(one.axes) <= len(partner.axes) else partner)
        self.fix(others)
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
        if one.source is not None and other.source is not None and one.source.name == other.source.name:
            for value in values:  # each factor counts in both
                self.settle(value)
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
                if letter in others and (varying(entry) == {letter} or (not varying(entry) and axis == first))
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
        placed = [[place(labels, own, names) for labels, own in side] for side in factors]
        for one in list(placed[0]):
            undoing = next((other for other in placed[1] if self._are_equal(one, other, -1)), None)
            if undoing is not None:
                placed = [_without(placed[0], [one]), _without(placed[1], [undoing])]
        result = []
        for one in [*placed[0], *placed[1]]:
            if not set(one.axes) & set(summed):
                result.append(place(one, names, letters))
        reads = [[one for one in side if set(one.axes) & set(summed)] for side in placed]
        for one in reads[0]:
            partner = next((other for other in reads[1] if other.axes == one.axes), None)
            if partner is None:
                self.fix([one])
                continue
            reads[1] = _without(reads[1], [partner])
            self.units.unite(one, partner.dual())
        self.fix(reads[1])
        return result

    def reduce(self, node: int, value: Value, axes: Sequence[int], tags: frozenset[str]) -> tuple[Labels, ...]:
        labels = self.settle(value)
        if not self.lets_through(tags):
            self.fix(labels)
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
                self.fix([labels])
        return tuple(result)


def _widen(labels: Iterable[Labels], rank: int) -> list[Labels]:
    """Labels of a tensor that is broadcast to ``rank`` axes."""
    return [one.map(lambda array: array.reshape((1,) * (rank - array.ndim) + array.shape)) for one in labels]


def _without(labels: Sequence[Labels], gone: Sequence[Labels]) -> list[Labels]:
    return [one for one in labels if not any(one is other for other in gone)]
