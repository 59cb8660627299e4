"""Training runs of many networks at once, each under its own meta-optimizer weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from teleport_optim.meta_optimizer import MetaOptimizer
from teleport_optim.tasks.problem import InnerProblem
from teleport_optim.update import Hyper, UpdateState, update

__all__ = ["Trajectory", "unroll"]


class Trajectory(NamedTuple):
    """Loss curves and final parameters of a batch of training runs."""

    losses: Tensor
    """Minibatch loss before every step, ``[num_candidates, num_problems, horizon]``."""
    params: dict[str, Tensor]
    """Final parameters, each ``[num_candidates, num_problems, ...]``."""


def unroll(
    meta_optimizer: MetaOptimizer,
    candidates: Mapping[str, Tensor],
    problem: InnerProblem,
    generator: torch.Generator,
) -> Trajectory:
    """Train every problem of ``problem`` with every candidate set of meta-optimizer weights, over the full horizon.

    All runs advance together in one batched computation; all candidates see the same initial values and minibatches.
    Differentiable in ``candidates`` where gradients are enabled.

    Args:
        meta_optimizer: The architecture of the meta-optimizer; its own weights are not used.
        candidates: Its weights by name, each ``[num_candidates, ...]``.
        problem: The networks to train.
        generator: Draws the minibatches.

    Memory: parameters and one momentum per run; it does not grow with the horizon unless gradients are recorded.
    """
    num_candidates = next(iter(candidates.values())).shape[0]
    num_runs = num_candidates * problem.num_problems
    weights = {name: value.repeat_interleave(problem.num_problems, dim=0) for name, value in candidates.items()}
    params = {name: _repeat(value, num_candidates) for name, value in problem.params.items()}
    layout = problem.layout
    num_tensors = len(layout.names)
    hidden = meta_optimizer.initial_hidden(num_tensors).detach()
    state = UpdateState.initial({name: param[0] for name, param in params.items()}, hidden)
    state = _map_state(state, num_runs)
    hyper = Hyper.default(num_tensors, problem.horizon)

    def loss_of(run_params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return problem.loss(functional_call(problem.model, run_params, (inputs,)), targets)

    gradient = vmap(grad_and_value(loss_of))
    losses = []
    for step in range(problem.horizon):
        inputs, targets = (_repeat(x, num_candidates) for x in problem.sample_batch(generator))
        grads, loss = gradient(params, inputs, targets)
        losses.append(loss)

        def step_run(
            run_weights: dict[str, Tensor],
            run_params: dict[str, Tensor],
            run_grads: dict[str, Tensor],
            run_state: UpdateState,
            step: int = step,
        ) -> tuple[dict[str, Tensor], UpdateState]:
            def controller(features: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
                return functional_call(meta_optimizer, run_weights, (features, hidden))  # type: ignore[no-any-return]

            return update(controller, run_params, run_grads, run_state, step=step, hyper=hyper, layout=layout)

        params, state = vmap(step_run)(weights, params, grads, state)
    shape = (num_candidates, problem.num_problems)
    final = {name: param.reshape(*shape, *param.shape[1:]) for name, param in params.items()}
    return Trajectory(torch.stack(losses, dim=-1).reshape(*shape, -1), final)


def _repeat(x: Tensor, times: int) -> Tensor:
    return x.repeat(times, *[1] * (x.dim() - 1))


def _map_state(state: UpdateState, num_runs: int) -> UpdateState:
    """``state`` of one run, copied ``num_runs`` times along a new first axis."""

    def copy(x: Tensor) -> Tensor:
        return x.expand(num_runs, *x.shape).clone()

    momenta = {name: copy(momentum) for name, momentum in state.momenta.items()}
    return UpdateState(
        momenta, copy(state.hidden), copy(state.outputs), copy(state.log_grad_rms), copy(state.teleport_size)
    )
