"""Convolutions, with groups and transposed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teleport_optim.symmetry.search.analysis import ChannelAnalysis
from teleport_optim.symmetry.search.channels import Array, Channels, mix
from teleport_optim.symmetry.search.graph import Call, Value
from teleport_optim.symmetry.search.operations.call import Result, bind_axis, with_channels
from teleport_optim.symmetry.search.operations.products import biased
from teleport_optim.symmetry.search.permutations import PermutationAnalysis

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
        result = _grouped(call, analysis, value, weight, channel, groups, is_transposed=is_transposed)
    return [biased(call, analysis, result, bias, channel)]


def _with_whole_kernels(analysis: ChannelAnalysis, weight: Value) -> Value:
    """A weight whose channels do not change from place to place in a kernel, each of which meets another pixel."""
    places = range(2, len(weight.shape))
    if weight.source is None:
        channels = [analysis.collapse_axes(one, places, weight.shape) for one in analysis.known(weight)]
        return with_channels(weight, channels)
    for axis in places:
        analysis.pin_axis(weight, axis)
    return weight


def _grouped(
    call: Call,
    analysis: ChannelAnalysis,
    value: Value,
    weight: Value,
    channel: int,
    groups: int,
    *,
    is_transposed: bool,
) -> tuple[Channels, ...]:
    """A convolution whose output channels read the input channels of their own group only."""
    fan_in = value.shape[channel] // groups
    fan_out = call.shape[channel] // groups
    here = [one for one in analysis.known(value) if one.axes == (channel,) or (not one.axes and fan_in == groups == 1)]
    passing = [one for one in analysis.known(value) if channel not in one.axes]
    for one in analysis.known(value):
        if channel in one.axes and one.axes != (channel,):
            analysis.classes.pin(one.ids)
    is_filter = fan_in == 1 and not isinstance(analysis, PermutationAnalysis) and not analysis.can_move(weight)
    if is_filter and len(here) == 1:  # of each channel alone, by numbers that are given: its factor passes
        analysis.close(weight)
        (one,) = here
        ids = np.repeat(np.broadcast_to(one.ids.ravel(), groups), fan_out)
        return (*passing, Channels.along(ids, channel, len(value.shape), None, one.sign))
    if weight.source is None or weight.source.axes[0] is None or len(here) > 1:
        analysis.freeze(value)
        analysis.freeze(weight)
        return ()
    rank = len(value.shape)
    blocks = [one.map(lambda array: array.reshape(groups, fan_in)) for one in here]
    is_exchange = isinstance(analysis, PermutationAnalysis)
    if is_exchange and fan_in > 1:
        for one in blocks:
            analysis.pin_positions(one, [0], (groups, fan_in))

    if analysis.name == "linear" or (analysis.name == "heads" and fan_in > 1):
        analysis.pin(here)
        analysis.close(weight)
        analysis.freeze(weight)  # what it is elsewhere, too
        return tuple(passing)
    if fan_in == 1 and is_exchange:
        # the group of a channel moves with it: its kernels and the outputs that they write
        if not blocks:
            analysis.close(weight)
            analysis.freeze(weight)
            return tuple(passing)
        ids = np.repeat(blocks[0].ids.ravel(), fan_out)
        positions = np.repeat(blocks[0].positions.ravel(), fan_out)
        if fan_out > 1:
            positions = mix(positions, np.tile(np.arange(fan_out), groups))
        output = Channels(ids, positions, blocks[0].sign)
        bind_axis(analysis, weight, 0, [blocks[0].map(lambda array: array.ravel()) if is_transposed else output])
        return (*passing, Channels.along(ids, channel, rank, positions, output.sign))

    reads = [one.dual() for one in blocks]
    if fan_in == 1 or is_transposed:
        spread = [one.map(lambda array: np.repeat(array.ravel(), 1 if is_transposed else fan_out)) for one in reads]
        is_written = not is_exchange and (not is_transposed or fan_out == 1)
        return (
            *passing,
            *_write_rows(
                call,
                analysis,
                weight,
                spread,
                channel,
                groups,
                fan_out,
                is_written=is_written,
            ),
        )
    for one in reads:
        analysis.bind_blocks(weight, 1, 0, one)
    written = analysis.write(weight, 0)
    return (*passing, *_within_groups(call, analysis, written, channel, groups, fan_out))


def _write_rows(
    call: Call,
    analysis: ChannelAnalysis,
    weight: Value,
    reads: list[Channels],
    channel: int,
    groups: int,
    fan_out: int,
    *,
    is_written: bool,
) -> tuple[Channels, ...]:
    """The outputs of a grouped convolution whose axis 0 holds what is read: all channels, or one channel's kernels."""
    rank = len(call.shape)
    if is_written:  # axis 0 tells the outputs apart, too
        count = groups * fan_out
        repeat = weight.shape[0] // count
        if analysis.is_free(weight, 0):
            ids = analysis.classes.new(count)
            zeros = np.zeros_like(ids, dtype=np.uint64)
            new = Channels(np.repeat(ids, repeat), np.repeat(zeros, repeat))
            bind_axis(analysis, weight, 0, [new, *reads])
            return (Channels.along(ids, channel, rank, zeros),)
        known = analysis.write(weight, 0)
        if len(known) != 1 + len(reads) or not _is_repeated(known[0].ids, repeat):  # it is something else elsewhere
            analysis.pin([*known, *reads])
            return ()
        for one in reads:
            analysis.classes.unite(one, known[-1])
        return (Channels.along(known[0].ids[::repeat], channel, rank, None, known[0].sign),)
    bind_axis(analysis, weight, 0, reads)
    blocks = analysis.blocks(weight, 1, 0)
    if blocks is None:
        ids = analysis.classes.new(groups * fan_out).reshape(groups, fan_out)
        blocks = Channels(ids, np.zeros_like(ids, dtype=np.uint64))
        analysis.bind_blocks(weight, 1, 0, blocks)
    return _within_groups(call, analysis, [blocks.map(lambda array: array.ravel())], channel, groups, fan_out)


def _is_repeated(ids: Array, times: int) -> bool:
    """Whether each unit comes ``times`` times in a row."""
    return np.array_equal(np.repeat(ids[::times], times), ids)


def _within_groups(
    call: Call, analysis: ChannelAnalysis, written: Sequence[Channels], channel: int, groups: int, fan_out: int
) -> tuple[Channels, ...]:
    """New channels of a grouped convolution, which may move within their group only."""
    for one in written:
        analysis.pin_positions(one.map(lambda array: array.reshape(groups, fan_out)), [0], (groups, fan_out))
    return tuple(Channels.along(one.ids, channel, len(call.shape), one.positions, one.sign) for one in written)
