"""Convolutions, with groups and transposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from teleport_optim.symmetry.search.analysis import ChannelAnalysis
from teleport_optim.symmetry.search.channels import Array, Channels, mix
from teleport_optim.symmetry.search.graph import Call, Value
from teleport_optim.symmetry.search.operations.call import Result, bind_axis, with_channels
from teleport_optim.symmetry.search.operations.products import biased

__all__ = ["convolution"]


def convolution(call: Call, analysis: ChannelAnalysis, *, is_transposed: bool) -> Result:
    value, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"]
    num_spatial = len(weight.shape) - 2
    channel = len(value.shape) - num_spatial - 1
    spatial = list(range(channel + 1, len(value.shape)))
    channels = [analysis.collapse_axes(one, spatial, value.shape) for one in analysis.channels_of(value)]
    value = with_channels(value, channels)
    weight = _with_whole_kernels(analysis, weight)
    batch = list(range(channel))
    pixels = [("pixel", k) for k in range(num_spatial)]
    subscripts = [*batch, "out", *[("place", k) for k in range(num_spatial)]]
    own = [*batch, "in", *[("from", k) for k in range(num_spatial)]]
    if groups == 1:
        others = ["in", "out", *pixels] if is_transposed else ["out", "in", *pixels]
        result = analysis.product(value, own, weight, others, subscripts)
    else:
        fan_in, fan_out = value.shape[channel] // groups, call.shape[channel] // groups
        result = _grouped(
            analysis, value, weight, _Grouping(len(value.shape), channel, groups, fan_in, fan_out, is_transposed)
        )
    return [biased(call, analysis, result, bias, channel)]


def _with_whole_kernels(analysis: ChannelAnalysis, weight: Value) -> Value:
    """Pin what differs from place to place in a kernel, since each place meets another pixel."""
    places = range(2, len(weight.shape))
    if weight.source is None:
        channels = [analysis.collapse_axes(one, places, weight.shape) for one in analysis.known(weight)]
        return with_channels(weight, channels)
    for axis in places:
        analysis.pin_axis(weight, axis)
    return weight


class _Grouping(NamedTuple):
    """Groups of a convolution.

    Attributes:
        rank: Number of axes of its input.
        axis: Axis of the channels.
        number: Number of groups.
        fan_in: Input channels of a group.
        fan_out: Output channels of a group.
        is_transposed: Whether the convolution is transposed.
    """

    rank: int
    axis: int
    number: int
    fan_in: int
    fan_out: int
    is_transposed: bool

    def on_axis(self, ids: Array, positions: Array | None, sign: int) -> Channels:
        """Put channels on their axis of the output."""
        return Channels.along(ids, self.axis, self.rank, positions, sign)


def _grouped(analysis: ChannelAnalysis, value: Value, weight: Value, groups: _Grouping) -> tuple[Channels, ...]:
    """Follow a convolution whose output channels read only the input channels of their own group."""
    here = [one for one in analysis.known(value) if one.axes == (groups.axis,)]
    passing = [one for one in analysis.known(value) if groups.axis not in one.axes]
    for one in analysis.known(value):
        if groups.axis in one.axes and one.axes != (groups.axis,):
            analysis.classes.pin(one.ids)
    if groups.fan_in == 1 and not analysis.moves_entries and not analysis.can_move(weight) and len(here) == 1:
        # a filter of each channel alone, by numbers that are given: its factor passes
        analysis.close(weight)
        ids = np.repeat(np.broadcast_to(here[0].ids.ravel(), groups.number), groups.fan_out)
        return (*passing, groups.on_axis(ids, None, here[0].sign))
    if weight.source is None or weight.source.axes[0] is None or len(here) > 1:
        analysis.freeze(value)
        analysis.freeze(weight)
        return ()
    blocks = [one.map(lambda array: array.reshape(groups.number, groups.fan_in)) for one in here]
    if analysis.moves_entries and groups.fan_in > 1:
        for one in blocks:
            analysis.pin_positions(one, [0], (groups.number, groups.fan_in))
    if analysis.mixes_channels or (analysis.moves_heads and groups.fan_in > 1):
        analysis.pin(here)
        return (*passing, *_unmoved(analysis, weight))
    if groups.fan_in == 1 and analysis.moves_entries:
        return (*passing, *(_depthwise(analysis, weight, blocks[0], groups) if blocks else _unmoved(analysis, weight)))
    reads = [one.dual() for one in blocks]
    if groups.fan_in == 1 or groups.is_transposed:
        return (*passing, *_write_rows(analysis, weight, reads, groups))
    for one in reads:
        analysis.bind_blocks(weight, 1, 0, one)
    return (*passing, *_within_groups(analysis, analysis.write(weight, 0), groups))


def _unmoved(analysis: ChannelAnalysis, weight: Value) -> tuple[Channels, ...]:
    """Let a weight not move, here and where it is used otherwise."""
    analysis.close(weight)
    analysis.freeze(weight)
    return ()


def _depthwise(analysis: ChannelAnalysis, weight: Value, block: Channels, groups: _Grouping) -> tuple[Channels, ...]:
    """Move the group of a channel along with it: its kernels and the outputs that they write."""
    ids = np.repeat(block.ids.ravel(), groups.fan_out)
    positions = np.repeat(block.positions.ravel(), groups.fan_out)
    if groups.fan_out > 1:
        positions = mix(positions, np.tile(np.arange(groups.fan_out), groups.number))
    rows = block.map(np.ravel) if groups.is_transposed else Channels(ids, positions, block.sign)
    bind_axis(analysis, weight, 0, [rows])
    return (groups.on_axis(ids, positions, block.sign),)


def _write_rows(
    analysis: ChannelAnalysis, weight: Value, reads: list[Channels], groups: _Grouping
) -> tuple[Channels, ...]:
    """Write the outputs where axis 0 of the weight holds what is read: all channels, or one channel's kernels."""
    reads = [
        one.map(lambda array: np.repeat(array.ravel(), 1 if groups.is_transposed else groups.fan_out)) for one in reads
    ]
    if not analysis.moves_entries and (not groups.is_transposed or groups.fan_out == 1):
        return _write_read_rows(analysis, weight, reads, groups)
    bind_axis(analysis, weight, 0, reads)
    blocks = analysis.blocks(weight, 1, 0)
    if blocks is None:
        ids = analysis.classes.new(groups.number * groups.fan_out).reshape(groups.number, groups.fan_out)
        blocks = Channels(ids, np.zeros_like(ids, dtype=np.uint64))
        analysis.bind_blocks(weight, 1, 0, blocks)
    return _within_groups(analysis, [blocks.map(np.ravel)], groups)


