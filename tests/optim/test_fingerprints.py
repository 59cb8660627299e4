"""Writes of others: the average begins again at what was written."""

from __future__ import annotations

import copy
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.optim.fingerprints import fingerprints
from teleport_optim.optim.kernels import native
from teleport_optim.optim.schedule import averaging_weight
from tests.helpers.averages import seen, trained
from tests.helpers.classification import network, train
from tests.helpers.comparing import same_weights, weights_of
from tests.helpers.expected_warnings import OPEN_ENDED_SAVED

pytestmark = OPEN_ENDED_SAVED


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([(1,), (7,), (8, 5), (64, 64), (3, 300), (16, 3, 3, 3), (1, 5, 8), (20_000,), (130, 130), ()]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_fingerprints_tell_writes_from_none(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, is_channels_last: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    if is_channels_last and tensor.dim() == 4:
        tensor = tensor.to(memory_format=torch.channels_last)
    others = [tensor.clone() for _ in range(4)]
    places = [tuple(int(torch.randint(size, (), generator=generator)) for size in shape) for _ in others]
    others[0][places[0]] *= -1
    others[1][places[1]] = 0
    others[2][places[2]] = torch.nextafter(tensor[places[2]].float(), torch.tensor(9.0)).to(dtype) * 1.5
    others[3] = others[3].mul(-1)
    for axis, size in enumerate(shape):
        if size > 1:
            others += [tensor.flip(axis), tensor.roll(1, axis)]
            swapped = tensor.clone()  # one channel with another sign
            swapped.select(axis, size // 2).mul_(-1)
            others.append(swapped)
    first, again, *changed = fingerprints([tensor, tensor.clone(), *others]).tolist()
    assert first == again == fingerprints([tensor])[0]
    for other, value in zip(others, changed):
        assert (value == first) == torch.equal(other, tensor)


def test_fingerprints_of_a_step_are_those_of_its_parameters() -> None:
    for is_contiguous in (True, False):
        model = nn.Sequential(nn.Conv2d(3, 70, 3), nn.BatchNorm2d(70), nn.Flatten(), nn.Linear(70, 9))
        if not is_contiguous:
            model = model.to(memory_format=torch.channels_last)
        optimizer = LearnedTeleportOptimizer.for_model(model)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 3, 3, 3)).square().mean().backward()
            optimizer.step()
            params = list(model.parameters())
            known = torch.stack([optimizer.state[param]["fingerprint"] for param in params])
            assert torch.equal(known, fingerprints(params))


def clip(param: Tensor) -> None:
    param.data.clamp_(-0.05, 0.05)


def mask(param: Tensor) -> None:
    with torch.no_grad():
        param[: len(param) // 2] = 0.0


def unit_norm(param: Tensor) -> None:
    param.data = param.data / param.data.norm()


def permute(param: Tensor) -> None:
    param.data.copy_(param.data.flip(0))


WRITES = {"clip": clip, "mask": mask, "unit norm": unit_norm, "permute": permute}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("is_native", [True, False])
def test_what_is_written_after_every_step_holds_in_the_average(
    write: Callable[[Tensor], None], is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_native:
        monkeypatch.setattr(native, "_native", None)
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, teleport=False)
    for _ in range(12):
        train(model, optimizer, 1)
        write(model[2].weight)
    iterates, average = weights_of(model), optimizer.averaged_parameters()
    assert torch.equal(average["2.weight"], iterates["2.weight"])
    assert not torch.equal(average["0.weight"], iterates["0.weight"])  # the control: nobody writes there
    assert same_weights(seen(optimizer, model), average)
    assert same_weights(weights_of(model), iterates)


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("at", [30, 80])
def test_the_average_begins_again_at_what_was_written(
    is_native: bool, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the next step is one with a teleport; the average then has the age of its new beginning."""
    if not is_native:
        monkeypatch.setattr(native, "_native", None)
    model, optimizer = trained(at)
    with torch.no_grad():
        model[0].weight.add_(100.0)
    expected = weights_of(model)["0.weight"].double()
    for age in range(6):
        train(model, optimizer, 1)
        value = weights_of(model)["0.weight"].double()
        expected = expected + averaging_weight(age) * (value - expected)
    average = optimizer.averaged_parameters()["0.weight"].double()
    assert float((average - expected).norm()) <= 0.02 * float((value - expected).norm())
    assert float((average - value).norm()) > 0.1 * float((value - expected).norm())


def test_writing_the_same_values_changes_nothing() -> None:
    """The control: swapping weights out and in again, as those who average by themselves do."""
    models = []
    for is_swapped in (False, True):
        model, optimizer = trained(20)
        if is_swapped:
            kept = copy.deepcopy(model.state_dict())
            model.load_state_dict(network(seed=5).state_dict())
            model.load_state_dict(kept)
        train(model, optimizer, 5)
        models.append(optimizer.averaged_parameters())
    assert same_weights(*models)


def test_loaded_weights_stay() -> None:
    """As of the best epoch, into a model in either mode; then training goes on from there."""
    for is_eval in (False, True):
        model, optimizer = trained(20)
        best = {name: value.clone() for name, value in weights_of(network(seed=7)).items()}
        if is_eval:
            optimizer.eval()
        model.load_state_dict(best)
        assert same_weights(optimizer.averaged_parameters(), best)
        optimizer.train()
        optimizer.eval()
        assert same_weights(weights_of(model), best)
        optimizer.train()
        assert same_weights(weights_of(model), best)
        train(model, optimizer, 1)
        assert not same_weights(weights_of(model), best)


def test_what_is_written_into_one_tensor_while_it_is_in_place_stays() -> None:
    model, optimizer = trained(20)
    iterates = weights_of(model)
    with optimizer.averaged(), torch.no_grad():
        model[2].bias.fill_(3.0)
    assert torch.equal(model[2].bias, torch.full((10,), 3.0))
    assert torch.equal(optimizer.averaged_parameters()["2.bias"], torch.full((10,), 3.0))
    iterates.pop("2.bias")
    assert same_weights({name: value for name, value in weights_of(model).items() if name != "2.bias"}, iterates)
