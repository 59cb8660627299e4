"""The update rule, written once: control, teleport, momentum step.

The optimizer class and the meta-training unroll both run :func:`update`. It is pure, and it maps over batches with
``torch.func.vmap``. With the controls at their prior it is a rule without anything learned in it ("rule H"):

    m <- beta m + (1 - beta) g          u = beta m + (1 - beta) g          beta = 0.8
    matrices:   O = orthogonalise(u), every row to unit RMS;   p <- (1 - a w) p - a O / sqrt(columns)
    vectors:    p <- p - a u / (4 RMS(u))
    a = 0.15 sqrt(300 / T) / sqrt(layers) (1 - t / T)          w so that the decay of a whole run is about 1 / sqrt(layers)

Orthogonalised momentum is from Muon (Jordan et al., 2024), the quintic iteration's coefficients too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from teleport_optim.action import SlotKind
from teleport_optim.features import compute_features, site_log_ratios
from teleport_optim.layout import Layout
from teleport_optim.meta_optimizer import Controller, Controls
from teleport_optim.symmetry.moves import move
from teleport_optim.symmetry.spec import SymmetrySpec

__all__ = ["CONTROL_INTERVAL", "TELEPORT_INTERVAL", "Hyper", "UpdateState", "orthogonalise", "prior_rate", "update"]

CONTROL_INTERVAL = 5
"""Steps between two runs of the meta-optimizer; its controls are held in between."""
TELEPORT_INTERVAL = 10
"""Steps between two teleports."""
MAX_LOG_SCALE = 3.0
"""Largest |log s| by which one teleport moves a channel."""

_ITERATION = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
_TINY = 1e-36
"""Where squares are cut off before a root, so that zero gradients have finite derivatives too."""


class Hyper(NamedTuple):
    """What the user may set; tensors hold one entry per tensor of the layout.

    Attributes:
        lr: Factor on the rate of every step.
        weight_decay: Decoupled decay per unit of rate; NaN stands for the learned decay.
        total_steps: Length of the run, over which the rate falls to zero; None for an open-ended run.
    """

    lr: Tensor
    weight_decay: Tensor
    total_steps: int | None = None

    @classmethod
    def default(cls, num_tensors: int, total_steps: int | None = None) -> Hyper:
        """Nothing set: ``lr`` 1 and the learned decay."""
        return cls(torch.ones(num_tensors), torch.full((num_tensors,), math.nan), total_steps)


class UpdateState(NamedTuple):
    """What the rule remembers between steps."""

    momenta: dict[str, Tensor]
    """Average of the gradients, a covector, of the shape of each parameter."""
    hidden: Tensor
    """Hidden state of the meta-optimizer, ``[num_tensors, 2 * hidden_size]``."""
    outputs: Tensor
    """The meta-optimizer's last raw outputs, ``[num_tensors, 6]``."""
    log_grad_rms: Tensor
    """Running and first log-RMS of each gradient, ``[num_tensors, 2]``; NaN before the first gradient."""
    teleport_size: Tensor
    """RMS over channels of ``log s`` in the last step's teleport, a scalar; 0 if it took none."""

    @classmethod
    def initial(cls, params: Mapping[str, Tensor], hidden: Tensor) -> UpdateState:
        """The state before the first step; ``hidden`` is the meta-optimizer's initial one."""
        momenta = {name: torch.zeros_like(param) for name, param in params.items()}
        num_tensors = len(momenta)
        return cls(
            momenta,
            hidden,
            torch.zeros(num_tensors, len(Controls._fields), device=hidden.device),
            torch.full((num_tensors, 2), math.nan, device=hidden.device),
            torch.zeros((), device=hidden.device),
        )


def prior_rate(step: int, total_steps: int | None, num_layers: int) -> tuple[float, float]:
    """The unlearned rate ``a`` of a step, and the unlearned ``weight_decay`` that goes with it.

    With a horizon the rate falls linearly to zero; past the horizon it stays at its last value. Without one, the rate is
    at every step that of the middle of a run twice as long as the run so far.
    """
    if total_steps is None:
        horizon, progress = 2 * (step + 50), 0.5
    else:
        horizon, progress = total_steps, min(step, total_steps - 1) / total_steps
    alpha = 0.15 * math.sqrt(300.0 / max(horizon, 75))
    return alpha * num_layers**-0.5 * (1.0 - progress), 2.0 / (alpha * horizon)


