"""What a single parameter, row or gradient may ask of the optimizer: rest, rare rows, rounding errors, odd sizes and kinds."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.optim.kernels import native
from tests.helpers.classification import X, Y, network, seeded, train
from tests.helpers.expected_warnings import OPEN_ENDED_SAVED

pytestmark = OPEN_ENDED_SAVED


@pytest.fixture(params=["in C", "with torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "with torch":
        monkeypatch.setattr(native, "_native", None)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


# Depth.


@pytest.mark.parametrize("names", [{"0.weight"}, {"2.weight", "2.bias"}, {"0.bias", "4.weight"}])
@pytest.mark.parametrize("way", ["own optimizer", "frozen others", "no gradient"])
def test_steps_do_not_depend_on_the_other_tensors(names: set[str], way: str) -> None:
    whole, part = network(), network()
    optimizer = LearnedTeleportOptimizer.for_model(whole, total_steps=50, teleport=False)
    train(whole, optimizer, 1)
    params = {name: param for name, param in part.named_parameters() if way != "own optimizer" or name in names}
    own = LearnedTeleportOptimizer(params.values(), model=part, total_steps=50, teleport=False)
    F.cross_entropy(part(X), Y).backward()
    for name, param in part.named_parameters():
        if name not in names:
            param.grad = None
            param.requires_grad_(way != "frozen others")
    own.step()
    for name, value in values(part).items():
        # Features of the others are among those that the meta-optimizer sees, so that the learned factors differ a little.
        step, expected = value - values(network())[name], values(whole)[name] - values(network())[name]
        if name in names:
            assert float((step - expected).norm()) < 0.05 * float(expected.norm())
        else:
            assert not step.any()


def test_a_single_matrix_without_a_model_is_warned_about_once() -> None:
    model = nn.Linear(4, 3)
    optimizer = LearnedTeleportOptimizer(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    with pytest.warns(UserWarning, match=r"does not know the depth of the network.*Pass model="):
        optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("kind", ["with its model", "two matrices", "vectors"])
def test_others_are_not_warned_about(kind: str) -> None:
    model = nn.Linear(4, 3) if kind != "two matrices" else nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    params = [model.bias] if kind == "vectors" else list(model.parameters())
    optimizer = LearnedTeleportOptimizer(params, model=model if kind == "with its model" else None)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


# Rows without a gradient.


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_rows_without_a_gradient_stay(rows: int) -> None:
    """Whatever their momentum and the decay; and the other rows step as if these were not there."""
    generator = torch.Generator().manual_seed(rows)
    weights = [nn.Parameter(torch.randn(12, 5, generator=generator)) for _ in range(3)]
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    optimizer = LearnedTeleportOptimizer(weights, teleport=False)
    train_on = torch.randn(3, 12, 5, generator=generator)
    for weight, grad in zip(weights, train_on):
        weight.grad = grad.clone()
    optimizer.step()
    twin = LearnedTeleportOptimizer(others, teleport=False)
    twin.load_state_dict(optimizer.state_dict())
    idle = torch.rand(12, generator=generator) < 0.5
    assert 0 < idle.sum() < 12
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad[idle] = 0.0  # type: ignore[index]
    optimizer.step()
    for weight, start in zip(weights, before):
        assert torch.equal(weight[idle], start[idle])
        assert not torch.isclose(weight[~idle], start[~idle], rtol=1e-5).all(dim=1).any()


@pytest.mark.usefixtures("kernel")
def test_a_row_that_occurs_once_moves_about_once() -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(60, 8), nn.Linear(8, 4)))
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=100, teleport=False)
    start = values(model)["0.weight"][7].clone()
    generator = torch.Generator().manual_seed(0)
    moves, steps = [], []
    for step in range(60):
        ids = torch.randint(8, 60, (16,), generator=generator)
        if step == 10:
            ids[0] = 7
        before = values(model)["0.weight"]
        optimizer.zero_grad()
        F.cross_entropy(model(ids), ids % 4).backward()
        optimizer.step()
        after = values(model)["0.weight"]
        moves.append(float((after[7] - before[7]).norm()))
        steps.append(float((after - before).norm(dim=1).max()))
    assert [step for step, move in enumerate(moves) if move] == [10]
    assert moves[10] == pytest.approx(steps[10], rel=0.2)
    assert float((values(model)["0.weight"][7] - start).norm()) == pytest.approx(moves[10], rel=1e-5)


# Gradients of rounding errors.


class Normed(nn.Module):
    """Convolutions whose biases a BatchNorm takes away again; and one whose bias counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 12, 3), nn.Conv2d(12, 12, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(12), nn.BatchNorm2d(12)])
        self.last = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norms[0](self.first(x)))
        x = torch.relu(self.norms[1](self.second(x)))
        return self.last(x).mean(dim=(2, 3))


