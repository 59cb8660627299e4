"""Operations that move entries to other places and leave them as they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from teleport_optim.symmetry.search.analysis import LINEAR, NOTHING, ChannelAnalysis
from teleport_optim.symmetry.search.channels import Channels
from teleport_optim.symmetry.search.graph import Call
from teleport_optim.symmetry.search.operations.call import Result, axes_of, opaque

__all__ = [
    "axis_order",
    "channel_shuffle",
    "expand",
    "flip",
    "pad",
    "permute",
    "pixel_shuffle",
    "repeat",
    "repeat_interleave",
    "reshape",
    "reshape_channels",
    "roll",
    "squeeze",
    "unsqueeze",
]


def reshape_channels(
    analysis: ChannelAnalysis, channels: Sequence[Channels], old: Sequence[int], new: Sequence[int]
) -> tuple[Channels, ...]:
    """Follow channels through a reshape. Where it mixes the axes of two of them, none moves any more."""
    moved = [one.reshape(old, new) for one in channels]
    result: list[Channels] = []
    for one, after in zip(channels, moved):
        axes = set(after.axes) if after is not None else set()
        is_mixed = analysis.moves_entries and any(
            other is not None and other is not after and set(other.axes) & axes for other in moved
        )
        if after is None or is_mixed:
            analysis.classes.pin(one.ids)
        else:
            result.append(after)
    return tuple(result)


def reshape(call: Call, analysis: ChannelAnalysis) -> Result:
    value = call.first
    if call["dtype"] is not None and (analysis.changes_numbers or call.shape != value.shape):
        return opaque(call, analysis)  # the same bytes are read as other numbers
    return [reshape_channels(analysis, analysis.channels_of(value), value.shape, call.shape)]


def permute(call: Call, analysis: ChannelAnalysis) -> Result:
    order = axis_order(call)
    return [tuple(one.permute(order) for one in analysis.channels_of(call.first))]


def axis_order(call: Call) -> list[int]:
    """Axes of the input in the order of the output."""
    rank = len(call.first.shape)
    order = list(range(rank))
    if call.name == "permute":
        return [axis % rank for axis in call["dims"]]
    if call.name == "movedim":
        sources, targets = (axes_of(call[key], rank) for key in ("source", "destination"))
        rest = [axis for axis in order if axis not in sources]
        for target, axis in sorted(zip(targets, sources)):
            rest.insert(target, axis)
        return rest
    if call.name in ("t", "numpy_T", "mT"):
        one, other = (0, rank - 1) if call.name in ("t", "numpy_T") else (rank - 2, rank - 1)
        if call.name == "numpy_T":
            return order[::-1]
    else:
        keys = next(pair for pair in (("dim0", "dim1"), ("axis0", "axis1")) if pair[0] in call.arguments)
        one, other = (call[key] % max(rank, 1) for key in keys)
    if rank > 1:
        order[one], order[other] = order[other], order[one]
    return order


def expand(call: Call, analysis: ChannelAnalysis) -> Result:
    value = call.first
    return [tuple(_widened(one, len(call.shape)) for one in analysis.channels_of(value))]


def _widened(channels: Channels, rank: int) -> Channels:
    return channels.map(lambda array: array.reshape((1,) * (rank - array.ndim) + array.shape))


def repeat(call: Call, analysis: ChannelAnalysis) -> Result:
    """Follow copies side by side: each axis gets an axis of copies in front, which is flattened into it."""
    value, rank = call.first, len(call.shape)
    own = (1,) * (rank - len(value.shape)) + value.shape
    times = [new // old if old else 1 for new, old in zip(call.shape, own)]
    shape = [size for pair in zip(times, own) for size in pair]
    channels = [_widened(one, rank) for one in analysis.channels_of(value)]
    spread = [one.map(lambda array: np.expand_dims(array, list(range(0, 2 * rank, 2)))) for one in channels]
    return [reshape_channels(analysis, spread, shape, call.shape)]


def repeat_interleave(call: Call, analysis: ChannelAnalysis) -> Result:
    value, axis = call.first, call["dim"]
    if axis is None or not isinstance(call["repeats"], int):
        return opaque(call, analysis)
    axis %= len(value.shape)
    shape = [*value.shape[: axis + 1], call["repeats"], *value.shape[axis + 1 :]]
    channels = [one.map(lambda array: np.expand_dims(array, axis + 1)) for one in analysis.channels_of(value)]
    return [reshape_channels(analysis, channels, shape, call.shape)]


def flip(call: Call, analysis: ChannelAnalysis) -> Result:
    axes = axes_of(call["dims"], len(call.shape))
    return [tuple(one.map(lambda array: np.flip(array, tuple(axes))) for one in analysis.channels_of(call.first))]


def roll(call: Call, analysis: ChannelAnalysis) -> Result:
    axes, shifts = call["dims"], call["shifts"]
    if not axes:
        return opaque(call, analysis)
    rank = len(call.shape)
    shifts, axes = (list(x) if isinstance(x, (list, tuple)) else [x] for x in (shifts, axes))
    axes = [axis % rank for axis in axes]
    return [tuple(one.map(lambda array: np.roll(array, shifts, axes)) for one in analysis.channels_of(call.first))]


def squeeze(call: Call, analysis: ChannelAnalysis) -> Result:
    value = call.first
    gone = [axis for axis in axes_of(call["dim"], len(value.shape)) if value.shape[axis] == 1]
    if call["dim"] is not None and not value.shape:
        gone = []
    return [tuple(one.map(lambda array: array.squeeze(tuple(gone))) for one in analysis.channels_of(value))]


def unsqueeze(call: Call, analysis: ChannelAnalysis) -> Result:
    axis = call["dim"] % len(call.shape)
    return [tuple(one.map(lambda array: np.expand_dims(array, axis)) for one in analysis.channels_of(call.first))]


def pad(call: Call, analysis: ChannelAnalysis) -> Result:
    value, padding = call.first, list(call["pad"])
    mode = call["mode"]
    rank, num_axes = len(value.shape), len(padding) // 2
    before, after = (
        [padding[2 * (rank - 1 - k) + side] if k >= rank - num_axes else 0 for k in range(rank)] for side in (0, 1)
    )
    padded = [k for k in range(rank) if before[k] or after[k]]
    is_zero = mode == "constant" and not call["value"]
    channels = analysis.elementwise(value, LINEAR if is_zero or mode != "constant" else NOTHING)
    result = []
    for one in channels:
        inside = [k for k in padded if k in one.axes]
        if not inside:
            result.append(one)
        elif mode == "constant" and min(*before, *after) >= 0:
            widths = [(before[k], after[k]) if k in inside else (0, 0) for k in range(rank)]
            result.append(one.map(partial(np.pad, pad_width=widths)))
        else:
            result.append(analysis.collapse_axes(one, inside, value.shape))
    return [tuple(result)]


def pixel_shuffle(call: Call, analysis: ChannelAnalysis) -> Result:
    value = call.first
    *batch, num_channels, height, width = value.shape
    r = call["upscale_factor"] or call["downscale_factor"]
    n = len(batch)
    if call.name == "pixel_shuffle":
        middle = [*batch, num_channels // r**2, r, r, height, width]
        order = [*range(n), n, n + 3, n + 1, n + 4, n + 2]
    else:
        middle = [*batch, num_channels, height // r, r, width // r, r]
        order = [*range(n), n, n + 2, n + 4, n + 1, n + 3]
    channels = reshape_channels(analysis, analysis.channels_of(value), value.shape, middle)
    moved = [one.permute(order) for one in channels]
    return [reshape_channels(analysis, moved, [middle[k] for k in order], call.shape)]


def channel_shuffle(call: Call, analysis: ChannelAnalysis) -> Result:
    value, groups = call.first, call["groups"]
    batch, num_channels, *spatial = value.shape
    middle = [batch, groups, num_channels // groups, *spatial]
    order = [0, 2, 1, *range(3, len(middle))]
    channels = reshape_channels(analysis, analysis.channels_of(value), value.shape, middle)
    moved = [one.permute(order) for one in channels]
    return [reshape_channels(analysis, moved, [middle[k] for k in order], call.shape)]
