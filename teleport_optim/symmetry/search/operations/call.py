"""One operation of a traced model, as rules see it, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from teleport_optim.symmetry.search.analysis import ChannelAnalysis, Value
from teleport_optim.symmetry.search.channels import Channels

__all__ = [
    "Call",
    "Result",
    "Rule",
    "aligned",
    "as_value",
    "axes_of",
    "bind_axis",
    "opaque",
    "values_in",
    "with_channels",
]


Result = list[tuple[Channels, ...]]


@dataclass
class Call:
    """One operation of a traced model.

    Attributes:
        name: Name of the operation.
        node: Its number in the graph.
        arguments: Arguments by the names of the schema; a :class:`Value` in place of each tensor.
        shapes: Shapes of the tensors that it returns.
    """

    name: str
    node: int
    arguments: dict[str, Any]
    shapes: list[tuple[int, ...]]

    def __getitem__(self, key: str) -> Any:
        return self.arguments.get(key)

    @property
    def first(self) -> Value:
        """The first tensor."""
        return next(values_in(self.arguments))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first tensor that it returns."""
        return self.shapes[0]


Rule = Callable[[Call, ChannelAnalysis], Result]


def values_in(argument: Any) -> Iterator[Value]:
    """The tensors in an argument, with those in lists and dictionaries."""
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, dict):
        for value in argument.values():
            yield from values_in(value)
    elif isinstance(argument, (list, tuple)):
        for value in argument:
            yield from values_in(value)


def as_value(argument: Any) -> Value:
    if isinstance(argument, Value):
        return argument
    return Value((), fill=float(argument) if isinstance(argument, (int, float)) else None)


def axes_of(argument: Any, rank: int) -> list[int]:
    """Axes as numbers from 0; all of them for None or an empty list."""
    if argument is None or argument == []:
        return list(range(rank))
    return [axis % max(rank, 1) for axis in ([argument] if isinstance(argument, int) else argument)]


def with_channels(
    value: Value, analysis: ChannelAnalysis, channels: Sequence[Channels], shape: Sequence[int] | None = None
) -> Value:
    return Value(tuple(value.shape if shape is None else shape), {analysis.name: tuple(channels)})


def aligned(value: Value, axis: int, shape: Sequence[int]) -> Value:
    """A tensor with one axis as one of ``shape`` that has it at ``axis``."""
    assert len(value.shape) == 1
    if value.source is not None:
        axes = tuple(value.source.axes[0] if k == axis else None for k in range(len(shape)))
        return replace(value, shape=tuple(shape), source=value.source._replace(axes=axes))
    channels = {
        name: tuple(Channels.along(one.ids, axis, len(shape), one.positions, one.sign) for one in own)
        for name, own in value.channels.items()
    }
    return replace(value, shape=tuple(shape), channels=channels)


def opaque(call: Call, analysis: ChannelAnalysis) -> Result:
    """What is not understood: nothing that goes in moves."""
    for value in values_in(call.arguments):
        analysis.freeze(value)
    return [()] * len(call.shapes)


def bind_axis(
    analysis: ChannelAnalysis,
    value: Value,
    axis: int,
    channels: Sequence[Channels],
    *,
    power: int = 1,
    is_updated: bool = False,
) -> None:
    """Let an axis of a parameter move as ``channels`` say, whether it is free or not.

    Args:
        analysis: The group.
        value: The parameter. What is none, or has no such axis, does not move.
        axis: The axis.
        channels: How it is to move.
        power: The degree.
        is_updated: Whether the operation itself writes the tensor, which then moves although it is a buffer.
    """
    if analysis.is_free(value, axis) or (is_updated and analysis.is_unused(value, axis)):
        analysis.bind(value, axis, channels, power=power)
        return
    if value.source is None or value.source.axes[axis] is None:
        analysis.freeze(value)
        analysis.pin(channels)
        return
    if analysis.is_unused(value, axis):
        analysis.bind(value, axis, [])
    known = analysis.write(value, axis)
    wanted = [one for one in channels for _ in range(power if analysis.changes_numbers else 1)]
    if len(known) != len(wanted):
        analysis.pin([*known, *channels])
        return
    for one, other in zip(known, wanted):
        analysis.classes.unite(one, other)
