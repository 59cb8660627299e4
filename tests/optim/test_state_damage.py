"""State dicts that are damaged at random are refused, or load wholly."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from teleport_optim import LearnedTeleportOptimizer, OptimizerStateError
from tests.helpers.classification import network, train
from tests.helpers.comparing import same
from tests.helpers.expected_warnings import OF_OURS
from tests.helpers.runs import MAKERS, assert_sound, horizon

pytestmark = OF_OURS


class Strange:
    """What no file should hold."""

    def __bool__(self) -> bool:
        raise ArithmeticError("neither true nor false")

    def __deepcopy__(self, memo: object) -> Strange:
        return self


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def junk(rng: random.Random) -> Any:
    numbers: list[Any] = [0, 1, -1, 2**40, 2**63, -(10**400), 10**400, True, 0.5, -0.5, 1e-300, math.nan, math.inf]
    plain = ["", "0", "0.weight", None, [], {}, (), [0], [[0]], {"a": {"b": {}}}, {0: None}, "1.0", b"x", {1, 2}, 1j]
    made = [deep(3), deep(5000), Strange(), object(), print, [None] * 3, torch.ones(()), torch.ones(2), torch.float32]
    return rng.choice([*numbers, *plain, *made, -math.inf, random_tensor(rng)])


DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)
SHAPES = ((), (1,), (0,), (5,), (6,), (24,), (10, 6), (6, 10), (2, 0, 3))


def random_tensor(rng: random.Random) -> Tensor:
    return torch.full(rng.choice(SHAPES), rng.choice((0.0, 1.0, -1.0, 2.0, math.nan)))


def damaged_tensor(value: Tensor, rng: random.Random) -> Any:
    if value.dtype != torch.float32 or value.layout != torch.strided or value.is_meta or type(value) is not Tensor:
        return None  # It has been damaged before.
    values = value.detach().clone().contiguous()
    if values.numel() and rng.random() < 0.4:
        values.view(-1)[rng.randrange(values.numel())] = rng.choice((math.nan, math.inf, -math.inf, -3.0, 0.5, 1e9))
        return values
    ways: list[Callable[[], Any]] = [
        lambda: values.to(rng.choice(DTYPES)),
        lambda: values.to("meta"),
        lambda: values.to_sparse(),
        lambda: values.tolist(),
        lambda: values.reshape(-1),
        lambda: values.unsqueeze(0),
        lambda: values.mT if values.dim() > 1 else values[..., None].expand(*values.shape, 2),
        lambda: nn.Parameter(values),
        lambda: values.new_zeros(values.shape),
        lambda: nn.UninitializedParameter(),
        lambda: values.double() * 1e300,
    ]
    return rng.choice(ways)()


def damage(saved: dict[str, Any], rng: random.Random) -> None:
    """Change one place, drawn at random at any depth."""
    at: Any = saved
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return
        key = rng.choice(keys)
        if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.15:
            break
        at = at[key]
    other = rng.choice(keys)
    what = rng.randrange(7)
    if what == 0:
        del at[key]
    elif what == 1 and isinstance(at, dict):
        at[rng.choice([key, str(key), 0, 5, 77, "x", (1,), None, "meta_optimizer", "betas", "num_steps"])] = at.pop(key)
    elif what == 2 and isinstance(at, dict):
        at[rng.choice(["copy", 6, "1", None, "exp_avg", "param_names"])] = copy.copy(at[key])
    elif what == 2:
        at.append(at[key])
    elif what == 3:
        at[key], at[other] = at[other], at[key]
    elif isinstance(at[key], Tensor) and what < 6:
        at[key] = damaged_tensor(at[key], rng)
    else:
        at[key] = junk(rng)


def fuzzed() -> tuple[list[tuple[nn.Module, LearnedTeleportOptimizer]], list[dict[str, Any]]]:
    """Optimizers that load, each for the state dict of the same index."""
    pairs, saved = [], []
    for make in (MAKERS["open-ended"], MAKERS["two groups"], horizon, lambda own: make_plain(own)):
        model, other = network(), network(seed=4)
        optimizer, target = make(model), make(other)
        assert isinstance(target, LearnedTeleportOptimizer)
        train(model, optimizer, 39)  # The two steps after loading are one without anything and one with all there is.
        train(other, target, 3)
        pairs.append((other, target))
        saved.append(copy.deepcopy(optimizer.state_dict()))
    return pairs, saved


def make_plain(model: nn.Module) -> Optimizer:
    return LearnedTeleportOptimizer(model.parameters(), total_steps=60, teleport=False)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:no teleports where", "ignore:.*past total_steps", "ignore:a step is skipped", "ignore:Sparse"
)
def test_damage_at_random_is_refused_or_loads_wholly() -> None:
    rng = random.Random(0)
    pairs, good = fuzzed()
    befores = [(copy.deepcopy(own.state_dict()), copy.deepcopy(optimizer.state_dict())) for own, optimizer in pairs]
    counts, slowest = {"refused": 0, "loaded": 0}, 0.0
    for trial in range(2000):
        index = rng.randrange(len(pairs))
        saved = copy.deepcopy(good[index])
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            damage(saved, rng)
        model, optimizer = pairs[index]
        start = time.perf_counter()
        try:
            optimizer.load_state_dict(saved)
        except OptimizerStateError:
            counts["refused"] += 1
            is_loaded = False
        else:
            counts["loaded"] += 1
            is_loaded = True
        slowest = max(slowest, time.perf_counter() - start)
        before = befores[index]
        if not is_loaded:
            assert same(before, (model.state_dict(), optimizer.state_dict())), trial
            continue
        for param, slots in optimizer.state.items():
            assert_sound(param, slots)
        group = optimizer.param_groups[0]
        train(model, optimizer, 2)
        if all(float(own["lr"]) < 10.0 and float(own["weight_decay"] or 0.0) < 10.0 for own in optimizer.param_groups):
            assert all(param.isfinite().all() for param in model.parameters()), (trial, group)
        model.load_state_dict(before[0])
        optimizer.load_state_dict(before[1])
    print(counts, f"slowest load: {1e3 * slowest:.1f} ms")
    assert min(counts.values()) > 200
    assert slowest < 2.0
