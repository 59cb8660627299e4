"""Groups that multiply each channel by a number of its own: positive scalings and sign flips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from teleport_optim.symmetry.search.analysis import MAX_CHANNELS, ChannelAnalysis, Subscripts, place, varying
from teleport_optim.symmetry.search.channels import ChannelClasses, Channels
from teleport_optim.symmetry.search.graph import Value

__all__ = ["ScalingAnalysis"]


class ScalingAnalysis(ChannelAnalysis):
    """Analysis of a group that multiplies each channel by a number of its own: positive scalings or sign flips.

    An entry that belongs to several channels, on several axes, is multiplied by all of their numbers.

    Args:
        name: ``"scaling"`` or ``"sign"``.
    """

    moves_entries = False

    def __init__(self, name: str) -> None:
        super().__init__(name, ChannelClasses(parity_matters=name == "scaling", use_positions=False))

    def pin_positions(self, channels: Channels, axes: Sequence[int], shape: Sequence[int]) -> None:
        """Do nothing: factors do not move from place to place."""

    def note_passage(self, output: int, channels: tuple[Channels, ...]) -> tuple[Channels, ...]:
        if len(channels) <= MAX_CHANNELS:
            return channels
        self.pin(channels)  # a tensor that was multiplied by itself over and over
        return ()

    def collapse_axes(self, channels: Channels, axes: Sequence[int], shape: Sequence[int]) -> Channels:
        if not set(axes) & set(channels.axes):
            return channels
        index = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(channels.rank))
        level = channels.map(lambda array: array[index])
        self.classes.unite(channels, level)
        return level

    def add(self, values: Sequence[Value], shape: tuple[int, ...], tags: frozenset[str]) -> tuple[Channels, ...]:
        moving = sorted((v for v in values if v.fill != 0.0), key=lambda value: value.source is not None)
        if not self.lets_through(tags):
            for value in moving:
                self.freeze(value)
            return ()
        if not moving or any(value.source is None and not self.known(value) for value in moving):
            for value in moving:
                self.pin(self.known(value))
            return ()
        result = _widen(self.channels_of(moving[0]), len(shape))
        for value in moving[1:]:
            result = self._agree(result, value, shape)
        return tuple(result)

    def _agree(self, reference: list[Channels], value: Value, shape: tuple[int, ...]) -> list[Channels]:
        """Set the factors of ``value`` equal to those of ``reference``; returns those that are left."""
        offset = len(shape) - len(value.shape)
        free = [axis for axis in range(len(value.shape)) if self.is_free(value, axis)]
        others = _widen(self.known(value), len(shape))
        absorbed: list[Channels] = []
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
                self.pin([one])
                continue
            others = _without(others, [partner])
            self.classes.unite(one, partner)
            result.append(one if len(one.axes) <= len(partner.axes) else partner)
        self.pin(others)
        return result

    def _partner(self, one: Channels, others: Sequence[Channels], *, sign: int) -> Channels | None:
        """Choose which of ``others`` to set equal to ``one``: the one that is equal, else one that changes along the same axes."""
        equal = [other for other in others if self._are_equal(one, other, sign)]
        alike = [other for other in others if other.axes == one.axes]
        overlapping = [other for other in others if set(other.axes) & set(one.axes)]
        return next(iter([*equal, *alike, *overlapping]), None)

    def _are_equal(self, one: Channels, other: Channels, sign: int) -> bool:
        if one.ids.shape != other.ids.shape:
            return False
        roots, _, signs = self.classes.find(one.ids)
        other_roots, _, other_signs = self.classes.find(other.ids)
        is_same = np.array_equal(roots, other_roots)
        return is_same and bool((one.sign * other.sign * signs * other_signs == sign).all())

    def product(
        self,
        one: Value,
        subscripts_one: Subscripts,
        other: Value,
        subscripts_other: Subscripts,
        subscripts: Subscripts,
    ) -> tuple[Channels, ...]:
        values, own = (one, other), (list(subscripts_one), list(subscripts_other))
        if one.source is not None and other.source is not None and one.source.name == other.source.name:
            for value in values:  # each factor counts in both
                self.channels_of(value)
        factors: list[list[tuple[Channels, list[Any]]]] = [[(x, o) for x in self.known(v)] for v, o in zip(values, own)]
        for side in sorted((0, 1), key=lambda k: values[k].source is None):
            if values[side].source is not None:
                factors[side] += self._fit(values[side], own[side], own[1 - side], factors[1 - side], list(subscripts))
        return tuple(self._contract(factors, list(subscripts)))

    def _fit(
        self,
        value: Value,
        own: list[Any],
        others: list[Any],
        factors: list[tuple[Channels, list[Any]]],
        subscripts: list[Any],
    ) -> list[tuple[Channels, list[Any]]]:
        """Let free axes of a parameter write new factors, and undo those of the other tensor.

        Factors that are undone are taken out of ``factors``. Returns the new ones.
        """
        written = []
        free = [axis for axis in range(len(own)) if self.is_free(value, axis)]
        shared = [axis for axis in free if own[axis] in others]
        # a factor of the whole tensor is undone once, best where it is summed over
        first = min(shared, key=lambda axis: (own[axis] in subscripts, -value.shape[axis]), default=None)
        for axis in free:
            subscript = own[axis]
            undone = [
                entry
                for entry in factors
                if subscript in others and (varying(entry) == {subscript} or (not varying(entry) and axis == first))
            ]
            new: list[Channels] = []
            if subscript in subscripts and (value.shape[axis] > 1 or subscript not in others or axis == first):
                ids = self.classes.new(value.shape[axis])
                new = [Channels(ids, np.zeros_like(ids, dtype=np.uint64))]
                written.append((Channels.along(ids, axis, len(own)), own))
            self.bind(value, axis, [*new, *(entry[0].dual() for entry in undone)])
            factors[:] = [entry for entry in factors if not any(entry is taken for taken in undone)]
        return written

    def _contract(self, factors: list[list[tuple[Channels, list[Any]]]], subscripts: list[Any]) -> list[Channels]:
        """Factors of a product that are left after the sum over all that is not among ``subscripts``."""
        names = list(dict.fromkeys(name for side in factors for _, own in side for name in own))
        summed = [index for index, name in enumerate(names) if name not in subscripts]
        placed = [[place(channels, own, names) for channels, own in side] for side in factors]
        for one in list(placed[0]):
            undoing = next((other for other in placed[1] if self._are_equal(one, other, -1)), None)
            if undoing is not None:
                placed = [_without(placed[0], [one]), _without(placed[1], [undoing])]
        result = []
        for one in [*placed[0], *placed[1]]:
            if not set(one.axes) & set(summed):
                result.append(place(one, names, subscripts))
        reads = [[one for one in side if set(one.axes) & set(summed)] for side in placed]
        for one in reads[0]:
            partner = next((other for other in reads[1] if other.axes == one.axes), None)
            if partner is None:
                self.pin([one])
                continue
            reads[1] = _without(reads[1], [partner])
            self.classes.unite(one, partner.dual())
        self.pin(reads[1])
        return result

    def reduce(self, value: Value, axes: Sequence[int], tags: frozenset[str]) -> tuple[Channels, ...]:
        channels = self.channels_of(value)
        if not self.lets_through(tags):
            self.pin(channels)
            return ()
        return tuple(self.collapse_axes(one, axes, value.shape) for one in channels)

    def normalise(self, value: Value, axes: Sequence[int], tags: frozenset[str]) -> tuple[Channels, ...]:
        result = []
        for channels in self.channels_of(value):
            if self.name == "sign" and ("sign" in tags or not set(channels.axes) & set(axes)):
                result.append(channels)
            elif self.name == "scaling" and not set(channels.axes) & set(axes):
                self.classes.mark_approximate(channels.ids)
            else:
                self.pin([channels])
        return tuple(result)


def _widen(channels: Iterable[Channels], rank: int) -> list[Channels]:
    """Put axes of length one in front, up to ``rank`` axes."""
    return [one.map(lambda array: array.reshape((1,) * (rank - array.ndim) + array.shape)) for one in channels]


def _without(channels: Sequence[Channels], gone: Sequence[Channels]) -> list[Channels]:
    return [one for one in channels if not any(one is other for other in gone)]
