"""Torch's own tests of optimizers: what a step does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.testing._internal.common_optimizers import OptimizerInfo, TensorTracker
from torch.testing._internal.common_utils import set_default_dtype

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.optim.kernels import native
from tests.helpers.expected_warnings import OF_OURS
from tests.helpers.torch_infos import (
    CHECK,
    INFOS,
    assert_close,
    assert_identical,
    assert_same_state,
    every_input,
    every_optimizer,
    make,
    make_params,
    random,
    state_after,
    take_steps,
    values,
)

pytestmark = [*OF_OURS, pytest.mark.private_torch]
DECAYS: dict[type[Optimizer], set[int]] = {AdamW: {1, 2}, Muon: {2}}
"""Axes (2 for more too) of the tensors that decay by default, without a gradient, too."""
RESTS = {LearnedTeleportOptimizer}
"""Classes in which a row without a gradient does not decay either."""
STATELESS = {SGD}
"""Classes without state, where there is no momentum."""


def fit(info: OptimizerInfo, kwargs: dict[str, Any], makers: Sequence[Callable[..., Any]], layout: str) -> None:
    """The loss falls, or climbs where that is asked for."""
    weight, bias = random((10, 5), 0), random((1, 10) if info.optim_cls is Muon else (10,), 1)
    if layout == "non-contiguous":
        weight, bias = torch.stack([weight, weight], -1)[..., 0], torch.stack([bias, bias], -1)[..., 0]
        assert not weight.is_contiguous()
    params = [Parameter(weight), Parameter(bias)]
    x = random((5,), 2)
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5 * kwargs.get("lr", 0.01)}]
    optimizer = make(info, groups if layout == "groups" else params, kwargs)
    moving = [make_scheduler(optimizer) for make_scheduler in makers]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (params[0].mv(x) + params[1]).square().sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure)
        for scheduler in moving:
            scheduler.step(loss.item()) if isinstance(scheduler, schedulers.ReduceLROnPlateau) else scheduler.step()
    last = closure().item()
    assert last > first if kwargs.get("maximize") else last < first


@every_input
@pytest.mark.parametrize("layout", ["contiguous", "non-contiguous"])
def test_forloop_goes_right_direction(info: OptimizerInfo, kwargs: dict[str, Any], layout: str) -> None:
    if kwargs.get("fused") and layout == "non-contiguous":
        pytest.skip("a bug of torch: fused kernels pair a parameter and its gradient by place in memory, not by index")
    fit(info, kwargs, [], layout)


@every_input
def test_param_group_with_lrscheduler_goes_right_direction(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    for makers in info.scheduler_inputs:
        fit(info, kwargs, makers, "groups")


@every_input
def test_one_group_or_many(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    """Tensors of one shape go together, whatever the group; torch's foreach has to match its loop likewise."""
    tracker = TensorTracker()
    for is_split in (False, True):
        params = make_params(info)
        optimizer = make(info, [{"params": [param]} for param in params] if is_split else params, kwargs)
        for step in range(22):
            take_steps(optimizer, params, 1, step)
            for param in params:
                tracker.pop_check_set(param, CHECK) if is_split else tracker.add(param)
    assert tracker.all_popped()


impl_cases = [
    pytest.param(info, impl, given.kwargs, id=f"{info.name}-{impl}-{given.desc}")
    for info in INFOS
    for impl in info.supported_impls
    if impl != "differentiable"
    for given in info.optim_inputs_func("cpu")
    if not (impl == "foreach" and isinstance(given.kwargs.get("lr"), Tensor))
]


@pytest.mark.parametrize(("info", "impl", "kwargs"), impl_cases)
def test_impl_matches_forloop(info: OptimizerInfo, impl: str, kwargs: dict[str, Any]) -> None:
    """Of the controls only: ours has one implementation, ``supported_impls=()``."""
    ends = []
    for is_used in (False, True):
        params = make_params(info, torch.float64)
        optimizer = make(info, params, {**kwargs, "foreach": False, impl: is_used})
        take_steps(optimizer, params)
        ends.append(values(params))
    assert_close(*ends)


