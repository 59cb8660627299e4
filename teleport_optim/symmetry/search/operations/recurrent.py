"""Recurrent layers, whose hidden units are rows of every gate and columns of the recurrent matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teleport_optim.symmetry.search.analysis import Theory, Value
from teleport_optim.symmetry.search.channels import FIXED, Labels, mix
from teleport_optim.symmetry.search.operations.call import Call, Result, bind_axis, opaque, relabelled
from teleport_optim.symmetry.search.permutations import Exchange

__all__ = ["recurrent"]


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


def recurrent(call: Call, theory: Theory) -> Result:
    """Hidden units of a recurrent layer: rows of every gate, columns of the recurrent matrix."""
    value, params = call["input"], call["params"]
    states = [call["hx"]] if isinstance(call["hx"], Value) else list(call["hx"] or [])
    per_layer = 4 if call["has_biases"] else 2
    directions = 2 if call["bidirectional"] else 1
    num_layers = call["num_layers"]
    if (
        value is None
        or params is None
        or len(params) != per_layer * directions * num_layers
        or any(p.source is None for p in params)
    ):
        return opaque(call, theory)
    for state in states:
        if state.fill != 0.0:
            theory.freeze(state)
    num_gates = _GATES[call.name]
    batch_axes = ["a", "b"][: len(value.shape) - 1]
    layers: list[list[Labels | None]] = []
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
            read = theory.product(call.node, value, [*batch_axes, "in"], weight, ["gate", "in"], [*batch_axes, "gate"])
            # steps in time follow each other, and a factor of all entries does not pass the gates
            theory.fix(one for one in read if one.axes != (len(batch_axes),))
            for parameter in (weight, recurrent, *biases):
                theory.close(parameter)
            if any(state.fill != 0.0 for state in states) and hidden is not None:
                theory.units.fix(hidden.units)
            outputs.append(hidden)
        layers.append(outputs)
        value = relabelled(
            value,
            theory,
            _sequence_labels(outputs, len(value.shape)),
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
        bind_axis(theory, parameter, 0, [Labels(rows, roles, hidden.sign)])


def _sequence_labels(outputs: list[Labels | None], rank: int) -> list[Labels]:
    """The labels of the outputs of a layer, both directions side by side."""
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
