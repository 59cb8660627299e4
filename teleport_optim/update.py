"""The update rule, written once: control, teleport, momentum step.

The optimizer class and the meta-training unroll both run :func:`update`. It is pure and differentiable, and its tensors
may have leading axes of runs, ``[*runs, ...]``: none in the optimizer, one in the unroll. With the controls at their
prior it is a rule without anything learned in it ("rule H"):

    m <- beta m + (1 - beta) g          u = beta m + (1 - beta) g          beta = 0.8
    matrices:   O = orthogonalise(u), every row to unit RMS;   p <- (1 - a w) p - a O / sqrt(columns)
    vectors:    p <- p - a u / (4 RMS(u))
    a = 0.15 sqrt(300 / T) / sqrt(layers) (1 - t / T)          w so that the decay of a whole run is about 1 / sqrt(layers)

Orthogonalised momentum is from Muon (Jordan et al., 2024).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from teleport_optim.action import SlotKind
from teleport_optim.features import compute_features, in_full_precision, log_ratio, site_log_norms
from teleport_optim.layout import Layout
from teleport_optim.meta_optimizer import Controller, Controls
from teleport_optim.symmetry.moves import move_scaling
from teleport_optim.symmetry.spec import Symmetry

__all__ = [
    "CONTROL_INTERVAL",
    "TELEPORT_INTERVAL",
    "Hyper",
    "Prepared",
    "UpdateState",
    "descend",
    "orthogonalise",
    "prepare",
    "prior_rate",
    "step_controls",
    "step_factors",
    "update",
]

CONTROL_INTERVAL = 5
"""Steps between two runs of the meta-optimizer; its controls are held in between."""
TELEPORT_INTERVAL = 10
"""Steps between two teleports."""
MAX_LOG_SCALE = 3.0
"""Largest |log s| by which one teleport moves a channel."""
SAFE_RATE = 0.1
"""Factor on the rate of a safe step."""

_ITERATIONS = ((7.9424, -22.2873, 15.8239), (3.5875, -2.5845, 0.4893), (2.6604, -1.9134, 0.4194))
"""Coefficients of x, x^3 and x^5 in the polynomials that move singular values in (0, 1] towards 1.

