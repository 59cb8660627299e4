"""Features of a network in training, which the controller reads: a few numbers per tensor.

All features are unchanged when hidden units are permuted and when the loss is multiplied by a constant, are of order
one, and are bounded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from teleport_optim.optim.parameters import NUM_STATIC_FEATURES, ParameterTable, ParameterTensors
from teleport_optim.optim.site_norms import log_ratio, site_log_norms
from teleport_optim.symmetry.moves import PART_SIZE, pick, unmoved

__all__ = ["NUM_FEATURES", "compute_features"]

NUM_TIME_FEATURES = 6
NUM_TENSOR_FEATURES = 6
NUM_SITE_FEATURES = 4
NUM_FEATURES = NUM_STATIC_FEATURES + NUM_TIME_FEATURES + 2 * NUM_TENSOR_FEATURES + NUM_SITE_FEATURES

_BOUND = 4.0
_TINY = 1e-36
"""Where squares are cut off, so that zeros have finite roots, logs and derivatives."""


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
    table: ParameterTable,
    step: int,
    total_steps: int | None,
) -> tuple[Tensor, Tensor]:
    """The features of every tensor at one control step.

    Args:
        params, grads, momenta: Tensors by name, all with the names of ``table``, each ``[*runs, *shape]``.
        log_grad_rms: ``[*runs, num_tensors, 2]``: the log of the gradient's RMS as a running mean, and at its first value; NaN
            for a tensor that has had no gradient but zeros.
        table: Shapes, roles and symmetries.
        step: Steps taken so far.
        total_steps: Length of the run, or None.

    Returns:
        Features ``[*runs, num_tensors, NUM_FEATURES]`` and the new ``log_grad_rms``.

    Cost: one pass over parameters, gradients and momenta.
    """
    runs = log_grad_rms.shape[:-2]
    # Squares of very large gradients are no floats: the largest one takes their place.
    gg, mm, pp, gm, gp = map(torch.nan_to_num, _inner_products(params, grads, momenta, table, len(runs)))
    known = table.tensors(gg)
    norm_g, norm_m, norm_p = (square.clamp_min(_TINY).sqrt() for square in (gg, mm, pp))
    log_g, log_m, log_p = (0.5 * torch.log((square / known.size).clamp_min(_TINY)) for square in (gg, mm, pp))
    running, first = torch.where(log_grad_rms.isnan(), log_g.unsqueeze(-1), log_grad_rms).unbind(-1)
    tensor_features = torch.stack(
        [
            log_g - running,
            (log_g - first) / 2.0,
            torch.where(mm > 0, log_m - log_g, 0.0),
            2.0 * gm / norm_g / norm_m,
            2.0 * gp / norm_g / norm_p,
            (log_p - torch.log(known.step_scale)).clamp(-_BOUND, _BOUND) / 2.0,
        ],
        dim=-1,
    )
    shared = tensor_features.mean(dim=-2, keepdim=True).expand_as(tensor_features)
    time = torch.tensor(time_features(step, total_steps), dtype=torch.float32, device=gg.device)
    constant = torch.cat([known.static_features, time.expand(len(table.names), -1)], dim=-1)
    features = torch.cat(
        [constant.expand(*runs, -1, -1), tensor_features, shared, _site_features(params, momenta, table, runs, known)],
        dim=-1,
    )
    seen = torch.stack([torch.lerp(running, log_g, 0.2), first], dim=-1)
    return _BOUND * torch.tanh(features / _BOUND), torch.where(gg.unsqueeze(-1) > 0, seen, log_grad_rms)


def _inner_products(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    momenta: Mapping[str, Tensor],
    table: ParameterTable,
    run_axes: int,
) -> tuple[Tensor, ...]:
    """``<g, g>, <m, m>, <p, p>, <g, m>, <g, p>`` of every tensor, ``[*runs, num_tensors]`` each."""
    products = []
    for group in (group for bucket in table.buckets for group in bucket.groups):
        names = [table.names[row] for row in group.rows]
        size = math.prod(group.entries)
        if size > PART_SIZE:
            products += [_products_in_parts((params, grads, momenta), name, run_axes) for name in names]
        else:
            count = PART_SIZE // max(size, 1)
            groups = [names[first : first + count] for first in range(0, len(names), count)]
            products += [_products((params, grads, momenta), some, run_axes) for some in groups]
    inner = torch.cat(products, dim=-1)
    return inner.index_select(-1, table.tensors(inner).inverse_order).unbind(-2)


def _products(
    kinds: Iterable[Mapping[str, Tensor]],
    names: Iterable[str],
    run_axes: int,
    select: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    """The five inner products of what ``select`` takes of tensors of one size, ``[*runs, 5, len(names)]``."""
    vectors = []
    for tensors in kinds:
        picked = [pick(tensors, name, select) for name in names]
        vectors.append(torch.stack([x.reshape(*x.shape[:run_axes], -1) for x in picked], dim=-2).float())
    x, y, z = vectors
    pairs = ((y, y), (z, z), (x, x), (y, z), (y, x))
    return torch.stack([torch.linalg.vecdot(left, right) for left, right in pairs], dim=-2)


def _products_in_parts(kinds: Iterable[Mapping[str, Tensor]], name: str, run_axes: int) -> Tensor:
    """The same of one large tensor, part by part of its longest axis."""
    params, *_ = kinds
    shape = unmoved(params)[name].shape[run_axes:]
    extent = max(shape)
    axis, length = run_axes + shape.index(extent), max(1, PART_SIZE * extent // shape.numel())
    parts = []
    for start in range(0, extent, length):
        select = functools.partial(torch.narrow, dim=axis, start=start, length=min(length, extent - start))
        parts.append(_products(kinds, [name], run_axes, select))
    return functools.reduce(torch.add, parts)


def _site_features(
    params: Mapping[str, Tensor],
    momenta: Mapping[str, Tensor],
    table: ParameterTable,
    runs: torch.Size,
    known: ParameterTensors,
) -> Tensor:
    """Per tensor, how far the channels that it writes or reads are out of balance, shape ``[*runs, num_tensors, 4]``."""
    if not len(table.spec):
        return known.size.new_zeros(*runs, len(table.names), NUM_SITE_FEATURES)
    rows = []
    for symmetry in table.spec:
        weight, momentum = (log_ratio(site_log_norms(symmetry, tensors, len(runs))) for tensors in (params, momenta))
        std, mean = torch.std_mean(torch.stack([weight, -momentum], dim=-2), dim=-1, correction=0)
        rows.append(torch.stack([mean, std], dim=-1).flatten(-2))
    spread = known.site_weights.mT
    return spread @ torch.stack(rows, dim=-2) / spread.sum(dim=1, keepdim=True).clamp_min(1e-6)
