"""torch's own description of optimizers (``OptimizerInfo``), with what it is used to check, for ours and for controls.

The tests that have a counterpart in torch's test_optim.py bear its name, so that the skips in torch's infos hold here too.
"""

from __future__ import annotations

import copy
import unittest
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.testing._internal.common_methods_invocations import DecorateInfo
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optim_db,
)
from torch.testing._internal.common_utils import TestCase

from teleport_optim import LearnedTeleportOptimizer, MetaOptimizer
from tests.helpers.options import UNSUPPORTED

torch.backends.__allow_nonbracketed_mutation_flag = True  # common_utils forbids it to all
CHECK = TestCase()
assert_close: Callable[..., None] = CHECK.assertEqual


# What ours is, in the terms of torch.


def our_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    options: dict[str, dict[str, Any]] = {
        "default": {},
        "non-default lr": {"lr": 0.3},
        "Tensor lr": {"lr": torch.tensor(0.3)},
        "Tensor lr of one axis": {"lr": torch.tensor([0.3])},
        "zero weight_decay": {"weight_decay": 0.0},
        "nonzero weight_decay": {"weight_decay": 0.1},
        "maximize": {"maximize": True},
        "maximize, weight_decay": {"maximize": True, "weight_decay": 0.1},
        "total_steps": {"total_steps": 60},
        "average, total_steps, maximize": {"average": False, "total_steps": 60, "maximize": True},
        "no teleport": {"teleport": False},
        "nothing learned": {"checkpoint": MetaOptimizer()},
    }
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in options.items()]


OUR_WORDS = {"Tensor lr must be 1-element": r"a tensor lr must have one element, got shape \(2,\)"}
"""Messages of torch for which ours has its own, since they do not say what was given."""


