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

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from teleport_optim.controller.features import compute_features, log_ratio, site_log_norms
from teleport_optim.optim.controls import Controller, Controls
from teleport_optim.optim.parameters import Layout, in_full_precision
from teleport_optim.symmetry.action import SlotKind
from teleport_optim.symmetry.moves import move_scaling, unmoved
from teleport_optim.symmetry.spec import Symmetry

__all__ = [
    "TELEPORT_INTERVAL",
    "Factors",
    "Horizon",
    "Hyper",
    "Pace",
    "UpdateState",
    "active_rows",
    "average_offset",
    "averaging_weight",
    "balanced",
    "column_scales",
    "control",
    "descend",
    "ema",
    "is_due",
    "prior_rate",
    "rate_and_decay",
    "row_mixers",
    "slot_dtype",
    "step_factors",
    "teleport",
    "update",
]

TELEPORT_INTERVAL = 80
"""Steps before the meta-optimizer is asked, and the network teleports, for the second time; after twice as many, the third time."""
MAX_LOG_SCALE = 3.0
"""Largest |log s| by which one teleport moves a channel."""
_MAX_SWEEPS, _BALANCED = 30, 0.01
_FIRST_RATE, _FLAT_STEPS = 0.22, 20
"""The rate in networks of one layer, and for how many steps; it falls with the root of time after that."""
_DEPTH_POWER, _MOST_LAYERS = -0.7, 11
"""Of the number of layers, with which the rate goes, up to so many; deeper networks normalise their layers, and want no less."""
_ANNEALED = 0.3
"""Share of a run of known length in which the rate falls to zero."""
_POWER, _TAIL = 6, 3
"""An iterate after t steps has the weight t^6 in the average; in the end of a run, only the last three iterates count."""
_LINEAR_RATE = 3.0
"""Factor on the rate of a model of one matrix, such as logistic regression: nothing comes after it that a step could upset."""

_ITERATIONS = ((7.9424, -22.2873, 15.8239), (3.5875, -2.5845, 0.4893), (2.6604, -1.9134, 0.4194))
"""Coefficients of x, x^3 and x^5 in the polynomials that move singular values in (0, 1] towards 1.

Each is the odd quintic p with the least ``max |1 - p(x)|`` on an interval [l, u], found by a linear program on a fine
grid: first l = 0.01 and u = 1.02, then l and u are the least and the largest value of the polynomial before (u and 2 % more).
Together the three take [0.01, 1] to [0.71, 1.29] and multiply small singular values by 75. Rows are brought to one norm
afterwards, so that only the spread matters. Composing optimal polynomials is from Polar Express (Amsel et al., 2025).
"""
_COLUMN_POWER = 0.375
"""Of the norms of columns, by which they are divided before rows are made orthogonal and once more after."""
_TINY = 1e-18
"""A norm below which a direction counts as zero; its square is still a float32."""


class Horizon(NamedTuple):
    """Length of a run, which may be changed while it runs.

    Attributes:
        total_steps: Number of steps of the run; None for an open-ended one.
        changed_at: Step at which ``total_steps`` was changed last; 0 if it never was.
        level: Share of its usual size that the rate had then.

    Example:
        >>> run = Horizon(100)
        >>> [run.annealing(step) for step in (0, 70, 85, 99)]
        [1.0, 1.0, 0.5, 0.03333333333333333]
        >>> longer = run.changed(200, step=85)
        >>> [longer.annealing(step) for step in (85, 100, 115, 170)]
        [0.5, 0.75, 1.0, 0.5]
    """

    total_steps: int | None = None
    changed_at: int = 0
    level: float = 1.0

    def steps_left(self, step: float) -> float:
        """Steps from this one on, this one included: at least 1, and infinite in an open-ended run."""
        return math.inf if self.total_steps is None else max(self.total_steps - step, 1)

    def annealing(self, step: float) -> float:
        """Share of its usual size that the rate has at this step: 1, and falling to zero in the last 30 % of the run.

        After a change of ``total_steps`` it goes on from the level that it had, so that the rate makes no jump. It rises no
        faster than it would have fallen; it falls faster where fewer steps are left than 30 % of the run.
        """
        end = self.changed_at if self.total_steps is None else self.total_steps
        usual_fall = _ANNEALED * max(end, 1)
        fall = min(usual_fall, self.steps_left(self.changed_at) / self.level)
        rise = self.level + max(step - self.changed_at, 0) / usual_fall
        return min(1.0, rise, self.steps_left(step) / fall)

    def changed(self, total_steps: int | None, step: int) -> Horizon:
        """The horizon of a run whose length is changed before this step."""
        return Horizon(total_steps, step, self.annealing(step))


