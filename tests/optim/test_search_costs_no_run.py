"""A search that fails, or takes too long, costs teleports and one warning, and never a step."""

import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.profiler import ProfilerActivity, profile

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.optim.kernels.native import are_plain
from teleport_optim.symmetry import find_symmetries
from teleport_optim.symmetry.inputs import InputWatch
from tests.helpers.odd_models import Model
from tests.helpers.specs import reasons_of


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def ids(model: nn.Module, inputs: Any, **options: Any) -> list[str]:
    return [symmetry.id for symmetry in find_symmetries(model, inputs, **options)]


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


# -------------------------------------------------------------------------------------------------------------- limits


def repeated(steps: int) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(steps):
            x = m.a(x).relu()
        out: Tensor = m.b(x)
        return out

    return Model(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2))


def test_a_search_stops_after_some_operations_and_says_so() -> None:
    model, x = repeated(40), torch.randn(3, 4)
    with pytest.warns(
        UserWarning, match=r"100 operations .*Raise max_operations.*symmetries=.*teleport=False"
    ) as record:
        spec = find_symmetries(model, x, max_operations=100)
    assert len(record) == 1
    assert len(spec) == 0
    assert "100 operations" in reasons_of(spec)["(root)"]
    assert reasons_of(find_symmetries(model, x)) == {}


def test_a_search_stops_after_some_seconds() -> None:
    model, x = repeated(100_000), torch.randn(3, 4)
    start = time.monotonic()
    with pytest.warns(UserWarning, match=r"0\.2 seconds"):
        assert len(find_symmetries(model, x, max_seconds=0.2)) == 0
    assert time.monotonic() - start < 10


def test_a_long_loop_is_searched_in_time_that_grows_with_its_length() -> None:
    def seconds(steps: int) -> float:
        model, x = repeated(steps), torch.randn(3, 4)
        start = time.process_time()
        find_symmetries(model, x, groups=["scaling"])
        return time.process_time() - start

    seconds(10)
    assert seconds(400) < 8 * seconds(100) + 0.5


# ------------------------------------------------------------------------------------------- what need not be refused


@dataclass
class Answer:
    logits: Tensor
    hidden: Any = None


def test_objects_as_outputs_do_not_move_and_refuse_nothing_else() -> None:
    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 5), "c": nn.Linear(5, 2)}

    def with_output(make: Callable[[Tensor, Tensor], Any]) -> list[str]:
        def forward(m: Any, x: Tensor) -> Any:
            h = m.b(m.a(x).relu()).relu()
            return make(m.c(h), h)

        return ids(Model(forward, **layers), torch.randn(3, 4), groups=["scaling"])

    assert with_output(lambda y, h: Answer(y)) == ["a:scaling", "b:scaling"]
    assert with_output(lambda y, h: Answer(y, {"h": [Answer(h)]})) == ["a:scaling"]
    assert with_output(lambda y, h: torch.distributions.Categorical(logits=y)) == ["a:scaling", "b:scaling"]
    assert with_output(lambda y, h: torch.distributions.Normal(y, h.exp()[:, :2])) == ["a:scaling"]
    assert with_output(lambda y, h: (y, lambda: h)) == ["a:scaling"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_part_is_refused_alone() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()))
    model = nn.Sequential(*mlp()[:2], nn.Linear(6, 6), scripted, *mlp()[2:], nn.ReLU(), nn.Linear(2, 3))
    inputs = torch.randn(5, 4)
    expected = model.eval()(inputs)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spec = find_symmetries(model, inputs, groups=["scaling"])
    assert [symmetry.id for symmetry in spec] == ["0:scaling", "4:scaling"]
    assert list(reasons_of(spec)) == ["3"]
    assert "scripted" in reasons_of(spec)["3"]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(model(inputs), expected)
    with_root = find_symmetries(torch.jit.script(mlp()), inputs)
    assert "scripted" in reasons_of(with_root)["(root)"]


def test_a_model_that_takes_one_dictionary() -> None:
    model = Model(lambda m, batch: m.b(m.a(batch["x"]).relu()) + batch["y"], a=nn.Linear(4, 6), b=nn.Linear(6, 2))

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            out: Tensor = self.inner(batch)
            return out

    example = {"x": torch.randn(3, 4), "y": torch.randn(3, 2)}
    assert ids(One(), example) == ["inner.a:permutation", "inner.a:scaling"]
    assert ids(One(), (example,)) == ["inner.a:permutation", "inner.a:scaling"]
    optimizer = LearnedTeleportOptimizer.for_model(One(), example_inputs=example)
    assert len(optimizer.spec) == 1


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.Identity()])
def test_a_batch_of_one_gives_what_a_batch_of_two_does(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    assert ids(model, torch.randn(1, 4)) == ids(model, torch.randn(2, 4)) != []


def test_a_batch_of_one_image() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1),
    )  # fmt: skip
    assert ids(model, torch.randn(1, 3, 6, 6)) == ids(model, torch.randn(3, 3, 6, 6)) != []


def test_no_batch_at_all_is_explained() -> None:
    with pytest.raises(ValueError, match=r"cannot take example_inputs in evaluation mode: .*as you would pass them"):
        find_symmetries(mlp(), torch.randn(1, 5))


# --------------------------------------------------------------------------------------------------------------- memory


def peak_of(call: Callable[[], object]) -> int:
    """Most bytes of tensors that a call has at a time, above those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


def peaks_of_steps(model: nn.Module, x: Tensor, steps: int) -> list[int]:
    """The peak of every step, of which those of number 0, 2, 4 and so on teleport."""
    optimizer = LearnedTeleportOptimizer.for_model(model, example_inputs=x)
    peaks = []
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for step in range(steps):
        if step == 0:
            for parameter in model.parameters():
                optimizer._slots_of(parameter)  # the state itself does not count
        peaks.append(peak_of(optimizer.step))
        assert (optimizer.teleport_size > 0) == (step % 2 == 0)
    return peaks


def deep(width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())))


@pytest.mark.skipif(not are_plain([]), reason="the step in C is not built")
def test_a_step_that_teleports_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teleport_optim.optim.schedule.TELEPORT_INTERVAL", 2)
    assert max(peaks_of_steps(deep(512, 10), torch.randn(2, 512), 3)) < 10e6  # beside 10 MB of parameters
    wide = nn.Sequential(nn.Embedding(16_000, 256), nn.ReLU(), nn.Linear(256, 4))
    assert max(peaks_of_steps(wide, torch.tensor([[3, 5]]), 3)) < 10e6  # beside a tensor of 16 MB


def test_a_teleport_with_torch_needs_no_more_memory_than_other_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teleport_optim.optim.schedule.TELEPORT_INTERVAL", 2)
    first, usual, second = peaks_of_steps(deep(192, 12).double(), torch.randn(2, 192).double(), 3)
    assert max(first, second) < 1.25 * usual
