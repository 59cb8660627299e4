"""Convolutions, with groups and transposed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teleport_optim.symmetry.search.analysis import Theory, Value
from teleport_optim.symmetry.search.channels import Array, Labels, mix
from teleport_optim.symmetry.search.operations.call import Call, Result, bind_axis, relabelled
from teleport_optim.symmetry.search.operations.products import biased
from teleport_optim.symmetry.search.permutations import Exchange

__all__ = ["convolution"]


def convolution(call: Call, theory: Theory, *, is_transposed: bool) -> Result:
    value, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"]
    num_spatial = len(weight.shape) - 2
    channel = len(value.shape) - num_spatial - 1
    spatial = list(range(channel + 1, len(value.shape)))
    labels = [theory.confine(one, spatial, value.shape) for one in theory.settle(value)]
    value = relabelled(value, theory, labels)
    weight = _with_whole_kernels(theory, weight)
    batch = list(range(channel))
    pixels = [("pixel", k) for k in range(num_spatial)]
    letters = [*batch, "out", *[("place", k) for k in range(num_spatial)]]
    own = [*batch, "in", *[("from", k) for k in range(num_spatial)]]
    if groups == 1:
        others = ["in", "out", *pixels] if is_transposed else ["out", "in", *pixels]
        result = theory.product(call.node, value, own, weight, others, letters)
    else:
        result = _grouped(call, theory, value, weight, channel, groups, is_transposed=is_transposed)
    return [biased(call, theory, result, bias, channel)]


def _with_whole_kernels(theory: Theory, weight: Value) -> Value:
    """A weight whose labels do not change from place to place in a kernel, each of which meets another pixel."""
    places = range(2, len(weight.shape))
    if weight.source is None:
        labels = [theory.confine(one, places, weight.shape) for one in theory.known(weight)]
        return relabelled(weight, theory, labels)
    for axis in places:
        theory.pin_axis(weight, axis)
    return weight


def _grouped(
    call: Call, theory: Theory, value: Value, weight: Value, channel: int, groups: int, *, is_transposed: bool
) -> tuple[Labels, ...]:
    """A convolution whose output channels read the input channels of their own group only."""
    fan_in = value.shape[channel] // groups
    fan_out = call.shape[channel] // groups
    here = [one for one in theory.known(value) if one.axes == (channel,) or (not one.axes and fan_in == groups == 1)]
    passing = [one for one in theory.known(value) if channel not in one.axes]
    for one in theory.known(value):
        if channel in one.axes and one.axes != (channel,):
            theory.units.fix(one.units)
    is_filter = fan_in == 1 and not isinstance(theory, Exchange) and not theory.can_move(weight)
    if is_filter and len(here) == 1:  # of each channel alone, by numbers that are given: its factor passes
        theory.close(weight)
        (one,) = here
        units = np.repeat(np.broadcast_to(one.units.ravel(), groups), fan_out)
        return (*passing, Labels.along(units, channel, len(value.shape), None, one.sign))
    if weight.source is None or weight.source.axes[0] is None or len(here) > 1:
        theory.freeze(value)
        theory.freeze(weight)
        return ()
    rank = len(value.shape)
    blocks = [one.map(lambda array: array.reshape(groups, fan_in)) for one in here]
    is_exchange = isinstance(theory, Exchange)
    if is_exchange and fan_in > 1:
        for one in blocks:
            theory.hold(call.node, one, [0], (groups, fan_in))

    if theory.name == "linear" or (theory.name == "heads" and fan_in > 1):
        theory.fix(here)
        theory.close(weight)
        theory.freeze(weight)  # what it is elsewhere, too
        return tuple(passing)
    if fan_in == 1 and is_exchange:
        # the group of a channel moves with it: its kernels and the outputs that they write
        if not blocks:
            theory.close(weight)
            theory.freeze(weight)
            return tuple(passing)
        units = np.repeat(blocks[0].units.ravel(), fan_out)
        roles = np.repeat(blocks[0].roles.ravel(), fan_out)
        if fan_out > 1:
            roles = mix(roles, np.tile(np.arange(fan_out), groups))
        output = Labels(units, roles, blocks[0].sign)
        bind_axis(theory, weight, 0, [blocks[0].map(lambda array: array.ravel()) if is_transposed else output])
        return (*passing, Labels.along(units, channel, rank, roles, output.sign))

    reads = [one.dual() for one in blocks]
    if fan_in == 1 or is_transposed:
        spread = [one.map(lambda array: np.repeat(array.ravel(), 1 if is_transposed else fan_out)) for one in reads]
        is_written = not is_exchange and (not is_transposed or fan_out == 1)
        return (
            *passing,
            *_write_rows(
                call,
                theory,
                weight,
                spread,
                channel,
                groups,
                fan_out,
                is_written=is_written,
            ),
        )
    for one in reads:
        theory.bind_blocks(weight, 1, 0, one)
    written = theory.write(weight, 0)
    return (*passing, *_held(call, theory, written, channel, groups, fan_out))


def _write_rows(
    call: Call,
    theory: Theory,
    weight: Value,
    reads: list[Labels],
    channel: int,
    groups: int,
    fan_out: int,
    *,
    is_written: bool,
) -> tuple[Labels, ...]:
    """The outputs of a grouped convolution whose axis 0 holds what is read: all channels, or one channel's kernels."""
    rank = len(call.shape)
    if is_written:  # axis 0 tells the outputs apart, too
        count = groups * fan_out
        repeat = weight.shape[0] // count
        if theory.is_free(weight, 0):
            units = theory.units.new(count)
            zeros = np.zeros_like(units, dtype=np.uint64)
            new = Labels(np.repeat(units, repeat), np.repeat(zeros, repeat))
            bind_axis(theory, weight, 0, [new, *reads])
            return (Labels.along(units, channel, rank, zeros),)
        known = theory.write(weight, 0)
        if len(known) != 1 + len(reads) or not _is_repeated(known[0].units, repeat):  # it is something else elsewhere
            theory.fix([*known, *reads])
            return ()
        for one in reads:
            theory.units.unite(one, known[-1])
        return (Labels.along(known[0].units[::repeat], channel, rank, None, known[0].sign),)
    bind_axis(theory, weight, 0, reads)
    blocks = theory.blocks(weight, 1, 0)
    if blocks is None:
        units = theory.units.new(groups * fan_out).reshape(groups, fan_out)
        blocks = Labels(units, np.zeros_like(units, dtype=np.uint64))
        theory.bind_blocks(weight, 1, 0, blocks)
    return _held(call, theory, [blocks.map(lambda array: array.ravel())], channel, groups, fan_out)


def _is_repeated(units: Array, times: int) -> bool:
    """Whether each unit comes ``times`` times in a row."""
    return np.array_equal(np.repeat(units[::times], times), units)


def _held(
    call: Call, theory: Theory, written: Sequence[Labels], channel: int, groups: int, fan_out: int
) -> tuple[Labels, ...]:
    """New channels of a grouped convolution, which may move within their group only."""
    for one in written:
        theory.hold(call.node, one.map(lambda array: array.reshape(groups, fan_out)), [0], (groups, fan_out))
    return tuple(Labels.along(one.units, channel, len(call.shape), one.roles, one.sign) for one in written)
