"""What each operation of a traced model demands of the channels that pass through it.

A rule takes a :class:`Call` and a theory, tells the theory what must hold, and returns the labels of each tensor that the
operation gives. Operations are named as in PyTorch's ATen, without the overload. What is not in :data:`RULES` lets nothing
through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from teleport_optim.symmetry.labels import FIXED, Labels, mix
from teleport_optim.symmetry.theories import (
    EVEN,
    HOMOGENEOUS,
    LINEAR,
    MASK,
    NOTHING,
    ODD,
    Exchange,
    Theory,
    Value,
)

__all__ = ["COPIES", "CREATIONS", "RULES", "Call", "source_view", "values_in"]

Result = list[tuple[Labels, ...]]


@dataclass
class Call:
    """One operation of a traced model.

    Attributes:
        name: Name of the operation.
        node: Its number in the graph.
        arguments: Arguments by the names of the schema; a :class:`Value` in place of each tensor.
        shapes: Shapes of the tensors that it returns.
    """

    name: str
    node: int
    arguments: dict[str, Any]
    shapes: list[tuple[int, ...]]

    def __getitem__(self, key: str) -> Any:
        return self.arguments.get(key)

    @property
    def first(self) -> Value:
        """The first tensor."""
        return next(values_in(self.arguments))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first tensor that it returns."""
        return self.shapes[0]


Rule = Callable[[Call, Theory], Result]


def values_in(argument: Any) -> Iterator[Value]:
    """The tensors in an argument, with those in lists and dictionaries."""
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, dict):
        for value in argument.values():
            yield from values_in(value)
    elif isinstance(argument, (list, tuple)):
        for value in argument:
            yield from values_in(value)


def _as_value(argument: Any) -> Value:
    if isinstance(argument, Value):
        return argument
    return Value((), fill=float(argument) if isinstance(argument, (int, float)) else None)


def _axes(argument: Any, rank: int) -> list[int]:
    """Axes as numbers from 0; all of them for None or an empty list."""
    if argument is None or argument == []:
        return list(range(rank))
    return [axis % max(rank, 1) for axis in ([argument] if isinstance(argument, int) else argument)]


def _relabelled(value: Value, theory: Theory, labels: Sequence[Labels], shape: Sequence[int] | None = None) -> Value:
    return Value(tuple(value.shape if shape is None else shape), {theory.name: tuple(labels)})


# ------------------------------------------------------------------------------------------------------- element-wise


def _map(call: Call, theory: Theory, tags: frozenset[str]) -> Result:
    """A function of each entry of the first tensor; other tensors, if any, are parameters without channels."""
    for value in list(values_in(call.arguments))[1:]:
        theory.freeze(value)
    return [theory.elementwise(call.node, call.first, tags)] * len(call.shapes)


def _combine(call: Call, theory: Theory, tags: frozenset[str]) -> Result:
    """A function of the entries of several tensors, together."""
    values = [_as_value(call[key]) for key in ("self", "other", "tensor1", "tensor2", "end") if call[key] is not None]
    if tags == NOTHING and not isinstance(theory, Exchange):
        for value in values:
            theory.freeze(value)
        return [()]
    return [theory.add(call.node, values, call.shape, tags)]


def _multiply(call: Call, theory: Theory) -> Result:
    return [theory.multiply(call.node, _as_value(call["self"]), _as_value(call["other"]), call.shape)]


def _divide(call: Call, theory: Theory) -> Result:
    value, divisor = _as_value(call["self"]), _as_value(call["other"])
    if call["rounding_mode"] is not None:
        return _combine(call, theory, NOTHING)
    labels = theory.settle(divisor)
    if theory.name == "linear":
        for one in labels:
            theory.units.fix(one.units)
    inverse = Value(divisor.shape, {theory.name: tuple(one.dual() for one in labels)}, fill=divisor.fill)
    return [theory.multiply(call.node, value, inverse, call.shape)]


def _where(call: Call, theory: Theory) -> Result:
    condition, *values = (_as_value(call[key]) for key in ("condition", "self", "other"))
    if isinstance(theory, Exchange):
        return [theory.add(call.node, [condition, *values], call.shape, NOTHING)]
    theory.freeze(condition)
    return [theory.add(call.node, values, call.shape, LINEAR)]


def _masked_fill(call: Call, theory: Theory) -> Result:
    value, mask = call["self"], call["mask"]
    if isinstance(theory, Exchange):
        return [theory.add(call.node, [value, mask], call.shape, NOTHING)]
    theory.freeze(mask)
    return [theory.elementwise(call.node, value, LINEAR if call["value"] == 0 else NOTHING)]


def _clamp(call: Call, theory: Theory) -> Result:
    low, high = (call[key] for key in (("min_val", "max_val") if call.name == "hardtanh" else ("min", "max")))
    if isinstance(low, Value) or isinstance(high, Value):
        return _opaque(call, theory)
    tags = HOMOGENEOUS if (low, high) in ((0, None), (None, 0)) else NOTHING
    return _map(call, theory, ODD if low is not None and high is not None and low == -high else tags)


def _prelu(call: Call, theory: Theory) -> Result:
    value, weight = call["self"], call["weight"]
    labels = theory.elementwise(call.node, value, HOMOGENEOUS)
    if isinstance(theory, Exchange) and weight.shape != (1,):
        shape = [1] * len(value.shape)
        shape[1] = weight.shape[0]
        return [theory.multiply(call.node, _relabelled(value, theory, labels), _aligned(weight, 1, shape), value.shape)]
    theory.freeze(weight)
    return [labels]