@every_input
def test_mixed_dtype(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    """Tensors of four precisions go as far as if all were of the highest."""
    mixed = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    moves = []
    for dtypes in (mixed, (torch.float64,) * 4):
        params = [Parameter(random((3, 4), seed, torch.bfloat16).to(dtype)) for seed, dtype in enumerate(dtypes)]
        optimizer, before = make(info, params, kwargs), values(params)
        for _ in range(2):
            for seed, param in enumerate(params):
                param.grad = random((3, 4), 10 + seed, torch.bfloat16).to(param.dtype)
            optimizer.step()
        assert tuple(param.dtype for param in params) == dtypes
        moves.append([(param.detach() - old).double() for param, old in zip(params, before)])
    for dtype, move, exact in zip(mixed, *moves):
        size = exact.abs().max().item()
        assert size > 0
        assert_close(move, exact, rtol=0, atol=6 * torch.finfo(dtype).eps + 0.02 * size)


@every_input
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_set_default_dtype(info: OptimizerInfo, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    ends = []
    for default in (torch.float32, dtype):
        with set_default_dtype(default):
            params = make_params(info)
            optimizer = make(info, params, kwargs)
            take_steps(optimizer, params)
            optimizer.load_state_dict(optimizer.state_dict())
            take_steps(optimizer, params, start=3)
            ends.append(values(params))
    assert_close(*ends)


@every_input
def test_step_is_noop_when_params_have_no_grad(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    params = make_params(info)
    optimizer, before = make(info, params, kwargs), values(params)
    optimizer.step()
    assert_identical(values(params), before)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert_identical(values(params[1:]), before[1:])
    assert not any(optimizer.state[param] for param in params[1:] if param in optimizer.state)


@every_input
def test_step_is_noop_for_zero_grads(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    """But for decay, which is towards zero in one proportion."""
    params = make_params(info)
    optimizer, before = make(info, params, kwargs), values(params)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    group = optimizer.param_groups[0]
    for param, old in zip(params, before):
        decays = group["weight_decay"] != 0.0
        if "weight_decay" not in kwargs:
            decays = min(param.dim(), 2) in DECAYS.get(info.optim_cls, ())
        if decays and info.optim_cls not in RESTS:
            shares = param.detach() / old
            assert_close(shares, shares.mean().expand_as(shares))
            assert 0.5 < shares.mean() < 1.0
        else:
            assert_identical(param.detach(), old)


@every_input
@pytest.mark.parametrize("num_axes", [0, 1])
def test_tensor_lr(info: OptimizerInfo, kwargs: dict[str, Any], num_axes: int) -> None:
    lr = float(kwargs.get("lr", make(info, make_params(info)).param_groups[0]["lr"]))
    ends = []
    for own in (lr, torch.tensor(lr).reshape([1] * num_axes)):
        params = make_params(info)
        optimizer = make(info, params, {**kwargs, "lr": own})
        scheduler = schedulers.LinearLR(optimizer, start_factor=0.5, total_iters=4)
        for step in range(22):
            take_steps(optimizer, params, 1, step)
            scheduler.step()
        ends.append(values(params))
        kept = optimizer.param_groups[0]["lr"]
        assert (kept.dim() == num_axes) if isinstance(own, Tensor) else not isinstance(kept, Tensor)
    assert_close(*ends)


@every_input
def test_param_groups_lr(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    lr = kwargs.get("lr", 0.5)
    params = make_params(info)
    before = values(params)
    optimizer = make(info, [{"params": params[:2], "lr": lr}, {"params": params[2:]}], {**kwargs, "lr": 0.0})
    take_steps(optimizer, params)
    assert all(not torch.equal(param, old) for param, old in zip(params[:2], before))
    assert_identical(values(params[2:]), before[2:])


@every_input
def test_param_groups_weight_decay(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    """The first half as if the group had everything to itself."""
    ends = []
    for decays in ((0.3, 0.3), (0.3, 0.0), (0.0, 0.0)):
        params = make_params(info)
        groups = [
            {"params": own, "weight_decay": decay} for own, decay in zip((params[:2], params[2:]), decays, strict=True)
        ]
        optimizer = make(info, groups, kwargs)
        take_steps(optimizer, params, 1)
        ends.append(values(params))
    both, first, none = ends
    assert_close(first[:2], both[:2])
    assert_close(first[2:], none[2:])
    assert all(not torch.equal(one, other) for one, other in zip(first[:2], none))


@every_input
def test_maximize(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    if "maximize" not in make(info, make_params(info)).defaults:
        pytest.skip(f"{info.name} has no maximize")
    ends = []
    for is_up in (False, True):
        params = make_params(info)
        optimizer = make(info, params, {**kwargs, "maximize": is_up})
        for step in range(3):
            for index, param in enumerate(params):
                param.grad = random(param.shape, 10 * step + index) * (-1.0 if is_up else 1.0)
            optimizer.step()
        ends.append(values(params))
    assert_close(*ends)


@every_input
def test_closure(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    params = make_params(info)
    optimizer = make(info, params, kwargs)
    for param in params:
        param.grad = torch.ones_like(param)
    modes = []

    def closure() -> Tensor:
        modes.append(torch.is_grad_enabled())
        return torch.tensor(7.0)

    assert optimizer.step(closure) == 7.0
    with torch.no_grad():
        optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert modes == [True, True]
    assert optimizer.step() is None


@every_input
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(info: OptimizerInfo, kwargs: dict[str, Any], set_to_none: bool) -> None:
    params = make_params(info)
    optimizer = make(info, params, kwargs)
    optimizer.zero_grad(set_to_none)
    sum(param.square().sum() for param in params[1:]).backward(create_graph=False)  # type: ignore[union-attr]
    grads = [param.grad for param in params]
    optimizer.zero_grad(set_to_none)
    for param, grad in zip(params, grads):
        if set_to_none or grad is None:
            assert param.grad is None
        else:
            assert param.grad is grad
            assert not bool(grad.any())
            assert not grad.requires_grad


@every_input
def test_non_empty_state(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    params, optimizer = state_after(info, kwargs, 1)
    if info.optim_cls in STATELESS and not kwargs.get("momentum"):
        return
    assert set(optimizer.state) == set(params)
    assert all(optimizer.state[param] for param in params)


@every_input
def test_optimizer_can_be_printed(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    first, second, *_ = make_params(info)
    optimizer = make(info, [{"params": [first]}, {"params": [second], "lr": 0.25}], kwargs)
    text = repr(optimizer)
    assert text.startswith(f"{info.name} (\nParameter Group 0\n")
    assert "Parameter Group 1" in text
    assert "lr: 0.25" in text
    assert repr(copy.deepcopy(optimizer)) == text


@every_optimizer
@pytest.mark.parametrize("how", ["load", "deepcopy"])
def test_loading_and_copying_add_no_options(info: OptimizerInfo, how: str) -> None:
    _, optimizer = state_after(info, {})
    before = set(optimizer.param_groups[0])
    if how == "load":
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        optimizer = copy.deepcopy(optimizer)
    assert set(optimizer.param_groups[0]) == before


@every_input
def test_deepcopy_copies_all_public_attrs(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    def public(optimizer: Optimizer) -> set[str]:
        return {name for name in vars(optimizer) if not name.startswith("_")}

    params, optimizer = state_after(info, kwargs)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert public(copied) == public(optimizer)
        own = [param for group in copied.param_groups for param in group["params"]]
        assert all(param is not old for param, old in zip(own, params))
        assert_same_state(copied, optimizer)
        take_steps(copied, own, start=3)
        ours, theirs = copy.deepcopy((params, optimizer))
        take_steps(theirs, ours, start=3)
        assert_identical(values(own), values(ours))


@every_optimizer
def test_the_profiler_knows_it(info: OptimizerInfo) -> None:
    params, optimizer = state_after(info, {})
    with torch.autograd.profiler.profile() as profile:
        take_steps(optimizer, params, 1)
        optimizer.zero_grad()
    names = {event.name for event in profile.function_events}
    assert {f"Optimizer.step#{info.name}.step", f"Optimizer.zero_grad#{info.name}.zero_grad"} <= names


@every_optimizer
@pytest.mark.parametrize("kind", ["default", "Tensor lr"])
def test_compiled_steps_match(info: OptimizerInfo, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_native", None)  # which rounds otherwise than torch does, compiled or not
    ends = []
    for is_compiled in (False, True):
        params = make_params(info)
        optimizer = make(info, params, {"lr": torch.tensor(0.1)} if kind == "Tensor lr" else {})
        step = torch.compile(optimizer.step, backend="eager") if is_compiled else optimizer.step
        for index in range(22):
            for seed, param in enumerate(params):
                param.grad = random(param.shape, 10 * index + seed)
            step()
        ends.append(values(params))
    torch.compiler.reset()
    assert_close(*ends)
