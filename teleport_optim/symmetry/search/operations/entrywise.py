"""Operations that work on each entry, or on entries of several tensors in the same place."""

from __future__ import annotations

from typing import Any

from teleport_optim.symmetry.search.analysis import (
    EVEN,
    HOMOGENEOUS,
    LINEAR,
    NOTHING,
    ODD,
    ChannelAnalysis,
    Intermediate,
)
from teleport_optim.symmetry.search.graph import Call, Value
from teleport_optim.symmetry.search.operations.call import Result, aligned, as_value, opaque, with_channels

__all__ = ["clamp", "combined", "divide", "each_entry", "lerp", "masked_fill", "multiply", "power", "prelu", "where"]


def each_entry(call: Call, analysis: ChannelAnalysis, tags: frozenset[str]) -> Result:
    """Follow a function of each entry of the first tensor; other tensors may not have channels."""
    for value in call.values[1:]:
        analysis.freeze(value)
    return [analysis.elementwise(call.first, tags)] * len(call.shapes)


def combined(call: Call, analysis: ChannelAnalysis, tags: frozenset[str]) -> Result:
    """Follow a function of the entries of several tensors in one place."""
    values = [as_value(call[key]) for key in ("self", "other", "end") if call[key] is not None]
    if tags == NOTHING and not analysis.moves_entries:
        for value in values:
            analysis.freeze(value)
        return [()]
    return [analysis.add(values, call.shape, tags)]


def multiply(call: Call, analysis: ChannelAnalysis) -> Result:
    return [analysis.multiply(as_value(call["self"]), as_value(call["other"]), call.shape)]


def divide(call: Call, analysis: ChannelAnalysis) -> Result:
    value, divisor = as_value(call["self"]), as_value(call["other"])
    if call["rounding_mode"] is not None:
        return combined(call, analysis, NOTHING)
    channels = analysis.channels_of(divisor)
    if analysis.mixes_channels:
        for one in channels:
            analysis.classes.pin(one.ids)
    inverse = Intermediate(divisor.shape, channels=tuple(one.dual() for one in channels), fill=divisor.fill)
    return [analysis.multiply(value, inverse, call.shape)]


def where(call: Call, analysis: ChannelAnalysis) -> Result:
    return _chosen(call, analysis, call["condition"], call["other"])


def lerp(call: Call, analysis: ChannelAnalysis) -> Result:
    if isinstance(call["weight"], Value):
        return _chosen(call, analysis, call["weight"], call["end"])
    return combined(call, analysis, LINEAR)


def _chosen(call: Call, analysis: ChannelAnalysis, selector: Value, other: Any) -> Result:
    """Follow a choice or a mixture of two tensors, entry by entry, by a third one."""
    values = [as_value(call["self"]), as_value(other)]
    if analysis.moves_entries:
        return [analysis.add([selector, *values], call.shape, NOTHING)]
    analysis.freeze(selector)
    return [analysis.add(values, call.shape, LINEAR)]


def masked_fill(call: Call, analysis: ChannelAnalysis) -> Result:
    value, mask = call["self"], call["mask"]
    if analysis.moves_entries:
        return [analysis.add([value, mask], call.shape, NOTHING)]
    analysis.freeze(mask)
    return [analysis.elementwise(value, LINEAR if call["value"] == 0 else NOTHING)]


def clamp(call: Call, analysis: ChannelAnalysis) -> Result:
    low, high = (call[key] for key in (("min_val", "max_val") if call.name == "hardtanh" else ("min", "max")))
    if isinstance(low, Value) or isinstance(high, Value):
        return opaque(call, analysis)
    tags = HOMOGENEOUS if (low, high) in ((0, None), (None, 0)) else NOTHING
    return each_entry(call, analysis, ODD if low is not None and high is not None and low == -high else tags)


def prelu(call: Call, analysis: ChannelAnalysis) -> Result:
    value, weight = call["self"], call["weight"]
    channels = analysis.elementwise(value, HOMOGENEOUS)
    if analysis.moves_entries and len(value.shape) > 1 and weight.shape not in ((), (1,)):
        shape = [1] * len(value.shape)
        shape[1] = weight.shape[0]
        return [analysis.multiply(with_channels(value, channels), aligned(weight, analysis, 1, shape), value.shape)]
    analysis.freeze(weight)
    return [channels]


def power(call: Call, analysis: ChannelAnalysis) -> Result:
    exponent = call["exponent"]
    if not isinstance(exponent, (int, float)) or not isinstance(call["self"], Value):
        return opaque(call, analysis)
    if exponent == 1:
        return each_entry(call, analysis, LINEAR)
    return each_entry(call, analysis, NOTHING if exponent % 1 else (EVEN, ODD)[int(exponent) % 2])
