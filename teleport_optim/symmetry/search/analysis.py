"""Base class of the analyses, each of which follows one group through a graph.

A :class:`ChannelAnalysis` keeps the channels of every tensor. From each call it learns which channels must move together, which
may not move at all and which parameters move along. There are two kinds: in one, channels are exchanged or mixed; in the other,
each is multiplied by a number of its own. The rules in :mod:`~teleport_optim.symmetry.search.operations` say what a call does by
a few words that both kinds understand: a sum, a product, a reduction, a normalisation, a function of each entry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from teleport_optim.symmetry.search.channels import Array, ChannelClasses, Channels, stretched
from teleport_optim.symmetry.search.graph import Value

__all__ = [
    "EVEN",
    "HOMOGENEOUS",
    "LINEAR",
    "MASK",
    "MAX_CHANNELS",
    "NOTHING",
    "ODD",
    "ChannelAnalysis",
    "Intermediate",
    "MovingAxis",
    "Subscripts",
    "broadcast_subscripts",
    "place",
    "varying",
]

LINEAR = frozenset({"linear", "scaling", "sign"})
"""Tags of linear functions."""
MASK = frozenset({"scaling", "sign"})
"""Tags of a multiplication by one factor for each entry, as in dropout."""
HOMOGENEOUS = frozenset({"scaling"})
"""Tags of f where f(s x) = s f(x) for positive s."""
ODD = frozenset({"sign"})
"""Tags of f where f(-x) = -f(x)."""
EVEN = frozenset({"even"})
"""Tags of f where f(-x) = f(x)."""
NOTHING: frozenset[str] = frozenset()
"""Tags of a function of each entry of which nothing else is known."""


@dataclass(frozen=True, eq=False)
class Intermediate(Value):
    """A tensor that occurs in the midst of a rule only, with its channels in the analysis to which the rule is applied."""

    channels: tuple[Channels, ...] = ()


class MovingAxis(NamedTuple):
    """Entries of a parameter that move with channels.

    Attributes:
        name: Name of the parameter.
        axis: The axis on which the entries lie.
        within: Axis, start and length of the slice of another axis in which alone they move; None for all of it.
        ids: Channel of each entry.
        positions: Position of each entry within its channel.
        degree: +1 if they are multiplied by the factor of their channel, -1 if they are divided by it, 2 for a variance.
    """

    name: str
    axis: int
    within: tuple[int, int, int] | None
    ids: Array
    positions: Array
    degree: int


class _Blocks(NamedTuple):
    """Channels ``[blocks, entries]`` of an axis of a parameter, one row for each block of its axis ``across``."""

    across: int
    channels: Channels


MAX_CHANNELS = 16
"""Most independent channels of one tensor, which multiply each other where they scale."""

Subscripts = Sequence[Any]
"""Name of each axis of a tensor, as in einsum: axes of two tensors with one name are one index."""


class ChannelAnalysis(ABC):
    """One group, followed through a model.

    Rules ask it for what its group does, never for its class or name.

    Attributes:
        name: Name of the analysis.
        group: Name of the group.
        node: Number of the call that is followed.
        classes: Classes of channels that move together.
        moving_axes: Axes of parameters that move, and with which channels.
        passages: Places at which channels are told apart: the number of the place, ids and positions of the channels that
            pass there, and where they do. Only groups that move entries have some.
        tied: Ids of channels that stand for whole heads.
        moves_entries: Whether the group moves entries to other places; otherwise it multiplies each where it is.
        changes_numbers: Whether the group changes numbers, and not only their places.
        mixes_channels: Whether each channel becomes a sum of channels.
        moves_heads: Whether the group exchanges whole heads instead of the channels within them.
        smallest_site: Fewest channels on which the group does anything.
    """

    moves_entries: ClassVar[bool]
    smallest_site: ClassVar[int] = 1
    changes_numbers = True
    mixes_channels = False
    moves_heads = False

    def __init__(self, name: str, classes: ChannelClasses) -> None:
        self.name = name
        self.group = name
        self.classes = classes
        self.moving_axes: list[MovingAxis] = []
        self.passages: list[tuple[int, Array, Array, Array]] = []
        self.tied: list[Array] = []
        self.node = 0
        self._channels: dict[Value, tuple[Channels, ...]] = {}
        self._data: set[str] = set()
        self._parameters: dict[str, list[tuple[Channels, ...] | None]] = {}
        self._blocked: dict[tuple[str, int], _Blocks] = {}

    # ------------------------------------------------------------------------------------------------ parameters

    def add_parameter(self, name: str, rank: int, *, is_data: bool = False) -> None:
        """Add a parameter, about whose axes nothing is known yet.

        Args:
            name: Its name.
            rank: Number of its axes.
            is_data: Whether its entries are data (a mask, integers), which may change places but are not multiplied.
        """
        self._parameters[name] = [None] * rank
        if is_data and self.changes_numbers:
            self._data.add(name)

    def is_free(self, value: Value, axis: int) -> bool:
        """Whether an axis of a parameter has met no call yet, so that it can still be made to fit."""
        return self.is_unused(value, axis) and value.source is not None and value.source.name not in self._data

    def is_unused(self, value: Value, axis: int) -> bool:
        """Whether an axis of a parameter, or of a buffer of data, has met no call yet."""
        if value.source is None:
            return False
        own_axis = value.source.axes[axis]
        return own_axis is not None and self._parameters[value.source.name][own_axis] is None

    def can_move(self, value: Value) -> bool:
        """Whether anything about a tensor moves, or can still be made to."""
        return any(self.is_free(value, axis) for axis in range(len(value.shape))) or bool(self.known(value))

    def bind(self, value: Value, axis: int, channels: Iterable[Channels], *, power: int = 1) -> None:
        """Let an unused axis move as ``channels`` say, which change along one axis at most; a variance has power 2."""
        name, own_axis = self._locate(value, axis)
        bound = []
        for one in channels:
            ids, positions = (stretched(array.ravel(), (value.shape[axis],)) for array in (one.ids, one.positions))
            self.moving_axes.append(MovingAxis(name, own_axis, None, ids, positions, power * one.sign))
            # who reads a variance sees the factor as often as its power says
            bound += [Channels(ids, positions, one.sign)] * (power if self.changes_numbers else 1)
        self._parameters[name][own_axis] = tuple(bound)

    def close(self, value: Value) -> None:
        """Let the axes that are still free never move: a call has used them, and nothing moved there."""
        for axis in range(len(value.shape)):
            if self.is_unused(value, axis):
                self.bind(value, axis, [])

    def pin_axis(self, value: Value, axis: int) -> None:
        """Let nothing move along an axis of a parameter, now or when another call uses it."""
        if value.source is None or value.source.axes[axis] is None:
            return
        name, own_axis = self._locate(value, axis)
        if self.is_unused(value, axis):
            self.bind(value, axis, [])
        self.pin(self._parameters[name][own_axis] or ())
        if (name, own_axis) in self._blocked:
            self.classes.pin(self._blocked[name, own_axis].channels.ids)

    @staticmethod
    def _locate(value: Value, axis: int) -> tuple[str, int]:
        assert value.source is not None
        own_axis = value.source.axes[axis]
        assert own_axis is not None
        return value.source.name, own_axis

    def bind_blocks(self, value: Value, axis: int, across: int, channels: Channels) -> None:
        """Let a parameter's ``axis``, in the k-th block of its axis ``across``, move as ``channels[k]`` say.

        ``channels`` has two axes: blocks and entries.
        """
        name, axes = value.source if value.source else ("", ())
        own_axis, own_across = (axes[k] if axes else None for k in (axis, across))
        known = self._blocked.get((name, own_axis)) if own_axis is not None else None
        if known is not None and known.across == own_across and known.channels.ids.shape == channels.ids.shape:
            self.classes.unite(channels, known.channels)
            return
        if own_axis is None or own_across is None or not self.is_free(value, axis):
            self.freeze(value)
            self.classes.pin(channels.ids)
            return
        self._blocked[name, own_axis] = _Blocks(own_across, channels)
        length = value.shape[across] // len(channels.ids)
        for block, (ids, positions) in enumerate(zip(channels.ids, channels.positions)):
            within = (own_across, block * length, length)
            self.moving_axes.append(MovingAxis(name, own_axis, within, ids, positions, channels.sign))
        self._parameters[name][own_axis] = ()

    def write(self, value: Value, axis: int) -> tuple[Channels, ...]:
        """Look up the channels along one axis of a parameter; if the axis is free, it gets new ones."""
        if self.is_free(value, axis):
            ids = self.classes.new(value.shape[axis])
            self.bind(value, axis, [Channels(ids, np.zeros_like(ids, dtype=np.uint64))])
        name, own_axis = self._locate(value, axis)
        return self._parameters[name][own_axis] or ()

    def blocks(self, value: Value, axis: int, across: int) -> Channels | None:
        """Look up the channels that :meth:`bind_blocks` gave to an axis; None if it did not."""
        name, axes = value.source if value.source else ("", ())
        own_axis, own_across = (axes[k] if axes else None for k in (axis, across))
        known = self._blocked.get((name, own_axis)) if own_axis is not None else None
        return known.channels if known is not None and known.across == own_across else None

    def known(self, value: Value) -> tuple[Channels, ...]:
        """Look up the channels of a tensor, without the free axes of a parameter."""
        if value.source is None:
            return value.channels if isinstance(value, Intermediate) else self._channels.get(value, ())
        name, axes = value.source
        rank = len(axes)
        for (owner, _), blocks in self._blocked.items():
            if owner == name:  # this call uses the parameter as a whole, so that its blocks may not move on their own
                self.classes.pin(blocks.channels.ids)
        result = []
        for axis, own in enumerate(axes):
            for one in (self._parameters[name][own] or ()) if own is not None else ():
                result.append(Channels.along(one.ids, axis, rank, one.positions, one.sign))
        return tuple(result)

    def is_still(self, value: Value) -> bool:
        """Whether a tensor is no parameter and has no channels, not even pinned ones."""
        return value.source is None and not self.known(value)

    def keep(self, value: Value, channels: tuple[Channels, ...]) -> None:
        """Let a tensor that an operation makes have these channels."""
        self._channels[value] = channels

    def channels_of(self, value: Value) -> tuple[Channels, ...]:
        """Look up the channels of a tensor; the free axes of a parameter get new ones."""
        if value.source is not None:
            for axis in range(len(value.shape)):
                if self.is_free(value, axis):
                    self.write(value, axis)
        return self.known(value)

    def is_at_rest(self, value: Value) -> bool:
        """Whether nothing about a tensor moves, or ever will, so that no rule can learn anything from it."""
        if value.source is None:
            return all(self.classes.are_pinned(one.ids) for one in self.known(value))
        axes = self._parameters[value.source.name]
        if any(own is None for own in axes) or any(name == value.source.name for name, _ in self._blocked):
            return False
        return all(self.classes.are_pinned(one.ids) for own in axes for one in own or ())

    @property
    def is_exhausted(self) -> bool:
        """Whether no parameter moves, and none can be made to, so that there is nothing left to find."""
        if any(own is None for axes in self._parameters.values() for own in axes):
            return False
        return all(self.classes.are_pinned(moving_axis.ids) for moving_axis in self.moving_axes)

    def freeze(self, value: Value) -> None:
        """Let nothing about a tensor move."""
        for channels in self.channels_of(value):
            self.classes.pin(channels.ids)

    # ------------------------------------------------------------------------------------------------ operations

    @abstractmethod
    def add(self, values: Sequence[Value], shape: tuple[int, ...], tags: frozenset[str]) -> tuple[Channels, ...]:
        """Follow a sum, or another function of several tensors that has ``tags`` in all of them together."""

    @abstractmethod
    def product(
        self,
        one: Value,
        subscripts_one: Subscripts,
        other: Value,
        subscripts_other: Subscripts,
        subscripts: Subscripts,
    ) -> tuple[Channels, ...]:
        """Follow a product of two tensors, summed over all indices that are not among ``subscripts``, as in einsum."""

    @abstractmethod
    def reduce(self, value: Value, axes: Sequence[int], tags: frozenset[str]) -> tuple[Channels, ...]:
        """Follow a symmetric function over ``axes``, which keep length one."""

    @abstractmethod
    def collapse_axes(self, channels: Channels, axes: Sequence[int], shape: Sequence[int]) -> Channels:
        """Let channels not change along ``axes``, along which a call mixes entries in a way of its own."""

    @abstractmethod
    def normalise(self, value: Value, axes: Sequence[int], tags: frozenset[str]) -> tuple[Channels, ...]:
        """Follow a division by a norm over ``axes``, perhaps after a mean over them is subtracted."""

    @abstractmethod
    def pin_positions(self, channels: Channels, axes: Sequence[int], shape: Sequence[int]) -> None:
        """Let channels move only to places with the same index on ``axes``."""

    def elementwise(self, value: Value, tags: frozenset[str]) -> tuple[Channels, ...]:
        """Follow a function of each entry."""
        channels = self.channels_of(value)
        if self.lets_through(tags):
            return channels
        if not ("even" in tags and self.name == "sign"):
            self.pin(channels)
        return ()

    def multiply(self, one: Value, other: Value, shape: tuple[int, ...]) -> tuple[Channels, ...]:
        """Follow a product, entry by entry, of two tensors that broadcast to ``shape``."""
        subscripts = [broadcast_subscripts(value, shape, side) for side, value in enumerate((one, other))]
        return self.product(one, subscripts[0], other, subscripts[1], range(len(shape)))

    @abstractmethod
    def note_passage(self, output: int, channels: tuple[Channels, ...]) -> tuple[Channels, ...]:
        """Note that channels pass through an output of the present call; returns those that can move on."""

    def lets_through(self, tags: frozenset[str]) -> bool:
        """Whether channels pass through a function with these tags."""
        return self.name in tags

    def pin(self, channels: Iterable[Channels]) -> None:
        """Let channels never move."""
        for one in channels:
            self.classes.pin(one.ids)


def broadcast_subscripts(value: Value, shape: Sequence[int], side: int) -> list[Any]:
    """The axes of the result with which the axes of a tensor are aligned; those that are broadcast get a name of their own."""
    offset = len(shape) - len(value.shape)
    return [
        offset + axis if size == shape[offset + axis] else ("broadcast", side, axis)
        for axis, size in enumerate(value.shape)
    ]


def place(channels: Channels, subscripts: Subscripts, target: Subscripts) -> Channels:
    """Channels whose axes are named ``subscripts``, on a tensor whose axes are named ``target``."""
    target = list(target)
    order = [subscripts.index(subscript) if subscript in subscripts else None for subscript in target]
    kept = [axis for axis in order if axis is not None]
    dropped = [axis for axis in range(channels.rank) if axis not in kept]

    def move(array: Array) -> Array:
        shape = [1 if axis is None else array.shape[axis] for axis in order]
        return array.transpose([*kept, *dropped]).reshape(shape)

    return channels.map(move)


def varying(entry: Any) -> set[Any]:
    """The names of the axes along which channels change."""
    return {entry[-1][axis] for axis in entry[0].axes}
