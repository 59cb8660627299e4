"""The average of the iterates: who sees it, and that nobody else notices."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from contextlib import AbstractContextManager

import pytest
import torch
from test_optimizer import X, Y, network, train
from torch import Tensor, nn
from torch.func import functional_call

from teleport_optim import LearnedTeleportOptimizer, find_symmetries
from teleport_optim.averaging import Exchange, average_on_forward

Trained = tuple[nn.Sequential, LearnedTeleportOptimizer]


def trained(num_steps: int = 12, **options: object) -> Trained:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, **options)
    train(model, optimizer, num_steps)
    return model, optimizer


def average_of(model: nn.Module, optimizer: LearnedTeleportOptimizer) -> dict[str, Tensor]:
    """What a call without gradients should compute with."""
    return {name: p.detach() + optimizer.state[p]["lag"] for name, p in model.named_parameters()}


def at_average(model: nn.Module, optimizer: LearnedTeleportOptimizer) -> Tensor:
    return functional_call(copy.deepcopy(model), average_of(model, optimizer), (X,)).detach()


def at_parameters(model: nn.Module) -> Tensor:
    with torch.enable_grad():
        output: Tensor = model(X).detach()
    return output


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("is_training", [True, False])
def test_calls_without_gradients_see_the_average(
    context: type[AbstractContextManager[None]], is_training: bool
) -> None:
    model, optimizer = trained()
    model.train(is_training)
    before = copy.deepcopy(model.state_dict())
    with context():
        seen = model(X).clone()
    assert torch.equal(seen, at_average(model, optimizer))
    assert not torch.allclose(seen, at_parameters(model), atol=1e-4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_training_does_not_notice_evaluations() -> None:
    results = []
    for is_evaluated in (False, True):
        model = network()
        optimizer = LearnedTeleportOptimizer.for_model(model)
        for _ in range(15):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(X), Y)
            if is_evaluated:
                with torch.no_grad():
                    model(X)  # a backward pass is waiting
            loss.backward()
            optimizer.step()
        results.append(model.state_dict())
    assert all(map(torch.equal, results[0].values(), results[1].values()))


def test_parameters_come_back_after_an_error() -> None:
    model, optimizer = trained()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(X[:, :-1])
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    with torch.no_grad():
        assert torch.equal(model(X), at_average(model, optimizer))


def test_a_model_that_calls_itself_sees_one_average() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor, depth: int = 1) -> Tensor:
            x = torch.relu(self.linear(x))
            return self(x, depth - 1) + self.linear(x) if depth else x

    model = Twice()
    optimizer = LearnedTeleportOptimizer.for_model(model, teleport=False)
    for _ in range(10):
        optimizer.zero_grad()
        (model(X) - X).square().mean().backward()
        optimizer.step()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(X), at_average(model, optimizer))
    assert all(map(torch.equal, model.state_dict().values(), before.values()))


@pytest.mark.parametrize("has_model", [True, False])
def test_the_context_shows_the_average(has_model: bool) -> None:
    model = network()
    options = {"model": model} if has_model else {}
    optimizer = LearnedTeleportOptimizer(model.parameters(), **options)
    train(model, optimizer, 12)
    expected, before = average_of(model, optimizer), copy.deepcopy(model.state_dict())
    with optimizer.averaged(), optimizer.averaged():
        seen = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            assert torch.equal(model(X), at_parameters(model))
        with pytest.raises(RuntimeError, match=r"inside averaged\(\)"):
            optimizer.step()
    assert all(torch.equal(seen[name], value) for name, value in expected.items())
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    optimizer.step()


def test_it_can_be_left_out() -> None:
    model, _optimizer = trained(average=False)
    with torch.no_grad():
        assert torch.equal(model(X), at_parameters(model))


def test_it_ends_where_the_parameters_do() -> None:
    _model, optimizer = trained(30, total_steps=30)
    assert not any(own["lag"].any() for own in optimizer.state.values())
    assert any(own["lag"].any() for own in trained(27, total_steps=30)[1].state.values())


def test_other_models_are_left_alone() -> None:
    model, _optimizer = trained()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    others = [copy.deepcopy(model), torch.load(stream, weights_only=False)]
    expected = at_parameters(model)
    with torch.no_grad():
        for other in others:
            assert torch.equal(other(X), expected)
        values = {name: value.clone() for name, value in model.state_dict().items()}
        assert torch.equal(functional_call(model, values, (X,)), expected)


@pytest.mark.parametrize("has_gradients", [True, False])
def test_a_compiled_model_is_one_graph_and_sees_its_parameters(has_gradients: bool) -> None:
    model, _optimizer = trained()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.set_grad_enabled(has_gradients):
        assert torch.equal(compiled(X).detach(), at_parameters(model))


def test_the_model_does_not_keep_the_optimizer_alive() -> None:
    model, optimizer = trained()
    expected = at_parameters(model)
    watched = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert watched() is None
    with torch.no_grad():
        assert torch.equal(model(X), expected)


def test_copies_of_the_optimizer_know_the_average() -> None:
    model, optimizer = trained()
    other, other_optimizer = copy.deepcopy((model, optimizer))
    with other_optimizer.averaged():
        seen = copy.deepcopy(other.state_dict())
    assert all(torch.equal(seen[name], value) for name, value in average_of(model, optimizer).items())


def test_the_search_for_symmetries_takes_no_notice() -> None:
    model, _optimizer = trained()
    assert find_symmetries(model, X) == find_symmetries(network(), X)


def test_hooks_can_be_taken_away() -> None:
    model = network()
    (param, *_) = model.parameters()
    exchange = Exchange(lambda: [(param, torch.ones_like(param))])
    expected = at_parameters(model)
    handles = average_on_forward(model, exchange)
    with torch.no_grad():
        assert not torch.equal(model(X), expected)
        for handle in handles:
            handle.remove()
        assert torch.equal(model(X), expected)


def test_the_average_of_noisy_steps_is_better_than_they_are() -> None:
    """Without a horizon, on gradients of small batches: what the average is for."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 10, generator=generator)
    labels = (inputs @ torch.randn(10, 3, generator=generator)).argmax(dim=1)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = LearnedTeleportOptimizer.for_model(model)
    losses = []
    for step in range(150):
        rows = torch.randint(512, (32,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
        if step >= 100:
            here = nn.functional.cross_entropy(model(inputs), labels)
            with torch.no_grad():
                losses.append((here.item(), nn.functional.cross_entropy(model(inputs), labels).item()))
    iterates, averages = (sum(own) for own in zip(*losses))
    assert averages < 0.6 * iterates
