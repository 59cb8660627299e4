"""Operations that take entries from tensors or put tensors together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from teleport_optim.symmetry.search.analysis import LINEAR, Theory, Value
from teleport_optim.symmetry.search.channels import FIXED, Labels, mix
from teleport_optim.symmetry.search.operations.call import Call, Result, axes_of, opaque
from teleport_optim.symmetry.search.permutations import Exchange

__all__ = ["cat", "embedding", "index", "select", "split", "take_slice"]


def _take(labels: Labels, axis: int, index: Any) -> Labels:
    """The labels of the positions ``index`` of an axis."""
    return labels.map(lambda array: array if array.shape[axis] == 1 else np.take(array, index, axis)).settled()


def take_slice(call: Call, theory: Theory) -> Result:
    value, axis = call.first, (call["dim"] or 0) % len(call.first.shape)
    size = value.shape[axis]
    if call.name == "narrow":
        start, step, length = call["start"], 1, call["length"]
        index = np.arange(size)[start : start + length] if isinstance(start, int) else None
    else:
        start, step = call["start"], call["step"] or 1
        index = np.arange(size)[start : call["end"] : step]
    if index is None:
        return opaque(call, theory)
    return [tuple(_take(one, axis, index) for one in theory.settle(value))]


def select(call: Call, theory: Theory) -> Result:
    value, axis = call.first, (call["dim"] or 0) % len(call.first.shape)
    labels = [_take(one, axis, [call["index"]]) for one in theory.settle(value)]
    return [tuple(one.map(lambda array: array.squeeze(axis)) for one in labels)]


def split(call: Call, theory: Theory) -> Result:
    value = call.first
    axis = (call["dim"] or 0) % len(value.shape)
    labels = theory.settle(value)
    result, start = [], 0
    for shape in call.shapes:
        size = 1 if call.name == "unbind" else shape[axis]
        parts = [_take(one, axis, np.arange(start, start + size)) for one in labels]
        if call.name == "unbind":
            parts = [one.map(lambda array: array.squeeze(axis)) for one in parts]
        result.append(tuple(parts))
        start += size
    return result


def cat(call: Call, theory: Theory) -> Result:
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


def index(call: Call, theory: Theory) -> Result:
    value = call.first
    indices = [call["index"]] if call.name == "index_select" else list(call["indices"])
    axes = (
        [axes_of(call["dim"], len(value.shape))[0]]
        if call.name == "index_select"
        else [k for k, i in enumerate(indices) if i is not None]
    )
    rank = len(value.shape)
    if len(axes) != 1 and axes != list(range(axes[0], axes[0] + len(axes))):
        return opaque(call, theory)
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


def embedding(call: Call, theory: Theory) -> Result:
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
