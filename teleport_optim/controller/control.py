"""A control step: the network reads the features and sets the controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from teleport_optim.controller.features import compute_features
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.records import UpdateState

__all__ = ["control"]


def control(
    network: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: UpdateState,
    *,
    step: int,
    total_steps: int | None,
    table: ParameterTable,
) -> UpdateState:
    """The state after a control step; :class:`~teleport_optim.optim.rule.Control` with a network in front.

    Args:
        network: Features ``[*runs, num_tensors, NUM_FEATURES]`` and hidden state to raw outputs ``[*runs, num_tensors, 5]`` and the
            new hidden state.
        params, grads: As for :func:`~teleport_optim.optim.rule.update`.
        state: The state before.
        step: Steps taken so far.
        total_steps: Length of the run, or None.
        table: Shapes, roles and symmetries.
    """
    features, log_grad_rms = compute_features(
        params, grads, state.momenta, state.log_grad_rms, table=table, step=step, total_steps=total_steps
    )
    outputs, hidden = network(features, state.hidden)
    return state._replace(outputs=outputs, hidden=hidden, log_grad_rms=log_grad_rms)