Each is the odd quintic p with the least ``max |1 - p(x)|`` on an interval [l, 1.02 u], found by a linear program on a fine
grid: first l = 0.01 and u = 1, then l and u are the least and the largest value of the polynomial before. The 2 % are
room for rounding to bfloat16: beyond its interval the first polynomial rises steeply. Together the three take [0.01, 1]
to [0.71, 1.29] and multiply small singular values by 75. Rows are brought to one norm afterwards, so that only the spread
matters. Composing optimal polynomials is from Polar Express (Amsel et al., 2025).
"""
_LARGE = 2**15
"""Number of entries from which on bfloat16 is faster than float32, on a CPU that has instructions for it."""
_TINY = 1e-18
"""A norm below which a direction counts as zero; its square is still a float32."""


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
        ones = torch.ones(num_tensors, dtype=torch.float32)
        return cls(ones, math.nan * ones, total_steps)


class UpdateState(NamedTuple):
    """What the rule remembers between steps."""

    momenta: dict[str, Tensor]
    """Average of the gradients, a covector, of the shape of each parameter."""
    hidden: Tensor
    """Hidden state of the meta-optimizer, ``[*runs, num_tensors, 2 * hidden_size]``."""
    outputs: Tensor
    """The meta-optimizer's last raw outputs, ``[*runs, num_tensors, 6]``."""
    log_grad_rms: Tensor
    """Running and first log-RMS of each gradient, ``[*runs, num_tensors, 2]``; NaN before the first gradient."""

    @classmethod
    def initial(cls, params: Mapping[str, Tensor], hidden: Tensor) -> UpdateState:
        """The state before the first step.

        Args:
            params: Parameters by name, each ``[*runs, *shape]``.
            hidden: The meta-optimizer's initial hidden state, ``[*runs, num_tensors, 2 * hidden_size]``.
        """
        *runs, num_tensors, _ = hidden.shape
        return cls(
            momenta={name: torch.zeros_like(param) for name, param in params.items()},
            hidden=hidden,
            outputs=hidden.new_zeros(*runs, num_tensors, len(Controls._fields)),
            log_grad_rms=hidden.new_full((*runs, num_tensors, 2), math.nan),
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
    """The nearest (semi-)orthogonal matrices to ``x``, approximately.

    Singular values from 0.01 to 1, relative to the fourth root of the sum of the fourth powers of all, go to 0.71 to 1.29.
    Zero matrices give zeros, with zero derivatives. Where the CPU multiplies in bfloat16 natively, large matrices are
    multiplied so.

    Args:
        x: ``[..., rows, columns]``, float32 or float64.

    Cost, in products of n x n with n x m, n the shorter and m the longer side: 6 and 3 of n x n; where m is more than twice
    n, 2 and 9 of n x n, or in bfloat16 4 and 6.
    """
    shape, dtype = x.shape, _product_dtype(x)
    is_tall = shape[-2] > shape[-1]
    y = x.reshape(math.prod(shape[:-2]), *shape[-2:]).to(dtype)
    is_long = max(shape[-2:]) > 2 * min(shape[-2:])
    # Rounded to bfloat16, small eigenvalues of a Gram matrix can become negative; a second iteration bears that, a third
    # does not.
    start = 0
    for length in ((2, 1) if dtype == torch.bfloat16 else (3,)) if is_long else (1, 1, 1):
        iterations = _ITERATIONS[start : start + length]
        gram = torch.bmm(y.mT, y) if is_tall else torch.bmm(y, y.mT)
        if start == 0:
            # First by the trace, so that squares of small entries do not vanish, then by the norm of the Gram matrix, whose
            # root is at least the largest singular value and less than the norm of x.
            trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1, keepdim=True).unsqueeze(-1)
            trace = F.threshold(trace, _TINY**2, math.inf)
            gram = gram / trace
            norm = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True).clamp_min(_TINY)
            factor = _composed(iterations, gram / norm) * (trace.rsqrt() * norm.rsqrt())
        else:
            factor = _composed(iterations, gram)
        y = torch.bmm(y, factor) if is_tall else torch.bmm(factor, y)
        start += length
    return y.to(x.dtype).reshape(shape)


def _composed(iterations: Sequence[tuple[float, float, float]], gram: Tensor) -> Tensor:
    """What the iterations together multiply x by: each iterate is a polynomial of the Gram matrix times x."""
    factor = product = _factor(iterations[0], gram)
    for coefficients in iterations[1:]:
        gram = torch.bmm(torch.bmm(factor, gram), factor)
        factor = _factor(coefficients, gram)
        product = torch.bmm(factor, product)
    return product


def _factor(coefficients: tuple[float, float, float], gram: Tensor) -> Tensor:
    a, b, c = coefficients
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=-2, dim2=-1).add_(a)
    return factor


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which to multiply matrices ``x``."""
    is_large = math.prod(x.shape[-2:]) >= _LARGE
    if x.dtype == torch.float32 and x.device.type == "cpu" and is_large and _has_bfloat16():
        return torch.bfloat16
    return x.dtype


@functools.cache
def _has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 natively, as far as torch can tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


class Prepared(NamedTuple):
    """Everything that the momentum step needs, all of it at the point of the orbit where the step is taken."""

    params: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]
    momenta: Mapping[str, Tensor]
    factors: Tensor
    """What steers the step: see :func:`step_factors`."""
    state: UpdateState
    """The state after the step, but for its momenta."""
    teleport_sizes: Tensor | None
    """RMS over channels of the log-scale by which every site was teleported, ``[*runs, num_sites]``; None if none was."""


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
        params: Parameters, with exactly the names of ``layout``, each ``[*runs, *shape]``.
        grads: Gradients at ``params``, one for each.
        state: State after the last step.
        step: Steps taken so far.
        hyper: What the user set.
        layout: Shapes, roles and symmetries of the parameters.

    Returns:
        New parameters and state; the arguments are unchanged.
    """
    ready = prepare(controller, params, grads, state, step=step, hyper=hyper, layout=layout)
    new_params, new_momenta = descend(ready.params, ready.grads, ready.momenta, ready.factors, layout)
    return new_params, ready.state._replace(momenta=new_momenta)


