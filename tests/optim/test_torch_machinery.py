"""torch's own description of optimizers (``OptimizerInfo``), with what it is used to check, run for ours and for controls.

The tests that have a counterpart in torch's test_optim.py bear its name, so that the skips in torch's infos hold here too.
"""

from __future__ import annotations

import copy
import io
import pickle
import unittest
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_methods_invocations import DecorateInfo
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    TensorTracker,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optim_db,
    optims,
)
from torch.testing._internal.common_utils import TestCase, set_default_dtype

from teleport_optim import LearnedTeleportOptimizer, MetaOptimizer
from teleport_optim.optim.kernels import native
from teleport_optim.optim.state import OptimizerStateError
from tests.optim.test_contract import UNSUPPORTED

pytestmark = [
    pytest.mark.filterwarnings("ignore:the state of an open-ended run is saved"),
    pytest.mark.filterwarnings("ignore:lr has changed"),
    pytest.mark.filterwarnings("ignore:an optimizer of a single matrix"),
]
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

# Where torch's optimizers differ among themselves, or ours on purpose.

DECAYS: dict[type[Optimizer], set[int]] = {AdamW: {1, 2}, Muon: {2}}
"""Axes (2 for more too) of the tensors that decay by default, without a gradient, too."""
RESTS = {LearnedTeleportOptimizer}
"""Classes in which a row without a gradient does not decay either."""
STATELESS = {SGD}
"""Classes without state, where there is no momentum."""
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


# What it refuses.

error_cases = [
    pytest.param(info, error, id=f"{info.name}-{error.optimizer_error_input.desc}")
    for info in INFOS
    for error in info.optim_error_inputs_func("cpu", torch.float32)
]


@pytest.mark.parametrize(("info", "error"), error_cases)
def test_errors(info: OptimizerInfo, error: ErrorOptimizerInput) -> None:
    given = error.optimizer_error_input
    params = given.params if given.params is not None else make_params(info)
    expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    if error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with expected(error.error_type, match=error.error_regex):
            make(info, params, given.kwargs)
        return
    optimizer, before = make(info, params, given.kwargs), values(params)
    with expected(error.error_type, match=error.error_regex):
        optimizer.step()
    assert_identical(values(params), before)
    assert not any(optimizer.state.values())


@every_optimizer
@pytest.mark.parametrize(
    ("params", "kind", "message"),
    [
        ([], ValueError, "optimizer got an empty parameter list"),
        ([1.0], TypeError, "optimizer can only optimize Tensors"),
        ([Parameter(torch.ones(2, 2)) * 2], ValueError, "can't optimize a non-leaf Tensor"),
        ([{"params": {Parameter(torch.ones(2, 2))}}], TypeError, "ordered collections"),
    ],
    ids=["empty", "number", "no leaf", "set"],
)
def test_bad_parameters(info: OptimizerInfo, params: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make(info, params)


@every_optimizer
def test_sparse_gradients(info: OptimizerInfo) -> None:
    param = Parameter(torch.ones(3, 2))
    kwargs, makers = info.metadata_for_sparse
    optimizer = make(info, [param], kwargs)
    moving = [make_scheduler(optimizer) for make_scheduler in makers]
    for _ in range(3):
        param.grad = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]).to_sparse()
        if not info.supports_sparse:
            with pytest.raises(RuntimeError, match="sparse"):
                optimizer.step()
            assert_identical(param.detach(), torch.ones(3, 2))
            return
        optimizer.step()
        for scheduler in moving:
            scheduler.step()
    assert bool((param[0] < 1).all())
    assert bool((param[1:] == 1).all())


@every_input
def test_complex(info: OptimizerInfo, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_native", None)  # One kernel for both: another one rounds otherwise.
    if kwargs.get("fused"):
        pytest.skip("fused kernels have no complex numbers")
    param = Parameter(random((4, 3, 2), 0).view(torch.complex64).squeeze(-1))
    optimizer = make(info, [param], kwargs)
    if not info.supports_complex:
        before = values([param])
        param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError, match="complex"):
            optimizer.step()
        assert_identical(values([param]), before)
        return
    pair = Parameter(torch.view_as_real(param.detach()).clone())
    real = make(info, [pair], kwargs)
    for step in range(3):
        pair.grad = random((4, 3, 2), step)
        param.grad = torch.view_as_complex(pair.grad.clone())
        optimizer.step()
        real.step()
        assert_close(torch.view_as_real(param.detach()), pair.detach())


# What a step does.


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


# State dicts.


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
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)
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


# Hooks.


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


# With the decorator of torch itself.


class TestUnderOptims(TestCase):
    """The infos are such that torch's own tests could be run with them."""

    @optims(INFOS, dtypes=[torch.float32, torch.float64])
    def test_every_input_makes_an_optimizer_that_steps(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for given in inputs_of(optim_info):
            params = make_params(optim_info, dtype)
            before = values(params)
            take_steps(make(optim_info, params, given.kwargs), params, 1)
            for param, old in zip(params, before):
                assert not torch.equal(param, old)


instantiate_device_type_tests(TestUnderOptims, globals(), only_for="cpu")
