"""The average of the iterates: nobody sees it who does not ask, and whoever asks sees the right one."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.optim.averaging import swap_in
from tests.helpers.averages import seen, trained
from tests.helpers.classification import X, Y, network, train
from tests.helpers.comparing import same_weights, weights_of
from tests.helpers.expected_warnings import OPEN_ENDED_SAVED

pytestmark = OPEN_ENDED_SAVED


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_calls_of_the_model_see_its_parameters(context: Callable[[], torch.no_grad]) -> None:
    model, _ = trained()
    plain = network()
    plain.load_state_dict(model.state_dict())
    with context():
        assert torch.equal(model(X), plain(X))
        assert torch.equal(model[0](X), plain[0](X))


@pytest.mark.private_torch
def test_no_hook_stays_on_the_model() -> None:
    model, _ = trained()
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(module, name) for module in model.modules() for name in hooks)
    io_copy = io.BytesIO()
    torch.save(model, io_copy)
    io_copy.seek(0)
    restored = torch.load(io_copy, weights_only=False)
    assert torch.equal(restored(X), model(X))


# Looking at it.


def test_three_ways_to_look_show_the_same() -> None:
    model, optimizer = trained()
    iterates, average = weights_of(model), optimizer.averaged_parameters()
    assert not same_weights(average, iterates)
    assert same_weights(seen(optimizer, model), average)
    optimizer.eval()
    assert same_weights(weights_of(model), average)
    assert same_weights(optimizer.averaged_parameters(), average)
    optimizer.train()
    assert same_weights(weights_of(model), iterates)


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
            assert same_weights(optimizer.averaged_parameters(), average)
        elif way == "save":
            optimizer.state_dict()
        elif way == "copy":
            other, other_optimizer = copy.deepcopy((model, optimizer))
            other_optimizer.train()
            assert same_weights(weights_of(other), iterates)
        assert same_weights(weights_of(model), average if is_average else iterates)
    while entered:
        entered.pop()[0].__exit__(None, None, None)
    optimizer.train()
    assert same_weights(weights_of(model), iterates)


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
        assert same_weights(weights_of(model), before)
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
        assert same_weights(weights_of(model), optimizer.averaged_parameters())
    assert "another thread is inside averaged()" in messages.pop()
    assert same_weights(weights_of(model), iterates)
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
    assert same_weights(weights_of(model), before)
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
    assert same_weights(weights_of(model), before)
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
    assert same_weights(*results)


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
    assert same_weights(dict(zip(weights_of(model), average.values())), seen(optimizer, model))


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
    assert same_weights(before, weights_of(with_average))  # The steps are the same.
    assert "average_offset" not in optimizer.state[model[0].weight]
    optimizer.eval()
    assert same_weights(weights_of(model), before)
    optimizer.train()
    with pytest.raises(RuntimeError, match=r"average=False.*after 12 steps"):
        optimizer.averaged()
    with pytest.raises(RuntimeError, match="average=True"):
        optimizer.averaged_parameters()


def test_at_the_end_of_a_run_the_parameters_are_the_result() -> None:
    model, optimizer = trained(20, average=False, total_steps=20)
    before = weights_of(model)
    assert same_weights(seen(optimizer, model), before)
    average = optimizer.averaged_parameters()
    assert same_weights(average, before)
    average["0.weight"].zero_()
    assert same_weights(weights_of(model), before)


@pytest.mark.parametrize("param", [torch.ones(3, 2).to(torch.float8_e4m3fn), torch.ones(3, 2).to_sparse()])
def test_parameters_that_cannot_be_averaged_are_refused(param: Tensor) -> None:
    with pytest.raises(ValueError, match="no average of such iterates can be kept"):
        LearnedTeleportOptimizer([nn.Parameter(param, requires_grad=False)])
    LearnedTeleportOptimizer([nn.Parameter(param, requires_grad=False)], average=False)