def prepare(
    controller: Controller,
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: UpdateState,
    *,
    step: int,
    hyper: Hyper,
    layout: Layout,
    may_teleport: bool = True,
    is_safe: bool = False,
) -> Prepared:
    """The part of :func:`update` before the momentum step.

    Args:
        controller, params, grads, state, step, hyper, layout: As for :func:`update`.
        may_teleport: Whether to teleport if it is time to.
        is_safe: Prepare a plain step instead: nothing learned, no teleport, a tenth of the rate.
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
    controls, hyper = step_controls(state.outputs, hyper, is_safe=is_safe)
    momenta: Mapping[str, Tensor] = state.momenta
    teleport_sizes = None
    if may_teleport and not is_safe and step % TELEPORT_INTERVAL == 0 and len(layout.spec):
        params, grads, momenta, teleport_sizes = teleport(params, grads, momenta, controls, layout)
    factors = step_factors(controls, step=step, hyper=hyper, layout=layout)
    return Prepared(params, grads, momenta, factors, state, teleport_sizes)


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
    ``MAX_LOG_SCALE``, since along a scaling orbit the gradient norm has no maximum. Channels whose weights could leave the
    range of their dtype stay where they are. Next to weights of 16 bits the scales are powers of two, so that nothing is
    rounded.

    Returns:
        Parameters, gradients and momenta, all at the same new point of the orbit, and for every site the RMS of ``log s``.
    """
    weights = layout.table(controls.balance).site_weights
    strengths = weights @ torch.stack([controls.balance, controls.gradient_balance], dim=-1)
    run_axes = controls.balance.dim() - 1
    sizes = []
    for symmetry, strength in zip(layout.spec, strengths.unbind(-2)):
        balance, gradient_balance = strength.unsqueeze(-2).unbind(-1)
        norms = site_log_norms(symmetry, params, run_axes)
        # A channel's log-scale that equalises squared norms is a quarter of their log-ratio: s^2 w^2 = r^2 / s^2.
        log_scale = 0.25 * (
            balance * log_ratio(norms) - gradient_balance * log_ratio(site_log_norms(symmetry, momenta, run_axes))
        ).clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE)
        log_scale = _in_range(log_scale, norms, symmetry, params)
        sizes.append(log_scale.square().mean(dim=-1).sqrt())
        scales = symmetry.group.exp(log_scale.double())
        params = move_scaling(symmetry, scales, params, SlotKind.VECTOR)
        grads, momenta = (move_scaling(symmetry, scales, slot, SlotKind.COVECTOR) for slot in (grads, momenta))
    return params, grads, momenta, torch.stack(sizes, dim=-1)


def _in_range(log_scale: Tensor, log_norms: Tensor, symmetry: Symmetry, params: Mapping[str, Tensor]) -> Tensor:
    """``log_scale``, but 0 for channels whose norms could leave the range of the dtypes of their weights."""
    dtypes = {params[leg.name].dtype for leg in symmetry.legs}
    if not dtypes <= {torch.float32, torch.float64}:
        log_scale = math.log(2.0) * torch.round(log_scale / math.log(2.0))
    reach = max(abs(leg.degree) for leg in symmetry.legs) * log_scale.abs()
    highest = min(math.log(torch.finfo(dtype).max) for dtype in dtypes)
    lowest = max(math.log(torch.finfo(dtype).tiny) for dtype in dtypes)
    norms = 0.5 * log_norms
    is_inside = (norms.amax(dim=-2) + reach < highest) & (norms.amin(dim=-2) - reach > lowest)
    return torch.where(is_inside, log_scale, 0.0)


