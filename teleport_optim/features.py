"""What the meta-optimizer sees of a network in training: a few numbers per tensor.

All features are unchanged when hidden units are permuted and when the loss is multiplied by a constant, are of order
one, and are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from teleport_optim.layout import NUM_STATIC_FEATURES, Layout
from teleport_optim.symmetry.moves import view_channels
from teleport_optim.symmetry.spec import Leg, Symmetry

__all__ = ["NUM_FEATURES", "compute_features", "site_log_ratios"]

NUM_TIME_FEATURES = 6
NUM_TENSOR_FEATURES = 6
NUM_SITE_FEATURES = 4
NUM_FEATURES = NUM_STATIC_FEATURES + NUM_TIME_FEATURES + 2 * NUM_TENSOR_FEATURES + NUM_SITE_FEATURES

_BOUND = 4.0


def site_log_ratios(symmetry: Symmetry, tensors: Mapping[str, Tensor]) -> Tensor:
    """Per channel, log of the squared norm of what reads it over that of what writes it, shape ``[size]``.

    A channel with nothing (or nothing finite) on one side gives 0: there is nothing to balance.
    """

    def total(legs: tuple[Leg, ...]) -> Tensor:
        norms = [view_channels(symmetry, leg, tensors[leg.name]).square().flatten(1).sum(dim=1) for leg in legs]
        return torch.stack(norms).sum(dim=0)

    read, written = total(symmetry.readers), total(symmetry.writers)
    is_usable = (read > 0) & (written > 0) & torch.isfinite(read) & torch.isfinite(written)
    log_read, log_written = (
        torch.log(torch.where(is_usable, norms, torch.ones_like(norms))) for norms in (read, written)
    )
    return (log_read - log_written).float()


def time_features(step: int, total_steps: int | None) -> list[float]:
    """Where in the run a step lies: progress and length (zeros where there is no horizon), and age on several scales."""
    known = total_steps is not None
    horizon = total_steps or 1
    return [
        float(known),
        2.0 * min(step / horizon, 1.0) - 1.0 if known else 0.0,
        (math.log(horizon) - 6.0) / 2.0 if known else 0.0,
        math.exp(-step / 10.0),
        math.exp(-step / 100.0),
        (math.log1p(step) - 4.0) / 3.0,
    ]


def compute_features(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    momenta: Mapping[str, Tensor],
    log_grad_rms: Tensor,
    *,
    layout: Layout,
    step: int,
    total_steps: int | None,
) -> tuple[Tensor, Tensor]:
    """The features of every tensor at one control step.

    Args:
        params, grads, momenta: Tensors by name, all with the names of ``layout``.
        log_grad_rms: ``[num_tensors, 2]``: the log of the gradient's RMS as a running mean, and at its first value; NaN
            for a tensor that has not been seen before.
        layout: Shapes, roles and symmetries.
        step: Steps taken so far.
        total_steps: Length of the run, or None.

    Returns:
        Features ``[num_tensors, NUM_FEATURES]`` and the new ``log_grad_rms``.

    Cost: one pass over parameters, gradients and momenta.
    """
    names = layout.names
    dots = torch.stack([_inner_products(params[name], grads[name], momenta[name]) for name in names])
    gg, mm, pp, gm, gp = dots.unbind(-1)
    device = dots.device
    sizes = torch.tensor([layout.shapes[name].numel() for name in names], device=device).clamp_min(1)
    norm_g, norm_m, norm_p = (square.clamp_min(1e-36).sqrt() for square in (gg, mm, pp))
    log_g, log_m, log_p = (0.5 * _safe_log(square / sizes) for square in (gg, mm, pp))
    running, first = torch.where(log_grad_rms.isnan(), log_g[:, None], log_grad_rms).unbind(-1)
    tensor_features = torch.stack(
        [
            log_g - running,
            (log_g - first) / 2.0,
            torch.where(mm > 0, log_m - log_g, torch.zeros_like(log_g)),
            2.0 * gm / (norm_g * norm_m),
            2.0 * gp / (norm_g * norm_p),
            (log_p - torch.log(layout.step_scale).to(log_p)).clamp(-_BOUND, _BOUND) / 2.0,
        ],
        dim=-1,
    )
    shared = tensor_features.mean(dim=0, keepdim=True).expand_as(tensor_features)
    time = torch.tensor(time_features(step, total_steps), device=device).expand(len(names), -1)
    features = torch.cat(
        [layout.static_features.to(device), time, tensor_features, shared, _site_features(params, momenta, layout)], -1
    )
    running = torch.lerp(running, log_g, 0.2)
    return _BOUND * torch.tanh(features / _BOUND), torch.stack([running, first], dim=-1)


def _inner_products(param: Tensor, grad: Tensor, momentum: Tensor) -> Tensor:
    p, g, m = param.reshape(-1).float(), grad.reshape(-1).float(), momentum.reshape(-1).float()
    return torch.stack([g @ g, m @ m, p @ p, g @ m, g @ p])


def _safe_log(x: Tensor) -> Tensor:
    return torch.log(x.clamp_min(1e-36))


def _site_features(params: Mapping[str, Tensor], momenta: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """Per tensor, how far the channels that it writes or reads are out of balance, shape ``[num_tensors, 4]``."""
    device = params[layout.names[0]].device
    if not len(layout.spec):
        return torch.zeros(len(layout.names), NUM_SITE_FEATURES, device=device)
    rows = []
    for symmetry in layout.spec:
        weight, gradient = site_log_ratios(symmetry, params), -site_log_ratios(symmetry, momenta)
        rows.append(torch.stack([weight.mean(), weight.std(correction=0), gradient.mean(), gradient.std(correction=0)]))
    spread = layout.site_weights.to(device).mT
    return spread @ torch.stack(rows) / spread.sum(dim=1, keepdim=True).clamp_min(1e-6)
