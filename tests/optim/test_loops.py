"""Loops as people write them: what is reported is what is saved, and evaluation changes nothing. AdamW is the control."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from teleport_optim import LearnedTeleportOptimizer, find_symmetries
from tests.helpers.comparing import Weights, same_weights, weights_of
from tests.helpers.regression import (
    HELD_X,
    NUM_STEPS,
    QUARTERS,
    Make,
    X,
    adamw,
    everyone,
    has_other_average,
    held_out,
    loaded,
    looking,
    network,
    open_ended,
    ours,
    target_of,
    teleporting,
    train,
)


def report_and_save(
    called: nn.Module, optimizer: Optimizer, make: Make, is_averaged: bool, save: Callable[[], Any]
) -> list[tuple[float, Any]]:
    """The loss that is reported and what is saved, at 25, 50, 75 and 100 % of a run."""
    pairs = []
    for start, end in pairwise((0, *QUARTERS)):
        train(called, optimizer, range(start, end))
        with looking(optimizer) if is_averaged else nullcontext():
            pairs.append((held_out(called), save()))
        if is_averaged:  # It does matter which of the two is measured.
            assert (held_out(called) != pairs[-1][0]) == has_other_average(make, end)
    return pairs


in_both_ways = pytest.mark.parametrize("is_averaged", [False, True])


@everyone
@in_both_ways
@teleporting
def test_a_plain_loop(make: Make, is_averaged: bool, tmp_path: Path) -> None:
    model = network()
    optimizer = make(model, NUM_STEPS)
    files = (tmp_path / f"{number}.pt" for number in range(4))

    def save() -> Path:
        path = next(files)
        torch.save(model.state_dict(), path)
        return path

    for reported, path in report_and_save(model, optimizer, make, is_averaged, save):
        assert held_out(loaded(torch.load(path, weights_only=True))) == reported


@pytest.mark.private_torch
@everyone
@teleporting
@pytest.mark.parametrize(("is_averaged", "backend"), [(False, "aot_eager"), (True, "eager")])
def test_a_compiled_model(make: Make, is_averaged: bool, backend: str) -> None:
    torch.compiler.reset()
    model = network()
    called: Any = torch.compile(model, backend=backend)
    optimizer = make(model, NUM_STEPS)
    for reported, weights in report_and_save(called, optimizer, make, is_averaged, lambda: weights_of(model)):
        assert held_out(loaded(weights)) == pytest.approx(reported, rel=1e-5)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@everyone
@in_both_ways
@teleporting
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(make: Make, is_averaged: bool) -> None:
    called = DistributedDataParallel(network())
    optimizer = make(called, NUM_STEPS)
    pairs = report_and_save(called, optimizer, make, is_averaged, lambda: weights_of(called.module))
    for reported, weights in pairs:
        assert held_out(loaded(weights)) == pytest.approx(reported, rel=1e-6)


@everyone
@in_both_ways
@teleporting
@pytest.mark.usefixtures("process_group")
def test_fully_sharded_data_parallel(make: Make, is_averaged: bool) -> None:
    model = network()
    options = {} if make is adamw else {"symmetries": find_symmetries(model, X, groups=["scaling"])}
    mesh = init_device_mesh("cpu", (1,))
    for layer in (model[0], model[3], model):
        fully_shard(layer, mesh=mesh)
    optimizer = make(model, NUM_STEPS, **options)

    def save() -> Weights:
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        return {name: value.clone() for name, value in whole.items()}

    for reported, weights in report_and_save(model, optimizer, make, is_averaged, save):
        assert held_out(loaded(weights)) == pytest.approx(reported, rel=1e-6)


# The best epoch of a loop as it is.


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_epoch_is_no_worse_than_with_adamw(seed: int) -> None:
    """Noisy labels, validated after every epoch; nothing in the loop is changed but the line of the optimizer."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(256, 6, generator=generator)
    labels = target_of(inputs) + 0.5 * torch.randn(256, 1, generator=generator)

    def best(make: Callable[[nn.Module], Optimizer]) -> float:
        model, losses = network(seed), []
        optimizer = make(model)
        order = torch.Generator().manual_seed(seed)
        for _ in range(20):
            for own in torch.randperm(256, generator=order).split(16):
                optimizer.zero_grad()
                F.mse_loss(model(inputs[own]), labels[own]).backward()
                optimizer.step()
            with looking(optimizer):
                losses.append(held_out(model))
        return min(losses)

    control = best(lambda model: AdamW(model.parameters()))
    assert best(lambda model: LearnedTeleportOptimizer.for_model(model, total_steps=320)) <= control
    assert best(LearnedTeleportOptimizer.for_model) <= control


