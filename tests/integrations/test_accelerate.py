"""Accelerate runs the plain loop. AdamW is the control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import nn

from tests.helpers.digits import (
    BATCHES,
    Make,
    assert_same,
    assert_teleports,
    everyone,
    loader,
    network,
    ours,
    reference,
    teleport_size,
)


def accelerated_epoch(
    accelerator: accelerate.Accelerator, model: nn.Module, optimizer: Any, data: Any, clip: float | None = None
) -> tuple[list[float], list[float]]:
    """The losses of the batches, and the teleports of the steps."""
    losses, sizes = [], []
    for inputs, labels in data:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients and clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if accelerator.sync_gradients:
            sizes.append(teleport_size(optimizer.optimizer))
    return losses, sizes


@everyone
@pytest.mark.parametrize("is_prepared_together", [False, True])
@pytest.mark.parametrize("options", [{}, {"accumulation": 2}, {"accumulation": 3, "clip": 0.1}])
def test_accelerate_runs_the_plain_loop(make: Make, is_prepared_together: bool, options: dict[str, Any]) -> None:
    accumulation = options.get("accumulation", 1)
    num_steps = 3 * -(-len(BATCHES) // accumulation)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = network()
    if is_prepared_together:
        model, optimizer, data = accelerator.prepare(model, make(model, num_steps), loader())
    else:
        model, data = accelerator.prepare(model, loader())
        optimizer = accelerator.prepare(make(model, num_steps))
    sizes = []
    for _ in range(3):
        sizes += accelerated_epoch(accelerator, model, optimizer, data, options.get("clip"))[1]
    assert len(sizes) == num_steps
    assert {optimizer.state[param]["step"].item() for param in model.parameters()} == {float(num_steps)}
    assert_same(model, reference(make, 3, **options))
    assert_teleports(make, sizes)


@everyone
def test_accelerate_resumes_bit_for_bit(make: Make, tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    model, optimizer, data = accelerator.prepare(model, make(model, 21), loader())
    accelerated_epoch(accelerator, model, optimizer, data)
    accelerator.save_state(str(tmp_path))
    losses = [accelerated_epoch(accelerator, model, optimizer, data) for _ in range(2)]

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    resumed = network(seed=9)
    resumed, optimizer, data = accelerator.prepare(resumed, make(resumed, 21), loader())
    accelerator.load_state(str(tmp_path))
    assert [accelerated_epoch(accelerator, resumed, optimizer, data) for _ in range(2)] == losses
    assert_same(resumed, model)


def test_accelerate_mixed_precision() -> None:
    """Accelerate replaces the forward method of the model by one that casts."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = network()
    model, optimizer, data = accelerator.prepare(model, ours(model, 21), loader())
    losses, sizes = zip(*(accelerated_epoch(accelerator, model, optimizer, data) for _ in range(3)))
    assert sum(losses[-1]) < sum(losses[0])
    assert_teleports(ours, [size for epoch in sizes for size in epoch])
    assert len(optimizer.optimizer.spec) == 2
