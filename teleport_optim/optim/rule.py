"""The update rule, written once: control, teleport, momentum step, average of the iterates.

The optimizer class and the meta-training unroll both run :func:`update`. It is pure and differentiable, and its tensors
may have leading axes of runs, ``[*runs, ...]``: none in the optimizer, one in the unroll. With the controls at their
prior it is a rule without anything learned in it:

    m <- beta m + (1 - beta) g          beta = 0.65
    matrices:   R = rows of m, 64 at a time, of unit norm;   c = 1 / (norms of the columns of R)^(3/8)
                O = rows of orthogonalised(R c) c, of norm min(1, sqrt(128 / columns)), embeddings 1;   p <- (1 - a w) p - a O
    vectors:    p <- p - a m / (6 RMS(m))
    a = 0.22 layers^-0.7 min(1, sqrt(20 / t)), and 3 times that for a model of one matrix; more than 11 layers count as 11
    a w = layers^-0.7 / (2 (t + 50))
    x <- x + 7 / (t + 7) (p - x)

Gradients are taken at ``p``, the parameters. ``x`` is an average of the iterates, in which that after t steps has a weight
like t^6. Where the number of steps is known, ``a`` falls to zero in the end, and the two meet.

Orthogonalised momentum is from Muon (Jordan et al., 2024), to orthogonalise in blocks from MuonBP (Khaled et al., 2025); to scale
columns down where gradients are large is what a diagonal Shampoo (Gupta et al., 2018) does on one side. To
average instead of annealing is from Polyak (1990) and Ruppert (1988), with polynomial weights from Shamir and Zhang (2013).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from teleport_optim.optim.controls import Controls
from teleport_optim.optim.orthogonalise import compute_steps
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.records import HyperParameters, UpdateState, step_coefficients
from teleport_optim.optim.schedule import averaging_weight, is_control_step
from teleport_optim.optim.shapes import in_full_precision
from teleport_optim.optim.teleport import Point, balance, teleport

__all__ = ["Control", "active_rows", "average_offset", "ema", "update"]


class Control(Protocol):
    """Sets the controls at a control step."""

    def __call__(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        state: UpdateState,
        *,
        step: int,
        total_steps: int | None,
        table: ParameterTable,
    ) -> UpdateState:
        """The state with new ``outputs``, and with what the controller remembers in ``hidden`` and ``log_grad_rms``."""
        ...


def update(
    control: Control | None,
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: UpdateState,
    *,
    step: int,
    hyper: HyperParameters,
    table: ParameterTable,
) -> tuple[dict[str, Tensor], UpdateState]:
    """One step: at control steps new controls and a teleport; then momentum, step and average.

    Args:
        control: Sets the controls at control steps; without it they stay at their prior, or as the state has them.
        params: Parameters, with exactly the names of ``table``, each ``[*runs, *shape]``.
        grads: Gradients at ``params``, one for each.
        state: State after the last step.
        step: Steps taken so far.
        hyper: What the user set.
        table: Shapes, roles and symmetries of the parameters.

    Returns:
        New parameters and state; the arguments are unchanged.
    """
    point = Point(params, grads, state.momenta, state.average_offsets)
    if step == 0:
        point, _ = balance(point, table)
    if is_control_step(step) and control is not None:
        total_steps = hyper.horizon.total_steps
        state = control(point.params, point.grads, state, step=step, total_steps=total_steps, table=table)
    controls = Controls.from_outputs(state.outputs)
    if is_control_step(step) and len(table.spec):
        point, _ = teleport(point, controls, table)
    params, grads, momenta, offsets = map(dict, point)
    coefficients = step_coefficients(controls, step=step, hyper=hyper, table=table)
    averages = {name: ema(momenta[name], grads[name], coefficients.beta) for name in params}
    active = {name: active_rows(name, grad, table) for name, grad in grads.items()}
    steps = compute_steps({name: average * active[name] for name, average in averages.items()}, coefficients, table)
    weight = averaging_weight(step, hyper.horizon.steps_left(step))
    new_params, new_offsets = {}, {}
    for (name, param), shrink in zip(params.items(), coefficients.decay_factors.unbind(-1)):
        shrink = shrink.reshape([*shrink.shape, *[1] * len(table.shapes[name])])
        stepped = steps[name].taken_from(in_full_precision(param) * shrink).to(param)
        new_params[name] = torch.where(active[name], stepped, param)
        new_offsets[name] = average_offset(offsets[name], param, new_params[name], weight)
    momenta = {name: value.to(momenta[name]) for name, value in averages.items()}
    return new_params, state._replace(momenta=momenta, average_offsets=new_offsets)


def active_rows(name: str, grad: Tensor, table: ParameterTable) -> Tensor:
    """Which rows of a tensor have a gradient; the others stay where they are, whatever their momentum.

    Returns:
        Booleans ``[*runs, *row_shape]`` for a gradient ``[*runs, *shape]``, which go with it.
    """
    kept = table.row_shape(name)
    run_axes = grad.dim() - len(kept)
    axes = tuple(run_axes + axis for axis, size in enumerate(table.shapes[name]) if size != kept[axis])
    return (grad != 0).any(dim=axes, keepdim=True) if axes else grad != 0


def ema(momentum: Tensor, grad: Tensor, beta: Tensor) -> Tensor:
    """The gradient average of a tensor after a step, ``[*runs, *shape]``, in float32 at least; ``beta`` is ``[*runs]``."""
    momentum = in_full_precision(momentum)
    gradient_weight = (1.0 - beta).to(momentum.dtype)
    per_run = [*beta.shape, *[1] * (momentum.dim() - beta.dim())]
    return torch.lerp(momentum, grad.to(momentum.dtype), gradient_weight.reshape(per_run))


def average_offset(offset: Tensor, old: Tensor, new: Tensor, weight: float) -> Tensor:
    """Average of the iterates minus the parameter, after the parameter has moved from ``old`` to ``new``.

    Args:
        offset: The same before the step, of any dtype, which is kept.
        old, new: The parameter.
        weight: :func:`averaging_weight` of the new value.
    """
    return ((1.0 - weight) * (in_full_precision(offset) + (in_full_precision(old) - in_full_precision(new)))).to(offset)
