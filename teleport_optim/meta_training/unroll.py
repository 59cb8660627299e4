"""Training runs of many networks at once, each under its own meta-optimizer weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from teleport_optim.meta_training.rules import Rule, Tensors
from teleport_optim.meta_training.tasks.problem import InnerProblem

__all__ = ["EXPLOSION", "Batches", "Runs", "UnrollResult", "init_unroll", "unroll"]

Batches = Callable[[int], torch.Generator]
"""The generator that draws the minibatch of a step."""

EXPLOSION = 1e6
"""A run whose loss exceeds this many times its first one has exploded, as has one whose loss is not finite."""
_CHECK_INTERVAL = 10


class Runs(NamedTuple):
    """Training runs in progress: every candidate set of weights on every problem, candidates outermost."""

    params: Tensors
    """Parameters by name, each ``[num_runs, ...]``."""
    state: Any
    """State of the rule."""
    initial: Tensor
    """Loss before the first step, ``[num_runs]``; NaN where no step has been taken."""
    is_exploded: Tensor
    """True for runs that are lost, ``[num_runs]``."""
    step: int
    """Steps taken."""

    def detach(self) -> Runs:
        """The same runs, cut off from how they came about."""
        detached: Runs = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, self)
        return detached


class UnrollResult(NamedTuple):
    """Losses of a number of consecutive steps, and the runs after them."""

    losses: Tensor
    """Minibatch loss after every step, at ``Rule.eval_params``: ``[num_runs, steps]``; infinite from where a run explodes."""
    runs: Runs
    """The runs after the last of the steps."""


def init_unroll(rule: Rule, problem: InnerProblem, num_candidates: int) -> Runs:
    """The runs of all candidates before their first step."""
    params = {name: _repeat(value, num_candidates) for name, value in problem.params.items()}
    num_runs = num_candidates * problem.num_problems
    device = next(iter(params.values())).device
    return Runs(
        params,
        rule.initial(params),
        torch.full((num_runs,), torch.nan, device=device),
        torch.zeros(num_runs, dtype=torch.bool, device=device),
        0,
    )


def unroll(
    rule: Rule,
    weights: Tensors,
    problem: InnerProblem,
    runs: Runs,
    num_steps: int,
    batches: Batches,
    *,
    second_order: bool = False,
) -> UnrollResult:
    """Take ``num_steps`` steps of all runs, in one batched computation.

    All candidates see the same minibatches. The loss after a step is that of the next step's minibatch, which is evaluated
    once more at the end. Differentiable in ``weights`` where gradients are enabled.

    Args:
        rule: The update rule.
        weights: The weights of its network, ``[num_runs, ...]`` each.
        problem: What is trained.
        runs: Where to go on from.
        num_steps: How many steps.
        batches: Generators of the minibatches.
        second_order: Differentiate the gradients that the rule sees too, where gradients are enabled.

    Memory: parameters and state of every run; it does not grow with the number of steps unless gradients are recorded.
    """
    num_candidates = len(runs.is_exploded) // problem.num_problems
    params, state, initial, is_exploded = runs.params, runs.state, runs.initial, runs.is_exploded
    losses = []

    def batch(step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = problem.sample_batch(batches(step))
        return _repeat(inputs, num_candidates), _repeat(targets, num_candidates)

    def record(loss: Tensor) -> None:
        nonlocal is_exploded
        is_exploded = is_exploded | ~(loss.detach() <= EXPLOSION * initial.abs())
        losses.append(torch.where(is_exploded, torch.inf, loss))

    end = runs.step + num_steps
    for step in range(runs.step, end):
        inputs, targets = batch(step)
        grads, loss = problem.gradients(params, inputs, targets, create_graph=second_order)
        if step == 0:
            initial = loss.detach()
        if step > runs.step:
            judged = rule.eval_params(params, state)
            # The loss at the parameters comes with their gradient; elsewhere it has to be evaluated.
            is_known = judged is params
            record(_attached(loss, params, grads) if is_known else problem.losses(judged, inputs, targets))
            if step % _CHECK_INTERVAL == 0 and bool(is_exploded.all()):
                break
        params, state = rule.step(weights, params, grads, state, step=step, problem=problem, inputs=inputs)
    else:
        record(problem.losses(rule.eval_params(params, state), *batch(end)))
    losses += (num_steps - len(losses)) * losses[-1:]
    return UnrollResult(torch.stack(losses, dim=-1), Runs(params, state, initial, is_exploded, end))


def _attached(loss: Tensor, params: Tensors, grads: Tensors) -> Tensor:
    """``loss`` as a differentiable function of ``params``, to first order, where it is not one already."""
    if loss.requires_grad or not any(param.requires_grad for param in params.values()):
        return loss
    slopes = [((param - param.detach()) * grads[name]).flatten(1).sum(dim=1) for name, param in params.items()]
    return loss + torch.stack(slopes).sum(dim=0)


def _repeat(x: Tensor, times: int) -> Tensor:
    return x.repeat(times, *[1] * (x.dim() - 1))
