"""A step that teleports needs little memory."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.optim.kernels.native import are_plain

pytestmark = pytest.mark.private_torch


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