def orthogonalise(x: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices to ``x``, approximately: singular values to about 0.7 to 1.2.

    Five Newton-Schulz iterations with Muon's quintic. Zero matrices give zeros.

    Args:
        x: ``[..., rows, columns]``.

    Cost, in products of n x n with n x m, n the shorter and m the longer side: 10 and 5 of n x n; 2 and 20 of n x n where m
    is more than twice n.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / x.square().sum(dim=(-2, -1), keepdim=True).clamp_min(_TINY).sqrt()
    a, b, c = _ITERATION
    if x.shape[-1] > 2 * x.shape[-2]:
        # Each iterate is a polynomial of x x^T times x, so that the long side need enter only twice.
        gram = x @ x.mT
        unit = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
        product = unit
        for _ in range(_NUM_ITERATIONS):
            factor = a * unit + b * gram + c * gram @ gram
            product = factor @ product
            gram = factor @ gram @ factor
        x = product @ x
    else:
        for _ in range(_NUM_ITERATIONS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def update(
    controller: Controller,
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: UpdateState,
    *,
    step: int,
    hyper: Hyper,
    layout: Layout,
) -> tuple[dict[str, Tensor], UpdateState]:
    """One step: maybe ask the meta-optimizer, maybe teleport, then the momentum step.

    Args:
        controller: Features and hidden state to raw outputs and hidden state.
        params: Parameters, with exactly the names of ``layout``.
        grads: Gradients at ``params``, one for each.
        state: State after the last step.
        step: Steps taken so far.
        hyper: What the user set.
        layout: Shapes, roles and symmetries of the parameters.

    Returns:
        New parameters and state; the arguments are unchanged.
    """
    if step % CONTROL_INTERVAL == 0:
        features, log_grad_rms = compute_features(
            params,
            grads,
            state.momenta,
            state.log_grad_rms,
            layout=layout,
            step=step,
            total_steps=hyper.total_steps,
        )
        outputs, hidden = controller(features, state.hidden)
        state = state._replace(outputs=outputs, hidden=hidden, log_grad_rms=log_grad_rms)
    controls = Controls.from_outputs(state.outputs)
    momenta: Mapping[str, Tensor] = state.momenta
    teleport_size = torch.zeros_like(state.teleport_size)
    if step % TELEPORT_INTERVAL == 0 and len(layout.spec):
        params, grads, momenta, teleport_size = teleport(params, grads, momenta, controls, layout)
    new_params, new_momenta = descend(params, grads, momenta, controls, step=step, hyper=hyper, layout=layout)
    return new_params, state._replace(momenta=new_momenta, teleport_size=teleport_size)


def teleport(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    momenta: Mapping[str, Tensor],
    controls: Controls,
    layout: Layout,
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor], Tensor]:
    """Move along the positive-scaling orbits towards balance, one site after the other.

    At strength 1 the weights (or the averaged gradients) that write into a channel and those that read from it get equal
    norms; the two strengths of a site are the means of those of the matrices on its legs. ``|log s|`` is at most
    ``MAX_LOG_SCALE``, since along a scaling orbit the gradient norm has no maximum.

    Returns:
        Parameters, gradients and momenta, all at the same new point of the orbit, and the RMS of ``log s``.
    """
    weights = layout.site_weights.to(controls.balance.device)
    strengths = weights @ torch.stack([controls.balance, controls.gradient_balance], dim=-1)
    log_scales = []
    for symmetry, (balance, gradient_balance) in zip(layout.spec, strengths.unbind(0)):
        # A channel's log-scale that equalises squared norms is a quarter of their log-ratio: s^2 w^2 = r^2 / s^2.
        log_scale = 0.25 * (
            balance * site_log_ratios(symmetry, params) - gradient_balance * site_log_ratios(symmetry, momenta)
        ).clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE)
        log_scales.append(log_scale)
        site = SymmetrySpec((symmetry,))
        element = {symmetry.id: symmetry.group.exp(log_scale.double())}
        params = move(site, element, params, SlotKind.VECTOR)
        grads, momenta = (move(site, element, slot, SlotKind.COVECTOR) for slot in (grads, momenta))
    return params, grads, momenta, torch.cat(log_scales).square().mean().sqrt()


def descend(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    momenta: Mapping[str, Tensor],
    controls: Controls,
    *,
    step: int,
    hyper: Hyper,
    layout: Layout,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The momentum step under given controls: new parameters and momenta. Tensors of one shape go as one batch."""
    rate, decay = prior_rate(step, hyper.total_steps, layout.num_layers)
    device = controls.rate.device
    rates = rate * controls.rate * hyper.lr.to(device)
    user_decay = hyper.weight_decay.to(device)
    learned_decay = decay * controls.decay * layout.is_matrix.to(device)
    shrinks = 1.0 - rates * torch.where(torch.isnan(user_decay), learned_decay, user_decay)
    steps = rates * layout.step_scale.to(rates)
    new_params, new_momenta = {}, {}
    for matrix, rows in layout.groups:
        names = [layout.names[row] for row in rows]
        shape = (len(rows), *(matrix or (layout.shapes[names[0]].numel(),)))
        p, g, m = (
            torch.stack([tensors[name] for name in names]).reshape(shape) for tensors in (params, grads, momenta)
        )
        per_tensor = [
            x[list(rows)].to(p.dtype).reshape(-1, *[1] * (p.dim() - 1)) for x in (controls.momentum, shrinks, steps)
        ]
        beta, shrink, size = per_tensor
        m = torch.lerp(g, m, beta)
        u = torch.lerp(g, m, beta)
        if matrix is None:
            direction = _unit_rms(u)
        else:
            row_weight = controls.row_weight[list(rows)].to(p.dtype)[:, None, None]
            direction = _unit_rms((_unit_rms(orthogonalise(u)) + row_weight * _unit_rms(u)).flatten(1)).reshape(shape)
        p = shrink * p - size * direction
        for name, new_param, new_momentum in zip(names, p.unbind(0), m.unbind(0)):
            new_params[name] = new_param.reshape(layout.shapes[name])
            new_momenta[name] = new_momentum.reshape(layout.shapes[name])
    return {name: new_params[name] for name in layout.names}, {name: new_momenta[name] for name in layout.names}


def _unit_rms(x: Tensor) -> Tensor:
    """``x`` with the RMS along its last axis set to 1; zeros stay zeros."""
    return x / x.square().mean(dim=-1, keepdim=True).clamp_min(_TINY).sqrt()
