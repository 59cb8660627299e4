"""Torch's own tests of optimizers: state dicts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD
from torch.testing._internal.common_optimizers import OptimizerInfo

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.optim.state import OptimizerStateError
from tests.helpers.comparing import through_file
from tests.helpers.expected_warnings import OF_OURS
from tests.helpers.torch_infos import (
    OURS,
    assert_close,
    assert_identical,
    assert_same_state,
    every_input,
    every_optimizer,
    make,
    make_params,
    state_after,
    take_steps,
    values,
)

pytestmark = [*OF_OURS, pytest.mark.private_torch]

OWN_NAMES = {LearnedTeleportOptimizer}
"""Classes that match loaded parameters by name and keep the names they have; others take over the names that are loaded."""
FLOAT32_STATE = {LearnedTeleportOptimizer: {"step", "skipped", "hidden", "outputs", "log_grad_rms"}}
"""Entries that stay float32 whatever the parameter; in ours those of the meta-optimizer, which rounding would disturb."""
INTEGER_STATE = {LearnedTeleportOptimizer: {"fingerprint", "average_start", "average_end"}}
"""Entries that are 64-bit integers: those of the average of the iterates."""
STATE_DTYPES = {LearnedTeleportOptimizer: {torch.float16: torch.bfloat16}}
"""Momentum in another dtype than the parameter: float16 has too small a range for what teleports make of gradients."""
REFUSED: dict[str, tuple[str, str]] = {
    "a step that is no tensor": ("step of parameter 0 is float", "no version of ours saved one"),
    "state of no parameter": ("state for 'more', which is in no parameter group", "others keep it without a use"),
    "missing state": (r"the state of parameter 0 holds \[.*\], expected", "others fail at the next step"),
    "state of another shape": ("of parameter 0 is .*, expected a tensor", "others fail at the next step"),
    "a bad lr": ("a parameter group cannot be used: Invalid learning rate: -1.0", "others take it"),
}
"""State dicts that torch's optimizers load and ours refuses: what it says, and why."""


