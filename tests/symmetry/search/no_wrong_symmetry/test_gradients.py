"""Gradients that a model changes on their way: what they belong to does not move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teleport_optim import LearnedTeleportOptimizer, act, act_dual
from teleport_optim.symmetry import find_symmetries
from tests.helpers.invariance import between
from tests.helpers.small_models import N, build, param

pytestmark = pytest.mark.private_torch


class Straight(torch.autograd.Function):
    """A step function whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.sign() * h.abs().amax(1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * torch.linspace(0.5, 1.5, gradient.shape[1], dtype=gradient.dtype)


class Weighted(torch.autograd.Function):
    """A product whose second factor gets no gradient beyond .01, with ``setup_context``."""

    @staticmethod
    def forward(h: Tensor, w: Tensor) -> Tensor:  # type: ignore[override]
        return h * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h, w = ctx.saved_tensors
        return gradient * w, (gradient * h).sum(0).clamp(-0.01, 0.01)


applied_elsewhere = Straight.apply


def clipped(gradient: Tensor) -> Tensor:
    return gradient.clamp(-0.01, 0.01)


def with_hook(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(clipped)
    return h


def first_rows(gradient: Tensor) -> Tensor:
    return gradient * (torch.arange(len(gradient)) < 2).to(gradient).view(-1, *[1] * (gradient.dim() - 1))


def zero_first(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad[:2] = 0


def hooked(attach: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, N), nn.ReLU(), nn.Linear(N, N), nn.ReLU(), nn.Linear(N, 2)).double()
        attach(model)
        return model

    return make


GRADIENTS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "function": (
        between(lambda m, x: m.b(m.c(Straight.apply(m.a(x))).relu()), c=lambda: nn.Linear(N, N)),
        "a.weight",
        "Straight has a backward pass of its own",
    ),
    "function under another name": (
        between(lambda m, x: m.b(m.c(applied_elsewhere(m.a(x))).relu()), c=lambda: nn.Linear(N, N)),
        "a.weight",
        "Straight has a backward pass of its own",
    ),
    "function of a parameter": (
        between(
            lambda m, x: m.b(m.c(Weighted.apply(m.a(x), m.w)).relu()), c=lambda: nn.Linear(N, N), w=lambda: param(N)
        ),
        "w",
        "Weighted has a backward pass of its own",
    ),
    "hook on hidden values": (
        between(lambda m, x: m.b(m.c(with_hook(m.a(x).relu())).relu()), c=lambda: nn.Linear(N, N)),
        "a.weight",
        "a hook in the forward pass",
    ),
    "hook on a parameter": (hooked(lambda m: m[0].weight.register_hook(first_rows)), "0.weight", "it has hooks"),
    "hook after accumulation": (
        hooked(lambda m: m[0].bias.register_post_accumulate_grad_hook(zero_first)),
        "0.bias",
        "it has hooks",
    ),
    "hook on a layer": (
        hooked(lambda m: m[1].register_full_backward_hook(lambda layer, inner, outer: (clipped(inner[0]),))),
        "0.weight",
        "it has backward hooks",
    ),
    "hook in front of a layer": (
        hooked(lambda m: m[1].register_full_backward_pre_hook(lambda layer, outer: (clipped(outer[0]),))),
        "0.weight",
        "it has backward hooks",
    ),
}


def gradients_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(x)
    (output * torch.linspace(1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_move_with_the_parameters_or_not_at_all(name: str) -> None:
    factory, pinned, reason = GRADIENTS[name]
    make = lambda: build(factory).double()  # noqa: E731
    model, x = make(), torch.randn(4, 3, dtype=torch.float64)
    spec = find_symmetries(model, x)
    assert any(reason in refusal.reason for refusal in spec.refusals)
    assert len(spec.of_group("scaling")) == 1, "what lies behind it moves on"
    assert not any(leg.name == pinned for symmetry in spec for leg in symmetry.legs)
    gradients = gradients_of(model, x)
    for seed in range(3):
        element = spec.random_element(torch.Generator().manual_seed(seed))
        other = make()
        other.load_state_dict(act(spec, element, model.state_dict()))
        expected = act_dual(spec, element, gradients)
        for key, gradient in gradients_of(other, x).items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-9)


def test_a_search_leaves_functions_and_torch_as_they_were() -> None:
    forward, asked, start = Straight.forward, torch.is_grad_enabled, torch.autograd.function.BackwardCFunction.__init__
    factory, _, _ = GRADIENTS["function"]
    find_symmetries(build(factory), torch.randn(4, 3))
    assert Straight.forward is forward
    assert torch.is_grad_enabled is asked
    assert torch.autograd.function.BackwardCFunction.__init__ is start


def test_rows_whose_gradient_a_hook_takes_away_stay_where_they_are() -> None:
    model = build(lambda: nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 2)))
    kept = model[0].weight[2:].detach().clone()
    model[0].weight.register_hook(first_rows)
    optimizer = LearnedTeleportOptimizer(model.parameters(), model=model, weight_decay=0.0)
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
    assert torch.equal(model[0].weight[2:], kept)
