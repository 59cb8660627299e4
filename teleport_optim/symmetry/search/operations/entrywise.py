"""Operations that work on each entry, or on entries of several tensors in the same place."""

from __future__ import annotations

from typing import Any

from teleport_optim.symmetry.search.analysis import EVEN, HOMOGENEOUS, LINEAR, NOTHING, ODD, Theory, Value
from teleport_optim.symmetry.search.operations.call import (
    Call,
    Result,
    aligned,
    as_value,
    opaque,
    relabelled,
    values_in,
)
from teleport_optim.symmetry.search.permutations import Exchange

__all__ = ["clamp", "combined", "divide", "each_entry", "lerp", "masked_fill", "multiply", "power", "prelu", "where"]


def each_entry(call: Call, theory: Theory, tags: frozenset[str]) -> Result:
    """A function of each entry of the first tensor; other tensors, if any, are parameters without channels."""
    for value in list(values_in(call.arguments))[1:]:
        theory.freeze(value)
    return [theory.elementwise(call.node, call.first, tags)] * len(call.shapes)


def combined(call: Call, theory: Theory, tags: frozenset[str]) -> Result:
    """A function of the entries of several tensors, together."""
    values = [as_value(call[key]) for key in ("self", "other", "end") if call[key] is not None]
    if tags == NOTHING and not isinstance(theory, Exchange):
        for value in values:
            theory.freeze(value)
        return [()]
    return [theory.add(call.node, values, call.shape, tags)]


def multiply(call: Call, theory: Theory) -> Result:
    return [theory.multiply(call.node, as_value(call["self"]), as_value(call["other"]), call.shape)]


def divide(call: Call, theory: Theory) -> Result:
    value, divisor = as_value(call["self"]), as_value(call["other"])
    if call["rounding_mode"] is not None:
        return combined(call, theory, NOTHING)
    labels = theory.settle(divisor)
    if theory.name == "linear":
        for one in labels:
            theory.units.fix(one.units)
    inverse = Value(divisor.shape, {theory.name: tuple(one.dual() for one in labels)}, fill=divisor.fill)
    return [theory.multiply(call.node, value, inverse, call.shape)]


def where(call: Call, theory: Theory) -> Result:
    return _chosen(call, theory, call["condition"], call["other"])


def lerp(call: Call, theory: Theory) -> Result:
    if isinstance(call["weight"], Value):
        return _chosen(call, theory, call["weight"], call["end"])
    return combined(call, theory, LINEAR)


def _chosen(call: Call, theory: Theory, selector: Value, other: Any) -> Result:
    """Entry by entry a choice or a mixture of two tensors, which a third decides."""
    values = [as_value(call["self"]), as_value(other)]
    if isinstance(theory, Exchange):
        return [theory.add(call.node, [selector, *values], call.shape, NOTHING)]
    theory.freeze(selector)
    return [theory.add(call.node, values, call.shape, LINEAR)]


def masked_fill(call: Call, theory: Theory) -> Result:
    value, mask = call["self"], call["mask"]
    if isinstance(theory, Exchange):
        return [theory.add(call.node, [value, mask], call.shape, NOTHING)]
    theory.freeze(mask)
    return [theory.elementwise(call.node, value, LINEAR if call["value"] == 0 else NOTHING)]


def clamp(call: Call, theory: Theory) -> Result:
    low, high = (call[key] for key in (("min_val", "max_val") if call.name == "hardtanh" else ("min", "max")))
    if isinstance(low, Value) or isinstance(high, Value):
        return opaque(call, theory)
    tags = HOMOGENEOUS if (low, high) in ((0, None), (None, 0)) else NOTHING
    return each_entry(call, theory, ODD if low is not None and high is not None and low == -high else tags)


def prelu(call: Call, theory: Theory) -> Result:
    value, weight = call["self"], call["weight"]
    labels = theory.elementwise(call.node, value, HOMOGENEOUS)
    if isinstance(theory, Exchange) and weight.shape != (1,):
        shape = [1] * len(value.shape)
        shape[1] = weight.shape[0]
        return [theory.multiply(call.node, relabelled(value, theory, labels), aligned(weight, 1, shape), value.shape)]
    theory.freeze(weight)
    return [labels]


def power(call: Call, theory: Theory) -> Result:
    exponent = call["exponent"]
    if isinstance(exponent, Value) or isinstance(call["self"], (int, float)):
        return opaque(call, theory)
    if exponent == 1:
        return each_entry(call, theory, LINEAR)
    return each_entry(call, theory, NOTHING if exponent % 1 else (EVEN, ODD)[int(exponent) % 2])