def _power(call: Call, theory: Theory) -> Result:
    exponent = call["exponent"]
    if isinstance(exponent, Value) or isinstance(call["self"], (int, float)):
        return _opaque(call, theory)
    if exponent == 1:
        return _map(call, theory, LINEAR)
    return _map(call, theory, NOTHING if exponent % 1 else (EVEN, ODD)[int(exponent) % 2])


# ------------------------------------------------------------------------------------------------ sums of products


def _linear(call: Call, theory: Theory) -> Result:
    value, weight, bias = call["input"], call["weight"], call["bias"]
    rank = len(value.shape)
    letters = [*range(rank - 1), "out"] if len(weight.shape) == 2 else list(range(rank - 1))
    own = ["out", "in"] if len(weight.shape) == 2 else ["in"]
    return [
        _biased(call, theory, theory.product(call.node, value, [*range(rank - 1), "in"], weight, own, letters), bias)
    ]


def _biased(
    call: Call, theory: Theory, labels: tuple[Labels, ...], bias: Value | None, axis: int = -1
) -> tuple[Labels, ...]:
    """The labels of an output after the bias along ``axis`` is added."""
    if bias is None:
        return labels
    shape = [1] * len(call.shape)
    shape[axis] = bias.shape[-1] if bias.shape else 1
    if len(bias.shape) == 1:
        bias = _aligned(bias, axis % len(shape), shape)
    return theory.add(call.node, [Value(call.shape, {theory.name: labels}), bias], call.shape, LINEAR)


def _aligned(value: Value, axis: int, shape: Sequence[int]) -> Value:
    """A tensor with one axis as one of ``shape`` that has it at ``axis``."""
    assert len(value.shape) == 1
    if value.source is not None:
        axes = tuple(value.source.axes[0] if k == axis else None for k in range(len(shape)))
        return replace(value, shape=tuple(shape), source=value.source._replace(axes=axes))
    labels = {
        name: tuple(Labels.along(one.units, axis, len(shape), one.roles, one.sign) for one in own)
        for name, own in value.labels.items()
    }
    return replace(value, shape=tuple(shape), labels=labels)


def _matmul(call: Call, theory: Theory) -> Result:
    one, other = (
        call["self"],
        call["mat2"] or call["other"] or call["tensor2"] or call["vec2"] or call["vec"] or call["tensor"],
    )
    return [_matrix_product(call, theory, one, other)]


def _matrix_product(call: Call, theory: Theory, one: Value, other: Value) -> tuple[Labels, ...]:
    num_batch = max(len(one.shape), len(other.shape)) - 2
    own, others = (
        [
            num_batch - (len(value.shape) - 2) + k if value.shape[k] == call.shape[num_batch - (len(value.shape) - 2) + k]
            else ("broadcast", side, k)
            for k in range(len(value.shape) - 2)
        ]
        for side, value in enumerate((one, other))
    )  # fmt: skip
    out = list(range(num_batch))
    own += ["in"] if len(one.shape) == 1 else ["row", "in"]
    others += ["in"] if len(other.shape) == 1 else ["in", "column"]
    out += ["row"] if len(one.shape) > 1 else []
    out += ["column"] if len(other.shape) > 1 else []
    return theory.product(call.node, one, own, other, others, out)


def _added_matmul(call: Call, theory: Theory) -> Result:
    first, second = (call["mat1"], call["mat2"]) if call["mat1"] is not None else (call["batch1"], call["batch2"])
    if call.name == "addmv":
        first, second = call["mat"], call["vec"]
    product = Value(call.shape, {theory.name: _matrix_product(call, theory, first, second)})
    return [theory.add(call.node, [product] + ([call["self"]] if call["beta"] != 0 else []), call.shape, LINEAR)]


def _outer(call: Call, theory: Theory) -> Result:
    return [theory.product(call.node, call["self"], [0], call["vec2"], [1], [0, 1])]


def _einsum(call: Call, theory: Theory) -> Result:
    equation = call["equation"].replace(" ", "")
    values = call["tensors"]
    inputs, arrow, out = equation.partition("->")
    letters = [list(part) for part in inputs.split(",")]
    if "." in equation or not arrow or any(len(set(own)) < len(own) for own in letters) or len(values) > 2:
        return _opaque(call, theory)
    if len(values) == 1:
        axes = [axis for axis, letter in enumerate(letters[0]) if letter not in out]
        labels = theory.reduce(call.node, values[0], axes, LINEAR)
        kept = [labels_ for labels_ in labels]
        return [tuple(_moved(one, [letters[0].index(letter) for letter in out], axes) for one in kept)]
    sizes = {letter: size for own, value in zip(letters, values) for letter, size in zip(own, value.shape) if size > 1}
    for own, value in zip(letters, values):
        for axis, letter in enumerate(own):
            if value.shape[axis] == 1 and sizes.get(letter, 1) > 1:
                return _opaque(call, theory)
    return [theory.product(call.node, values[0], letters[0], values[1], letters[1], list(out))]


def _moved(labels: Labels, order: list[int], dropped: list[int]) -> Labels:
    return labels.map(lambda array: array.transpose([*order, *dropped]).reshape([array.shape[axis] for axis in order]))


def _attention(call: Call, theory: Theory) -> Result:
    query, key, value, mask = (call[name] for name in ("query", "key", "value", "attn_mask"))
    batch = list(range(len(query.shape) - 2))
    if call["enable_gqa"] or any(
        len(one.shape) != len(query.shape) or one.shape[:-2] != query.shape[:-2] for one in (key, value)
    ):
        return _opaque(call, theory)
    scores = theory.product(call.node, query, [*batch, "q", "d"], key, [*batch, "k", "d"], [*batch, "q", "k"])
    shape = (*query.shape[:-1], key.shape[-2])
    if mask is not None:
        labels = Value(shape, {theory.name: scores})
        scores = theory.add(call.node, [labels, mask], shape, LINEAR if theory.known(labels) else NOTHING)
    weights = _relabelled(
        query, theory, _softmax_labels(call, theory, Value(shape, {theory.name: scores}), [len(batch) + 1]), shape
    )
    return [theory.product(call.node, weights, [*batch, "q", "k"], value, [*batch, "k", "v"], [*batch, "q", "v"])]


