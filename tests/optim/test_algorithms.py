"""Loops that compute with and without gradients: a trained model computes what one of the same weights does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from tests.helpers.comparing import same_weights, weights_of
from tests.helpers.regression import (
    HELD_X,
    HELD_Y,
    NUM_STEPS,
    Make,
    X,
    Y,
    adamw,
    everyone,
    held_out,
    looking,
    network,
    open_ended,
    teleporting,
    train,
)


def copy_of(model: nn.Module) -> nn.Module:
    """A model of the same weights that no optimizer has seen."""
    other = network()
    other.load_state_dict(weights_of(model))
    return other


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def log_probabilities(model: nn.Module, actions: Tensor) -> Tensor:
    return torch.distributions.Normal(model(HELD_X), 0.5).log_prob(actions)


def policy(model: nn.Module) -> list[Tensor]:
    """PPO: on the first pass the ratio to the probabilities that were recorded is 1."""
    actions = normal(64, 1, seed=1)
    with torch.no_grad():
        old = log_probabilities(model, actions)
    ratio = (log_probabilities(model, actions) - old).exp()
    assert torch.equal(ratio, torch.ones_like(ratio))
    clipped = torch.minimum(ratio * HELD_Y, ratio.clamp(0.8, 1.2) * HELD_Y)
    return gradients(-clipped.mean(), model)


def contrast(outputs: Tensor) -> Tensor:
    """A loss over all pairs of a batch."""
    return (outputs - outputs.T).sub(HELD_Y - HELD_Y.T).square().mean()


def cached_gradients(model: nn.Module) -> list[Tensor]:
    """Two passes: outputs without gradients, then their gradients through one small batch after another."""
    with torch.inference_mode():
        outputs = model(HELD_X)
    outputs = outputs.clone().requires_grad_()
    contrast(outputs).backward()
    parts = [gradients((model(own) * grad).sum(), model) for own, grad in zip(HELD_X.split(10), outputs.grad.split(10))]
    both = [torch.stack(own).sum(dim=0) for own in zip(*parts)]
    torch.testing.assert_close(both, gradients(contrast(model(HELD_X)), model), rtol=1e-5, atol=1e-5)
    return both


def recomputed(model: nn.Module) -> list[Tensor]:
    """Re-entrant checkpointing of the whole model, whose first pass is one without gradients."""
    model.zero_grad()
    inputs = HELD_X.clone().requires_grad_()
    contrast(checkpoint(model, inputs, use_reentrant=True)).backward()
    found = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()
    torch.testing.assert_close(found, gradients(contrast(model(HELD_X)), model), rtol=1e-5, atol=1e-5)
    return found


def adversarial(model: nn.Module) -> list[Tensor]:
    """VAT: the direction that changes the outputs most, by power iteration from outputs without gradients."""
    with torch.no_grad():
        clean = model(HELD_X)
    direction = normal(64, 6, seed=2)
    for _ in range(3):
        direction = (0.1 * F.normalize(direction)).requires_grad_()
        (direction,) = torch.autograd.grad(F.mse_loss(model(HELD_X + direction), clean), direction)
    assert float(direction.norm()) > 0.0
    return gradients(F.mse_loss(model(HELD_X + F.normalize(direction)), clean), model)


def distilled(model: nn.Module) -> list[Tensor]:
    """A copy of the model, called without gradients, is the teacher."""
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        goal = teacher(HELD_X)
    return gradients(F.mse_loss(model(HELD_X + 0.1 * normal(64, 6)), goal), model)


def discriminated(model: nn.Module) -> list[Tensor]:
    """GAN: the fakes that the discriminator is shown, made without gradients, are those of the generator's own pass."""
    with torch.no_grad():
        fakes = model(HELD_X)
    assert torch.equal(fakes, model(HELD_X).detach())
    critic = network(3)
    return gradients(F.softplus(-critic(model(HELD_X) * HELD_X)).mean(), model)


algorithms = pytest.mark.parametrize(
    "algorithm",
    [policy, cached_gradients, recomputed, adversarial, distilled, discriminated],
    ids=lambda own: own.__name__,
)


def assert_as_a_plain_one(model: nn.Module, algorithm: Callable[[nn.Module], list[Tensor]]) -> None:
    before = weights_of(model)
    found, expected = algorithm(model), algorithm(copy_of(model))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert same_weights(weights_of(model), before)


@everyone
@teleporting
@algorithms
def test_passes_with_and_without_gradients_agree(make: Make, algorithm: Callable[[nn.Module], list[Tensor]]) -> None:
    model = network()
    optimizer = make(model, NUM_STEPS)
    for start, end in pairwise((0, 1, 13, 26, 38)):
        train(model, optimizer, range(start, end))
        assert_as_a_plain_one(model, algorithm)


@algorithms
def test_other_weights_in_passes_without_gradients_are_noticed(
    algorithm: Callable[[nn.Module], list[Tensor]],
) -> None:
    model = network()

    def shift(amount: float) -> Callable[..., None]:
        def hook(module: nn.Sequential, *_: Any) -> None:
            if not torch.is_grad_enabled():
                module[-1].bias.data.add_(amount)
                module[-1].weight.data.mul_(2.0**amount)

        return hook

    model.register_forward_pre_hook(shift(1.0))
    model.register_forward_hook(shift(-1.0))
    with pytest.raises(AssertionError):
        assert_as_a_plain_one(model, algorithm)