def step_controls(outputs: Tensor, hyper: Hyper, *, is_safe: bool) -> tuple[Controls, Hyper]:
    """The controls of a step and what the user set; of a safe step, the prior and a tenth of the rate."""
    if is_safe:
        return Controls.from_outputs(torch.zeros_like(outputs)), hyper._replace(lr=SAFE_RATE * hyper.lr)
    return Controls.from_outputs(outputs), hyper


def step_factors(controls: Controls, *, step: int, hyper: Hyper, layout: Layout) -> Tensor:
    """What steers one momentum step, ``[4, *runs, num_tensors]``.

    In this order: the decay beta of the gradient average, what the weights are multiplied by, the Euclidean length of the
    step, and the weight of the row-normalised direction.
    """
    rate, decay = prior_rate(step, hyper.total_steps, layout.num_layers)
    table = layout.table(controls.rate)
    rates = controls.rate * (rate * hyper.lr.to(controls.rate))
    user_decay = hyper.weight_decay.to(controls.rate)
    learned_decay = controls.decay * (decay * table.is_matrix)
    shrinks = 1.0 - rates * torch.where(torch.isnan(user_decay), learned_decay, user_decay)
    lengths = rates * (table.step_scale * table.size.sqrt())
    return torch.stack([controls.momentum, shrinks, lengths, controls.row_weight])


def descend(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    momenta: Mapping[str, Tensor],
    factors: Tensor,
    layout: Layout,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The momentum step under given factors: new parameters and momenta. Tensors of one shape go as one batch."""
    runs = factors.shape[1:-1]
    factors = factors.index_select(-1, layout.table(factors).group_order)
    new_params, new_momenta = {}, {}
    start = 0
    for matrix, rows in layout.groups:
        names = [layout.names[row] for row in rows]
        entries = matrix or (layout.shapes[names[0]].numel(),)
        p, g, m = (_gather(tensors, names, runs, entries) for tensors in (params, grads, momenta))
        group_factors = factors.narrow(-1, start, len(rows)).to(p.dtype)
        start += len(rows)
        beta, shrink, length, row_weight = group_factors.reshape(*group_factors.shape, *[1] * len(entries)).unbind(0)
        m = torch.lerp(g, m, beta)
        u = torch.lerp(g, m, beta)
        if matrix is not None:
            o = orthogonalise(u)
            u = (o * _inverse_norm(o, -1)).addcmul_(u, row_weight * _inverse_norm(u, -1))
        p = (p * shrink).addcmul_(u, length * _inverse_norm(u, tuple(range(-len(entries), 0))), value=-1.0)
        for name, new_param, new_momentum in zip(names, p.unbind(len(runs)), m.unbind(len(runs))):
            new_params[name] = new_param.reshape(params[name].shape).to(params[name].dtype)
            new_momenta[name] = new_momentum.reshape(params[name].shape).to(momenta[name].dtype)
    return {name: new_params[name] for name in layout.names}, {name: new_momenta[name] for name in layout.names}


def _gather(tensors: Mapping[str, Tensor], names: Sequence[str], runs: torch.Size, entries: tuple[int, ...]) -> Tensor:
    """The tensors of one group as one, ``[*runs, len(names), *entries]``; 16-bit ones are reckoned with in 32 bits."""
    if len(names) == 1:
        group = tensors[names[0]].reshape(*runs, 1, *entries)
    else:
        group = torch.stack([tensors[name].reshape(*runs, *entries) for name in names], dim=len(runs))
    return in_full_precision(group)


def _inverse_norm(x: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    """One over the norm along ``axes``, which are kept; 0, with zero derivative, where ``x`` vanishes."""
    return F.threshold(torch.linalg.vector_norm(x, dim=axes, keepdim=True), _TINY, math.inf).reciprocal()
