"""Torch's own tests of optimizers: hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import OptimizerInfo

from tests.helpers.expected_warnings import OF_OURS
from tests.helpers.torch_infos import (
    assert_identical,
    every_input,
    every_optimizer,
    make,
    make_params,
    state_after,
    take_steps,
)

pytestmark = [*OF_OURS, pytest.mark.private_torch]


@contextmanager
def registered(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@every_input
def test_step_hooks(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    """Global ones first, then its own, each in the order of registration, and none once removed."""
    params = make_params(info)
    optimizer = make(info, params, kwargs)
    seen: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def run(own: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert own is optimizer
            seen.append(name)

        return run

    with registered(
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
        optimizer.register_step_pre_hook(hook("pre 1")),
        optimizer.register_step_pre_hook(hook("pre 2")),
        optimizer.register_step_post_hook(hook("post 1")),
        optimizer.register_step_post_hook(hook("post 2")),
    ):
        take_steps(optimizer, params, 1)
    assert seen == ["global pre", "pre 1", "pre 2", "post 1", "post 2", "global post"]
    take_steps(optimizer, params, 1)
    assert len(seen) == 6


@every_optimizer
def test_a_step_pre_hook_may_change_the_arguments(info: OptimizerInfo) -> None:
    params = make_params(info)
    optimizer = make(info, params)

    def give_closure(own: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {"closure": lambda: torch.tensor(5.0)}

    with registered(optimizer.register_step_pre_hook(give_closure)):
        assert optimizer.step() == 5.0
    with (
        registered(optimizer.register_step_pre_hook(lambda own, args, kwargs: 3)),
        pytest.raises(RuntimeError, match="3"),
    ):
        optimizer.step()


@every_optimizer
def test_state_dict_hooks(info: OptimizerInfo) -> None:
    _, optimizer = state_after(info, {})
    plain = optimizer.state_dict()
    seen: list[str] = []
    with registered(
        optimizer.register_state_dict_pre_hook(lambda own: seen.append("pre 1")),
        optimizer.register_state_dict_pre_hook(lambda own: seen.append("pre 0"), prepend=True),
        optimizer.register_state_dict_post_hook(lambda own, state: seen.append("post 1")),
        optimizer.register_state_dict_post_hook(lambda own, state: seen.append("post 0"), prepend=True),
        optimizer.register_state_dict_post_hook(lambda own, state: {**state, "more": 1}),
    ):
        assert_identical(optimizer.state_dict(), {**plain, "more": 1})
    assert seen == ["pre 0", "pre 1", "post 0", "post 1"]
    assert_identical(optimizer.state_dict(), plain)


@every_optimizer
def test_state_dict_post_hook_may_return_anything(info: OptimizerInfo) -> None:
    _, optimizer = state_after(info, {})
    with registered(optimizer.register_state_dict_post_hook(lambda own, state: {"wrapped": state})):
        assert set(optimizer.state_dict()) == {"wrapped"}


@every_optimizer
def test_state_dict_post_hook_sees_everything(info: OptimizerInfo) -> None:
    _, optimizer = state_after(info, {})
    seen: list[Any] = []
    with registered(optimizer.register_state_dict_post_hook(lambda own, state: seen.append(copy.deepcopy(state)))):
        state = optimizer.state_dict()
    assert_identical(seen, [state])


@every_optimizer
@pytest.mark.parametrize("is_new", [False, True], ids=["in place", "new"])
def test_load_state_dict_hooks(info: OptimizerInfo, is_new: bool) -> None:
    _, optimizer = state_after(info, {})
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    seen: list[str] = []

    def change_lr(own: Optimizer, given: dict[str, Any]) -> dict[str, Any] | None:
        seen.append("pre 1")
        groups = [{**group, "lr": 0.125} for group in given["param_groups"]]
        if is_new:
            return {**given, "param_groups": groups}
        given["param_groups"] = groups
        return None

    with registered(
        optimizer.register_load_state_dict_pre_hook(change_lr),
        optimizer.register_load_state_dict_pre_hook(lambda own, given: seen.append("pre 0"), prepend=True),
        optimizer.register_load_state_dict_post_hook(lambda own: seen.append(f"post {own.param_groups[0]['lr']}")),
        optimizer.register_load_state_dict_post_hook(lambda own: seen.append("post 0"), prepend=True),
    ):
        optimizer.load_state_dict(state)
    assert seen == ["pre 0", "pre 1", "post 0", "post 0.125"]
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert_identical(state, before)
