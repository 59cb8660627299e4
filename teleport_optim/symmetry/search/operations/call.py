"""Helpers that several rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from teleport_optim.symmetry.search.analysis import ChannelAnalysis, Intermediate
from teleport_optim.symmetry.search.channels import Channels
from teleport_optim.symmetry.search.graph import Call, Value

__all__ = [
    "Result",
    "Rule",
    "aligned",
    "as_value",
    "axes_of",
    "bind_axis",
    "opaque",
    "with_channels",
]


Result = list[tuple[Channels, ...]]


Rule = Callable[[Call, ChannelAnalysis], Result]


def as_value(argument: Any) -> Value:
    """Make a tensor of a number."""
    if isinstance(argument, Value):
        return argument
    return Value((), fill=float(argument) if isinstance(argument, (int, float)) else None)


def axes_of(argument: Any, rank: int) -> list[int]:
    """Axes as numbers from 0; all of them for None or an empty list."""
    if argument is None or argument == []:
        return list(range(rank))
    return [axis % max(rank, 1) for axis in ([argument] if isinstance(argument, int) else argument)]


def with_channels(value: Value, channels: Sequence[Channels], shape: Sequence[int] | None = None) -> Intermediate:
    """Make a tensor of the shape of ``value``, or of another shape, with these channels."""
    return Intermediate(tuple(value.shape if shape is None else shape), channels=tuple(channels))


def aligned(value: Value, analysis: ChannelAnalysis, axis: int, shape: Sequence[int]) -> Value:
    """Make of a tensor with one axis one of ``shape`` that has it at ``axis``."""
    assert len(value.shape) == 1
    if value.source is not None:
        axes = tuple(value.source.axes[0] if k == axis else None for k in range(len(shape)))
        return replace(value, shape=tuple(shape), source=value.source._replace(axes=axes))
    channels = tuple(
        Channels.along(one.ids, axis, len(shape), one.positions, one.sign) for one in analysis.known(value)
    )
    return Intermediate(tuple(shape), channels=channels, fill=value.fill)


def opaque(call: Call, analysis: ChannelAnalysis) -> Result:
    """Let nothing move that goes into a call: the rule does not cover this form of the operation."""
    for value in call.values:
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
    """Let an axis of a parameter move as ``channels`` say; if it is not free, unite them with those it has.

    Args:
        analysis: The group.
        value: The parameter. A tensor that is none does not move.
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
