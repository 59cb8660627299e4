"""Recurrent layers, whose hidden units are rows of every gate and columns of the recurrent matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teleport_optim.symmetry.search.analysis import HOMOGENEOUS, ODD, ChannelAnalysis
from teleport_optim.symmetry.search.channels import PINNED, Channels, mix
from teleport_optim.symmetry.search.graph import Call, Value
from teleport_optim.symmetry.search.operations.call import Result, bind_axis, opaque, with_channels

__all__ = ["recurrent"]


_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


_MOVED_GATE = {"lstm": 2, "gru": 2}
"""Number of the gate from which a hidden unit gets its sign or size; the others only multiply it."""


_TAGS = {"rnn_relu": HOMOGENEOUS, "rnn_tanh": ODD, "lstm": ODD, "gru": ODD}
"""Tags of the functions through which hidden units pass."""


def recurrent(call: Call, analysis: ChannelAnalysis) -> Result:
    """Follow a recurrent layer: a hidden unit is a row of every gate and a column of the recurrent matrix."""
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
        return opaque(call, analysis)
    for state in states:
        if state.fill != 0.0:
            analysis.freeze(state)
    num_gates = _GATES[call.name]
    batch_axes = ["a", "b"][: len(value.shape) - 1]
    layers: list[list[Channels | None]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            start = (layer * directions + direction) * per_layer
            weight, recurrent, *biases = params[start : start + per_layer]
            size = recurrent.shape[1]
            hidden = _hidden_channels(analysis, recurrent) if analysis.lets_through(_TAGS[call.name]) else None
            _bind_gates(analysis, [weight, recurrent, *biases], hidden, num_gates, size, call.name)
            if hidden is not None and analysis.is_free(recurrent, 1):
                analysis.bind(recurrent, 1, [hidden.dual()])
            read = analysis.product(value, [*batch_axes, "in"], weight, ["gate", "in"], [*batch_axes, "gate"])
            # the order of the steps counts, and a factor of the whole tensor does not pass the gates
            analysis.pin(one for one in read if one.axes != (len(batch_axes),))
            for parameter in (weight, recurrent, *biases):
                analysis.close(parameter)
            if any(state.fill != 0.0 for state in states) and hidden is not None:
                analysis.classes.pin(hidden.ids)
            outputs.append(hidden)
        layers.append(outputs)
        value = with_channels(
            value,
            _sequence_channels(outputs, len(value.shape)),
            (*value.shape[:-1], size * directions),
        )
    result: Result = [analysis.known(value)]
    return result + _final_states(call, analysis, layers, len(call.shapes) - 1)


def _hidden_channels(analysis: ChannelAnalysis, recurrent: Value) -> Channels | None:
    """Hidden units of a recurrent layer, which its recurrent matrix reads; None if they cannot move."""
    if analysis.is_free(recurrent, 1):
        ids = analysis.classes.new(recurrent.shape[1])
        return Channels(ids, np.zeros_like(ids, dtype=np.uint64))
    known = analysis.write(recurrent, 1)
    return known[0].dual() if len(known) == 1 else None


def _bind_gates(
    analysis: ChannelAnalysis,
    parameters: Sequence[Value],
    hidden: Channels | None,
    num_gates: int,
    size: int,
    name: str,
) -> None:
    """Let the rows of every gate move with the hidden units."""
    for parameter in parameters:
        if hidden is None:
            if analysis.is_free(parameter, 0):
                analysis.bind(parameter, 0, [])
            continue
        ids = hidden.ids.ravel()
        if analysis.moves_entries:
            rows, positions = np.tile(ids, num_gates), mix(9, np.repeat(np.arange(num_gates), size))
        else:
            rows, positions = np.full((num_gates, size), PINNED), np.zeros(num_gates * size, np.uint64)
            rows[_MOVED_GATE.get(name, 0)] = ids
            rows = rows.ravel()
        bind_axis(analysis, parameter, 0, [Channels(rows, positions, hidden.sign)])


def _sequence_channels(outputs: list[Channels | None], rank: int) -> list[Channels]:
    """Channels of the outputs of a layer, both directions side by side."""
    if any(one is None for one in outputs):
        return []
    ids, positions = (np.concatenate([getattr(one, key).ravel() for one in outputs]) for key in ("ids", "positions"))
    return [Channels.along(ids, rank - 1, rank, positions, outputs[0].sign)]  # type: ignore[union-attr]


def _final_states(call: Call, analysis: ChannelAnalysis, layers: list[list[Channels | None]], count: int) -> Result:
    flat = [one for outputs in layers for one in outputs]
    if any(one is None for one in flat):
        return [()] * count
    shape = call.shapes[1]
    ids = np.stack([one.ids.ravel() for one in flat])  # type: ignore[union-attr]
    target = [len(flat)] + [1] * (len(shape) - 2) + [ids.shape[1]]
    channels = Channels(ids.reshape(target), np.zeros(target, np.uint64), flat[0].sign)  # type: ignore[union-attr]
    return [(channels,)] * count
