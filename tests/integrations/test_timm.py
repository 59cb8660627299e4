"""The factory, the schedules and the Lookahead of timm. AdamW is the control."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import Lookahead, create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from teleport_optim import LearnedTeleportOptimizer
from tests.helpers import classification
from tests.helpers.digits import (
    BATCHES,
    Make,
    X,
    Y,
    adamw,
    assert_same,
    assert_teleports,
    everyone,
    network,
    ours,
    teleport_size,
    warned_of_a_schedule,
)


def resnet() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("test_resnet", in_chans=1, num_classes=10, stem_type="")


def train_on_images(model: nn.Module, optimizer: Optimizer, steps: int) -> tuple[list[float], list[float]]:
    losses, sizes = [], []
    for step in range(steps):
        inputs, labels = BATCHES[step % len(BATCHES)]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs.view(-1, 1, 8, 8)), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        sizes.append(teleport_size(optimizer))
    return losses, sizes


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("make", ["teleport", "adamw"])
def test_timm_factory(make: str) -> None:
    model = resnet()
    options = {"model": model, "total_steps": 21} if make == "teleport" else {"lr": 1e-3}
    optimizer = create_optimizer_v2(model, make, weight_decay=0.1, eps=1e-8, **options)
    undecayed, decayed = optimizer.param_groups
    assert (undecayed["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    assert {param.ndim for param in undecayed["params"]} == {1}
    losses, sizes = train_on_images(model, optimizer, 21)
    assert sum(losses[-7:]) < sum(losses[:7])
    assert_teleports(ours if make == "teleport" else adamw, sizes)


@pytest.mark.usefixtures("registered")
def test_timm_factory_keeps_the_learned_decay_of_parameters() -> None:
    """With a model timm sets every group's decay, to 0 if it is given none."""
    model, other = resnet(), resnet()
    made = create_optimizer_v2(model.parameters(), "teleport", weight_decay=None, model=model, total_steps=21)
    assert [group["weight_decay"] for group in made.param_groups] == [None]
    given = LearnedTeleportOptimizer.for_model(other, total_steps=21)
    assert train_on_images(model, made, 3) == train_on_images(other, given, 3)
    assert_same(model, other)


@everyone
@pytest.mark.usefixtures("registered")
def test_timm_layer_decay(make: Make) -> None:
    model = resnet()
    name, options = ("teleport", {"model": model, "total_steps": 21}) if make is ours else ("adamw", {})
    optimizer = create_optimizer_v2(model, name, lr=1.0, layer_decay=0.5, **options)
    CosineLRScheduler(optimizer, t_initial=21, t_in_epochs=False).step_update(0)
    assert sorted({group["lr"] for group in optimizer.param_groups})[-2:] == [0.5, 1.0]
    first, last = (copy.deepcopy(param) for param in (model.conv1.weight, model.fc.weight))
    train_on_images(model, optimizer, 1)
    assert not torch.equal(model.conv1.weight, first)
    assert not torch.equal(model.fc.weight, last)


@everyone
def test_timm_schedule(make: Make) -> None:
    model = network()
    optimizer = make(model, 21)
    first = optimizer.defaults["lr"]
    schedule = CosineLRScheduler(optimizer, t_initial=12, warmup_t=2, t_in_epochs=False, warmup_prefix=True)
    rates = []
    for step in range(21):
        before = network()
        before.load_state_dict(model.state_dict())
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"] / first)
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        with warned_of_a_schedule(make) if step == 1 else nullcontext():  # where it changes first
            optimizer.step()
        moved = not torch.equal(before[0].weight, model[0].weight)
        assert moved == (rates[-1] > 0)
    assert rates[:4] == pytest.approx([0.0, 0.5, 1.0, 0.983], abs=1e-3)
    assert rates[-1] == 0.0


def test_slots_of_wrappers_are_given_back() -> None:
    model = classification.network()

    def make() -> Lookahead:
        return Lookahead(LearnedTeleportOptimizer.for_model(model, total_steps=100), k=2)

    optimizer = make()
    classification.train(model, optimizer, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = make()
    resumed.load_state_dict(saved)
    for before, after in zip(saved["state"].values(), resumed.state_dict()["state"].values()):
        assert torch.equal(before["lookahead_slow_buff"], after["lookahead_slow_buff"])
    classification.train(model, resumed, 3)