def our_error_inputs(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    errors = get_error_inputs_for_all_optims(device, dtype)
    for error in errors:
        error.error_regex = OUR_WORDS.get(error.error_regex, error.error_regex)
    bad: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("negative lr", {"lr": -0.1}, ValueError, "Invalid learning rate: -0.1: .* at least 0"),
        ("lr is NaN", {"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
        ("negative Tensor lr", {"lr": torch.tensor(-1.0)}, ValueError, "Invalid learning rate: -1.0"),
        ("negative weight_decay", {"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1: .* or None"),
        ("infinite weight_decay", {"weight_decay": float("inf")}, ValueError, "Invalid weight_decay value: inf"),
        ("no steps", {"total_steps": 0}, ValueError, "Invalid total_steps value: 0: .* integer from 1 to"),
        ("half a step", {"total_steps": 1.5}, ValueError, "Invalid total_steps value: 1.5"),
        ("maximize is a number", {"maximize": 1}, TypeError, "maximize must be True or False, got 1"),
        ("model is a list", {"model": []}, TypeError, r"model must be a torch\.nn\.Module, got list"),
        ("lr of Adam", {"lr": 1e-3}, UserWarning, "lr=0.001 is a factor on the learned rate"),
    ]
    errors += [
        ErrorOptimizerInput(OptimizerInput(None, kwargs, desc), error_type=kind, error_regex=regex)
        for desc, kwargs, kind, regex in bad
    ]
    for key, value in UNSUPPORTED.items():
        group = {"params": [Parameter(torch.ones(2, 3, dtype=dtype))], key: value}
        given = OptimizerInput([group], {}, f"{key} in a group")
        errors.append(ErrorOptimizerInput(given, error_type=ValueError, error_regex=f"has no {key} "))
    for key in ("fused", "capturable", "differentiable"):
        given = OptimizerInput(None, {key: True}, f"{key} as an argument")
        errors.append(ErrorOptimizerInput(given, error_type=TypeError, error_regex=f"argument '{key}'"))
    steps = OptimizerInput([{"params": [torch.ones(2)], "total_steps": 3}, {"params": [torch.ones(3)]}], {}, "two runs")
    errors.append(ErrorOptimizerInput(steps, error_type=ValueError, error_regex="total_steps is one number"))
    meta = OptimizerInput([torch.ones(2, device="meta")], {}, "no data")
    errors.append(ErrorOptimizerInput(meta, error_type=ValueError, error_regex="is on the meta device"))
    param = torch.ones(2, 3, dtype=dtype)
    param.grad = torch.ones_like(param).to_sparse()
    errors.append(
        ErrorOptimizerInput(
            OptimizerInput([param], {}, "sparse gradient"),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_regex="the gradient of parameter 0 is sparse",
        )
    )
    return errors


OURS = OptimizerInfo(
    LearnedTeleportOptimizer,
    optim_inputs_func=our_inputs,
    optim_error_inputs_func=our_error_inputs,
    scheduler_inputs=(
        [lambda opt: schedulers.StepLR(opt, gamma=0.9, step_size=10)],
        [lambda opt: schedulers.LinearLR(opt, start_factor=0.4, end_factor=0.8, total_iters=4)],
        [lambda opt: schedulers.StepLR(opt, gamma=0.9, step_size=10), schedulers.ReduceLROnPlateau],
        [lambda opt: schedulers.ExponentialLR(opt, gamma=0.99)],
        [lambda opt: schedulers.OneCycleLR(opt, max_lr=1.0, total_steps=60, cycle_momentum=False)],
    ),
    supported_impls=(),
    not_og_supported_flags=("maximize", "total_steps", "weight_decay"),
    supports_sparse=False,
    has_capturable_arg=False,
    supports_complex=True,
    supports_multiple_devices=False,
    skips=(
        DecorateInfo(
            unittest.skip("it never had a step that was no tensor: see REFUSED"),
            "TestOptimRenewed",
            "test_load_nontensor_step",
        ),
    ),
)
INFOS = [OURS, *(info for info in optim_db if info.optim_cls in (AdamW, SGD, Adafactor, Muon))]


# How the tests are laid out.

COUNTERPARTS = {"test_compiled_steps_match": ("CompiledOptimizerParityTests", "test_correctness")}
"""Tests whose counterpart in torch is in another file."""


def marks_of(info: OptimizerInfo, test_name: str, **param_kwargs: Any) -> list[Any]:
    """What an info says about a test, as marks."""

    def stand_in() -> None: ...

    decorated: Any = stand_in
    test_class, test_name = COUNTERPARTS.get(test_name, ("TestOptimRenewed", test_name))
    for decorate in info.get_decorators(test_class, test_name, "cpu", torch.float32, param_kwargs):
        decorated = decorate(decorated)
    marks = list(getattr(decorated, "pytestmark", []))
    if getattr(decorated, "__unittest_skip__", False):
        marks.append(pytest.mark.skip(reason=decorated.__unittest_skip_why__))
    return marks


def every_optimizer(test: Callable[..., None]) -> Callable[..., None]:
    cases = [pytest.param(info, marks=marks_of(info, test.__name__), id=info.name) for info in INFOS]
    return pytest.mark.parametrize("info", cases)(test)


def inputs_of(info: OptimizerInfo) -> list[OptimizerInput]:
    return _get_optim_inputs_including_global_cliquey_kwargs(  # type: ignore[no-any-return]
        "cpu", torch.float32, info, skip=("differentiable",)
    )


def every_input(test: Callable[..., None]) -> Callable[..., None]:
    cases = [
        pytest.param(
            info, given.kwargs, marks=marks_of(info, test.__name__, **given.kwargs), id=f"{info.name}-{given.desc}"
        )
        for info in INFOS
        for given in inputs_of(info)
    ]
    return pytest.mark.parametrize(("info", "kwargs"), cases)(test)


def random(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_params(info: OptimizerInfo, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    shapes = [(5, 4), (4, 5), (5, 4), (1, 6)] if info.optim_cls is Muon else [(5, 4), (4, 5), (5, 4), (6,), (2, 3, 2)]
    return [Parameter(random(shape, seed, dtype)) for seed, shape in enumerate(shapes)]


def make(info: OptimizerInfo, params: Any, kwargs: dict[str, Any] | None = None) -> Any:
    """An optimizer; the options are copied, since a scheduler writes into a rate that is a tensor."""
    return info.optim_cls(params, **copy.deepcopy(kwargs or {}))


def take_steps(optimizer: Optimizer, params: Sequence[Tensor], steps: int = 3, start: int = 0) -> None:
    for step in range(start, start + steps):
        for index, param in enumerate(params):
            param.grad = random(param.shape, 100 + 10 * step + index, param.dtype)
        optimizer.step()


def assert_identical(first: Any, second: Any) -> None:
    assert_close(first, second, rtol=0, atol=0)


def assert_same_state(first: Optimizer, second: Any) -> None:
    second = second.state_dict() if isinstance(second, Optimizer) else second
    assert_identical(first.state_dict(), second)


def values(params: Sequence[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def state_after(info: OptimizerInfo, kwargs: dict[str, Any], steps: int = 3) -> tuple[list[Parameter], Any]:
    params = make_params(info)
    optimizer = make(info, params, kwargs)
    take_steps(optimizer, params, steps)
    return params, optimizer
