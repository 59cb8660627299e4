"""What a state dict holds, which parameter is which, and what stays in memory."""

from __future__ import annotations

import copy
import gc
import json
import math
import resource
import sys

import pytest
import torch
from torch import Tensor, nn

from teleport_optim import LearnedTeleportOptimizer, OptimizerStateError
from teleport_optim.optim.optimizer import TeleportOptimizer
from tests.helpers.classification import network, train
from tests.helpers.comparing import same, through_file
from tests.helpers.expected_warnings import OF_OURS
from tests.helpers.runs import FLOAT32, ROWS, Make, Run, by_position, every_case, everyone, horizon, leaves, storages

pytestmark = OF_OURS


@pytest.mark.parametrize("order", [[5, 4, 3, 2, 1, 0], [0, 3, 1, 5, 2, 4]])
@pytest.mark.parametrize("kind", ["model", "named", "unnamed", "prefixed"])
def test_names_are_matched_and_else_the_order(kind: str, order: list[int]) -> None:
    """Groups of equal sizes with other members load right by name; without common names, by order."""

    def make(model: nn.Module, order: list[int], prefix: str = "") -> LearnedTeleportOptimizer:
        named = [(prefix + name, param) for name, param in model.named_parameters()]
        groups = by_position([named[index] for index in order])
        if kind in ("model", "unnamed"):
            groups = [{"params": [param for _, param in group["params"]]} for group in groups]
        return LearnedTeleportOptimizer(groups, model=model if kind == "model" else None, total_steps=60)

    model, other = network(), network()
    optimizer = make(model, list(range(6)))
    train(model, optimizer, 37)
    saved = through_file(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    if kind in ("unnamed", "prefixed"):
        resumed = make(other, order, prefix="module." * (kind == "prefixed"))
        with pytest.raises(OptimizerStateError, match=r"exp_avg of parameter .* expected .* shape"):
            resumed.load_state_dict(saved)
        order = list(range(6))
    resumed = make(other, order, prefix="module." * (kind == "prefixed"))
    resumed.load_state_dict(saved)
    for param, own in zip(model.parameters(), other.parameters()):
        assert same(optimizer.state[param], resumed.state[own])
    ends = train(other, resumed, 9), train(model, optimizer, 9)
    assert math.isfinite(ends[0])
    if order == list(range(6)):  # The meta-optimizer knows where in the order a tensor stands.
        assert ends[0] == ends[1]


def test_names_that_are_numbers_are_matched() -> None:
    def make() -> tuple[nn.ParameterList, LearnedTeleportOptimizer]:
        params = nn.ParameterList([torch.ones(3), torch.ones(3)])
        return params, LearnedTeleportOptimizer(reversed(list(params)), model=params, teleport=False)

    params, optimizer = make()
    params[0].grad = torch.ones(3)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["1", "0"]
    saved["param_groups"][0]["param_names"] = [1, 0]
    others, resumed = make()
    resumed.load_state_dict(saved)
    assert others[0] in resumed.state
    assert others[1] not in resumed.state


def test_how_parameters_are_matched_is_documented() -> None:
    documentation = " ".join((LearnedTeleportOptimizer.load_state_dict.__doc__ or "").split())
    assert "matched by name where both sides have the same names, else by order" in documentation


# What a state dict is made of.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_meta_optimizers_state_is_never_rounded(dtype: torch.dtype) -> None:
    model = network()
    optimizer = horizon(model)
    train(model, optimizer, 13)
    saved = through_file(optimizer.state_dict())
    other = network().to(dtype)
    resumed = horizon(other)
    resumed.load_state_dict(saved)
    is_rounded = False
    for param, slots in zip(other.parameters(), saved["state"].values()):
        own = resumed.state[param]
        assert same({key: own[key] for key in FLOAT32}, {key: slots[key] for key in FLOAT32})
        assert all(own[key].dtype == torch.float32 for key in FLOAT32)
        is_rounded |= not torch.equal(own["hidden"], own["hidden"].to(dtype).float())
        kept = torch.float64 if dtype == torch.float64 else torch.bfloat16
        assert all(same(own[key], slots[key].to(kept)) for key in ("exp_avg", "average_offset"))
    assert is_rounded == (dtype != torch.float64)
    back = horizon(network())
    back.load_state_dict(resumed.state_dict())
    for slots, own in zip(saved["state"].values(), back.state_dict()["state"].values()):
        assert same({key: own[key] for key in FLOAT32}, {key: slots[key] for key in FLOAT32})


@every_case
def test_a_state_dict_is_plain(case: str) -> None:
    run = Run.of(case)
    run.train(0, 12)
    saved = run.optimizer.state_dict()
    allowed = (int, float, bool, str, type(None), Tensor, *([tuple] if case == "AdamW" else []))
    assert {type(leaf) for leaf in leaves(saved)} <= set(allowed)
    assert same(through_file(saved), saved)
    groups = json.loads(json.dumps(saved["param_groups"]))
    if case != "AdamW":  # JSON knows no tuple.
        assert same(groups, saved["param_groups"])
        loaded = Run.of(case, seed=9)
        loaded.optimizer.load_state_dict({**saved, "param_groups": groups})
        assert same(loaded.optimizer.state_dict(), saved)


@everyone
def test_nothing_loaded_is_aliased(make: Make) -> None:
    """AdamW keeps the tensors that it loads, and so shows that this test can fail."""
    model, other = network(), network()
    optimizer, resumed = make(model), make(other)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.5)
    train(model, optimizer, 12)
    saved = through_file(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    resumed.load_state_dict(saved)
    is_ours = isinstance(resumed, LearnedTeleportOptimizer)
    assert (not storages(saved) & storages(resumed.state_dict())) == is_ours
    for group in resumed.param_groups:
        group["lr"] = group["lr"].mul_(0.5) if is_ours else group["lr"]
    train(other, resumed, 12)
    assert same(saved, kept) == is_ours
    before = copy.deepcopy(resumed.state_dict())
    for leaf in leaves(saved):
        if isinstance(leaf, Tensor):
            leaf.fill_(77.0)
    saved["param_groups"][0]["params"].clear()
    assert same(resumed.state_dict(), before) == is_ours


def test_states_of_before_the_first_release_are_refused_with_a_sentence() -> None:
    """They kept the rows of all tensors together; what to do instead is said, and nothing has changed."""
    model = network()
    optimizer = horizon(model)
    train(model, optimizer, 3)
    old = through_file(optimizer.state_dict())
    old["state"]["meta_optimizer"] = {key: torch.stack([own[key] for own in old["state"].values()]) for key in ROWS}
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(OptimizerStateError, match="before the first release cannot be loaded: load the weights"):
        optimizer.load_state_dict(old)
    assert same(optimizer.state_dict(), before)


def test_states_with_six_outputs_are_refused() -> None:
    model = network()
    optimizer = horizon(model)
    train(model, optimizer, 3)
    old = through_file(optimizer.state_dict())
    for slots in old["state"].values():
        slots["outputs"] = torch.cat([slots["outputs"], torch.zeros(1)])
    with pytest.raises(OptimizerStateError, match=r"outputs of parameter 0 is \(6,\)"):
        optimizer.load_state_dict(old)


@pytest.mark.parametrize("is_learned", [True, False])
def test_a_state_of_another_controller_is_refused(is_learned: bool) -> None:
    """What a controller remembers is missing in a state without one; without a controller it is kept and does nothing."""
    model = network()
    rule = TeleportOptimizer(model.parameters(), model=model, total_steps=200)
    learned = LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=200)
    train(model, rule if is_learned else learned, 3)
    if is_learned:
        with pytest.raises(OptimizerStateError, match="it is of another optimizer"):
            learned.load_state_dict(rule.state_dict())
    else:
        rule.load_state_dict(learned.state_dict())
        train(model, rule, 3)
        assert rule.stats().num_steps == 6


# Memory.


@pytest.mark.slow
@pytest.mark.parametrize("is_leaking", [False, True])
@pytest.mark.parametrize("is_saved", [False, True])
def test_memory_stays_flat(is_saved: bool, is_leaking: bool) -> None:
    param = nn.Parameter(torch.ones(3, 2))
    optimizer = LearnedTeleportOptimizer([param], total_steps=None)
    kept = []
    sizes: list[tuple[int, int]] = []
    num_steps = 500 if is_leaking or is_saved else 10_000
    for step in range(num_steps):
        param.grad = torch.full_like(param, math.cos(step))
        optimizer.step()
        if is_saved:
            optimizer.load_state_dict(through_file(optimizer.state_dict()))
        if is_leaking:
            kept.append([param.grad])
        if step in (num_steps // 5, num_steps - 1):
            gc.collect()
            sizes.append((len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    objects, peaks = (last - first for first, last in zip(*sizes))
    assert (objects < 100) == (not is_leaking)
    assert peaks < 8 * 1024 * (1024 if sys.platform == "darwin" else 1)
