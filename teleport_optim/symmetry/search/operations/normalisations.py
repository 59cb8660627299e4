"""Normalisations, with their gains, biases and running statistics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teleport_optim.symmetry.search.analysis import LINEAR, NOTHING, ODD, ChannelAnalysis, Intermediate
from teleport_optim.symmetry.search.channels import Channels
from teleport_optim.symmetry.search.graph import Call
from teleport_optim.symmetry.search.operations.call import Result, aligned, bind_axis, with_channels
from teleport_optim.symmetry.search.operations.layout import reshape_channels

__all__ = ["batch_norm", "group_norm", "layer_norm"]


def _affine(
    call: Call, analysis: ChannelAnalysis, channels: tuple[Channels, ...], axes: Sequence[int]
) -> tuple[Channels, ...]:
    """Follow a multiplication by ``weight`` and an addition of ``bias``, both of which lie on ``axes``."""
    for key in ("weight", "bias"):
        parameter = call[key]
        if parameter is None:
            continue
        shape = [size if axis in axes else 1 for axis, size in enumerate(call.shape)]
        value = Intermediate(call.shape, channels=channels)
        if len(parameter.shape) == 1:
            parameter = aligned(parameter, analysis, axes[0], shape)
        if key == "weight":
            channels = analysis.multiply(value, parameter, call.shape)
        else:
            channels = analysis.add([value, parameter], call.shape, LINEAR)
    return channels


def batch_norm(call: Call, analysis: ChannelAnalysis) -> Result:
    value, channel = call["input"], 1
    mean, variance = call["running_mean"], call["running_var"]
    others = [axis for axis in range(len(value.shape)) if axis != channel]
    channels = [analysis.collapse_axes(one, others, value.shape) for one in analysis.channels_of(value)]
    value = with_channels(value, channels)
    through = [one for one in channels if one.axes in ((channel,), ())]
    if len(through) < len(channels) or len(through) > 1:
        for one in channels:
            analysis.classes.pin(one.ids)
        through = []
    for buffer, power in ((mean, 1), (variance, 2)):
        if buffer is not None:
            flat = [one.map(lambda array: np.broadcast_to(array.ravel(), value.shape[channel])) for one in through]
            bind_axis(analysis, buffer, 0, flat, power=power, is_updated=True)
    uses_batch = others if call.name != "instance_norm" else others[1:]
    normal = analysis.normalise(value, uses_batch, ODD)
    return [_affine(call, analysis, normal, [channel])] + [()] * (len(call.shapes) - 1)


def group_norm(call: Call, analysis: ChannelAnalysis) -> Result:
    value, num_groups = call["input"], call["num_groups"]
    batch, num_channels, *spatial = value.shape
    shape = (batch, num_groups, num_channels // num_groups, *spatial)
    grouped = reshape_channels(analysis, analysis.channels_of(value), value.shape, shape)
    axes = range(2, len(shape))
    pixels = range(3, len(shape))
    grouped = tuple(analysis.collapse_axes(one, pixels, shape) for one in grouped)
    normal = analysis.normalise(Intermediate(shape, channels=grouped), axes, NOTHING)
    return [_affine(call, analysis, reshape_channels(analysis, normal, shape, value.shape), [1])]


def layer_norm(call: Call, analysis: ChannelAnalysis) -> Result:
    value = call["input"]
    axes = list(range(len(value.shape) - len(call["normalized_shape"]), len(value.shape)))
    tags = ODD if call.name == "rms_norm" else NOTHING
    channels = analysis.normalise(value, axes, tags)
    return [_affine(call, analysis, channels, axes)]
