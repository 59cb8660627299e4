"""Compiled models and compiled steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from teleport_optim import LearnedTeleportOptimizer
from tests.helpers.classification import X, Y, network, random
from tests.helpers.expected_warnings import OF_OURS

pytestmark = [*OF_OURS, pytest.mark.private_torch]


@contextmanager
def counted_graphs() -> Iterator[list[int]]:
    """Counts what torch.compile compiles, without a compiler: a list with one entry for every graph."""
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(len(list(graph.graph.nodes)))
        return graph.forward

    compiled = torch.compile
    try:
        torch.compile = lambda target: compiled(target, backend=backend)  # type: ignore[assignment]
        yield graphs
    finally:
        torch.compile = compiled
        torch._dynamo.reset()


def trained_for(steps: int, *, compile_model: bool, compile_step: bool) -> tuple[nn.Module, LearnedTeleportOptimizer]:
    model = network().double()
    called = torch.compile(model) if compile_model else model
    optimizer = LearnedTeleportOptimizer.for_model(called, total_steps=60)  # type: ignore[arg-type]
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 60)
    step = torch.compile(optimizer.step) if compile_step else optimizer.step
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(called(X.double()), Y).backward()
        step()
        scheduler.step()
    return model, optimizer


@pytest.mark.filterwarnings("ignore:.*record_function.*")
@pytest.mark.parametrize("which", ["model", "step", "model and step"])
def test_compiled_once_and_teleports_as_ever(which: str) -> None:
    expected, _ = trained_for(45, compile_model=False, compile_step=False)
    with counted_graphs() as graphs:
        options = {"compile_model": "model" in which, "compile_step": "step" in which}
        trained_for(2, **options)
        first = len(graphs)
        model, optimizer = trained_for(45, **options)
    assert first >= 1
    assert len(graphs) <= 2 * first  # those of the second model; none since the rate, or the step, has changed
    assert len(optimizer.spec) == 2
    assert optimizer.stats().num_steps == 45
    for one, other in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*record_function.*")
def test_steps_of_models_of_other_shapes_compile_in_one_process() -> None:
    """Numbers of rows are symbols to the compiler from the second model on."""
    with counted_graphs() as graphs:
        for width in (8, 70, 72):
            model = nn.Sequential(
                nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
            )
            optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=20)
            step = torch.compile(optimizer.step)
            for _ in range(3):
                optimizer.zero_grad()
                model(random(9, 3)).square().sum().backward()
                step()
            assert optimizer.stats().num_steps == 3
    assert graphs
