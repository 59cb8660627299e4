"""The training loop that the demo and comparisons share, and its minibatches."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_optim.cli.training import Scheduled, train
from teleport_optim.meta_training.tasks.data import Data, minibatches, standardise
from teleport_optim.meta_training.tasks.networks import perceptron, seeded


def waves(*, noise: float) -> Data:
    inputs = torch.linspace(-2, 2, 40, dtype=torch.float64)[:, None]
    return Data(inputs, inputs.sin(), inputs[:8], inputs[:8].sin(), F.mse_loss, noise)


def network() -> nn.Sequential:
    return seeded(lambda: perceptron((1, 5, 1), nn.Tanh))(3).double()


def test_a_step_is_forward_backward_and_optimizer() -> None:
    data, expected, model = waves(noise=0.0), network(), network()
    reference = torch.optim.SGD(expected.parameters(), lr=0.2, momentum=0.5)
    for inputs, targets in islice(minibatches(data, 6, torch.Generator().manual_seed(1)), 9):
        grads = torch.autograd.grad(F.mse_loss(expected(inputs), targets), list(expected.parameters()))
        for param, grad in zip(expected.parameters(), grads):
            param.grad = grad
        reference.step()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    loop = train(model, optimizer, data.loss, minibatches(data, 6, torch.Generator().manual_seed(1)))
    assert all(seconds > 0.0 for seconds in islice(loop, 9))
    for ours, theirs in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0.0)


def test_the_loop_ends_with_its_minibatches_and_takes_no_step_before_it_is_asked() -> None:
    model = network()
    before = model[0].weight.clone()
    batch = (torch.ones(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64))
    loop = train(model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss, [batch] * 4)
    assert torch.equal(model[0].weight, before)
    assert len(list(loop)) == 4
    assert not torch.equal(model[0].weight, before)


def test_no_minibatch_is_kept_while_the_next_one_is_drawn() -> None:
    drawn: list[weakref.ref[Tensor]] = []

    def fresh() -> tuple[Tensor, Tensor]:
        batch = (torch.ones(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64))
        drawn.extend(map(weakref.ref, batch))
        return batch

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(3):
            assert [tensor for tensor in drawn if tensor() is not None] == []
            yield fresh()

    model = network()
    list(train(model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss, batches()))
    assert len(drawn) == 6


def test_minibatches_follow_from_the_generator_and_have_noise_on_the_inputs_alone() -> None:
    data = waves(noise=0.3)
    first, second, other = (
        list(islice(minibatches(data, 7, torch.Generator().manual_seed(seed)), 30)) for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second))
    assert not torch.equal(first[0][0], other[0][0])
    inputs, targets = (torch.cat(parts) for parts in zip(*first))
    assert set(targets.flatten().tolist()) <= set(data.targets.flatten().tolist())
    noise = inputs - targets.asin()
    inner = noise[inputs.abs() < 1.0]  # where the sine has one inverse
    assert 0.2 < float(inner.std()) < 0.4
    exact, sines = (torch.cat(parts) for parts in zip(*islice(minibatches(waves(noise=0.0), 7, torch.Generator()), 9)))
    assert torch.equal(exact.sin(), sines)


def test_integers_without_noise_stay_integers() -> None:
    tokens = torch.arange(12).view(6, 2)
    inputs, targets = next(minibatches(Data(tokens, tokens, tokens, tokens), 4, torch.Generator().manual_seed(0)))
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs, targets)


@pytest.mark.parametrize("factor", [None, lambda step: 0.5**step])
def test_a_schedule_moves_every_optimizer(factor: object) -> None:
    params = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
    optimizer = Scheduled([torch.optim.SGD([param], lr=1.0) for param in params], factor)  # type: ignore[arg-type]
    for _ in range(3):
        optimizer.zero_grad()
        sum(param.sum() for param in params).backward()  # type: ignore[union-attr]
        optimizer.step()
    expected = 1.0 - 3.0 if factor is None else 1.0 - (1.0 + 0.5 + 0.25)
    assert all(torch.equal(param.detach(), torch.full((2,), expected, dtype=torch.float64)) for param in params)


def test_standardised_columns_have_no_mean_and_unit_variance() -> None:
    values = standardise(torch.tensor([[1.0, 50.0], [2.0, 10.0], [6.0, 30.0]], dtype=torch.float64))
    torch.testing.assert_close(values.mean(dim=0), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(values.std(dim=0), torch.ones(2, dtype=torch.float64))
