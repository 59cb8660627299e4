"""A search that fails costs teleports and one warning, and never a step."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.symmetry import find_symmetries
from teleport_optim.symmetry.inputs import InputWatch
from tests.helpers.small_models import Model
from tests.helpers.specs import reasons_of

pytestmark = pytest.mark.private_torch


def train(model: nn.Module, call: Callable[[], Tensor], steps: int = 3) -> list[str]:
    """The warnings of a few steps, in which every parameter moves."""
    optimizer = LearnedTeleportOptimizer(model.parameters(), model=model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            call().square().mean().backward()
            optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters()))
    return [str(one.message) for one in record if "teleport" in str(one.message)]


class Failing(nn.Module):
    """A model that fails wherever it is called without data."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.a, self.b, self.error = nn.Linear(4, 6), nn.Linear(6, 2), error

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor:
            raise self.error
        return self.b(self.a(x).relu())


def endless() -> None:
    endless()


@pytest.mark.parametrize(
    "error", [OSError("disk full"), MemoryError(), RecursionError("too deep"), AttributeError("x"), StopIteration()]
)
def test_an_error_within_the_search_costs_one_warning(error: Exception) -> None:
    model, x = Failing(error), torch.randn(3, 4)
    (message,) = train(model, lambda: model(x))
    assert type(error).__name__ in message
    assert "pass symmetries=" in message
    assert "teleport=False" in message


def test_an_interrupt_is_passed_on() -> None:
    model, x = Failing(KeyboardInterrupt()), torch.randn(3, 4)
    optimizer = LearnedTeleportOptimizer(model.parameters(), model=model)
    model(x).sum().backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()


def test_a_search_for_the_user_raises_what_is_documented() -> None:
    for error in (OSError("disk full"), RecursionError(), MemoryError()):
        with pytest.raises(ValueError, match=f"cannot take example_inputs.*{type(error).__name__}"):
            find_symmetries(Failing(error), torch.randn(3, 4))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(3, 5, batch_first=True), nn.Linear(5, 1)

    def forward(self, packed: PackedSequence) -> Tensor:
        out: Tensor = self.out(pad_packed_sequence(self.cell(packed)[0], batch_first=True)[0])
        return out


def test_packed_sequences_cost_teleports_and_no_call() -> None:
    model = Packed()
    packed = pack_padded_sequence(torch.randn(3, 4, 3), torch.tensor([4, 2, 1]), batch_first=True)
    (message,) = train(model, lambda: model(packed))
    assert "PackedSequence" in message
    assert reasons_of(find_symmetries(model, packed))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_cost_teleports_and_no_call() -> None:
    model = Model(lambda m, x: m.b(m.a(x).relu()).to_padded_tensor(0.0), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    (message,) = train(model, lambda: model(nested))
    assert "nested" in message


def test_inputs_within_containers_are_seen() -> None:
    model = Model(
        lambda m, batch, *, scale: m.b(m.a(batch["x"][0]).relu()) * scale["s"], a=nn.Linear(4, 6), b=nn.Linear(6, 2)
    )
    batch, scale = {"x": [torch.randn(3, 4)], "name": "train"}, {"s": torch.ones(1)}
    optimizer = LearnedTeleportOptimizer(model.parameters(), model=model)
    model(batch, scale=scale).sum().backward()
    optimizer.step()
    assert [symmetry.id for symmetry in optimizer.spec] == ["a:scaling"]


def test_an_optimizer_of_a_single_tensor_does_not_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("there is nothing to be found")

    monkeypatch.setattr("teleport_optim.optim.binding.find_symmetries", fail)
    model, x = nn.Linear(4, 1, bias=False), torch.randn(3, 4)
    assert train(model, lambda: model(x)) == []
    assert not any(isinstance(hook, InputWatch) for hook in model._forward_pre_hooks.values())
