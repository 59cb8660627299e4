"""Normalisations with what they keep per channel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teleport_optim.symmetry.search.analysis import LINEAR, NOTHING, ODD, Theory, Value
from teleport_optim.symmetry.search.channels import Labels
from teleport_optim.symmetry.search.operations.call import Call, Result, aligned, bind_axis, relabelled
from teleport_optim.symmetry.search.operations.layout import reshape_labels

__all__ = ["batch_norm", "group_norm", "layer_norm"]


def _affine(call: Call, theory: Theory, labels: tuple[Labels, ...], axes: Sequence[int]) -> tuple[Labels, ...]:
    """The labels after the multiplication with ``weight`` and the addition of ``bias``, both of which lie on ``axes``."""
    for key in ("weight", "bias"):
        parameter = call[key]
        if parameter is None:
            continue
        shape = [size if axis in axes else 1 for axis, size in enumerate(call.shape)]
        value = Value(call.shape, {theory.name: labels})
        if len(parameter.shape) == 1:
            parameter = aligned(parameter, axes[0], shape)
        if key == "weight":
            labels = theory.multiply(call.node, value, parameter, call.shape)
        else:
            labels = theory.add(call.node, [value, parameter], call.shape, LINEAR)
    return labels


def batch_norm(call: Call, theory: Theory) -> Result:
    value, channel = call["input"], 1
    mean, variance = call["running_mean"], call["running_var"]
    others = [axis for axis in range(len(value.shape)) if axis != channel]
    labels = [theory.confine(one, others, value.shape) for one in theory.settle(value)]
    value = relabelled(value, theory, labels)
    through = [one for one in labels if one.axes in ((channel,), ())]
    if len(through) < len(labels) or len(through) > 1:
        for one in labels:
            theory.units.fix(one.units)
        through = []
    for buffer, power in ((mean, 1), (variance, 2)):
        if buffer is not None:
            flat = [one.map(lambda array: np.broadcast_to(array.ravel(), value.shape[channel])) for one in through]
            bind_axis(theory, buffer, 0, flat, power=power, is_updated=True)
    uses_batch = others if call.name != "instance_norm" else others[1:]
    normal = theory.normalise(call.node, value, uses_batch, ODD)
    return [_affine(call, theory, normal, [channel])] + [()] * (len(call.shapes) - 1)


def group_norm(call: Call, theory: Theory) -> Result:
    value, num_groups = call["input"], call["num_groups"]
    batch, channels, *spatial = value.shape
    shape = (batch, num_groups, channels // num_groups, *spatial)
    grouped = reshape_labels(theory, theory.settle(value), value.shape, shape)
    axes = range(2, len(shape))
    pixels = range(3, len(shape))
    grouped = tuple(theory.confine(one, pixels, shape) for one in grouped)
    normal = theory.normalise(call.node, Value(shape, {theory.name: grouped}), axes, NOTHING)
    return [_affine(call, theory, reshape_labels(theory, normal, shape, value.shape), [1])]


def layer_norm(call: Call, theory: Theory) -> Result:
    value = call["input"]
    axes = list(range(len(value.shape) - len(call["normalized_shape"]), len(value.shape)))
    tags = ODD if call.name == "rms_norm" else NOTHING
    labels = theory.normalise(call.node, value, axes, tags)
    return [_affine(call, theory, labels, axes)]
