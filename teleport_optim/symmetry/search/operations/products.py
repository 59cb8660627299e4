"""Sums of products: linear layers, matrix products, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from teleport_optim.symmetry.search.analysis import LINEAR, NOTHING, ChannelAnalysis, Intermediate
from teleport_optim.symmetry.search.channels import Channels
from teleport_optim.symmetry.search.graph import Call, Value
from teleport_optim.symmetry.search.operations.call import Result, aligned, axes_of, opaque, with_channels

__all__ = ["added_matmul", "attention", "biased", "einsum", "linear", "matmul", "outer", "softmax"]


def linear(call: Call, analysis: ChannelAnalysis) -> Result:
    value, weight, bias = call["input"], call["weight"], call["bias"]
    rank = len(value.shape)
    subscripts = [*range(rank - 1), "out"] if len(weight.shape) == 2 else list(range(rank - 1))
    own = ["out", "in"] if len(weight.shape) == 2 else ["in"]
    return [biased(call, analysis, analysis.product(value, [*range(rank - 1), "in"], weight, own, subscripts), bias)]


def biased(
    call: Call, analysis: ChannelAnalysis, channels: tuple[Channels, ...], bias: Value | None, axis: int = -1
) -> tuple[Channels, ...]:
    """Follow the sum of an output and a bias along ``axis``."""
    if bias is None:
        return channels
    shape = [1] * len(call.shape)
    shape[axis] = bias.shape[-1] if bias.shape else 1
    if len(bias.shape) == 1:
        bias = aligned(bias, analysis, axis % len(shape), shape)
    return analysis.add([Intermediate(call.shape, channels=channels), bias], call.shape, LINEAR)


def matmul(call: Call, analysis: ChannelAnalysis) -> Result:
    one, other = (
        call["self"],
        call["mat2"] or call["other"] or call["tensor2"] or call["vec2"] or call["vec"] or call["tensor"],
    )
    return [_matrix_product(call, analysis, one, other)]


def _matrix_product(call: Call, analysis: ChannelAnalysis, one: Value, other: Value) -> tuple[Channels, ...]:
    num_batch = max(len(one.shape), len(other.shape)) - 2
    own, others = (_batch_subscripts(value, call.shape, num_batch, side) for side, value in enumerate((one, other)))
    out: list[Any] = list(range(num_batch))
    own += ["in"] if len(one.shape) == 1 else ["row", "in"]
    others += ["in"] if len(other.shape) == 1 else ["in", "column"]
    out += ["row"] if len(one.shape) > 1 else []
    out += ["column"] if len(other.shape) > 1 else []
    return analysis.product(one, own, other, others, out)


def _batch_subscripts(value: Value, shape: Sequence[int], num_batch: int, side: int) -> list[Any]:
    """Subscripts of the axes in front of the matrices of an operand; an axis that is broadcast gets one of its own."""
    first = num_batch - (len(value.shape) - 2)
    return [
        first + axis if value.shape[axis] == shape[first + axis] else ("broadcast", side, axis)
        for axis in range(len(value.shape) - 2)
    ]


def added_matmul(call: Call, analysis: ChannelAnalysis) -> Result:
    first, second = (call["mat1"], call["mat2"]) if call["mat1"] is not None else (call["batch1"], call["batch2"])
    if call.name == "addmv":
        first, second = call["mat"], call["vec"]
    product = Intermediate(call.shape, channels=_matrix_product(call, analysis, first, second))
    return [analysis.add([product] + ([call["self"]] if call["beta"] != 0 else []), call.shape, LINEAR)]


def outer(call: Call, analysis: ChannelAnalysis) -> Result:
    return [analysis.product(call["self"], [0], call["vec2"], [1], [0, 1])]


def einsum(call: Call, analysis: ChannelAnalysis) -> Result:
    equation = call["equation"].replace(" ", "")
    values = call["tensors"]
    inputs, arrow, out = equation.partition("->")
    subscripts = [list(part) for part in inputs.split(",")]
    if "." in equation or not arrow or any(len(set(own)) < len(own) for own in subscripts) or len(values) > 2:
        return opaque(call, analysis)
    if len(values) == 1:
        axes = [axis for axis, subscript in enumerate(subscripts[0]) if subscript not in out]
        channels = analysis.reduce(values[0], axes, LINEAR)
        return [tuple(_moved(one, [subscripts[0].index(subscript) for subscript in out], axes) for one in channels)]
    sizes = {
        subscript: size
        for own, value in zip(subscripts, values)
        for subscript, size in zip(own, value.shape)
        if size > 1
    }
    for own, value in zip(subscripts, values):
        for axis, subscript in enumerate(own):
            if value.shape[axis] == 1 and sizes.get(subscript, 1) > 1:
                return opaque(call, analysis)
    return [analysis.product(values[0], subscripts[0], values[1], subscripts[1], list(out))]


def _moved(channels: Channels, order: list[int], dropped: list[int]) -> Channels:
    return channels.map(
        lambda array: array.transpose([*order, *dropped]).reshape([array.shape[axis] for axis in order])
    )


def attention(call: Call, analysis: ChannelAnalysis) -> Result:
    query, key, value, mask = (call[name] for name in ("query", "key", "value", "attn_mask"))
    batch = list(range(len(query.shape) - 2))
    if call["enable_gqa"] or any(
        len(one.shape) != len(query.shape) or one.shape[:-2] != query.shape[:-2] for one in (key, value)
    ):
        return opaque(call, analysis)
    scores = analysis.product(query, [*batch, "q", "d"], key, [*batch, "k", "d"], [*batch, "q", "k"])
    shape = (*query.shape[:-1], key.shape[-2])
    if call["is_causal"]:  # the mask tells queries and keys apart by their place
        analysis.pin(one for one in scores if set(one.axes) & {len(batch), len(batch) + 1})
    if mask is not None:
        channels = Intermediate(shape, channels=scores)
        scores = analysis.add([channels, mask], shape, LINEAR if analysis.known(channels) else NOTHING)
    weights = with_channels(
        query,
        _softmax_channels(call, analysis, Intermediate(shape, channels=scores), [len(batch) + 1]),
        shape,
    )
    return [analysis.product(weights, [*batch, "q", "k"], value, [*batch, "k", "v"], [*batch, "q", "v"])]


def _softmax_channels(call: Call, analysis: ChannelAnalysis, value: Value, axes: Sequence[int]) -> tuple[Channels, ...]:
    if analysis.moves_entries:
        return analysis.normalise(value, axes, NOTHING)
    return analysis.elementwise(value, NOTHING)


def softmax(call: Call, analysis: ChannelAnalysis) -> Result:
    return [_softmax_channels(call, analysis, call["self"], axes_of(call["dim"], len(call.shape)))]