class Hyper(NamedTuple):
    """What the user may set; tensors hold one entry per tensor of the layout.

    Attributes:
        lr: Factor on the rate of every step.
        weight_decay: Decoupled decay per unit of rate; NaN stands for the learned decay.
        horizon: Length of the run, in the last 30 % of which the rate falls to zero.
    """

    lr: Tensor
    weight_decay: Tensor
    horizon: Horizon = Horizon()

    @classmethod
    def default(cls, num_tensors: int, total_steps: int | None = None) -> Hyper:
        """Nothing set: ``lr`` 1 and the learned decay."""
        ones = torch.ones(num_tensors, dtype=torch.float32)
        return cls(ones, math.nan * ones, Horizon(total_steps))


class UpdateState(NamedTuple):
    """What the rule remembers between steps."""

    momenta: Mapping[str, Tensor]
    """Average of the gradients, a covector, of the shape of each parameter."""
    average_offsets: Mapping[str, Tensor]
    """Average of the iterates minus the parameters, of the shape of each; transforms like a vector."""
    hidden: Tensor
    """Hidden state of the meta-optimizer, ``[*runs, num_tensors, 2 * hidden_size]``."""
    outputs: Tensor
    """The meta-optimizer's last raw outputs, ``[*runs, num_tensors, 5]``."""
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
            momenta={name: torch.zeros_like(param, dtype=slot_dtype(param)) for name, param in params.items()},
            average_offsets={name: torch.zeros_like(param, dtype=slot_dtype(param)) for name, param in params.items()},
            hidden=hidden,
            outputs=hidden.new_zeros(*runs, num_tensors, len(Controls._fields)),
            log_grad_rms=hidden.new_full((*runs, num_tensors, 2), math.nan),
        )


def slot_dtype(param: Tensor) -> torch.dtype:
    """Dtype of the momentum and of the average's offset of a parameter: bfloat16, but float64 for parameters of that."""
    return torch.float64 if param.dtype == torch.float64 else torch.bfloat16


def prior_rate(step: float, horizon: Horizon, num_layers: int) -> tuple[float, float]:
    """The unlearned rate ``a`` of a step, and the unlearned ``weight_decay`` that goes with it.

    Where the length of the run is known the rate falls to zero over the last part of it; past it, it stays at its last value.
    """
    step = min(step, (horizon.total_steps or math.inf) - 1)
    share = min(1.0, math.sqrt(_FLAT_STEPS / max(step, 1)))
    depth = min(num_layers, _MOST_LAYERS) ** _DEPTH_POWER
    return _FIRST_RATE * share * horizon.annealing(step) * depth, 0.5 / ((step + 50) * _FIRST_RATE * share)


def averaging_weight(age: int, steps_left: float = math.inf) -> float:
    """Weight of the newest iterate in the average of the iterates.

    Args:
        age: Iterates that are in the average already.
        steps_left: Steps until the end of the run, this one included. In the last ones the average goes to the parameters.
    """
    return max((_POWER + 1.0) / (age + _POWER + 1.0), min(1.0, _TAIL / steps_left))


def rate_and_decay(step: int, horizon: Horizon, layout: Layout) -> tuple[float, float]:
    """:func:`prior_rate` for the tensors of ``layout``."""
    rate, decay = prior_rate(step, horizon, layout.num_layers)
    return (_LINEAR_RATE * rate, decay / _LINEAR_RATE) if layout.is_linear else (rate, decay)


def column_scales(blocks: Tensor) -> Tensor:
    """What the columns of blocks of rows are multiplied by, before rows are made orthogonal and once more after.

    That is the -3/8th power of the norm that a column has among rows of norm 1; 0 for columns of zeros.

    Args:
        blocks: ``[*runs, blocks, k, columns]``, float32 or float64.

    Returns:
        ``[*runs, blocks, 1, columns]``.
    """
    rows = blocks / _threshold(torch.linalg.vector_norm(blocks, dim=-1, keepdim=True))
    return _threshold(torch.linalg.vector_norm(rows, dim=-2, keepdim=True)).pow(-_COLUMN_POWER)


