"""Groups that exchange channels or mix them: permutations and general linear maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from teleport_optim.symmetry.search.analysis import (
    MAX_CHANNELS,
    ChannelAnalysis,
    Intermediate,
    Subscripts,
    broadcast_subscripts,
    place,
    varying,
)
from teleport_optim.symmetry.search.channels import Array, ChannelClasses, Channels, coordinates, mix
from teleport_optim.symmetry.search.graph import Value

__all__ = ["PermutationAnalysis"]

_MAX_OUTPUTS = 2**16
"""Most outputs of a call; it keeps the numbers of places apart."""


class PermutationAnalysis(ChannelAnalysis):
    """Analysis of a group that exchanges or mixes channels: permutations, also of whole heads, and general linear maps.

    Two channels can be exchanged if they pass through the same calls, with the same positions. So each call that channels pass
    through is noted, and where a call tells places on an axis apart, the place too.

    Args:
        name: ``"permutation"``, ``"heads"`` or ``"linear"``.
    """

    moves_entries = True
    smallest_site = 2

    def __init__(self, name: str) -> None:
        super().__init__(name, ChannelClasses(parity_matters=name == "linear", use_positions=True))
        self.changes_numbers = self.mixes_channels = name == "linear"
        self.moves_heads = name == "heads"
        self.group = "permutation" if self.moves_heads else name
        self._noted: set[tuple[bytes, bytes]] = set()

    def lets_through(self, tags: frozenset[str]) -> bool:
        return not self.mixes_channels or "linear" in tags

    def note_passage(self, output: int, channels: tuple[Channels, ...]) -> tuple[Channels, ...]:
        moving = tuple(one for one in channels if one.axes)
        # a channel that is a whole tensor has no other to be exchanged with
        self.pin(one for one in channels if not one.axes)
        for number, one in enumerate(moving):
            key = (one.ids.tobytes(), one.positions.tobytes())
            if key in self._noted:  # they have passed another call together, which tells as much
                continue
            self._noted.add(key)
            nowhere = np.zeros([1] * one.rank, np.uint64)
            place = (self.node * _MAX_OUTPUTS + output) * MAX_CHANNELS + number
            self.passages.append((place, one.ids, one.positions, nowhere))
        return moving

    def pin_positions(self, channels: Channels, axes: Sequence[int], shape: Sequence[int]) -> None:
        where = [axis for axis in axes if axis in channels.axes]
        if where:
            self.passages.append(
                (self.node, channels.ids, channels.positions, mix(*where, coordinates(shape, where)) | np.uint64(1))
            )

    def collapse_axes(self, channels: Channels, axes: Sequence[int], shape: Sequence[int]) -> Channels:
        if not set(axes) & set(channels.axes):
            return channels
        return self._tie(channels, axes, shape)

    def _tie(self, channels: Channels, axes: Sequence[int], shape: Sequence[int]) -> Channels:
        """Let the entries along ``axes`` move as one channel, each at its own position."""
        gone = [axis for axis in channels.axes if axis in axes]
        kept = [1 if axis in gone else size for axis, size in enumerate(channels.ids.shape)]
        tied = Channels(self.classes.new(int(np.prod(kept))).reshape(kept), np.zeros(kept, np.uint64), channels.sign)
        rows, positions, places = (
            _in_rows(array, gone) for array in (channels.ids, channels.positions, tied.spread(shape, gone).positions)
        )
        _, first, inverse = np.unique(rows[0], return_index=True, return_inverse=True)
        # a channel may lie in several places (pixels), but these must be the same in each row
        is_alike = np.array_equal(rows, rows[:, first][:, inverse]) and np.array_equal(
            positions, np.broadcast_to(positions[:1], positions.shape)
        )
        if is_alike and (np.diff(np.sort(rows[:, first], axis=1), axis=1) != 0).all():
            own = Channels(rows[:, first], np.zeros_like(rows[:, first], dtype=np.uint64), channels.sign)
            whole = np.broadcast_to(tied.ids.reshape(-1, 1), own.ids.shape)
            self.classes.unite(own, Channels(whole, np.broadcast_to(places[:1, first], whole.shape), channels.sign))
        else:
            self.pin([channels, tied])
        return tied

    def add(self, values: Sequence[Value], shape: tuple[int, ...], tags: frozenset[str]) -> tuple[Channels, ...]:
        if not self.lets_through(tags):
            for value in values:
                self.freeze(value)
            return ()
        if self.mixes_channels:  # zero is the one constant that a linear map keeps
            values = [value for value in values if value.fill != 0.0] or values[:1]
        result = values[0]
        for value in values[1:]:
            subscripts = [broadcast_subscripts(one, shape, side) for side, one in enumerate((result, value))]
            channels = self._combine(result, subscripts[0], value, subscripts[1], range(len(shape)), is_sum=True)
            result = Intermediate(shape, channels=channels, fill=None)
        return self.channels_of(result)

    def product(
        self,
        one: Value,
        subscripts_one: Subscripts,
        other: Value,
        subscripts_other: Subscripts,
        subscripts: Subscripts,
    ) -> tuple[Channels, ...]:
        return self._combine(one, subscripts_one, other, subscripts_other, subscripts)

    def _combine(
        self,
        one: Value,
        subscripts_one: Subscripts,
        other: Value,
        subscripts_other: Subscripts,
        subscripts: Subscripts,
        *,
        is_sum: bool = False,
    ) -> tuple[Channels, ...]:
        subscripts_one, subscripts_other, subscripts = list(subscripts_one), list(subscripts_other), list(subscripts)
        self._fit(one, subscripts_one, other, subscripts_other, subscripts)
        self._fit(other, subscripts_other, one, subscripts_one, subscripts)
        sides = [
            [(channels, value, own) for channels in self.known(value)]
            for value, own in ((one, subscripts_one), (other, subscripts_other))
        ]
        opposites = ((other, subscripts_other), (one, subscripts_one))
        result = []
        for number, side in enumerate(sides):
            for entry in side:
                met = [second for second in sides[1 - number] if varying(entry) & varying(second)]
                competing = [first for first in side if met and varying(first) & varying(met[0])]
                if not met and is_sum and self.mixes_channels:
                    self.pin([entry[0]])
                elif not met:
                    result += self._alone(entry, *opposites[number], subscripts)
                elif len(met) > 1 or len(competing) > 1:
                    self.classes.pin(entry[0].ids)
                elif number == 0:
                    result += self._pair(entry, met[0], subscripts, is_sum=is_sum)
        return tuple(result)

    def _fit(self, value: Value, own: list[Any], other: Value, others: list[Any], subscripts: list[Any]) -> None:
        """Bind the free axes of a parameter to the channels of the tensor that it meets."""
        if value.source is None:
            return
        for axis, subscript in enumerate(own):
            if value.shape[axis] == 1 or not self.is_free(value, axis):
                continue
            if subscript not in others:
                if subscript in subscripts:
                    self.write(value, axis)
                continue
            there = others.index(subscript)
            if self.is_free(other, there):
                self.write(other, there)
                if not self.is_free(value, axis):  # they are one parameter
                    continue
            met = [channels for channels in self.known(other) if there in channels.axes]
            if len(met) == 1 and met[0].axes == (there,):
                self.bind(value, axis, [met[0] if subscript in subscripts else met[0].dual()])
            elif met:
                self.write(value, axis)

    def _alone(self, entry: Any, other: Value, others: list[Any], subscripts: list[Any]) -> list[Channels]:
        """Follow channels that meet nothing that moves in the other tensor."""
        channels, value, own = entry
        names = varying(entry)
        if other.fill is None or self.mixes_channels:
            met = [own.index(name) for name in names if name in others]
            self.pin_positions(channels, met, value.shape)
        kept = names & set(subscripts)
        if kept == names:
            return [place(channels, own, subscripts)]
        return self._sum_out(channels, [own.index(name) for name in names - kept], value.shape, own, subscripts)

    def _sum_out(
        self,
        channels: Channels,
        axes: list[int],
        shape: Sequence[int],
        own: list[Any],
        subscripts: list[Any],
    ) -> list[Channels]:
        """Follow channels through a sum over ``axes``."""
        kept = [axis for axis in channels.axes if axis not in axes]
        if kept and self.moves_heads:
            tied = self._tie(channels, axes, shape)
            self.tied.append(tied.ids.ravel())
            return [place(tied, own, subscripts)]
        self.pin_positions(channels, kept, shape)
        return []

    def _pair(self, first: Any, second: Any, subscripts: list[Any], *, is_sum: bool) -> list[Channels]:
        """Let the channels of two tensors move alike, and follow them into the product."""
        names = [varying(entry) for entry in (first, second)]
        if not (names[0] <= names[1] or names[1] <= names[0]):
            self.pin([first[0], second[0]])
            return []
        large, small = (first, second) if names[1] <= names[0] else (second, first)
        channels, value, own = large
        extra = [own.index(name) for name in varying(large) - varying(small)]
        spread = place(small[0], small[2], own).spread(value.shape, extra)
        contracted = [own.index(name) for name in varying(large) if name not in subscripts]
        is_contraction = bool(varying(small) - set(subscripts))
        self.classes.unite(channels, spread.dual() if is_contraction else spread)
        if self.mixes_channels and not is_sum and not is_contraction:
            self.pin([channels])
        if not contracted:
            return [place(channels, own, subscripts)]
        return self._sum_out(channels, contracted, value.shape, own, subscripts)

    def reduce(self, value: Value, axes: Sequence[int], tags: frozenset[str]) -> tuple[Channels, ...]:
        result: list[Channels] = []
        own = list(range(len(value.shape)))
        for channels in self.channels_of(value):
            gone = [axis for axis in channels.axes if axis in axes]
            if self.mixes_channels and (gone or "linear" not in tags):
                self.pin([channels])
            elif not gone:
                result.append(channels)
            else:
                result += self._sum_out(channels, gone, value.shape, own, own)
        return tuple(result)

    def normalise(self, value: Value, axes: Sequence[int], tags: frozenset[str]) -> tuple[Channels, ...]:
        result = []
        for channels in self.channels_of(value):
            inside = set(channels.axes) & set(axes)
            if self.mixes_channels:
                self.pin([channels])
            elif inside and inside != set(channels.axes):
                result += self._regroup(channels, sorted(inside), value.shape)
            else:
                result.append(channels)
        return tuple(result)

    def _regroup(self, channels: Channels, inside: list[int], shape: Sequence[int]) -> list[Channels]:
        """Keep channels within the group with which they are normalised, or move whole groups."""
        outside = [axis for axis in channels.axes if axis not in inside]
        if self.moves_heads:
            tied = self._tie(channels, inside, shape)
            self.tied.append(tied.ids.ravel())
        else:
            self.pin_positions(channels, outside, shape)
        return [channels]


def _in_rows(array: Array, axes: Sequence[int]) -> Array:
    """Flatten ``axes`` of an array into columns and all others into rows."""
    others = [axis for axis in range(array.ndim) if axis not in axes]
    return array.transpose([*others, *axes]).reshape(int(np.prod([array.shape[axis] for axis in others])), -1)
