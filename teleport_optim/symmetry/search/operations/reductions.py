"""Pools, interpolation and reductions over axes."""

from __future__ import annotations

from teleport_optim.symmetry.search.analysis import HOMOGENEOUS, NOTHING, ChannelAnalysis
from teleport_optim.symmetry.search.graph import Call, Value
from teleport_optim.symmetry.search.operations.call import Result, axes_of
from teleport_optim.symmetry.search.operations.entrywise import combined

__all__ = ["extreme", "norm", "reduce", "spatial"]


def spatial(call: Call, analysis: ChannelAnalysis, tags: frozenset[str], num_spatial: int | None = None) -> Result:
    """Follow a layer that works on the last axes, and on each channel alone."""
    value = call.first
    rank = len(value.shape)
    num_spatial = rank - 2 if num_spatial is None else num_spatial
    axes = range(rank - num_spatial, rank)
    channels = analysis.elementwise(value, tags)
    result = tuple(analysis.collapse_axes(one, axes, value.shape) for one in channels)
    # a second output holds indices, which move with the channels but are not multiplied
    indices = result if analysis.moves_entries else ()
    return [result] + [indices] * (len(call.shapes) - 1)


def reduce(call: Call, analysis: ChannelAnalysis, tags: frozenset[str]) -> Result:
    value = call.first
    rank = len(value.shape)
    key = next((key for key in ("dim", "axis") if key in call.arguments), None)
    axes = axes_of(call[key], rank) if key else list(range(rank))
    channels = analysis.reduce(value, axes, tags)
    keeps = bool(call["keepdim"]) and rank == len(call.shape)
    if not keeps:
        channels = tuple(one.map(lambda array: array.squeeze(tuple(axes))) for one in channels)
    if len(call.shapes) == 2 and call.name in ("max", "min"):
        for one in analysis.known(value):
            if set(one.axes) & set(axes):  # the index that is returned tells which channel it was
                analysis.classes.pin(one.ids)
        return [channels, channels if analysis.moves_entries else ()]
    return [channels] * len(call.shapes)


def norm(call: Call, analysis: ChannelAnalysis) -> Result:
    """Follow a norm over axes. The norm of order 0 counts entries and does not grow with them."""
    return reduce(call, analysis, HOMOGENEOUS if call["ord"] else NOTHING)


def extreme(call: Call, analysis: ChannelAnalysis) -> Result:
    """Follow max and min: over an axis, over all axes, or of two tensors."""
    return (
        combined(call, analysis, HOMOGENEOUS)
        if isinstance(call["other"], Value)
        else reduce(call, analysis, HOMOGENEOUS)
    )
