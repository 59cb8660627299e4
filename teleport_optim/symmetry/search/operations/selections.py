"""Operations that take entries from tensors or put tensors together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from teleport_optim.symmetry.search.analysis import LINEAR, ChannelAnalysis, Intermediate
from teleport_optim.symmetry.search.channels import PINNED, Channels, mix
from teleport_optim.symmetry.search.graph import Call, Value
from teleport_optim.symmetry.search.operations.call import Result, axes_of, opaque

__all__ = ["cat", "embedding", "index", "select", "split", "take_slice"]


def _take(channels: Channels, axis: int, index: Any) -> Channels:
    """Take the entries ``index`` of an axis."""
    return channels.map(lambda array: array if array.shape[axis] == 1 else np.take(array, index, axis)).simplified()


def take_slice(call: Call, analysis: ChannelAnalysis) -> Result:
    value, axis = call.first, (call["dim"] or 0) % len(call.first.shape)
    size = value.shape[axis]
    if call.name == "narrow":
        start, step, length = call["start"], 1, call["length"]
        index = np.arange(size)[start : start + length] if isinstance(start, int) else None
    else:
        start, step = call["start"], call["step"] or 1
        index = np.arange(size)[start : call["end"] : step]
    if index is None:
        return opaque(call, analysis)
    return [tuple(_take(one, axis, index) for one in analysis.channels_of(value))]


def select(call: Call, analysis: ChannelAnalysis) -> Result:
    value, axis = call.first, (call["dim"] or 0) % len(call.first.shape)
    channels = [_take(one, axis, [call["index"]]) for one in analysis.channels_of(value)]
    return [tuple(one.map(lambda array: array.squeeze(axis)) for one in channels)]


def split(call: Call, analysis: ChannelAnalysis) -> Result:
    value = call.first
    axis = (call["dim"] or 0) % len(value.shape)
    channels = analysis.channels_of(value)
    result, start = [], 0
    for shape in call.shapes:
        size = 1 if call.name == "unbind" else shape[axis]
        parts = [_take(one, axis, np.arange(start, start + size)) for one in channels]
        if call.name == "unbind":
            parts = [one.map(lambda array: array.squeeze(axis)) for one in parts]
        result.append(tuple(parts))
        start += size
    return result


def cat(call: Call, analysis: ChannelAnalysis) -> Result:
    values, rank = list(call["tensors"]), len(call.shape)
    axis = (call["dim"] or 0) % rank
    if call.name == "stack":
        values = [_inserted(analysis, value, axis) for value in values]
    values = [value for value in values if len(value.shape) == rank]  # empty vectors are passed over
    for value in values:
        if value.source is None or value.source.axes[axis] is None:
            continue
        if value.shape[axis] > 1:
            analysis.write(value, axis)
        elif analysis.is_free(value, axis):
            analysis.bind(value, axis, [])
        else:  # a single entry, which would have to be told from the others
            for one in analysis.write(value, axis):
                analysis.classes.pin(one.ids)
    channels = _across(call, analysis, values, axis)
    joined = _joined(analysis, values, axis)
    return [(*channels, *joined)]


def _inserted(analysis: ChannelAnalysis, value: Value, axis: int) -> Value:
    """Put in a new axis of length one."""
    shape = (*value.shape[:axis], 1, *value.shape[axis:])
    if value.source is not None:
        axes = (*value.source.axes[:axis], None, *value.source.axes[axis:])
        return replace(value, shape=shape, source=value.source._replace(axes=axes))
    channels = [one.map(lambda array: np.expand_dims(array, axis)) for one in analysis.known(value)]
    return Intermediate(shape, channels=tuple(channels), fill=value.fill)


def _across(call: Call, analysis: ChannelAnalysis, values: list[Value], axis: int) -> list[Channels]:
    """Channels on the axes along which nothing is concatenated; all tensors must agree on them."""
    reference: Value | None = None
    shape = tuple(1 if k == axis else size for k, size in enumerate(call.shape))
    parts = []
    for value in values:
        if value.source is not None:
            axes = tuple(None if k == axis else own for k, own in enumerate(value.source.axes))
            parts.append(replace(value, shape=shape, source=value.source._replace(axes=axes)))
        else:
            channels = [one for one in analysis.known(value) if axis not in one.axes]
            parts.append(Intermediate(shape, channels=tuple(channels), fill=value.fill))
    for part in sorted(parts, key=lambda part: part.source is not None):
        reference = (
            part if reference is None else Intermediate(shape, channels=analysis.add([reference, part], shape, LINEAR))
        )
    return list(analysis.channels_of(reference)) if reference is not None else []


def _joined(analysis: ChannelAnalysis, values: list[Value], axis: int) -> list[Channels]:
    """Channels that change along the axis of concatenation. Entries that do not move get the id PINNED."""
    own = [[one for one in analysis.known(value) if axis in one.axes] for value in values]
    if not any(own):
        return []
    if any(len(channels) > 1 for channels in own):
        for channels in own:
            for one in channels:
                analysis.classes.pin(one.ids)
        return []
    other_axes = sorted({k for channels in own for one in channels for k in one.axes} - {axis})
    pieces = []
    for value, channels in zip(values, own):
        shape = [size if k == axis or k in other_axes else 1 for k, size in enumerate(value.shape)]
        if channels:
            one = channels[0].spread(value.shape, [axis, *other_axes])
            one = one if one.sign == 1 else _unsigned(analysis, one)
        else:
            one = Channels(np.full(shape, PINNED), np.zeros(shape, np.uint64))
        pieces.append(one)
    ids, positions = (np.concatenate([getattr(one, key) for one in pieces], axis) for key in ("ids", "positions"))
    return [_distinguished(analysis, Channels(ids, positions)).simplified()]


def _unsigned(analysis: ChannelAnalysis, channels: Channels) -> Channels:
    """Give channels new ids, so that their sign is +1."""
    ids = analysis.classes.new(channels.ids.size).reshape(channels.ids.shape)
    positive = Channels(ids, channels.positions)
    analysis.classes.unite(Channels(ids, channels.positions), channels)
    return positive


def _distinguished(analysis: ChannelAnalysis, channels: Channels) -> Channels:
    """Give entries that are copies of each other positions of their own."""
    if not analysis.moves_entries:
        return channels
    roots, positions, _ = analysis.classes.find(channels.ids, channels.positions)
    keys = mix(roots, positions).ravel()
    order = np.argsort(keys, kind="stable")
    _, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
    if counts.max(initial=1) == 1:
        return channels
    occurrence = np.empty(len(keys), np.int64)
    occurrence[order] = np.arange(len(keys)) - np.repeat(starts, counts)
    copies = occurrence.reshape(channels.ids.shape)
    return Channels(
        channels.ids, np.where(copies > 0, mix(channels.positions, 7, copies), channels.positions), channels.sign
    )


def index(call: Call, analysis: ChannelAnalysis) -> Result:
    value = call.first
    indices = [call["index"]] if call.name == "index_select" else list(call["indices"])
    axes = (
        [axes_of(call["dim"], len(value.shape))[0]]
        if call.name == "index_select"
        else [k for k, i in enumerate(indices) if i is not None]
    )
    rank = len(value.shape)
    if len(axes) != 1 and axes != list(range(axes[0], axes[0] + len(axes))):
        return opaque(call, analysis)
    given = [index for index in indices if index is not None]
    for index in given:
        analysis.freeze(index)
    num_new = len(call.shape) - (rank - len(axes))
    result = []
    for axis in range(rank):
        if axis in axes and analysis.is_free(value, axis):
            analysis.bind(value, axis, [])
    for one in analysis.channels_of(value):
        if not set(axes) & set(one.axes):
            kept = one.map(lambda array: array.squeeze(tuple(axes)))
            result.append(kept.map(lambda array: np.expand_dims(array, tuple(range(axes[0], axes[0] + num_new)))))
        elif len(axes) == 1 and given[0].data is not None and given[0].data.dtype.kind == "i":
            result.append(
                _distinguished(analysis, one.map(lambda array: np.take(array, given[0].data, axes[0]))).simplified()
            )
        else:
            analysis.classes.pin(one.ids)
    return [tuple(result)]


def embedding(call: Call, analysis: ChannelAnalysis) -> Result:
    weight, indices = call["weight"], call["indices"]
    analysis.freeze(indices)
    if analysis.is_free(weight, 0):
        analysis.bind(weight, 0, [])
    channels = []
    for one in analysis.channels_of(weight):
        if one.axes and 0 in one.axes:
            analysis.classes.pin(one.ids)
        else:
            channels.append(one.map(lambda array: array.reshape((1,) * (len(call.shape) - 1) + (-1,))))
    return [tuple(channels)]