def _softmax_labels(call: Call, theory: Theory, value: Value, axes: Sequence[int]) -> tuple[Labels, ...]:
    if isinstance(theory, Exchange):
        return theory.normalise(call.node, value, axes, NOTHING)
    return theory.elementwise(call.node, value, NOTHING)


def _softmax(call: Call, theory: Theory) -> Result:
    return [_softmax_labels(call, theory, call["self"], _axes(call["dim"], len(call.shape)))]


# ------------------------------------------------------------------------------------------------------ convolutions


def _convolution(call: Call, theory: Theory, *, is_transposed: bool) -> Result:
    value, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"]
    num_spatial = len(weight.shape) - 2
    channel = len(value.shape) - num_spatial - 1
    spatial = list(range(channel + 1, len(value.shape)))
    labels = [theory.confine(one, spatial, value.shape) for one in theory.settle(value)]
    value = _relabelled(value, theory, labels)
    batch = list(range(channel))
    pixels = [("pixel", k) for k in range(num_spatial)]
    letters = [*batch, "out", *[("place", k) for k in range(num_spatial)]]
    own = [*batch, "in", *[("from", k) for k in range(num_spatial)]]
    if groups == 1:
        others = ["in", "out", *pixels] if is_transposed else ["out", "in", *pixels]
        result = theory.product(call.node, value, own, weight, others, letters)
    else:
        result = _grouped(call, theory, value, weight, channel, groups, is_transposed=is_transposed)
    return [_biased(call, theory, result, bias, channel)]


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
    if weight.source is None or len(here) > 1:
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
        for one in here:
            theory.units.fix(one.units)
        theory.close(weight)
        return tuple(passing)
    if fan_in == 1 and is_exchange:
        # the group of a channel moves with it: its kernels and the outputs that they write
        if not blocks:
            return tuple(passing)
        units = np.repeat(blocks[0].units.ravel(), fan_out)
        roles = np.repeat(blocks[0].roles.ravel(), fan_out)
        if fan_out > 1:
            roles = mix(roles, np.tile(np.arange(fan_out), groups))
        output = Labels(units, roles, blocks[0].sign)
        _bind_axis(theory, weight, 0, [blocks[0].map(lambda array: array.ravel()) if is_transposed else output])
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
                is_transposed=is_transposed,
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
    is_transposed: bool,
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
            _bind_axis(theory, weight, 0, [new, *reads])
            return (Labels.along(units, channel, rank, zeros),)
        known = theory.write(weight, 0)
        for one in reads:
            theory.units.unite(one, known[-1])
        return (Labels.along(known[0].units[::repeat], channel, rank, None, known[0].sign),) if known else ()
    _bind_axis(theory, weight, 0, reads)
    blocks = theory.blocks(weight, 1)
    if blocks is None:
        units = theory.units.new(groups * fan_out).reshape(groups, fan_out)
        blocks = Labels(units, np.zeros_like(units, dtype=np.uint64))
        theory.bind_blocks(weight, 1, 0, blocks)
    return _held(call, theory, [blocks.map(lambda array: array.ravel())], channel, groups, fan_out)


def _held(
    call: Call, theory: Theory, written: Sequence[Labels], channel: int, groups: int, fan_out: int
) -> tuple[Labels, ...]:
    """New channels of a grouped convolution, which may move within their group only."""
    for one in written:
        theory.hold(call.node, one.map(lambda array: array.reshape(groups, fan_out)), [0], (groups, fan_out))
    return tuple(Labels.along(one.units, channel, len(call.shape), one.roles, one.sign) for one in written)


def _bind_axis(theory: Theory, value: Value, axis: int, labels: Sequence[Labels], *, power: int = 1) -> None:
    """Let an axis of a parameter move as ``labels`` say, whether it is free or not."""
    if theory.is_free(value, axis):
        theory.bind(value, axis, labels, power=power)
        return
    known = theory.write(value, axis)
    if len(known) != len(labels):
        for one in [*known, *labels]:
            theory.units.fix(one.units)
        return
    for one, other in zip(known, labels):
        theory.units.unite(one, other)


# ----------------------------------------------------------------------------------------------------- normalisations


def _affine(call: Call, theory: Theory, labels: tuple[Labels, ...], axes: Sequence[int]) -> tuple[Labels, ...]:
    """The labels after the multiplication with ``weight`` and the addition of ``bias``, both of which lie on ``axes``."""
    for key in ("weight", "bias"):
        parameter = call[key]
        if parameter is None:
            continue
        shape = [size if axis in axes else 1 for axis, size in enumerate(call.shape)]
        value = Value(call.shape, {theory.name: labels})
        if len(parameter.shape) == 1:
            parameter = _aligned(parameter, axes[0], shape)
        if key == "weight":
            labels = theory.multiply(call.node, value, parameter, call.shape)
        else:
            labels = theory.add(call.node, [value, parameter], call.shape, LINEAR)
    return labels