@every_input
def test_state_dict_deterministic(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    params, optimizer = state_after(info, kwargs, 7)
    state = copy.deepcopy(optimizer.state_dict())
    others = [Parameter(param.detach().clone()) for param in params]
    other = make(info, others, kwargs)
    given = copy.deepcopy(state)
    other.load_state_dict(given)
    assert_identical(given, state)
    assert_same_state(other, state)
    for step in range(7, 23):
        take_steps(optimizer, params, 1, step)
        take_steps(other, others, 1, step)
        assert_identical(values(others), values(params))
    assert_same_state(other, optimizer)


@every_input
def test_repeated_groups_have_one_set_of_keys(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    _, optimizer = state_after(info, kwargs)
    keys = optimizer.state_dict()["param_groups"][0]["params"]
    optimizer.param_groups.extend(optimizer.param_groups)
    repeated = optimizer.state_dict()["param_groups"]
    assert [group["params"] for group in repeated] == [keys, keys]


@every_input
def test_can_load_older_state_dict(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    if any(kwargs.get(flag) for flag in info.not_og_supported_flags):
        pytest.skip("an option that the older version did not have is in use")
    params, optimizer = state_after(info, kwargs)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in info.not_og_supported_flags:
            group.pop(flag, None)
    others = copy.deepcopy(params)
    other = make(info, others, kwargs)
    other.load_state_dict(old)
    take_steps(optimizer, params, start=3)
    take_steps(other, others, start=3)
    assert_close(values(others), values(params))


@every_input
def test_save_load_equality_with_weights_only(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    params, optimizer = state_after(info, kwargs)
    loaded = through_file(optimizer.state_dict())
    assert_identical(loaded, optimizer.state_dict())
    other = make(info, params, kwargs)
    other.load_state_dict(loaded)
    assert_same_state(other, optimizer)


@every_input
def test_load_nontensor_step(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    params, optimizer = state_after(info, kwargs)
    state = copy.deepcopy(optimizer.state_dict())
    for slots in state["state"].values():
        if "step" in slots:
            slots["step"] = slots["step"].item()
    optimizer.load_state_dict(state)
    take_steps(optimizer, params, 1)
    assert all(torch.isfinite(param).all() for param in params)


def damaged(state: dict[str, Any], how: str) -> dict[str, Any]:
    state = copy.deepcopy(state)
    slots = state["state"][0]
    if how == "a step that is no tensor":
        slots["step"] = 3.0
    elif how == "state of no parameter":
        state["state"]["more"] = 1
    elif how == "missing state":
        del slots[next(key for key in slots if key != "step")]
    elif how == "state of another shape":
        slots[next(key for key in slots if key != "step")] = torch.ones(7, 7)
    else:
        state["param_groups"][0]["lr"] = -1.0
    return state


@every_optimizer
@pytest.mark.parametrize("how", REFUSED)
def test_state_that_does_not_fit(info: OptimizerInfo, how: str) -> None:
    _, optimizer = state_after(info, {"momentum": 0.9} if info.optim_cls is SGD else {})
    before = copy.deepcopy(optimizer.state_dict())
    state = damaged(before, how)
    if info is OURS:
        with pytest.raises(OptimizerStateError, match=REFUSED[how][0]):
            optimizer.load_state_dict(state)
        assert_identical(optimizer.state_dict(), before)
    else:
        optimizer.load_state_dict(state)


@every_input
@pytest.mark.parametrize("kept", [0, 2, 4], ids=lambda kept: f"{kept} groups")
def test_groups_that_do_not_fit(info: OptimizerInfo, kwargs: dict[str, Any], kept: int) -> None:
    first, second, third, *_ = make_params(info)
    optimizer = make(info, [{"params": [first, second]}, {"params": [third]}], kwargs)
    state = optimizer.state_dict()
    groups = [*state["param_groups"], {"params": [3]}, {"params": [4]}][:kept]
    if kept == 2:
        groups = groups[::-1]
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict({**state, "param_groups": groups})


@every_input
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_loaded_state_has_the_dtype_of_its_parameter(
    info: OptimizerInfo, kwargs: dict[str, Any], dtype: torch.dtype
) -> None:
    _, optimizer = state_after(info, kwargs)
    params = make_params(info, dtype)
    other = make(info, params, kwargs)
    other.load_state_dict(optimizer.state_dict())
    wanted = STATE_DTYPES.get(info.optim_cls, {}).get(dtype, dtype)
    plain = FLOAT32_STATE.get(info.optim_cls, {"step"})
    for slots in other.state.values():
        for key, value in slots.items():
            if isinstance(value, Tensor):
                is_integer = key in INTEGER_STATE.get(info.optim_cls, ())
                assert value.dtype == (torch.int64 if is_integer else torch.float32 if key in plain else wanted), key
    take_steps(other, params, 1)
    assert all(torch.isfinite(param).all() for param in params)


@every_input
@pytest.mark.parametrize("is_from_named", [False, True], ids=["from plain", "from named"])
@pytest.mark.parametrize("is_to_named", [False, True], ids=["to plain", "to named"])
def test_can_load_from_to_named_state_dict(
    info: OptimizerInfo, kwargs: dict[str, Any], is_from_named: bool, is_to_named: bool
) -> None:
    def entries(params: Sequence[Tensor], prefix: str, is_named: bool) -> list[Any]:
        return [(f"{prefix}{index}", p) for index, p in enumerate(params)] if is_named else list(params)

    params = make_params(info)
    optimizer = make(info, entries(params, "old", is_from_named), kwargs)
    take_steps(optimizer, params)
    others = [Parameter(param.detach().clone()) for param in params]
    other = make(info, entries(others, "new", is_to_named), kwargs)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's own go on with the tensors they are given
    names = {0: None, 1: "old", 2: "new"}[2 if is_to_named else is_from_named]
    if is_to_named and is_from_named and info.optim_cls not in OWN_NAMES:
        names = "old"
    if is_from_named and not is_to_named and info.optim_cls in OWN_NAMES:
        names = None
    found = other.param_groups[0].get("param_names")
    assert found == (None if names is None else [f"{names}{index}" for index in range(len(params))])
    take_steps(optimizer, params, start=3)
    take_steps(other, others, start=3)
    assert_identical(values(others), values(params))