# Threads, several optimizers, interrupts, best weights.


@everyone
@teleporting
def test_a_thread_that_evaluates_while_another_trains(make: Make) -> None:
    def run(is_watched: bool) -> Weights:
        model = network()
        optimizer = make(model, NUM_STEPS)
        is_done, losses = threading.Event(), []

        def watch() -> None:
            while not is_done.is_set():
                losses.append(held_out(model))
                losses.append(held_out(copy.deepcopy(model)))

        thread = threading.Thread(target=watch)
        if is_watched:
            thread.start()
        try:
            for step in range(NUM_STEPS):
                train(model, optimizer, [step])
                with torch.no_grad():
                    model(HELD_X)
        finally:
            is_done.set()
            if is_watched:
                thread.join()
        assert all(torch.tensor(losses).isfinite())
        return weights_of(model)

    assert same_weights(run(is_watched=True), run(is_watched=False))


@everyone
@teleporting
@pytest.mark.parametrize("second", [ours, open_ended, adamw])
def test_a_second_optimizer_while_the_first_is_alive(make: Make, second: Make) -> None:
    def run(is_kept: bool) -> tuple[nn.Module, Optimizer | None]:
        model = network()
        first: Optimizer | None = make(model, NUM_STEPS)
        train(model, first, range(15))
        first = first if is_kept else None
        other = second(model, NUM_STEPS)
        train(model, other, range(20))
        before = weights_of(model)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                model(HELD_X)
        for own in (first, other):
            with looking(own) if own is not None else nullcontext():
                held_out(model)
        assert same_weights(weights_of(model), before)
        train(model, other, range(20, NUM_STEPS))
        return model, first

    (kept, first), (alone, _) = run(is_kept=True), run(is_kept=False)
    assert same_weights(weights_of(kept), weights_of(alone))
    if isinstance(first, LearnedTeleportOptimizer):  # Others have written everything since its last step.
        assert same_weights(first.averaged_parameters(), weights_of(kept))


class Stopped(nn.Module):
    """Is interrupted, before or after its second layer."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.network, self.place, self.is_stopping = network(), place, False

    def forward(self, inputs: Tensor) -> Tensor:
        for number, layer in enumerate(self.network):
            if number == self.place and self.is_stopping:
                raise KeyboardInterrupt
            inputs = layer(inputs)
        return inputs


@everyone
@in_both_ways
@teleporting
@pytest.mark.parametrize("place", [0, 4])
def test_an_evaluation_is_interrupted(make: Make, is_averaged: bool, place: int) -> None:
    ends = []
    for is_interrupted in (False, True):
        model = Stopped(place)
        optimizer = make(model, NUM_STEPS)
        for step in range(NUM_STEPS):
            train(model, optimizer, [step])
            if is_interrupted and step % 7 == 0:
                before = weights_of(model)
                model.is_stopping = True
                with pytest.raises(KeyboardInterrupt), looking(optimizer) if is_averaged else nullcontext():
                    held_out(model)
                model.is_stopping = False
                assert same_weights(weights_of(model), before)
        ends.append(weights_of(model))
    assert same_weights(*ends)


@everyone
@in_both_ways
@teleporting
@pytest.mark.parametrize("where", ["between", "inside"])
def test_the_best_weights_are_loaded_at_the_end(make: Make, is_averaged: bool, where: str) -> None:
    """What was recorded, what the model gives, and what a fresh one gives; and training may go on from there."""
    model = network()
    optimizer = make(model, 400)
    best, weights, bad, step = float("inf"), {}, 0, 0
    while bad < 4 and step < 400:
        train(model, optimizer, range(step, step + 5))
        step += 5
        with looking(optimizer) if is_averaged else nullcontext():
            loss = held_out(model)
            bad = 0 if loss < best else bad + 1
            if loss < best:
                best, weights = loss, copy.deepcopy(model.state_dict())
    assert step < 400
    with looking(optimizer) if where == "inside" else nullcontext():
        model.load_state_dict(weights)
    assert held_out(model) == held_out(loaded(weights)) == best
    with looking(optimizer):
        assert held_out(model) == best
    train(model, optimizer, [0])
    assert not same_weights(weights_of(model), weights)