@everyone
def test_clipped_policy_updates(make: Make) -> None:
    """PPO with several passes over what was recorded: the reward rises."""
    model = network()
    optimizer = make(model, NUM_STEPS)
    rewards = []
    for round_ in range(10):
        noise = 0.5 * normal(64, 1, seed=round_)
        with torch.no_grad():
            actions = model(HELD_X) + noise
            old = log_probabilities(model, actions)
        reward = -(actions - HELD_Y).square()
        rewards.append(reward.mean().item())
        advantages = (reward - reward.mean()) / reward.std()
        for number in range(4):
            ratio = (log_probabilities(model, actions) - old).exp()
            if number == 0:
                assert torch.equal(ratio, torch.ones_like(ratio))
            optimizer.zero_grad()
            (-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()).backward()
            optimizer.step()
    assert rewards[-1] > rewards[0]


@everyone
def test_a_generator_does_not_collapse(make: Make) -> None:
    """Points on a circle, from fakes that are made without gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
        critic = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))
    both = [
        AdamW(model.parameters(), lr=3e-3, betas=(0.5, 0.9)) if make is adamw else make(model, 200)
        for model in (generator, critic)
    ]
    angles = torch.rand(200, 64, generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
    for step, angle in enumerate(angles):
        noise, real = normal(64, 2, seed=step), torch.stack([angle.cos(), angle.sin()], dim=1)
        with torch.no_grad():
            fakes = generator(noise)
        both[1].zero_grad()
        (F.softplus(-critic(real)).mean() + F.softplus(critic(fakes)).mean()).backward()
        both[1].step()
        both[0].zero_grad()
        made = generator(noise)
        assert torch.equal(made.detach(), fakes)
        F.softplus(-critic(made)).mean().backward()
        both[0].step()
    with torch.no_grad(), looking(both[0]):
        points = generator(normal(256, 2, seed=-1))
    assert float(points.std(dim=0).min()) > 0.2


@everyone
@teleporting
def test_a_target_that_follows(make: Make) -> None:
    """BYOL: the target is the moving average of the parameters and of nothing else."""
    model = network()
    optimizer = make(model, NUM_STEPS)
    train(model, optimizer, range(3))
    target = copy.deepcopy(model).requires_grad_(False)
    expected = weights_of(model)
    losses = []
    for step in range(NUM_STEPS - 3):
        one, other = (HELD_X + 0.1 * normal(64, 6, seed=2 * step + number) for number in range(2))
        with torch.no_grad():
            goal = target(other)
        optimizer.zero_grad()
        loss = F.mse_loss(model(one), goal) + F.mse_loss(model(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            for own, online in zip(target.parameters(), model.parameters()):
                own.lerp_(online, 0.1)
        expected = {name: value.lerp(weights_of(model)[name], 0.1) for name, value in expected.items()}
    assert same_weights(weights_of(target), expected)
    assert losses[-1] < losses[0]


# MeZO


def perturb(model: nn.Module, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(scale * torch.randn(param.shape, generator=generator))


def zeroth_order(model: nn.Module, optimizer: Optimizer, seed: int, is_exact: bool) -> None:
    """One step of MeZO: the slope along a random direction, from two passes with parameters moved in place."""
    before, losses = weights_of(model), []
    for scale in (1e-3, -2e-3):
        perturb(model, scale, seed)
        losses.append(held_out(model))
        assert losses[-1] == held_out(copy_of(model))
    perturb(model, 1e-3, seed)
    if is_exact:
        model.load_state_dict(before)
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = (losses[0] - losses[1]) / 2e-3 * torch.randn(param.shape, generator=generator)
    optimizer.step()


@everyone
def test_zeroth_order_gradients(make: Make) -> None:
    model = network()
    optimizer = make(model, 60)
    before = held_out(model)
    for step in range(60):
        zeroth_order(model, optimizer, step, is_exact=False)
    assert held_out(model) < before


@teleporting
def test_parameters_that_are_moved_and_put_back() -> None:
    """Bit for bit: the average has not noticed. Nearly: it begins again, since that is a write as any other."""
    averages = []
    for is_exact in (None, True, False):
        model = network()
        optimizer = open_ended(model, NUM_STEPS)
        train(model, optimizer, range(20))
        before = weights_of(model)
        if is_exact is not None:
            perturb(model, 1e-3, 0)
            perturb(model, -1e-3, 0)
            assert not same_weights(weights_of(model), before)
        if is_exact:
            model.load_state_dict(before)
        averages.append(optimizer.averaged_parameters())
    untouched, exact, near = averages
    assert same_weights(untouched, exact)
    now, num_changed = weights_of(model), 0
    for name, average in near.items():
        is_changed = not torch.equal(now[name], before[name])
        num_changed += is_changed
        assert torch.equal(average, now[name] if is_changed else untouched[name])
        assert not torch.equal(average, now[name]) or is_changed
    assert num_changed > 0