class Attention(nn.Module):
    """The bias of the keys changes no output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        weights = torch.softmax(self.query(x) @ self.key(x).mT / 4.0, dim=-1)
        return self.head(weights @ self.value(x)).mean(dim=1)


CASES = {
    "convolutions": (Normed, (2, 9, 9), ["first.bias", "second.bias"], ["last.bias", "norms.0.bias"]),
    "attention": (Attention, (7, 6), ["key.bias"], ["query.bias", "value.bias", "head.bias", "embed.bias"]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("loss_scale", "layer_scale"), [(1.0, 1.0), (1e4, 1.0), (1e-4, 1.0), (1.0, 8.0), (1.0, 0.125)])
def test_biases_with_gradients_of_rounding_errors_rest(case: str, loss_scale: float, layer_scale: float) -> None:
    make, shape, resting, moving = CASES[case]
    model = seeded(make)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.rpartition(".")[0] in {own.rpartition(".")[0] for own in resting}:
                param.mul_(layer_scale)
    generator = torch.Generator().manual_seed(0)
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=100, teleport=False, weight_decay=0.0)
    before = values(model)
    for _ in range(40):
        x = torch.randn(24, *shape, generator=generator)
        optimizer.zero_grad()
        (loss_scale * F.cross_entropy(model(x), x.flatten(1).sum(dim=1).abs().long() % 6)).backward()
        optimizer.step()
    moves = {name: float((value - before[name]).square().mean().sqrt()) for name, value in values(model).items()}
    for name in resting:  # One step of all of them would be .02 or more.
        assert moves[name] < 0.01, moves
    for name in moving:
        assert moves[name] > 0.05, moves


@pytest.mark.usefixtures("kernel")
def test_small_gradients_that_agree_are_followed() -> None:
    """A bias whose gradient is a millionth of that of its matrix and of all its neighbours, from step to step the same."""
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2)))
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=100, teleport=False, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    before, direction = values(model)["0.bias"], torch.randn(6, generator=generator)
    for _ in range(10):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        model[0].bias.grad = 1e-7 * direction
        optimizer.step()
    move = before - values(model)["0.bias"]
    assert float(F.cosine_similarity(move, direction, dim=0)) > 0.99
    assert float(move.norm()) > 0.1


# A rate of zero.


def unbalanced() -> nn.Sequential:
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(5.0)
        model[0].bias.mul_(5.0)
    return model


@pytest.mark.usefixtures("kernel")
def test_at_rate_zero_nothing_moves_and_the_run_begins_with_the_first_other_rate() -> None:
    model = unbalanced()
    optimizer = LearnedTeleportOptimizer.for_model(model, lr=0.0)
    before, outputs = values(model), model(X)
    train(model, optimizer, 7)
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    optimizer.param_groups[0]["lr"] = 1e-35
    train(model, optimizer, 1)
    assert optimizer.teleport_size > 0.1
    torch.testing.assert_close(model(X), outputs, rtol=1e-4, atol=1e-4)
    assert not torch.equal(model[0].weight, before["0.weight"])
    balanced = values(model)
    train(model, optimizer, 3)
    assert optimizer.teleport_size == 0.0
    torch.testing.assert_close(values(model), balanced)


def test_tensors_at_rate_zero_take_part_in_no_teleport() -> None:
    model = unbalanced()
    named = list(model.named_parameters())
    groups = [{"params": named[:2], "lr": 0.0}, {"params": named[2:]}]
    optimizer = LearnedTeleportOptimizer(groups, model=model)
    before = values(model)
    train(model, optimizer, 90)
    for name, value in values(model).items():
        assert torch.equal(value, before[name]) == name.startswith("0.")
    assert any(leg.name == "0.weight" for site in optimizer.spec for leg in site.legs)


def test_a_run_that_begins_late_resumes_bit_for_bit() -> None:
    model, optimizer = unbalanced(), None
    optimizer = LearnedTeleportOptimizer.for_model(model, lr=0.0)
    train(model, optimizer, 3)
    other = network(seed=4)
    resumed = LearnedTeleportOptimizer.for_model(other, lr=0.0)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own, own_model in ((optimizer, model), (resumed, other)):
        own.param_groups[0]["lr"] = 1.0
        train(own_model, own, 10)
    assert all(torch.equal(value, values(other)[name]) for name, value in values(model).items())


# Gradients of any size.


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("scale", [2.0**85, 2.0**-85, 2.0**60])
def test_gradients_of_any_finite_size_are_followed(scale: float) -> None:
    ends = []
    for factor in (1.0, scale):
        model = network()
        optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=40, checkpoint="light", teleport=False)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            for param in model.parameters():
                param.grad.mul_(factor)  # type: ignore[union-attr]
            optimizer.step()
        assert optimizer.stats().num_skipped_steps == 0
        ends.append(values(model))
    for name, value in ends[0].items():
        start = values(network())[name]
        # Very small squares are zeros in the features that the meta-optimizer sees, hence the tolerance.
        assert float((ends[1][name] - value).norm()) < 0.15 * float((value - start).norm())


# Complex numbers, options.


@pytest.mark.parametrize("shape", [(6, 4), (5,), (), (3, 2, 3, 3)])
def test_complex_parameters_are_pairs_of_real_ones(shape: tuple[int, ...]) -> None:
    dtype = torch.complex128
    generator = torch.Generator().manual_seed(0)
    start, target = (torch.randn(shape, dtype=dtype, generator=generator) for _ in range(2))
    param = nn.Parameter(start.clone())
    real_shape = (2 * shape[0],) if len(shape) == 1 else (*shape, 2)
    pairs = nn.Parameter(torch.view_as_real(start).reshape(real_shape).clone())
    others = [nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]  # so that the depth is that of a network
    optimizers = [LearnedTeleportOptimizer([own, *others], total_steps=30, teleport=False) for own in (param, pairs)]
    for _ in range(30):
        for own, goal, optimizer in (
            (param, target, optimizers[0]),
            (pairs, torch.view_as_real(target), optimizers[1]),
        ):
            optimizer.zero_grad()
            (own - goal.reshape(own.shape)).abs().square().sum().backward()
            optimizer.step()
        as_pairs = torch.view_as_real(param.detach()).reshape(real_shape)
        torch.testing.assert_close(as_pairs, pairs.detach(), rtol=0, atol=1e-12)
    assert float((param.detach() - target).abs().max()) < float((start - target).abs().max())
    average = optimizers[0].averaged_parameters()["0"]
    assert average.dtype == dtype
    with optimizers[0].averaged():
        assert torch.equal(param, average)


def test_complex_parameters_resume_bit_for_bit() -> None:
    ends = []
    for is_resumed in (False, True):
        param, others = nn.Parameter(torch.ones(4, 3, dtype=torch.complex64)), [nn.Parameter(torch.ones(2, 2))]
        optimizer = LearnedTeleportOptimizer([param, *others], total_steps=30)
        for step in range(10):
            if is_resumed and step == 5:
                optimizer.eval()
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = LearnedTeleportOptimizer([param, *others], total_steps=30)
                optimizer.load_state_dict(saved)
                optimizer.train()
            optimizer.zero_grad()
            (param - 2j).abs().square().sum().backward()
            optimizer.step()
        ends.append(param.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("foreach", [True, False, None])
def test_foreach_is_taken_with_either_value(foreach: bool | None) -> None:
    ends = []
    for options in ({}, {"foreach": foreach}):
        model = network()
        train(model, LearnedTeleportOptimizer.for_model(model, total_steps=9, **options), 3)
        ends.append(values(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
