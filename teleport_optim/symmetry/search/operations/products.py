"""Sums of products: linear layers, matrix products, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from teleport_optim.symmetry.search.analysis import LINEAR, NOTHING, Theory, Value
from teleport_optim.symmetry.search.channels import Labels
from teleport_optim.symmetry.search.operations.call import Call, Result, aligned, axes_of, opaque, relabelled
from teleport_optim.symmetry.search.permutations import Exchange

__all__ = ["added_matmul", "attention", "biased", "einsum", "linear", "matmul", "outer", "softmax"]


def linear(call: Call, theory: Theory) -> Result:
    value, weight, bias = call["input"], call["weight"], call["bias"]
    rank = len(value.shape)
    letters = [*range(rank - 1), "out"] if len(weight.shape) == 2 else list(range(rank - 1))
    own = ["out", "in"] if len(weight.shape) == 2 else ["in"]
    return [
        biased(call, theory, theory.product(call.node, value, [*range(rank - 1), "in"], weight, own, letters), bias)
    ]


def biased(
    call: Call, theory: Theory, labels: tuple[Labels, ...], bias: Value | None, axis: int = -1
) -> tuple[Labels, ...]:
    """The labels of an output after the bias along ``axis`` is added."""
    if bias is None:
        return labels
    shape = [1] * len(call.shape)
    shape[axis] = bias.shape[-1] if bias.shape else 1
    if len(bias.shape) == 1:
        bias = aligned(bias, axis % len(shape), shape)
    return theory.add(call.node, [Value(call.shape, {theory.name: labels}), bias], call.shape, LINEAR)


def matmul(call: Call, theory: Theory) -> Result:
    one, other = (
        call["self"],
        call["mat2"] or call["other"] or call["tensor2"] or call["vec2"] or call["vec"] or call["tensor"],
    )
    return [_matrix_product(call, theory, one, other)]


def _matrix_product(call: Call, theory: Theory, one: Value, other: Value) -> tuple[Labels, ...]:
    num_batch = max(len(one.shape), len(other.shape)) - 2
    own, others = (_batch_letters(value, call.shape, num_batch, side) for side, value in enumerate((one, other)))
    out: list[Any] = list(range(num_batch))
    own += ["in"] if len(one.shape) == 1 else ["row", "in"]
    others += ["in"] if len(other.shape) == 1 else ["in", "column"]
    out += ["row"] if len(one.shape) > 1 else []
    out += ["column"] if len(other.shape) > 1 else []
    return theory.product(call.node, one, own, other, others, out)


def _batch_letters(value: Value, shape: Sequence[int], num_batch: int, side: int) -> list[Any]:
    """Names for the axes of a matrix product's operand in front of its matrices; what is broadcast has one of its own."""
    first = num_batch - (len(value.shape) - 2)
    return [
        first + axis if value.shape[axis] == shape[first + axis] else ("broadcast", side, axis)
        for axis in range(len(value.shape) - 2)
    ]


def added_matmul(call: Call, theory: Theory) -> Result:
    first, second = (call["mat1"], call["mat2"]) if call["mat1"] is not None else (call["batch1"], call["batch2"])
    if call.name == "addmv":
        first, second = call["mat"], call["vec"]
    product = Value(call.shape, {theory.name: _matrix_product(call, theory, first, second)})
    return [theory.add(call.node, [product] + ([call["self"]] if call["beta"] != 0 else []), call.shape, LINEAR)]


def outer(call: Call, theory: Theory) -> Result:
    return [theory.product(call.node, call["self"], [0], call["vec2"], [1], [0, 1])]


def einsum(call: Call, theory: Theory) -> Result:
    equation = call["equation"].replace(" ", "")
    values = call["tensors"]
    inputs, arrow, out = equation.partition("->")
    letters = [list(part) for part in inputs.split(",")]
    if "." in equation or not arrow or any(len(set(own)) < len(own) for own in letters) or len(values) > 2:
        return opaque(call, theory)
    if len(values) == 1:
        axes = [axis for axis, letter in enumerate(letters[0]) if letter not in out]
        labels = theory.reduce(call.node, values[0], axes, LINEAR)
        return [tuple(_moved(one, [letters[0].index(letter) for letter in out], axes) for one in labels)]
    sizes = {letter: size for own, value in zip(letters, values) for letter, size in zip(own, value.shape) if size > 1}
    for own, value in zip(letters, values):
        for axis, letter in enumerate(own):
            if value.shape[axis] == 1 and sizes.get(letter, 1) > 1:
                return opaque(call, theory)
    return [theory.product(call.node, values[0], letters[0], values[1], letters[1], list(out))]


def _moved(labels: Labels, order: list[int], dropped: list[int]) -> Labels:
    return labels.map(lambda array: array.transpose([*order, *dropped]).reshape([array.shape[axis] for axis in order]))


def attention(call: Call, theory: Theory) -> Result:
    query, key, value, mask = (call[name] for name in ("query", "key", "value", "attn_mask"))
    batch = list(range(len(query.shape) - 2))
    if call["enable_gqa"] or any(
        len(one.shape) != len(query.shape) or one.shape[:-2] != query.shape[:-2] for one in (key, value)
    ):
        return opaque(call, theory)
    scores = theory.product(call.node, query, [*batch, "q", "d"], key, [*batch, "k", "d"], [*batch, "q", "k"])
    shape = (*query.shape[:-1], key.shape[-2])
    if call["is_causal"]:  # who looks at whom depends on the position of both
        theory.fix(one for one in scores if set(one.axes) & {len(batch), len(batch) + 1})
    if mask is not None:
        labels = Value(shape, {theory.name: scores})
        scores = theory.add(call.node, [labels, mask], shape, LINEAR if theory.known(labels) else NOTHING)
    weights = relabelled(
        query, theory, _softmax_labels(call, theory, Value(shape, {theory.name: scores}), [len(batch) + 1]), shape
    )
    return [theory.product(call.node, weights, [*batch, "q", "k"], value, [*batch, "k", "v"], [*batch, "q", "v"])]


def _softmax_labels(call: Call, theory: Theory, value: Value, axes: Sequence[int]) -> tuple[Labels, ...]:
    if isinstance(theory, Exchange):
        return theory.normalise(call.node, value, axes, NOTHING)
    return theory.elementwise(call.node, value, NOTHING)


def softmax(call: Call, theory: Theory) -> Result:
    return [_softmax_labels(call, theory, call["self"], axes_of(call["dim"], len(call.shape)))]
