"""What the average is: of all iterates, also of tensors that rest or come later."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.optim.kernels import native
from teleport_optim.optim.schedule import Horizon, averaging_weight
from tests.helpers.averages import trained
from tests.helpers.classification import X, Y, network, train
from tests.helpers.comparing import same_weights, weights_of
from tests.helpers.expected_warnings import OPEN_ENDED_SAVED

pytestmark = OPEN_ENDED_SAVED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("is_native", [True, False])
def test_it_is_the_average_of_the_iterates(
    dtype: torch.dtype, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_native:
        monkeypatch.setattr(native, "_native", None)
    model = network().to(dtype)
    optimizer = LearnedTeleportOptimizer.for_model(model, teleport=False)
    expected = {name: value.double() for name, value in weights_of(model).items()}
    for step in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X.to(dtype)), Y).backward()
        optimizer.step()
        for name, value in weights_of(model).items():
            expected[name] += averaging_weight(step) * (value.double() - expected[name])
    tolerance = {torch.float32: 1e-2, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    iterates = weights_of(model)
    for name, average in optimizer.averaged_parameters().items():
        way = (iterates[name].double() - expected[name]).norm()
        assert float((average.double() - expected[name]).norm()) <= tolerance * float(way) + 1e-2 * tolerance
    assert not same_weights(iterates, optimizer.averaged_parameters())


def test_it_ends_where_the_parameters_do() -> None:
    model, optimizer = trained(30, total_steps=30)
    assert same_weights(optimizer.averaged_parameters(), weights_of(model))
    model, optimizer = trained(27, total_steps=30)
    assert not same_weights(optimizer.averaged_parameters(), weights_of(model))


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
            here = nn.functional.cross_entropy(model(inputs), labels).item()
            with optimizer.averaged():
                losses.append((here, nn.functional.cross_entropy(model(inputs), labels).item()))
    iterates, averages = (sum(own) for own in zip(*losses))
    assert averages < 0.6 * iterates


# Tensors that rest, and those that come later.


@pytest.mark.parametrize("rest", [1, 40])
@pytest.mark.parametrize("total_steps", [None, 100])
def test_a_tensor_that_rests_is_averaged_as_it_stands(rest: int, total_steps: int | None) -> None:
    model = network().double()
    optimizer = LearnedTeleportOptimizer.for_model(model, teleport=False, total_steps=total_steps)
    expected, horizon = weights_of(model), Horizon(total_steps)
    for step in range(20 + rest + 10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X.double()), Y).backward()
        if 20 <= step < 20 + rest:
            model[0].weight.grad = None
        optimizer.step()
        for name, value in weights_of(model).items():
            expected[name] += averaging_weight(step, horizon.steps_left(step)) * (value - expected[name])
        for name, average in optimizer.averaged_parameters().items() if step in (20 + rest // 2, 29 + rest) else ():
            torch.testing.assert_close(average, expected[name], rtol=0, atol=1e-12)
    for name, average in optimizer.averaged_parameters().items():
        torch.testing.assert_close(average, expected[name], rtol=0, atol=1e-12)


def test_a_frozen_tensor_ends_where_it_stands() -> None:
    model, optimizer = trained(20, total_steps=40)
    model[0].weight.requires_grad_(False)
    model[0].weight.grad = None
    train(model, optimizer, 20)
    assert same_weights(optimizer.averaged_parameters(), weights_of(model))


def test_a_group_that_is_added_begins_an_average() -> None:
    model, _ = trained(50)
    head = nn.Parameter(torch.zeros(8))
    plain = LearnedTeleportOptimizer(model.parameters())
    plain.add_param_group({"params": [head]})
    train(model, plain, 50)
    values = []
    for _ in range(4):
        head.grad = torch.ones(8)
        train(model, plain, 1)
        values.append(head.detach().clone())
    expected = values[0].clone()
    for age, value in enumerate(values[1:], start=1):
        expected += averaging_weight(age) * (value - expected)
    torch.testing.assert_close(plain.averaged_parameters()["6"], expected, rtol=1e-2, atol=1e-4)
