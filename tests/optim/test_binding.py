"""An optimizer and its model: the first call, and the sites that are found by it."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim import Optimizer

from teleport_optim import LearnedTeleportOptimizer, find_symmetries
from teleport_optim.optim.schedule import TELEPORT_INTERVAL
from tests.helpers.classification import NO_STEP, X, Y, balancing, network, seeded, train
from tests.helpers.expected_warnings import OF_OURS, RATE_OF_NO_STEP

pytestmark = [*OF_OURS, RATE_OF_NO_STEP, pytest.mark.private_torch]


class Residual(nn.Module):
    """A network that is no sequence of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        for norm in (self.stem[1], self.inner[1], self.outer[1]):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = (x + self.outer(self.inner(x))).relu()
        return self.head(self.hidden(x.mean((2, 3))).relu())  # type: ignore[no-any-return]


class Tied(nn.Module):
    """One weight and one bias under two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu() + self.second(-x).relu())  # type: ignore[no-any-return]


class Named(nn.Module):
    """Takes its inputs by name only, and one of them is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, *, x: Tensor, sign: float) -> Tensor:
        return sign * self.inner(x)  # type: ignore[no-any-return]


class Branching(nn.Module):
    """Which way the data go depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else self.inner(-x)  # type: ignore[no-any-return]


IMAGES = torch.randn(32, 2, 5, 5, generator=torch.Generator().manual_seed(2))


def step_on(optimizer: Optimizer, output: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(output, Y)
    loss.backward()
    optimizer.step()
    return loss.item()


def assert_teleports_alone(model: nn.Module, optimizer: LearnedTeleportOptimizer, inputs: Tensor) -> None:
    """A first step at rate 0 teleports: it moves the parameters of the spec and leaves the function as it is."""
    assert optimizer.param_groups[0]["lr"] == NO_STEP
    assert not len(optimizer.spec)
    state = copy.deepcopy(model.state_dict())
    outputs = {mode: model.train(mode)(inputs).detach() for mode in (False, True)}
    step_on(optimizer, model(inputs))
    assert optimizer.teleport_size > 1e-3
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, state[name])}
    assert {leg.name for symmetry in optimizer.spec for leg in symmetry.legs} == moved
    for name, buffer in model.named_buffers():
        buffer.copy_(state[name])
    for mode, output in outputs.items():
        torch.testing.assert_close(model.train(mode)(inputs), output, rtol=1e-9, atol=1e-11)


def test_a_network_that_is_no_sequence_teleports() -> None:
    model = seeded(Residual).double()
    optimizer = LearnedTeleportOptimizer.for_model(model, lr=NO_STEP, total_steps=20)
    assert_teleports_alone(model, optimizer, IMAGES.double())
    assert {"inner.1:scaling", "hidden:scaling"} <= {symmetry.id for symmetry in optimizer.spec}


def test_tied_parameters_teleport_under_one_name() -> None:
    model = seeded(Tied).double()
    optimizer = LearnedTeleportOptimizer.for_model(model, lr=NO_STEP, total_steps=20)
    assert_teleports_alone(model, optimizer, X.double())
    (symmetry,) = optimizer.spec
    assert [str(leg) for leg in symmetry.legs] == ["first.weight[0]^+1", "first.bias[0]^+1", "head.weight[1]^-1"]
    assert model.second.weight is model.first.weight


def test_inputs_by_name_are_learned() -> None:
    model = Named()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=20)
    before = step_on(optimizer, model(x=X, sign=-1.0))
    assert [symmetry.id for symmetry in optimizer.spec] == ["inner.0:scaling", "inner.2:scaling"]
    assert optimizer.teleport_size > 0
    for _ in range(15):
        step_on(optimizer, model(x=X, sign=-1.0))
    assert F.cross_entropy(model(x=X, sign=-1.0), Y).item() < before


def test_a_model_that_is_never_called_trains_and_warns_once() -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=200)
    with pytest.warns(UserWarning, match=r"the model \(Sequential\) has not been called.*example_inputs") as record:
        before = step_on(optimizer, model.forward(X))
    assert [warning.filename for warning in record] == [__file__]
    for _ in range(TELEPORT_INTERVAL + 4):
        step_on(optimizer, model.forward(X))
        assert optimizer.teleport_size == 0.0
    assert F.cross_entropy(model.forward(X), Y).item() < before
    train(
        model, optimizer, TELEPORT_INTERVAL - 4
    )  # the last of them is the first since the call at which it may teleport
    assert len(optimizer.spec) == 2
    assert optimizer.teleport_size > 0
    given = LearnedTeleportOptimizer.for_model(model, total_steps=20, example_inputs=X)
    step_on(given, model.forward(X))
    assert given.teleport_size > 0


def test_a_model_whose_way_depends_on_data_trains_without_teleports() -> None:
    model = Branching()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=100)
    before = step_on(optimizer, model(X))
    for _ in range(TELEPORT_INTERVAL + 4):
        step_on(optimizer, model(X))
        assert optimizer.teleport_size == 0.0
    assert F.cross_entropy(model(X), Y).item() < before
    assert not len(optimizer.spec)
    assert [refusal.name for refusal in optimizer.spec.refusals] == ["(root)"]


@pytest.mark.parametrize(("make", "inputs"), [(network, X), (Residual, IMAGES), (Tied, X)])
def test_inputs_that_are_given_and_those_that_are_learned_train_alike(
    make: Callable[[], nn.Module], inputs: Tensor
) -> None:
    ends = []
    for options in ({}, {}, {"example_inputs": inputs}, {"example_inputs": (inputs[:2],)}):
        model = seeded(make)
        optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=200, **options)
        assert (len(optimizer.spec) > 0) == ("example_inputs" in options)
        sizes = []
        for _ in range(2 * TELEPORT_INTERVAL + 5):
            step_on(optimizer, model(inputs))
            sizes.append(optimizer.teleport_size)
        assert sum(size > 0 for size in sizes) == 3
        ends.append((model.state_dict(), sizes))
    for state, sizes in ends[1:]:
        assert sizes == ends[0][1]
        assert all(torch.equal(value, ends[0][0][name]) for name, value in state.items())


@pytest.mark.parametrize("step", [1, TELEPORT_INTERVAL, TELEPORT_INTERVAL + 3])
def test_a_state_dict_continues_teleports_bit_for_bit(step: int) -> None:
    model, other = network(), network(seed=9)
    optimizer = LearnedTeleportOptimizer.for_model(
        model, lr=0.1, total_steps=400
    )  # slow enough to have gradients to the end
    train(model, optimizer, step)
    resumed = LearnedTeleportOptimizer.for_model(other, lr=0.1, total_steps=400)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    sizes = []
    for _ in range(3 * TELEPORT_INTERVAL):
        assert train(model, optimizer, 1) == train(other, resumed, 1)
        assert resumed.teleport_size == optimizer.teleport_size
        sizes.append(resumed.teleport_size)
    assert sum(size > 0 for size in sizes) == 2
    assert all(torch.equal(first, second) for first, second in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_made_before_the_first_step_teleport(clone: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=100)
    other, copied = clone((model, optimizer))
    assert train(other, copied, 82) == train(model, optimizer, 82)
    assert len(copied.spec) == len(optimizer.spec) == 2
    assert all(torch.equal(first, second) for first, second in zip(model.parameters(), other.parameters()))


def test_waiting_for_the_first_call_leaves_no_trace_in_the_model() -> None:
    """Neither in what others find in it, nor in copies, which average models make."""
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=20)
    assert find_symmetries(model, X) == find_symmetries(network(), X)
    averaged = copy.deepcopy(model)
    averaged(X[:2])
    assert find_symmetries(averaged, X) == find_symmetries(network(), X)
    train(model, optimizer, 1)
    assert optimizer.teleport_size > 0
    assert find_symmetries(model, X) == find_symmetries(network(), X)


pytestmark = [
    pytest.mark.filterwarnings("ignore:the state of an open-ended run is saved"),
    pytest.mark.filterwarnings("ignore:lr has changed"),
    pytest.mark.filterwarnings("ignore:an optimizer of a single matrix"),
    pytest.mark.filterwarnings("ignore:lr=1e-35 is a factor"),
]


class Mask(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (weight.detach().abs() > 0.1)


def changed(change: Callable[[nn.Sequential], object]) -> nn.Sequential:
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.nn.utils.weight_norm is deprecated
        change(model)
    return model


CHANGED: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    "weight_norm": (lambda m: [parametrizations.weight_norm(m[0]), parametrizations.weight_norm(m[2])], "weight_norm"),
    "weight_norm by hooks": (lambda m: nn.utils.weight_norm(m[2]), "has forward hooks"),
    "spectral_norm": (lambda m: parametrizations.spectral_norm(m[2]), "vdot"),
    "spectral_norm by hooks": (lambda m: nn.utils.spectral_norm(m[2]), "hooks|cannot be copied"),
    "pruning": (lambda m: prune.l1_unstructured(m[2], "weight", 0.3), "has forward hooks"),
    "a mask as parametrization": (lambda m: nn.utils.parametrize.register_parametrization(m[2], "weight", Mask()), ""),
}


@pytest.mark.parametrize(("change", "reason"), CHANGED.values(), ids=CHANGED)
def test_models_that_are_changed_from_outside_train_without_wrong_teleports(
    change: Callable[[nn.Sequential], object], reason: str
) -> None:
    model = changed(change)
    optimizer = LearnedTeleportOptimizer.for_model(model, lr=NO_STEP, total_steps=60, checkpoint=balancing())
    before = F.cross_entropy(model(X), Y)
    before.backward()
    outputs = model.eval()(X)
    optimizer.step()
    torch.testing.assert_close(model(X), outputs, rtol=1e-5, atol=1e-6)
    model.train()
    assert re.search(reason, " ".join(refusal.reason for refusal in optimizer.spec.refusals))
    moving = {leg.name for symmetry in optimizer.spec for leg in symmetry.legs}
    assert not any(name.startswith("2.") and name != "2.bias" for name in moving)
    optimizer.param_groups[0]["lr"] = 1.0
    assert train(model, optimizer, 40) < before.item() - 0.5


def test_masks_that_a_loop_multiplies_in_stay_through_teleports() -> None:
    model = network()
    mask = (torch.rand(10, 10, generator=torch.Generator().manual_seed(3)) > 0.3).float()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=60)
    for _ in range(60):
        with torch.no_grad():
            model[2].weight.mul_(mask)
        train(model, optimizer, 1)
    with torch.no_grad():
        model[2].weight.mul_(mask)
    assert F.cross_entropy(model(X), Y) < 0.2
    assert optimizer.teleport_size == 0.0
    assert optimizer.stats().tensors["2.weight"].teleport_size > 0


def test_lazy_modules_train_once_they_have_shapes() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=60)
        model(X)
    assert train(model, optimizer, 60) < 0.2
    assert len(optimizer.spec) == 1


def test_weights_of_another_optimizer_do_not_teleport() -> None:
    model = network()
    other = torch.optim.AdamW(model[2].parameters(), lr=1e-3)
    optimizer = LearnedTeleportOptimizer([*model[0].parameters(), *model[4].parameters()], model=model, total_steps=40)
    with pytest.warns(UserWarning, match=r"no teleports where .*2\.weight"):
        train(model, optimizer, 1)
    for _ in range(20):
        train(model, optimizer, 1)
        other.step()
    assert not len(optimizer.spec)