def row_mixers(gram: Tensor) -> Tensor:
    """What to multiply the rows of blocks by from the left, so that they are nearly orthogonal, of any length.

    Rows are brought to one norm; then the singular values of the block, from 0.01 to 1 relative to the fourth root of the sum
    of the fourth powers of all, go to 0.71 to 1.29. Rows of zeros stay so, with zero derivatives.

    Args:
        gram: Inner products of the rows of every block, ``[*runs, blocks, k, k]``, float32 or float64.

    Returns:
        ``[*runs, blocks, k, k]``. However long rows are, it costs nine products of k x k.
    """
    inverse_norms = _threshold(gram.diagonal(dim1=-2, dim2=-1), _TINY**2).rsqrt()
    cosines = gram * (inverse_norms.unsqueeze(-1) * inverse_norms.unsqueeze(-2))
    cosines = cosines.reshape(-1, *gram.shape[-2:])
    norms = torch.linalg.vector_norm(cosines, dim=(-2, -1), keepdim=True)
    power = cosines / norms.clamp_min(0.5)  # norms are at least 1 but for zeros
    mixers = None
    for index, (a, b, c) in enumerate(_ITERATIONS):
        factor = torch.baddbmm(power, power, power, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        mixers = factor if mixers is None else torch.bmm(factor, mixers)
        if index + 1 < len(_ITERATIONS):
            power = torch.bmm(torch.bmm(factor, power), factor)
    assert mixers is not None
    return mixers.reshape(gram.shape) * inverse_norms.unsqueeze(-2)


def _threshold(norm: Tensor, least: float = _TINY) -> Tensor:
    """What to divide by to get zeros, with zero derivatives, where a norm vanishes."""
    return torch.threshold(norm, least, math.inf)


class Factors(NamedTuple):
    """What steers one momentum step."""

    beta: Tensor
    """Decay of the gradient average, ``[*runs]``."""
    shrinks: Tensor
    """What the parameters are multiplied by, ``[*runs, num_tensors]``."""
    lengths: Tensor
    """Length of the step of every row of a matrix, or of a vector, ``[*runs, num_tensors]``."""


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
    momenta: Mapping[str, Tensor] = state.momenta
    offsets: Mapping[str, Tensor] = state.average_offsets
    if step == 0:
        params, grads, momenta, offsets, _ = balanced(params, grads, momenta, offsets, layout)
    if is_due(step):
        state = control(
            controller, params, grads, state, step=step, total_steps=hyper.horizon.total_steps, layout=layout
        )
    controls = Controls.from_outputs(state.outputs)
    if is_due(step) and len(layout.spec):
        params, grads, momenta, offsets, _ = teleport(params, grads, momenta, offsets, controls, layout)
    params, grads, momenta, offsets = map(dict, (params, grads, momenta, offsets))
    factors = step_factors(controls, step=step, hyper=hyper, layout=layout)
    averages = {name: ema(momenta[name], grads[name], factors.beta) for name in params}
    active = {name: active_rows(name, grad, layout) for name, grad in grads.items()}
    steps = descend({name: average * active[name] for name, average in averages.items()}, factors, layout)
    weight = averaging_weight(step, hyper.horizon.steps_left(step))
    new_params, new_offsets = {}, {}
    for (name, param), shrink in zip(params.items(), factors.shrinks.unbind(-1)):
        shrink = shrink.reshape([*shrink.shape, *[1] * len(layout.shapes[name])])
        stepped = steps[name].taken_from(in_full_precision(param) * shrink).to(param)
        new_params[name] = torch.where(active[name], stepped, param)
        new_offsets[name] = average_offset(offsets[name], param, new_params[name], weight)
    momenta = {name: value.to(momenta[name]) for name, value in averages.items()}
    return new_params, state._replace(momenta=momenta, average_offsets=new_offsets)


def active_rows(name: str, grad: Tensor, layout: Layout) -> Tensor:
    """Which rows of a tensor have a gradient; the others stay where they are, whatever their momentum.

    Returns:
        Booleans ``[*runs, *row_shape]`` for a gradient ``[*runs, *shape]``, which go with it.
    """
    kept = layout.row_shape(name)
    run_axes = grad.dim() - len(kept)
    axes = tuple(run_axes + axis for axis, size in enumerate(layout.shapes[name]) if size != kept[axis])
    return (grad != 0).any(dim=axes, keepdim=True) if axes else grad != 0


def is_due(step: int) -> bool:
    """Whether the step of this number begins with asking the meta-optimizer, and with a teleport: 0, 80, 160, 320 and so on.

    What changes with the root of time changes ever slower.
    """
    count, rest = divmod(step, TELEPORT_INTERVAL)
    return rest == 0 and count & (count - 1) == 0


def control(
    controller: Controller,
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: UpdateState,
    *,
    step: int,
    total_steps: int | None,
    layout: Layout,
) -> UpdateState:
    """The state after the meta-optimizer has been asked."""
    features, log_grad_rms = compute_features(
        params, grads, state.momenta, state.log_grad_rms, layout=layout, step=step, total_steps=total_steps
    )
    outputs, hidden = controller(features, state.hidden)
    return state._replace(outputs=outputs, hidden=hidden, log_grad_rms=log_grad_rms)


def teleport(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    momenta: Mapping[str, Tensor],
    offsets: Mapping[str, Tensor],
    controls: Controls,
    layout: Layout,
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor], Tensor]:
    """Move along the positive-scaling orbits towards balance, one site after the other.

    At strength 1 the weights (or the averaged gradients) that write into a channel and those that read from it get equal
    norms; the two strengths of a site are the means of those of the matrices on its legs. ``|log s|`` is at most
    ``MAX_LOG_SCALE``, since along a scaling orbit the gradient norm has no maximum. Channels whose weights could leave the
    range of their dtype stay where they are. Next to weights of 16 bits the scales are powers of two, so that nothing is
    rounded.

    Returns:
        Parameters, gradients, momenta and offsets of the average, all at the same new point of the orbit, each computed when it
        is asked for, and for every site the RMS of ``log s``.
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
        # Gradients whose squares are no floats say nothing about balance.
        log_scale = _in_range(torch.nan_to_num(log_scale), norms, symmetry, params)
        sizes.append(log_scale.square().mean(dim=-1).sqrt())
        scales = symmetry.group.exp(log_scale.double())
        params = move_scaling(symmetry, scales, params, SlotKind.VECTOR)
        if offsets:  # an optimizer need not keep an average
            offsets = move_scaling(symmetry, scales, offsets, SlotKind.VECTOR)
        grads, momenta = (move_scaling(symmetry, scales, slot, SlotKind.COVECTOR) for slot in (grads, momenta))
    return params, grads, momenta, offsets, torch.stack(sizes, dim=-1)


def balanced(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    momenta: Mapping[str, Tensor],
    offsets: Mapping[str, Tensor],
    layout: Layout,
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor], Tensor]:
    """The point of the positive-scaling orbit where every run begins, what goes with it there, and the way to it.

    It is where the norms of what writes into a channel and of what reads from it are equal, for all channels at once: the
    least sum of squared weights on the orbit, so that where on the orbit a network was initialised makes no difference. Found
    by balancing one site after the other until none moves by more than 1 %, at most 30 times. In 16 bits nothing moves by less
    than a power of two.

    Returns:
        Parameters, gradients, momenta and offsets of the average (if there are any), each computed when it is asked for, and for
        every site the RMS of ``log s`` in all, ``[*runs, num_sites]``.
    """
    name = layout.names[0]
    shape = unmoved(params)[name].shape
    run_axes = len(shape) - len(layout.shapes[name])
    runs = shape[:run_axes]
    ways: dict[str, Tensor] = {}
    is_moving = torch.ones(runs, dtype=torch.bool)
    for _ in range(_MAX_SWEEPS if len(layout.spec) else 0):
        largest = torch.zeros(runs)
        for symmetry in layout.spec:
            norms = site_log_norms(symmetry, params, run_axes)
            log_scale = _in_range(0.25 * log_ratio(norms), norms, symmetry, params)
            log_scale = torch.where(is_moving.to(log_scale.device).unsqueeze(-1), log_scale, 0.0)
            largest = torch.maximum(largest, log_scale.detach().abs().amax(dim=-1).cpu())
            log_scale = log_scale.double()
            ways[symmetry.id] = ways.get(symmetry.id, 0.0) + log_scale
            scales = symmetry.group.exp(log_scale)
            params = move_scaling(symmetry, scales, params, SlotKind.VECTOR)
        is_moving = is_moving & (largest >= _BALANCED)
        if not bool(is_moving.any()):
            break
    for symmetry in layout.spec:
        scales = symmetry.group.exp(ways[symmetry.id])
        grads, momenta = (move_scaling(symmetry, scales, slot, SlotKind.COVECTOR) for slot in (grads, momenta))
        if offsets:
            offsets = move_scaling(symmetry, scales, offsets, SlotKind.VECTOR)
    sizes = [way.square().mean(dim=-1).sqrt().float() for way in ways.values()]
    return params, grads, momenta, offsets, torch.stack(sizes, dim=-1) if sizes else torch.zeros(*runs, 0)


def _in_range(log_scale: Tensor, log_norms: Tensor, symmetry: Symmetry, params: Mapping[str, Tensor]) -> Tensor:
    """``log_scale``, but 0 for channels whose norms could leave the range of the dtypes of their weights."""
    dtypes = {unmoved(params)[leg.name].dtype for leg in symmetry.legs}
    if not dtypes <= {torch.float32, torch.float64}:
        log_scale = math.log(2.0) * torch.round(log_scale / math.log(2.0))
    reach = max(abs(leg.degree) for leg in symmetry.legs) * log_scale.abs()
    highest = min(math.log(torch.finfo(dtype).max) for dtype in dtypes)
    lowest = max(math.log(torch.finfo(dtype).tiny) for dtype in dtypes)
    norms = 0.5 * log_norms
    is_inside = (norms.amax(dim=-2) + reach < highest) & (norms.amin(dim=-2) - reach > lowest)
    return torch.where(is_inside, log_scale, 0.0)


class Pace(NamedTuple):
    """What the factors of a step have per unit of the prior rate; it changes only with the controls and with what the user sets."""

    beta: Tensor
    """Decay of the gradient average, ``[*runs]``."""
    lengths: Tensor
    """Length of the step of every row of a matrix, or of a vector, ``[*runs, num_tensors]``."""
    learned_decays: Tensor
    """Decay per unit of the prior decay, where it is learned."""
    user_decays: Tensor
    """Decay where the user has set it."""

    @classmethod
    def of(cls, controls: Controls, hyper: Hyper, layout: Layout) -> Pace:
        """The pace under these controls."""
        table = layout.table(controls.rate)
        rates = controls.rate * hyper.lr.to(controls.rate)
        user_decay = hyper.weight_decay.to(controls.rate)
        is_learned = torch.isnan(user_decay)
        return cls(
            controls.momentum,
            rates * table.step_length,
            rates * torch.where(is_learned, controls.decay * table.is_matrix, 0.0),
            rates * torch.where(is_learned, 0.0, user_decay),
        )

    def factors(self, rate: float, decay: float) -> Factors:
        """What steers a momentum step at this prior rate and decay."""
        shrinks = (1.0 - rate * self.user_decays).sub_(self.learned_decays, alpha=rate * decay)
        return Factors(self.beta, shrinks, rate * self.lengths)


def step_factors(controls: Controls, *, step: int, hyper: Hyper, layout: Layout) -> Factors:
    """What steers the momentum step of this number."""
    return Pace.of(controls, hyper, layout).factors(*rate_and_decay(step, hyper.horizon, layout))


def ema(momentum: Tensor, grad: Tensor, beta: Tensor) -> Tensor:
    """The gradient average of a tensor after a step, ``[*runs, *shape]``, in float32 at least; ``beta`` is ``[*runs]``."""
    momentum = in_full_precision(momentum)
    rest = (1.0 - beta).to(momentum.dtype)
    return torch.lerp(
        momentum, grad.to(momentum.dtype), rest.reshape([*rest.shape, *[1] * (momentum.dim() - rest.dim())])
    )


def average_offset(offset: Tensor, old: Tensor, new: Tensor, weight: float) -> Tensor:
    """Average of the iterates minus the parameter, after the parameter has moved from ``old`` to ``new``.

    Args:
        offset: The same before the step, of any dtype, which is kept.
        old, new: The parameter.
        weight: :func:`averaging_weight` of the new value.
    """
    return ((1.0 - weight) * (in_full_precision(offset) + (in_full_precision(old) - in_full_precision(new)))).to(offset)


class Mixing(NamedTuple):
    """How the rows of blocks ``[*runs, blocks, k, columns]`` are made orthogonal."""

    scales: Tensor
    """``[*runs, blocks, 1, columns]``: what columns are multiplied by before and after."""
    mixers: Tensor
    """``[*runs, blocks, k, k]``: what they are multiplied by from the left."""


class Step(NamedTuple):
    """What one tensor moves by. That of a large one is computed only when it is applied."""

    move: Tensor
    """``[*runs, *shape]``, or blocks of rows ``[*runs, blocks, k, columns]``."""
    lengths: Tensor | None = None
    """``[*runs, blocks]``: what rows are brought to in the end; None where ``move`` is the step."""
    mixing: Mixing | None = None
    """How rows are mixed before; None where every one is for itself."""

    def product(self) -> Tensor:
        """The step, of the shape of ``move``."""
        rows = self._rows()
        return rows if self.lengths is None else self._factors(rows, self.lengths) * rows

    def taken_from(self, params: Tensor) -> Tensor:
        """``params``, ``[*runs, *shape]``, less the step."""
        return params - self.product().reshape(params.shape)

    def take_from_(self, params: Tensor) -> None:
        """:meth:`taken_from` in place, without axes of runs."""
        if self.lengths is None or not params.is_contiguous():
            params.sub_(self.product().view(params.shape))
        else:
            rows = self._rows()
            params.view(rows.shape).addcmul_(self._factors(rows, self.lengths), rows, value=-1.0)

    def _rows(self) -> Tensor:
        if self.mixing is None:
            return self.move
        scales, mixers = self.mixing
        return torch.matmul(mixers, self.move * scales) * scales

    @staticmethod
    def _factors(rows: Tensor, lengths: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return lengths[..., None, None].to(norms.dtype) / _threshold(norms)


def descend(momenta: Mapping[str, Tensor], factors: Factors, layout: Layout) -> dict[str, Step]:
    """What to take from the parameters, once they are multiplied by ``factors.shrinks``, under given gradient averages.

    Args:
        momenta: Gradient averages, this step's gradients included.
        factors, layout: As for :func:`update`.

    Returns:
        Steps in float32, or in float64 where momenta are.
    """
    run_axes, table = factors.beta.dim(), layout.table(factors.lengths)
    groups = [
        (group, group.blocks_of(view))
        for bucket in layout.buckets
        for group, view in zip(bucket.groups, bucket.views(bucket.gather(momenta, run_axes)))
    ]
    lengths = factors.lengths.index_select(-1, table.block_tensors)
    all_lengths = torch.split(lengths, [blocks.shape[-3] for _, blocks in groups], dim=-1)
    mixings = _mixings([blocks for group, blocks in groups if group.is_mixed])
    steps: dict[str, Step] = {}
    for (group, blocks), own_lengths in zip(groups, all_lengths):
        step = Step(blocks, own_lengths, next(mixings) if group.is_mixed else None)
        if group.is_large:
            steps[layout.names[group.rows[0]]] = step
            continue
        for row, move in zip(group.rows, group.tensors_of(step.product())):
            name = layout.names[row]
            shape = layout.shapes[name]
            fits = len(shape) == len(group.entries)
            steps[name] = Step(move if fits else move.reshape([*move.shape[:run_axes], *shape]))
    return steps


def _mixings(all_blocks: list[Tensor]) -> Iterator[Mixing]:
    """How the rows of blocks are mixed; the mixers are made together, padded with zeros to the size of the largest."""
    if not all_blocks:
        return
    most = max(blocks.shape[-2] for blocks in all_blocks)
    all_scales = [column_scales(blocks) for blocks in all_blocks]
    mixers = row_mixers(torch.cat([_gram(b * scales, most) for b, scales in zip(all_blocks, all_scales)], dim=-3))
    parts = torch.split(mixers, [blocks.shape[-3] for blocks in all_blocks], dim=-3)
    for blocks, scales, part in zip(all_blocks, all_scales, parts):
        size = blocks.shape[-2]
        yield Mixing(scales, part[..., :size, :size].to(blocks.dtype))


def _gram(blocks: Tensor, size: int) -> Tensor:
    """Inner products of the rows of every block, with zeros around them."""
    missing = size - blocks.shape[-2]
    gram = torch.matmul(blocks, blocks.mT)
    return F.pad(gram, [0, missing, 0, missing]) if missing else gram
