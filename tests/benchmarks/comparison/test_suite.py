"""The tasks of comparisons: reproducible, learnable, and apart from what meta-training sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.comparison.suite import FAR, SUITE
from teleport_optim.controller.checkpoints import find_checkpoint, read_card
from teleport_optim.meta_training.tasks.data import Data, digits
from teleport_optim.meta_training.tasks.splits import CHANNELS, SEQUENCE_WIDTHS, WIDTHS
from teleport_optim.symmetry import SymmetrySpec, find_symmetries

pytest.importorskip("torchvision")

BARS = {
    "deep_mlp": 0.95,
    "vit": 0.97,
    "ill_conditioned": 0.97,
}
"""Share of the initial loss that must not be exceeded at the end; 0.9 for others."""
STEPS = {"torchvision_net": 150}
"""Steps to get there, 40 for others: ShuffleNet learns hardly anything in its first 40 at this rate."""
TORCHVISION = {"torchvision_net"}
"""Networks that were not made here: their sizes are as they are."""
TASKS = SUITE | FAR
each_task = pytest.mark.parametrize("name", TASKS)


def minibatch(name: str, data: Data, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rows = torch.randint(len(data.inputs), (TASKS[name].batch_size,), generator=generator)
    inputs = data.inputs[rows]
    if data.noise:
        inputs = inputs + data.noise * torch.randn(inputs.shape, generator=generator)
    return inputs, data.targets[rows]


def rows_of(*tensors: Tensor) -> set[bytes]:
    return {bytes(row.contiguous().numpy().data) for tensor in tensors for row in tensor.flatten(1)}


@each_task
def test_the_output_is_finite_and_differentiable(name: str) -> None:
    data, model = TASKS[name].make_data(), TASKS[name].make_model(0)
    inputs, targets = minibatch(name, data, torch.Generator().manual_seed(0))
    output = model(inputs)
    data.loss(output, targets).backward()
    assert output.isfinite().all()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    if not inputs.is_floating_point():
        assert data.noise == 0
        assert output.shape[:2] == targets.shape


@each_task
def test_the_seed_decides_the_model_and_the_global_generator_stays(name: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (TASKS[name].make_model(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    TASKS[name].make_data.__wrapped__()  # type: ignore[attr-defined]
    assert torch.equal(torch.get_rng_state(), before)


@each_task
def test_the_data_are_the_same_at_every_call_and_apart_from_the_test(name: str) -> None:
    data = TASKS[name].make_data()
    again = TASKS[name].make_data.__wrapped__()  # type: ignore[attr-defined]
    for field in ("inputs", "targets", "test_inputs", "test_targets"):
        assert torch.equal(getattr(data, field), getattr(again, field))
    assert len(data.inputs) == len(data.targets)
    assert len(data.test_inputs) == len(data.test_targets)
    assert not rows_of(data.inputs) & rows_of(data.test_inputs)


@each_task
def test_a_few_steps_of_adamw_lower_the_loss(name: str) -> None:
    task = TASKS[name]
    data, model, generator = task.make_data(), task.make_model(0), torch.Generator().manual_seed(0)
    optimizer = AdamW(model.parameters(), lr=1e-2 if name == "ill_conditioned" else 3e-3)
    losses = []
    for _ in range(STEPS.get(name, 40)):
        inputs, targets = minibatch(name, data, generator)
        loss = data.loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < BARS.get(name, 0.9) * losses[0]


def test_no_digit_is_one_of_meta_trainings() -> None:
    seen = rows_of(digits("train")[0], digits("validation")[0])
    on_digits = [task for task in TASKS.values() if task.make_data().inputs[0].numel() == 64]
    assert len(on_digits) >= 5
    for task in on_digits:
        data = task.make_data()
        assert not seen & rows_of(data.inputs, data.test_inputs)


@pytest.mark.parametrize("name", sorted(set(TASKS) - TORCHVISION))
def test_no_hidden_size_is_one_of_meta_trainings(name: str) -> None:
    model = TASKS[name].make_model(0)
    num_outputs = list(model.parameters())[-1].shape[0]
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            width, taken = layer.out_features, WIDTHS
        elif isinstance(layer, nn.Conv2d):
            width, taken = layer.out_channels, CHANNELS
        elif isinstance(layer, (nn.LSTM, nn.GRU)):
            width, taken = layer.hidden_size, SEQUENCE_WIDTHS
        elif isinstance(layer, nn.Embedding):
            width, taken = layer.embedding_dim, SEQUENCE_WIDTHS
        else:
            continue
        assert width == num_outputs or width not in {*taken["train"], *taken["validation"]}


@each_task
def test_symmetries_are_searched_without_an_error(name: str) -> None:
    model = TASKS[name].make_model(0)
    assert isinstance(find_symmetries(model, TASKS[name].make_data().inputs[:4]), SymmetrySpec)


def test_far_is_eight_times_what_meta_training_saw() -> None:
    seen = read_card(find_checkpoint("default"))["meta_training"]["max_horizon"]
    seen_widths = WIDTHS["train"] + WIDTHS["validation"]
    for name, task in FAR.items():
        widths = {len(param) for param in task.make_model(0).parameters()}
        assert task.steps == 8 * seen if name.startswith("long_") else max(widths) >= 8 * max(seen_widths)
