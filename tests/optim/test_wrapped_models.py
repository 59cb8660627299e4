"""What torch wraps around models and optimizers: scaled gradients, data-parallel and compiled models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_flatten

from teleport_optim import LearnedTeleportOptimizer
from tests.helpers.digits import (
    BATCHES,
    Make,
    X,
    Y,
    assert_same,
    assert_teleports,
    everyone,
    network,
    ours,
    reference,
    teleport_size,
)

pytestmark = pytest.mark.private_torch


def assert_same_values(first: Any, second: Any) -> None:
    """Two nested containers hold the same."""
    (one, one_tree), (other, other_tree) = tree_flatten(first), tree_flatten(second)
    assert one_tree == other_tree
    for value, other_value in zip(one, other, strict=True):
        assert torch.equal(value, other_value) if isinstance(value, Tensor) else value == other_value


@everyone
@pytest.mark.parametrize("steps", [0, 7, 20])
def test_the_gradient_scaler_skips_a_step_of_infinite_gradients(make: Make, steps: int) -> None:
    """Nothing changes then, and the next step is what it would have been."""
    ends = []
    for is_disturbed in (False, True):
        model = network()
        optimizer = make(model, 21)
        for step in range(21):
            if step == steps and is_disturbed:
                scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
                before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                optimizer.zero_grad()
                scaler.scale(1e4 * F.cross_entropy(model(X), Y)).backward()
                assert not all(param.grad.isfinite().all() for param in model.parameters() if param.grad is not None)
                scaler.step(optimizer)
                scaler.update()
                assert scaler.get_scale() == 2.0**126
                assert_same_values((model.state_dict(), optimizer.state_dict()), before)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(X), Y)).backward()
            scaler.step(optimizer)
        ends.append(model)
    assert_same(*ends)


@everyone
def test_distributed_data_parallel_runs_the_plain_loop(make: Make) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = network()
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = make(model, 21)
        sizes = []
        for inputs, labels in BATCHES * 3:
            optimizer.zero_grad()
            F.cross_entropy(wrapped(inputs), labels).backward()
            optimizer.step()
            sizes.append(teleport_size(optimizer))
    finally:
        torch.distributed.destroy_process_group()
    assert_same(model, reference(make, 3))
    assert_teleports(make, sizes)


def compile_whole(model: nn.Module, backend: Any = "aot_eager") -> tuple[nn.Module, nn.Module]:
    """What is called, and what the optimizer is told of."""
    return torch.compile(model, backend=backend), model  # type: ignore[return-value]


def compile_in_place(model: nn.Module, backend: Any = "aot_eager") -> tuple[nn.Module, nn.Module]:
    model.compile(backend=backend)
    return model, model


def compile_and_hand_over(model: nn.Module, backend: Any = "aot_eager") -> tuple[nn.Module, nn.Module]:
    compiled: Any = torch.compile(model, backend=backend)
    return compiled, compiled


@pytest.mark.parametrize("compiling", [compile_whole, compile_in_place, compile_and_hand_over])
def test_a_compiled_model_teleports(compiling: Callable[..., tuple[nn.Module, nn.Module]]) -> None:
    plain = reference(ours, 2)
    model = network()
    called, known = compiling(model)
    optimizer = ours(known, 14)
    sizes = []
    for inputs, labels in BATCHES * 2:
        optimizer.zero_grad()
        F.cross_entropy(called(inputs), labels).backward()
        optimizer.step()
        sizes.append(optimizer.teleport_size)
    assert_teleports(ours, sizes)
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()), rtol=1e-3, atol=1e-4)


def compiles_in_place() -> bool:
    """Whether torch compiles a module in place at all: 2.9.0 does not."""
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        calls.append(len(inputs))
        return graph.forward

    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    model.compile(backend=backend)
    model(torch.zeros(4, 2))
    return bool(calls)


@pytest.mark.parametrize("compiling", [compile_whole, compile_in_place, compile_and_hand_over])
@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_compiled_model_is_compiled_whole(
    compiling: Callable[..., tuple[nn.Module, nn.Module]], is_waiting: bool
) -> None:
    """Whatever waits for the first call of the model must not break its graph."""
    if compiling is compile_in_place and not compiles_in_place():
        pytest.skip("this torch runs a module that was compiled in place as it is, with or without an optimizer")
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    called, known = compiling(network(), backend)
    optimizer = LearnedTeleportOptimizer.for_model(
        known, total_steps=21, example_inputs=None if is_waiting else BATCHES[0][0]
    )
    for inputs, labels in BATCHES:
        optimizer.zero_grad()
        F.cross_entropy(called(inputs), labels).backward()
        optimizer.step()
    assert max(graphs, default=0) == 5


def test_waiting_leaves_nothing_behind_in_torch() -> None:
    """A hook on all modules would, and torch.compile warns of one for as long."""
    before = dict(torch_module._global_forward_hooks_with_kwargs)
    model = network()
    optimizer = ours(model, 21)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    assert dict(torch_module._global_forward_hooks_with_kwargs) == before