def _batch_norm(call: Call, theory: Theory) -> Result:
    value, channel = call["input"], 1
    mean, variance = call["running_mean"], call["running_var"]
    others = [axis for axis in range(len(value.shape)) if axis != channel]
    labels = [theory.confine(one, others, value.shape) for one in theory.settle(value)]
    value = _relabelled(value, theory, labels)
    through = [one for one in labels if one.axes in ((channel,), ())]
    if len(through) < len(labels) or len(through) > 1:
        for one in labels:
            theory.units.fix(one.units)
        through = []
    for buffer, power in ((mean, 1), (variance, 2)):
        if buffer is not None:
            flat = [one.map(lambda array: np.broadcast_to(array.ravel(), value.shape[channel])) for one in through]
            _bind_axis(theory, buffer, 0, flat, power=power)
    uses_batch = others if call.name != "instance_norm" else others[1:]
    normal = theory.normalise(call.node, value, uses_batch, ODD)
    return [_affine(call, theory, normal, [channel])] + [()] * (len(call.shapes) - 1)


def _group_norm(call: Call, theory: Theory) -> Result:
    value, num_groups = call["input"], call["num_groups"]
    batch, channels, *spatial = value.shape
    shape = (batch, num_groups, channels // num_groups, *spatial)
    grouped = _reshape_labels(theory, theory.settle(value), value.shape, shape)
    axes = range(2, len(shape))
    pixels = range(3, len(shape))
    grouped = tuple(theory.confine(one, pixels, shape) for one in grouped)
    normal = theory.normalise(call.node, Value(shape, {theory.name: grouped}), axes, NOTHING)
    return [_affine(call, theory, _reshape_labels(theory, normal, shape, value.shape), [1])]


def _layer_norm(call: Call, theory: Theory) -> Result:
    value = call["input"]
    axes = list(range(len(value.shape) - len(call["normalized_shape"]), len(value.shape)))
    tags = ODD if call.name == "rms_norm" else NOTHING
    labels = theory.normalise(call.node, value, axes, tags)
    return [_affine(call, theory, labels, axes)]


# ------------------------------------------------------------------------------------------------------------- layout


def _reshape_labels(
    theory: Theory, labels: Sequence[Labels], old: Sequence[int], new: Sequence[int]
) -> tuple[Labels, ...]:
    """Labels after a reshape. Where it mixes the axes of two of them, none moves any more."""
    moved = [one.reshape(old, new) for one in labels]
    result: list[Labels] = []
    for one, after in zip(labels, moved):
        axes = set(after.axes) if after is not None else set()
        is_mixed = isinstance(theory, Exchange) and any(
            other is not None and other is not after and set(other.axes) & axes for other in moved
        )
        if after is None or is_mixed:
            theory.units.fix(one.units)
        else:
            result.append(after)
    return tuple(result)


def _reshape(call: Call, theory: Theory) -> Result:
    value = call.first
    return [_reshape_labels(theory, theory.settle(value), value.shape, call.shape)]


def _permute(call: Call, theory: Theory) -> Result:
    order = _order(call)
    return [tuple(one.permute(order) for one in theory.settle(call.first))]


def _order(call: Call) -> list[int]:
    """The axes of the input in the order of the output."""
    rank = len(call.first.shape)
    order = list(range(rank))
    if call.name == "permute":
        return [axis % rank for axis in call["dims"]]
    if call.name == "movedim":
        sources, targets = (_axes(call[key], rank) for key in ("source", "destination"))
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


def _expand(call: Call, theory: Theory) -> Result:
    value = call.first
    return [tuple(_widened(one, len(call.shape)) for one in theory.settle(value))]


def _widened(labels: Labels, rank: int) -> Labels:
    return labels.map(lambda array: array.reshape((1,) * (rank - array.ndim) + array.shape))


def _repeat(call: Call, theory: Theory) -> Result:
    """Copies side by side: as an axis of copies in front of each axis, flattened into it."""
    value, rank = call.first, len(call.shape)
    own = (1,) * (rank - len(value.shape)) + value.shape
    times = [new // old if old else 1 for new, old in zip(call.shape, own)]
    shape = [size for pair in zip(times, own) for size in pair]
    labels = [_widened(one, rank) for one in theory.settle(value)]
    spread = [one.map(lambda array: np.expand_dims(array, list(range(0, 2 * rank, 2)))) for one in labels]
    return [_reshape_labels(theory, spread, shape, call.shape)]


def _repeat_interleave(call: Call, theory: Theory) -> Result:
    value, axis = call.first, call["dim"]
    if axis is None or not isinstance(call["repeats"], int):
        return _opaque(call, theory)
    axis %= len(value.shape)
    shape = [*value.shape[: axis + 1], call["repeats"], *value.shape[axis + 1 :]]
    labels = [one.map(lambda array: np.expand_dims(array, axis + 1)) for one in theory.settle(value)]
    return [_reshape_labels(theory, labels, shape, call.shape)]


def _take(theory: Theory, labels: Labels, axis: int, index: Any) -> Labels:
    """The labels of the positions ``index`` of an axis."""
    return labels.map(lambda array: array if array.shape[axis] == 1 else np.take(array, index, axis)).settled()


def _slice(call: Call, theory: Theory) -> Result:
    value, axis = call.first, (call["dim"] or 0) % len(call.first.shape)
    size = value.shape[axis]
    if call.name == "narrow":
        start, step, length = call["start"], 1, call["length"]
        index = np.arange(size)[start : start + length] if isinstance(start, int) else None
    else:
        start, step = call["start"], call["step"] or 1
        index = np.arange(size)[start : call["end"] : step]
    if index is None:
        return _opaque(call, theory)
    return [tuple(_take(theory, one, axis, index) for one in theory.settle(value))]


def _select(call: Call, theory: Theory) -> Result:
    value, axis = call.first, (call["dim"] or 0) % len(call.first.shape)
    labels = [_take(theory, one, axis, [call["index"]]) for one in theory.settle(value)]
    return [tuple(one.map(lambda array: array.squeeze(axis)) for one in labels)]


def _split(call: Call, theory: Theory) -> Result:
    value = call.first
    axis = (call["dim"] or 0) % len(value.shape)
    labels = theory.settle(value)
    result, start = [], 0
    for shape in call.shapes:
        size = 1 if call.name == "unbind" else shape[axis]
        parts = [_take(theory, one, axis, np.arange(start, start + size)) for one in labels]
        if call.name == "unbind":
            parts = [one.map(lambda array: array.squeeze(axis)) for one in parts]
        result.append(tuple(parts))
        start += size
    return result


def _cat(call: Call, theory: Theory) -> Result:
    values, rank = list(call["tensors"]), len(call.shape)
    axis = (call["dim"] or 0) % rank
    if call.name == "stack":
        values = [_inserted(theory, value, axis) for value in values]
    values = [value for value in values if len(value.shape) == rank]  # empty vectors are passed over
    for value in values:
        if value.source is None or value.source.axes[axis] is None:
            continue
        if value.shape[axis] > 1:
            theory.write(value, axis)
        elif theory.is_free(value, axis):
            theory.bind(value, axis, [])
        else:  # a single entry, which would have to be told from the others
            for one in theory.write(value, axis):
                theory.units.fix(one.units)
    labels = _across(call, theory, values, axis)
    joined = _joined(theory, values, axis)
    return [(*labels, *joined)]


def _inserted(theory: Theory, value: Value, axis: int) -> Value:
    """A tensor with a new axis of length one."""
    shape = (*value.shape[:axis], 1, *value.shape[axis:])
    if value.source is not None:
        axes = (*value.source.axes[:axis], None, *value.source.axes[axis:])
        return replace(value, shape=shape, source=value.source._replace(axes=axes))
    labels = [one.map(lambda array: np.expand_dims(array, axis)) for one in theory.known(value)]
    return Value(shape, {theory.name: tuple(labels)}, fill=value.fill)


def _across(call: Call, theory: Theory, values: list[Value], axis: int) -> list[Labels]:
    """The labels on the axes along which nothing is concatenated: all tensors must agree on them."""
    reference: Value | None = None
    shape = tuple(1 if k == axis else size for k, size in enumerate(call.shape))
    parts = []
    for value in values:
        if value.source is not None:
            axes = tuple(None if k == axis else own for k, own in enumerate(value.source.axes))
            parts.append(replace(value, shape=shape, source=value.source._replace(axes=axes)))
        else:
            labels = [one for one in theory.known(value) if axis not in one.axes]
            parts.append(Value(shape, {theory.name: tuple(labels)}, fill=value.fill))
    for part in sorted(parts, key=lambda part: part.source is not None):
        reference = (
            part
            if reference is None
            else Value(shape, {theory.name: theory.add(call.node, [reference, part], shape, LINEAR)})
        )
    return list(theory.settle(reference)) if reference is not None else []


def _joined(theory: Theory, values: list[Value], axis: int) -> list[Labels]:
    """The labels that change along the axis of concatenation. Entries that do not move get the unit FIXED."""
    own = [[one for one in theory.known(value) if axis in one.axes] for value in values]
    if not any(own):
        return []
    if any(len(labels) > 1 for labels in own):
        for labels in own:
            for one in labels:
                theory.units.fix(one.units)
        return []
    other_axes = sorted({k for labels in own for one in labels for k in one.axes} - {axis})
    pieces = []
    for value, labels in zip(values, own):
        shape = [size if k == axis or k in other_axes else 1 for k, size in enumerate(value.shape)]
        if labels:
            one = labels[0].spread(value.shape, [axis, *other_axes])
            one = one if one.sign == 1 else _unsigned(theory, one)
        else:
            one = Labels(np.full(shape, FIXED), np.zeros(shape, np.uint64))
        pieces.append(one)
    units, roles = (np.concatenate([getattr(one, key) for one in pieces], axis) for key in ("units", "roles"))
    return [_distinguished(theory, Labels(units, roles)).settled()]


def _unsigned(theory: Theory, labels: Labels) -> Labels:
    """The same labels with new units, so that their sign is +1."""
    units = theory.units.new(labels.units.size).reshape(labels.units.shape)
    positive = Labels(units, labels.roles)
    theory.units.unite(Labels(units, labels.roles), labels)
    return positive


def _distinguished(theory: Theory, labels: Labels) -> Labels:
    """Labels in which entries that are copies of each other have roles of their own."""
    if not isinstance(theory, Exchange):
        return labels
    roots, roles, _ = theory.units.find(labels.units, labels.roles)
    keys = mix(roots, roles).ravel()
    order = np.argsort(keys, kind="stable")
    _, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
    if counts.max(initial=1) == 1:
        return labels
    occurrence = np.empty(len(keys), np.int64)
    occurrence[order] = np.arange(len(keys)) - np.repeat(starts, counts)
    copies = occurrence.reshape(labels.units.shape)
    return Labels(labels.units, np.where(copies > 0, mix(labels.roles, 7, copies), labels.roles), labels.sign)


def _flip(call: Call, theory: Theory) -> Result:
    axes = _axes(call["dims"], len(call.shape))
    return [tuple(one.map(lambda array: np.flip(array, axes)) for one in theory.settle(call.first))]


def _roll(call: Call, theory: Theory) -> Result:
    axes, shifts = call["dims"], call["shifts"]
    if not axes:
        return _opaque(call, theory)
    rank = len(call.shape)
    shifts, axes = (list(x) if isinstance(x, (list, tuple)) else [x] for x in (shifts, axes))
    axes = [axis % rank for axis in axes]
    return [tuple(one.map(lambda array: np.roll(array, shifts, axes)) for one in theory.settle(call.first))]


def _index(call: Call, theory: Theory) -> Result:
    value = call.first
    indices = [call["index"]] if call.name == "index_select" else list(call["indices"])
    axes = (
        [_axes(call["dim"], len(value.shape))[0]]
        if call.name == "index_select"
        else [k for k, i in enumerate(indices) if i is not None]
    )
    rank = len(value.shape)
    if len(axes) != 1 and axes != list(range(axes[0], axes[0] + len(axes))):
        return _opaque(call, theory)
    given = [index for index in indices if index is not None]
    for index in given:
        theory.freeze(index)
    num_new = len(call.shape) - (rank - len(axes))
    result = []
    for axis in range(rank):
        if axis in axes and theory.is_free(value, axis):
            theory.bind(value, axis, [])
    for one in theory.settle(value):
        if not set(axes) & set(one.axes):
            kept = one.map(lambda array: array.squeeze(tuple(axes)))
            result.append(kept.map(lambda array: np.expand_dims(array, tuple(range(axes[0], axes[0] + num_new)))))
        elif len(axes) == 1 and given[0].data is not None and given[0].data.dtype.kind == "i":
            result.append(
                _distinguished(theory, one.map(lambda array: np.take(array, given[0].data, axes[0]))).settled()
            )
        else:
            theory.units.fix(one.units)
    return [tuple(result)]


def _squeeze(call: Call, theory: Theory) -> Result:
    value = call.first
    gone = [axis for axis in _axes(call["dim"], len(value.shape)) if value.shape[axis] == 1]
    if call["dim"] is not None and not value.shape:
        gone = []
    return [tuple(one.map(lambda array: array.squeeze(tuple(gone))) for one in theory.settle(value))]


def _unsqueeze(call: Call, theory: Theory) -> Result:
    axis = call["dim"] % len(call.shape)
    return [tuple(one.map(lambda array: np.expand_dims(array, axis)) for one in theory.settle(call.first))]


def _pad(call: Call, theory: Theory) -> Result:
    value, padding = call.first, list(call["pad"])
    mode = call["mode"]
    rank, num_axes = len(value.shape), len(padding) // 2
    before, after = (
        [padding[2 * (rank - 1 - k) + side] if k >= rank - num_axes else 0 for k in range(rank)] for side in (0, 1)
    )
    padded = [k for k in range(rank) if before[k] or after[k]]
    is_zero = mode == "constant" and not call["value"]
    labels = theory.elementwise(call.node, value, LINEAR if is_zero or mode != "constant" else NOTHING)
    result = []
    for one in labels:
        inside = [k for k in padded if k in one.axes]
        if not inside:
            result.append(one)
        elif mode == "constant" and min(*before, *after) >= 0:
            widths = [(before[k], after[k]) if k in inside else (0, 0) for k in range(rank)]
            result.append(one.map(lambda array: np.pad(array, widths, constant_values=0)))
        else:
            result.append(theory.confine(one, inside, value.shape))
    return [tuple(result)]


def _pixel_shuffle(call: Call, theory: Theory) -> Result:
    value = call.first
    *batch, channels, height, width = value.shape
    r = call["upscale_factor"] or call["downscale_factor"]
    n = len(batch)
    if call.name == "pixel_shuffle":
        middle = [*batch, channels // r**2, r, r, height, width]
        order = [*range(n), n, n + 3, n + 1, n + 4, n + 2]
    else:
        middle = [*batch, channels, height // r, r, width // r, r]
        order = [*range(n), n, n + 2, n + 4, n + 1, n + 3]
    labels = _reshape_labels(theory, theory.settle(value), value.shape, middle)
    moved = [one.permute(order) for one in labels]
    return [_reshape_labels(theory, moved, [middle[k] for k in order], call.shape)]


def _channel_shuffle(call: Call, theory: Theory) -> Result:
    value, groups = call.first, call["groups"]
    batch, channels, *spatial = value.shape
    middle = [batch, groups, channels // groups, *spatial]
    order = [0, 2, 1, *range(3, len(middle))]
    labels = _reshape_labels(theory, theory.settle(value), value.shape, middle)
    moved = [one.permute(order) for one in labels]
    return [_reshape_labels(theory, moved, [middle[k] for k in order], call.shape)]


# --------------------------------------------------------------------------------------------- pooling and reductions


def _spatial(call: Call, theory: Theory, tags: frozenset[str], num_spatial: int | None = None) -> Result:
    """A layer that works on the last axes, and on each channel alone."""
    value = call.first
    rank = len(value.shape)
    num_spatial = rank - 2 if num_spatial is None else num_spatial
    axes = range(rank - num_spatial, rank)
    labels = theory.elementwise(call.node, value, tags)
    result = tuple(theory.confine(one, axes, value.shape) for one in labels)
    # a second output holds positions, which move with the channels but are not multiplied
    positions = result if isinstance(theory, Exchange) else ()
    return [result] + [positions] * (len(call.shapes) - 1)


def _reduce(call: Call, theory: Theory, tags: frozenset[str]) -> Result:
    value = call.first
    rank = len(value.shape)
    key = next((key for key in ("dim", "axis") if key in call.arguments), None)
    axes = _axes(call[key], rank) if key else list(range(rank))
    labels = theory.reduce(call.node, value, axes, tags)
    keeps = bool(call["keepdim"]) and rank == len(call.shape)
    if not keeps:
        labels = tuple(one.map(lambda array: array.squeeze(tuple(axes))) for one in labels)
    if len(call.shapes) == 2 and call.name in ("max", "min", "median", "mode"):
        for one in theory.known(value):
            if set(one.axes) & set(axes):  # which channel it was is no property of the function
                theory.units.fix(one.units)
        return [labels, labels if isinstance(theory, Exchange) else ()]
    return [labels] * len(call.shapes)


def _extreme(call: Call, theory: Theory) -> Result:
    """max and min: over an axis, over everything, or of two tensors."""
    return (
        _combine(call, theory, HOMOGENEOUS) if isinstance(call["other"], Value) else _reduce(call, theory, HOMOGENEOUS)
    )


def _opaque(call: Call, theory: Theory) -> Result:
    """What is not understood: nothing that goes in moves."""
    for value in values_in(call.arguments):
        theory.freeze(value)
    return [()] * len(call.shapes)


# ------------------------------------------------------------------------------------------------ lookups, recurrence


def _embedding(call: Call, theory: Theory) -> Result:
    weight, indices = call["weight"], call["indices"]
    theory.freeze(indices)
    if theory.is_free(weight, 0):
        theory.bind(weight, 0, [])
    labels = []
    for one in theory.settle(weight):
        if one.axes and 0 in one.axes:
            theory.units.fix(one.units)
        else:
            labels.append(one.map(lambda array: array.reshape((1,) * (len(call.shape) - 1) + (-1,))))
    return [tuple(labels)]


_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_MOVED_GATE = {"lstm": 2, "gru": 2}
"""The gate whose activation is multiplied by the others: where a hidden unit gets its sign or size."""
_MOVABLE = {
    "permutation": {"all"},
    "heads": {"all"},
    "linear": set(),
    "scaling": {"rnn_relu"},
    "sign": {"rnn_tanh", "lstm", "gru"},
}
"""The recurrent layers whose hidden units each group moves."""


def _recurrent(call: Call, theory: Theory) -> Result:
    """Hidden units of a recurrent layer: rows of every gate, columns of the recurrent matrix."""
    value, params = call["input"], call["params"]
    states = [call["hx"]] if isinstance(call["hx"], Value) else list(call["hx"] or [])
    per_layer = 4 if call["has_biases"] else 2
    directions = 2 if call["bidirectional"] else 1
    num_layers = call["num_layers"]
    if params is None or len(params) != per_layer * directions * num_layers or any(p.source is None for p in params):
        return _opaque(call, theory)
    for state in states:
        if state.fill != 0.0:
            theory.freeze(state)
    num_gates = _GATES[call.name]
    batch_axes = ["a", "b"][: len(value.shape) - 1]
    layers: list[list[Labels]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            start = (layer * directions + direction) * per_layer
            weight, recurrent, *biases = params[start : start + per_layer]
            size = recurrent.shape[1]
            hidden = _hidden_units(theory, recurrent, _MOVABLE[theory.name] & {"all", call.name})
            _bind_gates(theory, [weight, recurrent, *biases], hidden, num_gates, size, call.name)
            if hidden is not None and theory.is_free(recurrent, 1):
                theory.bind(recurrent, 1, [hidden.dual()])
            theory.product(call.node, value, [*batch_axes, "in"], weight, ["gate", "in"], [*batch_axes, "gate"])
            for parameter in (weight, recurrent, *biases):
                theory.close(parameter)
            if any(state.fill != 0.0 for state in states) and hidden is not None:
                theory.units.fix(hidden.units)
            outputs.append(hidden)
        layers.append(outputs)
        value = _relabelled(
            value,
            theory,
            _recurrent_output(theory, outputs, params, start, len(value.shape)),
            (*value.shape[:-1], size * directions),
        )
    result: Result = [theory.known(value)]
    return result + _final_states(call, theory, layers, len(call.shapes) - 1)


def _hidden_units(theory: Theory, recurrent: Value, can_move: set[str]) -> Labels | None:
    """The hidden units of a recurrent layer, which its recurrent matrix reads; None if they cannot move."""
    if not can_move:
        return None
    if theory.is_free(recurrent, 1):
        units = theory.units.new(recurrent.shape[1])
        return Labels(units, np.zeros_like(units, dtype=np.uint64))
    known = theory.write(recurrent, 1)
    return known[0].dual() if len(known) == 1 else None


def _bind_gates(
    theory: Theory, parameters: Sequence[Value], hidden: Labels | None, num_gates: int, size: int, name: str
) -> None:
    """Let the rows of every gate move with the hidden units."""
    for parameter in parameters:
        if hidden is None:
            if theory.is_free(parameter, 0):
                theory.bind(parameter, 0, [])
            continue
        units = hidden.units.ravel()
        if isinstance(theory, Exchange):
            rows, roles = np.tile(units, num_gates), mix(9, np.repeat(np.arange(num_gates), size))
        else:
            rows, roles = np.full((num_gates, size), FIXED), np.zeros(num_gates * size, np.uint64)
            rows[_MOVED_GATE.get(name, 0)] = units
            rows = rows.ravel()
        _bind_axis(theory, parameter, 0, [Labels(rows, roles, hidden.sign)])


def _recurrent_output(theory: Theory, outputs: list[Labels | None], params: Any, start: int, rank: int) -> list[Labels]:
    if any(one is None for one in outputs):
        return []
    units, roles = (np.concatenate([getattr(one, key).ravel() for one in outputs]) for key in ("units", "roles"))
    return [Labels.along(units, rank - 1, rank, roles, outputs[0].sign)]  # type: ignore[union-attr]


def _final_states(call: Call, theory: Theory, layers: list[list[Labels | None]], count: int) -> Result:
    flat = [one for outputs in layers for one in outputs]
    if any(one is None for one in flat):
        return [()] * count
    shape = call.shapes[1]
    units = np.stack([one.units.ravel() for one in flat])  # type: ignore[union-attr]
    target = [len(flat)] + [1] * (len(shape) - 2) + [units.shape[1]]
    labels = Labels(units.reshape(target), np.zeros(target, np.uint64), flat[0].sign)  # type: ignore[union-attr]
    return [(labels,)] * count


# -------------------------------------------------------------------------------------------------------- the table


def _names(text: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(text.split(), rule)


COPIES = frozenset("clone contiguous to _to_copy detach alias lift_fresh lift".split())
"""Operations whose result has the entries of their tensor."""

CREATIONS = frozenset(
    "zeros ones full empty arange linspace eye rand randn randint randperm zeros_like ones_like full_like empty_like rand_like "
    "randn_like randint_like new_zeros new_ones new_full new_empty scalar_tensor tril_indices triu_indices normal_ uniform_ "
    "bernoulli_ random_ empty_strided new_empty_strided zero_ fill_".split()
)
"""Operations whose result takes at most its shape from their tensors."""

RULES: dict[str, Rule] = {
    **_names(f"neg positive {' '.join(COPIES)}", partial(_map, tags=LINEAR)),
    **_names("dropout feature_dropout native_dropout", partial(_map, tags=MASK)),
    **_names("relu leaky_relu rrelu rrelu_with_noise", partial(_map, tags=HOMOGENEOUS)),
    **_names("abs", partial(_map, tags=HOMOGENEOUS | EVEN)),
    **_names(
        "tanh sin asin sinh atan asinh atanh tan erf sign sgn softshrink hardshrink round trunc",
        partial(_map, tags=ODD),
    ),
    **_names("cos cosh square", partial(_map, tags=EVEN)),
    **_names(
        "gelu silu mish sigmoid log_sigmoid elu celu selu softplus relu6 hardswish hardsigmoid threshold exp exp2 expm1 log log1p "
        "log2 log10 sqrt rsqrt reciprocal floor ceil logical_not isnan isfinite isinf nan_to_num alpha_dropout "
        "feature_alpha_dropout erfc lgamma frac",
        partial(_map, tags=NOTHING),
    ),
    **_names("add sub rsub lerp", partial(_combine, tags=LINEAR)),
    **_names("maximum minimum", partial(_combine, tags=HOMOGENEOUS)),
    **_names(
        "eq ne lt le gt ge logical_and logical_or atan2 fmod remainder floor_divide bitwise_and bitwise_or",
        partial(_combine, tags=NOTHING),
    ),
    "mul": _multiply,
    "div": _divide,
    "where": _where,
    "masked_fill": _masked_fill,
    **_names("clamp clamp_min clamp_max hardtanh", _clamp),
    "prelu": _prelu,
    "pow": _power,
    "linear": _linear,
    "max_pool2d_with_indices": partial(_spatial, tags=HOMOGENEOUS, num_spatial=2),
    **_names("matmul mm bmm mv dot", _matmul),
    **_names("addmm baddbmm addmv", _added_matmul),
    "outer": _outer,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **_names("softmax log_softmax", _softmax),
    **_names("conv1d conv2d conv3d", partial(_convolution, is_transposed=False)),
    **_names("conv_transpose1d conv_transpose2d conv_transpose3d", partial(_convolution, is_transposed=True)),
    **_names("batch_norm instance_norm", _batch_norm),
    "group_norm": _group_norm,
    **_names("layer_norm rms_norm", _layer_norm),
    **_names("view reshape flatten unflatten", _reshape),
    **_names("permute transpose t swapaxes movedim numpy_T mT", _permute),
    **_names("expand expand_as", _expand),
    **_names("repeat tile", _repeat),
    "repeat_interleave": _repeat_interleave,
    **_names("slice narrow", _slice),
    "select": _select,
    **_names("split split_with_sizes chunk unbind tensor_split", _split),
    **_names("cat stack", _cat),
    "flip": _flip,
    "roll": _roll,
    **_names("index index_select", _index),
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "pad": _pad,
    **_names("pixel_shuffle pixel_unshuffle", _pixel_shuffle),
    "channel_shuffle": _channel_shuffle,
    **{
        f"{stem}{n}d": partial(_spatial, tags=LINEAR, num_spatial=n)
        for stem in ("avg_pool", "adaptive_avg_pool")
        for n in (1, 2, 3)
    },
    **{
        f"{stem}{n}d": partial(_spatial, tags=HOMOGENEOUS, num_spatial=n)
        for stem in ("max_pool", "adaptive_max_pool")
        for n in (1, 2, 3)
    },
    **_names(
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
        "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa",
        partial(_spatial, tags=LINEAR),
    ),
    **_names("mean sum", partial(_reduce, tags=LINEAR)),
    **_names("amax amin std linalg_vector_norm", partial(_reduce, tags=HOMOGENEOUS)),
    **_names("var prod logsumexp any all var_mean std_mean", partial(_reduce, tags=NOTHING)),
    **_names("max min", _extreme),
    "embedding": _embedding,
    **_names("lstm gru rnn_tanh rnn_relu", _recurrent),
}
"""The rule of every known operation."""


def source_view(call: Call) -> Value | None:
    """A parameter, seen with its axes in another order or with axes of length one inserted or removed; None for anything else."""
    value = next(values_in(call.arguments), None)
    if value is None or value.source is None or len(list(values_in(call.arguments))) != 1:
        return None
    axes: list[int | None] = list(value.source.axes)
    if call.name in COPIES:
        pass
    elif RULES.get(call.name) is _permute:
        axes = [axes[k] for k in _order(call)]
    elif call.name == "unsqueeze":
        axes.insert(call["dim"] % len(call.shape), None)
    elif call.name == "squeeze":
        gone = [axis for axis in _axes(call["dim"], len(value.shape)) if value.shape[axis] == 1]
        axes = [own for axis, own in enumerate(axes) if axis not in gone]
    elif RULES.get(call.name) is _expand:
        axes = [None] * (len(call.shape) - len(axes)) + axes
        own = (1,) * (len(call.shape) - len(value.shape)) + value.shape
        axes = [axis if old == new else None for axis, old, new in zip(axes, own, call.shape)]
    else:
        return None
    return Value(call.shape, source=value.source._replace(axes=tuple(axes)))
