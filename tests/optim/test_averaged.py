"""The average of the iterates: nobody sees it who does not ask, and whoever asks sees the right one."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from teleport_optim import LearnedTeleportOptimizer, OptimizerStateError
from teleport_optim.optim.averaging import swap_in
from teleport_optim.optim.fingerprints import fingerprints
from teleport_optim.optim.kernels import native
from teleport_optim.optim.schedule import Horizon, averaging_weight
from tests.optim.test_optimizer import X, Y, network, train

pytestmark = pytest.mark.filterwarnings("ignore:the state of an open-ended run is saved")

Weights = dict[str, Tensor]


def trained(num_steps: int = 12, **options: object) -> tuple[nn.Sequential, LearnedTeleportOptimizer]:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, **options)
    train(model, optimizer, num_steps)
    return model, optimizer


def weights_of(model: nn.Module) -> Weights:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def seen(optimizer: LearnedTeleportOptimizer, model: nn.Module) -> Weights:
    with optimizer.averaged():
        return weights_of(model)


# What it is.


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
    assert not same(iterates, optimizer.averaged_parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_calls_of_the_model_see_its_parameters(context: Callable[[], torch.no_grad]) -> None:
    model, _ = trained()
    plain = network()
    plain.load_state_dict(model.state_dict())
    with context():
        assert torch.equal(model(X), plain(X))
        assert torch.equal(model[0](X), plain[0](X))


def test_no_hook_stays_on_the_model() -> None:
    model, _ = trained()
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(module, name) for module in model.modules() for name in hooks)
    io_copy = io.BytesIO()
    torch.save(model, io_copy)
    io_copy.seek(0)
    restored = torch.load(io_copy, weights_only=False)
    assert torch.equal(restored(X), model(X))


def test_it_ends_where_the_parameters_do() -> None:
    model, optimizer = trained(30, total_steps=30)
    assert same(optimizer.averaged_parameters(), weights_of(model))
    model, optimizer = trained(27, total_steps=30)
    assert not same(optimizer.averaged_parameters(), weights_of(model))


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


# Looking at it.


def test_three_ways_to_look_show_the_same() -> None:
    model, optimizer = trained()
    iterates, average = weights_of(model), optimizer.averaged_parameters()
    assert not same(average, iterates)
    assert same(seen(optimizer, model), average)
    optimizer.eval()
    assert same(weights_of(model), average)
    assert same(optimizer.averaged_parameters(), average)
    optimizer.train()
    assert same(weights_of(model), iterates)


WAYS = ("eval", "train", "enter", "leave", "look", "save", "copy")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(WAYS), max_size=12), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_no_order_of_looking_changes_anything(ways: list[str], dtype: torch.dtype) -> None:
    model = network().to(dtype)
    optimizer = LearnedTeleportOptimizer.for_model(model)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X.to(dtype)), Y).backward()
        optimizer.step()
    iterates, average = weights_of(model), optimizer.averaged_parameters()
    entered = []
    is_average = False
    for way in ways:
        if way == "eval":
            optimizer.eval()
            is_average = True
        elif way == "train":
            optimizer.train()
            is_average = False
        elif way == "enter":
            entered.append((optimizer.averaged(), is_average))
            entered[-1][0].__enter__()
            is_average = True
        elif way == "leave" and entered:
            context, was_average = entered.pop()
            context.__exit__(None, None, None)
            is_average = is_average and was_average
        elif way == "look":
            assert same(optimizer.averaged_parameters(), average)
        elif way == "save":
            optimizer.state_dict()
        elif way == "copy":
            other, other_optimizer = copy.deepcopy((model, optimizer))
            other_optimizer.train()
            assert same(weights_of(other), iterates)
        assert same(weights_of(model), average if is_average else iterates)
    while entered:
        entered.pop()[0].__exit__(None, None, None)
    optimizer.train()
    assert same(weights_of(model), iterates)


@pytest.mark.parametrize("way", ["context", "eval"])
def test_no_step_is_taken_while_it_is_in_place(way: str) -> None:
    model, optimizer = trained()
    errors: list[Exception] = []

    def step() -> None:
        try:
            optimizer.step()
        except RuntimeError as error:
            errors.append(error)

    if way == "eval":
        optimizer.eval()
    with optimizer.averaged():
        before = weights_of(model)
        step()
        other = threading.Thread(target=step)
        other.start()
        other.join()
        assert same(weights_of(model), before)
    optimizer.train()
    assert len(errors) == 2
    assert all("call train() or leave averaged()" in str(error) for error in errors)
    optimizer.step()


def test_one_thread_at_a_time_swaps() -> None:
    model, optimizer = trained()
    messages = []

    def look() -> None:
        try:
            with optimizer.averaged():
                messages.append("inside")
        except RuntimeError as error:
            messages.append(str(error))
        optimizer.averaged_parameters()

    iterates = weights_of(model)
    with optimizer.averaged():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert same(weights_of(model), optimizer.averaged_parameters())
    assert "another thread is inside averaged()" in messages.pop()
    assert same(weights_of(model), iterates)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert messages == ["inside"]


def test_a_thread_that_looks_on_sees_whole_steps() -> None:
    """All tensors of what it gets are of one step: here every step moves all biases by the same."""
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(30)])
    optimizer = LearnedTeleportOptimizer.for_model(model, teleport=False)
    for param in model.parameters():
        nn.init.ones_(param)
    stop, torn = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            biases = [value for name, value in optimizer.averaged_parameters().items() if name.endswith("bias")]
            if not all(torch.equal(value, biases[0]) for value in biases):
                torn.append(biases)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(100):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    stop.set()
    thread.join()
    assert not torn


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_parameters_come_back_after_an_error(error: type[BaseException]) -> None:
    model, optimizer = trained()
    before = weights_of(model)
    with pytest.raises(error), optimizer.averaged():
        raise error
    assert same(weights_of(model), before)
    optimizer.step()


@pytest.mark.parametrize("tensors", range(7))
def test_an_interrupt_while_swapping_leaves_nothing_behind(tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    before = weights_of(model)

    def interrupted(pairs: list[tuple[Tensor, dict[str, Tensor]]]) -> None:
        swap_in(pairs[:tensors])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("teleport_optim.optim.averaged.swap_in", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.eval()
    assert same(weights_of(model), before)
    optimizer.step()


def test_a_waiting_backward_pass_does_not_notice() -> None:
    results = []
    for is_evaluated in (False, True):
        model = network()
        optimizer = LearnedTeleportOptimizer.for_model(model)
        for _ in range(15):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(X), Y)
            if is_evaluated:
                with optimizer.averaged(), torch.inference_mode():
                    model(X)
            loss.backward()
            optimizer.step()
        results.append(weights_of(model))
    assert same(*results)


def test_names_of_tied_weights_are_all_there() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

    model = Tied()
    optimizer = LearnedTeleportOptimizer.for_model(model)
    tokens = torch.arange(7)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
    average = optimizer.averaged_parameters()
    assert average.keys() == model.state_dict().keys()
    other = Tied()
    other.load_state_dict(model.state_dict() | average)
    with optimizer.averaged():
        assert torch.equal(model(tokens), other(tokens))


def test_without_names_they_are_numbers() -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer(model.parameters())
    train(model, optimizer, 3)
    average = optimizer.averaged_parameters()
    assert list(average) == [str(number) for number in range(len(weights_of(model)))]
    assert same(dict(zip(weights_of(model), average.values())), seen(optimizer, model))


def test_the_model_does_not_keep_the_optimizer_alive() -> None:
    model, optimizer = trained()
    watched = weakref.ref(optimizer)
    optimizer.eval()
    del optimizer
    gc.collect()
    assert watched() is None
    model(X)


# Without an average.


def test_it_can_be_left_out() -> None:
    model, optimizer = trained(average=False)
    with_average, _ = trained()
    before = weights_of(model)
    assert same(before, weights_of(with_average))  # The steps are the same.
    assert "average_offset" not in optimizer.state[model[0].weight]
    optimizer.eval()
    assert same(weights_of(model), before)
    optimizer.train()
    with pytest.raises(RuntimeError, match=r"average=False.*after 12 steps"):
        optimizer.averaged()
    with pytest.raises(RuntimeError, match="average=True"):
        optimizer.averaged_parameters()


def test_at_the_end_of_a_run_the_parameters_are_the_result() -> None:
    model, optimizer = trained(20, average=False, total_steps=20)
    before = weights_of(model)
    assert same(seen(optimizer, model), before)
    average = optimizer.averaged_parameters()
    assert same(average, before)
    average["0.weight"].zero_()
    assert same(weights_of(model), before)


@pytest.mark.parametrize("param", [torch.ones(3, 2).to(torch.float8_e4m3fn), torch.ones(3, 2).to_sparse()])
def test_parameters_that_cannot_be_averaged_are_refused(param: Tensor) -> None:
    with pytest.raises(ValueError, match="no average of such iterates can be kept"):
        LearnedTeleportOptimizer([nn.Parameter(param, requires_grad=False)])
    LearnedTeleportOptimizer([nn.Parameter(param, requires_grad=False)], average=False)


# Writes of others.


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
    assert same(seen(optimizer, model), average)
    assert same(weights_of(model), iterates)


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
    assert same(*models)


def test_loaded_weights_stay() -> None:
    """As of the best epoch, into a model in either mode; then training goes on from there."""
    for is_eval in (False, True):
        model, optimizer = trained(20)
        best = {name: value.clone() for name, value in weights_of(network(seed=7)).items()}
        if is_eval:
            optimizer.eval()
        model.load_state_dict(best)
        assert same(optimizer.averaged_parameters(), best)
        optimizer.train()
        optimizer.eval()
        assert same(weights_of(model), best)
        optimizer.train()
        assert same(weights_of(model), best)
        train(model, optimizer, 1)
        assert not same(weights_of(model), best)


def test_what_is_written_into_one_tensor_while_it_is_in_place_stays() -> None:
    model, optimizer = trained(20)
    iterates = weights_of(model)
    with optimizer.averaged(), torch.no_grad():
        model[2].bias.fill_(3.0)
    assert torch.equal(model[2].bias, torch.full((10,), 3.0))
    assert torch.equal(optimizer.averaged_parameters()["2.bias"], torch.full((10,), 3.0))
    iterates.pop("2.bias")
    assert same({name: value for name, value in weights_of(model).items() if name != "2.bias"}, iterates)


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
    assert same(optimizer.averaged_parameters(), weights_of(model))


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


# Saving.


@pytest.mark.parametrize("options", [{}, {"total_steps": 90}, {"average": False}])
@pytest.mark.parametrize("is_eval", [True, False])
@pytest.mark.parametrize("is_optimizer_first", [True, False])
def test_a_run_resumes_bit_for_bit_from_either_mode(
    options: dict[str, object], is_eval: bool, is_optimizer_first: bool
) -> None:
    model, optimizer = trained(40, **options)
    if is_eval:
        optimizer.eval()
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    other = network(seed=3)
    resumed = LearnedTeleportOptimizer.for_model(other, **options)
    loads = [(other, "model"), (resumed, "optimizer")]
    for target, key in reversed(loads) if is_optimizer_first else loads:
        target.load_state_dict(saved[key])
    assert same(weights_of(other), weights_of(model))
    assert saved["optimizer"]["param_groups"][0]["is_eval"] == (is_eval and options.get("average", True))
    for own in (optimizer, resumed):
        own.train()
    assert same(weights_of(other), weights_of(model))
    train(model, optimizer, 50)
    train(other, resumed, 50)
    assert same(weights_of(other), weights_of(model))
    if options.get("average", True):
        assert same(resumed.averaged_parameters(), optimizer.averaged_parameters())


def test_a_state_of_evaluation_mode_says_so_at_the_first_step() -> None:
    model, optimizer = trained()
    optimizer.eval()
    other = network(seed=3)
    resumed = LearnedTeleportOptimizer.for_model(other)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    nn.functional.cross_entropy(other(X), Y).backward()
    with pytest.raises(RuntimeError, match=r"call train\(\)"):
        resumed.step()


def test_other_weights_beside_a_state_of_evaluation_mode_stay() -> None:
    _, optimizer = trained()
    optimizer.eval()
    other = network(seed=3)
    resumed = LearnedTeleportOptimizer.for_model(other)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.train()
    assert same(weights_of(other), weights_of(network(seed=3)))


def test_states_of_the_other_setting() -> None:
    model, optimizer = trained()
    other = network(seed=3)
    other.load_state_dict(model.state_dict())
    without = LearnedTeleportOptimizer.for_model(other, average=False)
    without.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 3)
    train(other, without, 3)
    assert same(weights_of(model), weights_of(other))
    with_average = LearnedTeleportOptimizer.for_model(other)
    with_average.load_state_dict(without.state_dict())
    assert same(with_average.averaged_parameters(), weights_of(other))  # It begins here.
    optimizer.eval()
    before = copy.deepcopy(without.state_dict())
    with pytest.raises(OptimizerStateError, match="load it into one with average=True, or call train"):
        without.load_state_dict(optimizer.state_dict())
    assert str(before) == str(without.state_dict())


@pytest.mark.filterwarnings("error:the state of an open-ended run is saved")
def test_saving_an_open_ended_run_whose_result_nobody_has_seen_warns_once() -> None:
    _, optimizer = trained(3)
    with pytest.warns(UserWarning, match="the average of the iterates"):
        optimizer.state_dict()
    optimizer.state_dict()
    for options in ({"average": False}, {"total_steps": 9}):
        trained(3, **options)[1].state_dict()
    model, looked_at = trained(3)
    looked_at.averaged_parameters()
    saved = looked_at.state_dict()
    resumed = LearnedTeleportOptimizer.for_model(model)
    resumed.load_state_dict(saved)
    train(model, resumed, 1)
    resumed.state_dict()
    LearnedTeleportOptimizer.for_model(network()).state_dict()


# A length of the run that changes.


def rates(optimizer: LearnedTeleportOptimizer) -> float:
    return optimizer.stats().tensors["0.weight"].rate


def change_in_groups(optimizer: LearnedTeleportOptimizer, total_steps: int | None) -> None:
    for group in optimizer.param_groups:
        group["total_steps"] = total_steps


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(st.none(), st.integers(1, 300)),
    st.lists(st.tuples(st.integers(0, 400), st.one_of(st.none(), st.integers(1, 300))), max_size=4),
)
def test_no_change_of_the_horizon_makes_the_rate_jump(first: int | None, changes: list[tuple[int, int | None]]) -> None:
    horizon, step = Horizon(first), 0
    for until, left in [*sorted(changes, key=lambda change: change[0]), (400, None)]:
        levels = [horizon.annealing(number) for number in range(step, until + 1)]
        slope = max((abs(a - b) for a, b in pairwise(levels)), default=0.0)
        total = horizon.total_steps
        assert all(0.0 < level <= 1.0 for level in levels)
        if total is not None and until < total:
            assert slope <= max(1.0 / (0.3 * total), horizon.level / max(total - horizon.changed_at, 1)) + 1e-9
        step = until
        changed = horizon.changed(None if left is None else step + left, step)
        assert changed.annealing(step) == pytest.approx(horizon.annealing(step))
        horizon = changed


@pytest.mark.parametrize("change", [LearnedTeleportOptimizer.set_total_steps, change_in_groups])
@pytest.mark.parametrize(("first", "then"), [(50, 120), (None, 60), (100, 48), (100, None)])
def test_a_running_optimizer_takes_another_length(
    change: Callable[[LearnedTeleportOptimizer, int | None], None], first: int | None, then: int | None
) -> None:
    model, optimizer = trained(45, total_steps=first)
    before, average = rates(optimizer), optimizer.averaged_parameters()
    change(optimizer, then)
    assert same(optimizer.averaged_parameters(), average)
    train(model, optimizer, 1)
    assert rates(optimizer) == pytest.approx(before, rel=0.35)
    if then is not None:
        train(model, optimizer, then - 46)
        assert same(optimizer.averaged_parameters(), weights_of(model))
        assert rates(optimizer) < 0.5 * before


def test_a_change_is_in_the_state() -> None:
    model, optimizer = trained(45, total_steps=50)
    change_in_groups(optimizer, 120)
    other = network(seed=3)
    resumed = LearnedTeleportOptimizer.for_model(other, total_steps=50)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 20)
    train(other, resumed, 20)
    assert same(weights_of(model), weights_of(other))


def test_a_run_can_be_finished() -> None:
    model, optimizer = trained(30)
    optimizer.finish_in(20)
    train(model, optimizer, 20)
    assert same(optimizer.averaged_parameters(), weights_of(model))


@pytest.mark.parametrize("total_steps", [0, 12, -3, 1.5, True, "many"])
def test_lengths_that_cannot_be_are_refused(total_steps: object) -> None:
    _, optimizer = trained(12, total_steps=40)
    with pytest.raises(ValueError, match="total_steps"):
        optimizer.set_total_steps(total_steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="total_steps"):
        optimizer.finish_in(0)
    assert optimizer.param_groups[0]["total_steps"] == 40


def test_a_schedule_on_top_is_warned_about_once() -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=30)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    train(model, optimizer, 1)
    schedule.step()
    with pytest.warns(UserWarning, match="a scheduler multiplies with that. Leave the scheduler out"):
        train(model, optimizer, 1)
    schedule.step()
    train(model, optimizer, 1)


@pytest.mark.parametrize("total_steps", [30, None])
def test_a_constant_schedule_and_one_without_horizon_are_fine(total_steps: int | None) -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=total_steps)
    factor = 1.0 if total_steps else 0.99
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor**step)
    for _ in range(5):
        train(model, optimizer, 1)
        schedule.step()