def _write_read_rows(
    analysis: ChannelAnalysis, weight: Value, reads: list[Channels], groups: _Grouping
) -> tuple[Channels, ...]:
    """Write the outputs where axis 0 of the weight tells both the inputs and the outputs apart."""
    count = groups.number * groups.fan_out
    repeat = weight.shape[0] // count
    if analysis.is_free(weight, 0):
        ids = analysis.classes.new(count)
        zeros = np.zeros_like(ids, dtype=np.uint64)
        bind_axis(analysis, weight, 0, [Channels(np.repeat(ids, repeat), np.repeat(zeros, repeat)), *reads])
        return (groups.on_axis(ids, zeros, 1),)
    known = analysis.write(weight, 0)
    if len(known) != 1 + len(reads) or not _is_repeated(known[0].ids, repeat):  # another call uses it otherwise
        analysis.pin([*known, *reads])
        return ()
    for one in reads:
        analysis.classes.unite(one, known[-1])
    return (groups.on_axis(known[0].ids[::repeat], None, known[0].sign),)


def _is_repeated(ids: Array, times: int) -> bool:
    """Whether each id comes ``times`` times in a row."""
    return np.array_equal(np.repeat(ids[::times], times), ids)


def _within_groups(analysis: ChannelAnalysis, written: Sequence[Channels], groups: _Grouping) -> tuple[Channels, ...]:
    """Write output channels that may move only within their group."""
    shape = (groups.number, groups.fan_out)
    for one in written:
        analysis.pin_positions(one.map(lambda array: array.reshape(shape)), [0], shape)
    return tuple(groups.on_axis(one.ids, one.positions, one.sign) for one in written)
