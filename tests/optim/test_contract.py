"""More of the contract of torch.optim: tensors of every kind, schedulers, hooks. AdamW and SGD are the controls."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.optim import buckets as buckets_module
from teleport_optim.optim import parameters
from teleport_optim.optim.optimizer import TeleportOptimizer
from tests.helpers.classification import X, Y, network, random, train
from tests.helpers.expected_warnings import OF_OURS
from tests.helpers.options import UNSUPPORTED

pytestmark = OF_OURS

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "ours": lambda params, **options: LearnedTeleportOptimizer(params, total_steps=50, **options),
    "nothing learned": TeleportOptimizer,
    "AdamW": lambda params, **options: AdamW(params, **{"lr": 1e-2, **options}),
    "SGD": lambda params, **options: SGD(params, **{"lr": 0.1, "momentum": 0.9, **options}),
}
everyone = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def backward(model: nn.Module, dtype: torch.dtype = torch.float32) -> float:
    loss = F.cross_entropy(model(X.to(dtype)).float(), Y)
    loss.backward()
    return loss.item()


def strided(value: Tensor) -> Tensor:
    """Every second entry of a larger tensor."""
    larger = value.new_zeros(*value.shape[:-1], 2 * value.shape[-1])
    larger[..., ::2] = value
    return larger[..., ::2]


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "contiguous": ((4, 6), lambda value: value),
    "transposed": ((4, 6), lambda value: value.t().contiguous().t()),
    "strided": ((4, 6), strided),
    "strided vector": ((7,), strided),
    "channels last": ((4, 3, 2, 2), lambda value: value.to(memory_format=torch.channels_last)),
    "large channels last": ((64, 64, 3, 3), lambda value: value.to(memory_format=torch.channels_last)),
    "no axes": ((), lambda value: value),
    "no entries": ((0, 5), lambda value: value),
}


@everyone
@pytest.mark.parametrize("is_grad_strided", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_memory_formats_make_no_difference(make: Callable[..., Optimizer], kind: str, is_grad_strided: bool) -> None:
    shape, arrange = LAYOUTS[kind]
    plain, arranged = nn.Parameter(random(*shape)), nn.Parameter(arrange(random(*shape)))
    optimizers = [make([plain]), make([arranged])]
    for step in range(22):
        plain.grad = random(*shape, seed=step + 1)
        arranged.grad = arrange(plain.grad.clone()) if is_grad_strided else plain.grad.clone()
        strides = arranged.stride()
        for optimizer in optimizers:
            optimizer.step()
        assert arranged.stride() == strides
        torch.testing.assert_close(arranged, plain, rtol=1e-5, atol=1e-6)
    assert not plain.numel() or not torch.equal(plain, random(*shape))


@everyone
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_train(make: Callable[..., Optimizer], dtype: torch.dtype) -> None:
    model = network().to(dtype)
    optimizer = make(model.parameters())
    if isinstance(optimizer, AdamW) and dtype == torch.float16:
        pytest.skip("its eps is 0 in float16")
    before = backward(model, dtype)
    for _ in range(30):
        optimizer.zero_grad()
        loss = backward(model, dtype)
        optimizer.step()
    assert loss < before - 0.1
    assert all(param.dtype == dtype and bool(param.isfinite().all()) for param in model.parameters())
    if isinstance(optimizer, LearnedTeleportOptimizer):
        kept = torch.float64 if dtype == torch.float64 else torch.bfloat16
        for param in model.parameters():
            dtypes = {key: value.dtype for key, value in optimizer.state[param].items()}
            assert dtypes.pop("exp_avg") == dtypes.pop("average_offset") == kept
            assert {dtypes.pop(key) for key in ("fingerprint", "average_start", "average_end")} == {torch.int64}
            assert set(dtypes.values()) == {torch.float32}


def test_sixteen_bits_train_as_well_as_thirty_two() -> None:
    ends = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = network().to(dtype)
        optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=60)
        for _ in range(60):
            optimizer.zero_grad()
            ends[dtype] = backward(model, dtype)
            optimizer.step()
        assert len(optimizer.spec) == 2
    assert ends[torch.float32] < 0.01
    assert ends[torch.bfloat16] < 0.03
    assert ends[torch.float16] < 0.02


@everyone
def test_the_rate_may_be_a_tensor_that_changes_in_place(make: Callable[..., Optimizer]) -> None:
    first, second = network(), network()
    by_number, by_tensor = make(first.parameters(), lr=0.5), make(second.parameters(), lr=torch.tensor(0.5))
    train(first, by_number, 6)
    train(second, by_tensor, 6)
    by_number.param_groups[0]["lr"] = 0.25
    by_tensor.param_groups[0]["lr"].fill_(0.25)
    train(first, by_number, 6)
    train(second, by_tensor, 6)
    assert isinstance(by_tensor.param_groups[0]["lr"], Tensor)
    for one, other in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


SCHEDULERS: dict[type[LRScheduler], Callable[[Optimizer], LRScheduler]] = {
    lr_scheduler.LambdaLR: lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    lr_scheduler.MultiplicativeLR: lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    lr_scheduler.StepLR: lambda o: lr_scheduler.StepLR(o, 2),
    lr_scheduler.MultiStepLR: lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    lr_scheduler.ConstantLR: lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    lr_scheduler.LinearLR: lr_scheduler.LinearLR,
    lr_scheduler.ExponentialLR: lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    lr_scheduler.PolynomialLR: lr_scheduler.PolynomialLR,
    lr_scheduler.CosineAnnealingLR: lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    lr_scheduler.CosineAnnealingWarmRestarts: lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    lr_scheduler.CyclicLR: lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 2, cycle_momentum=False),
    lr_scheduler.OneCycleLR: lambda o: lr_scheduler.OneCycleLR(o, 1.0, 20, cycle_momentum=False),
    lr_scheduler.ReduceLROnPlateau: lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    lr_scheduler.ChainedScheduler: lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 2)]),
    lr_scheduler.SequentialLR: lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    found = {value for _, value in inspect.getmembers(lr_scheduler, inspect.isclass) if issubclass(value, LRScheduler)}
    assert found - {LRScheduler, getattr(lr_scheduler, "_LRScheduler", LRScheduler)} == set(SCHEDULERS)


@everyone
@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_schedulers_move_the_rate_and_resume(make: Callable[..., Optimizer], kind: type[LRScheduler]) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=1.0)
    scheduler = SCHEDULERS[kind](optimizer)
    rates = []

    def advance(model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> float:
        train(model, optimizer, 1)
        scheduler.step(*([1.0] if kind is lr_scheduler.ReduceLROnPlateau else []))  # type: ignore[arg-type]
        return float(optimizer.param_groups[0]["lr"])

    rates = [advance(model, optimizer, scheduler) for _ in range(6)]
    assert len({round(rate, 9) for rate in rates}) > 1
    other = copy.deepcopy(model)
    resumed = make(other.parameters(), lr=1.0)
    resumed_scheduler = SCHEDULERS[kind](resumed)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's optimizers share tensors otherwise
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    for _ in range(3):
        assert advance(model, optimizer, scheduler) == advance(other, resumed, resumed_scheduler)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters()))


def test_a_scheduler_of_momentum_is_refused_since_there_is_none_to_set() -> None:
    optimizer = LearnedTeleportOptimizer(network().parameters())
    with pytest.raises(ValueError, match="must support momentum"):
        lr_scheduler.OneCycleLR(optimizer, 1.0, 20)


@everyone
def test_parameters_freeze_and_thaw(make: Callable[..., Optimizer]) -> None:
    model = network()
    optimizer = make(model.parameters())
    train(model, optimizer, 7)
    model[0].requires_grad_(False)
    model[0].weight.grad = model[0].bias.grad = None
    frozen, thawed = model[0].weight.clone(), model[2].weight.clone()
    train(model, optimizer, 7)
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[2].weight, thawed)
    model[0].requires_grad_(True)
    train(model, optimizer, 7)
    assert not torch.equal(model[0].weight, frozen)
    assert all(bool(param.isfinite().all()) for param in model.parameters())


@everyone
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(make: Callable[..., Optimizer], set_to_none: bool) -> None:
    model = network()
    optimizer = make(model.parameters())
    backward(model)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in model.parameters())  # type: ignore[union-attr]
    optimizer.step()
    assert all(bool(param.isfinite().all()) for param in model.parameters())


@everyone
def test_hooks_run_in_their_places(make: Callable[..., Optimizer]) -> None:
    model = network()
    optimizer = make(model.parameters())
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global before")),  # type: ignore[arg-type, func-returns-value]
        register_optimizer_step_post_hook(lambda *_: calls.append("global after")),
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),  # type: ignore[arg-type, func-returns-value]
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
        optimizer.register_state_dict_pre_hook(lambda *_: calls.append("before saving")),
        optimizer.register_state_dict_post_hook(lambda *_: calls.append("after saving")),  # type: ignore[func-returns-value]
        optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before loading")),  # type: ignore[func-returns-value]
        optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after loading")),
    ]
    try:
        train(model, optimizer, 1)
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        for handle in handles:
            handle.remove()
    train(model, optimizer, 1)
    assert calls == [
        *("global before", "before", "after", "global after"),
        *("before saving", "after saving", "before loading", "after loading"),
    ]


@everyone
def test_a_hook_may_change_what_is_loaded(make: Callable[..., Optimizer]) -> None:
    model = network()
    optimizer = make(model.parameters())
    train(model, optimizer, 3)

    def halve(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(state_dict)
        changed["param_groups"][0]["lr"] *= 0.5
        return changed

    handle = optimizer.register_load_state_dict_pre_hook(halve)
    rate = optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(optimizer.state_dict())
    handle.remove()
    assert optimizer.param_groups[0]["lr"] == 0.5 * rate


@everyone
def test_the_profiler_knows_its_name(make: Callable[..., Optimizer]) -> None:
    model = network()
    optimizer = make(model.parameters())
    backward(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert f"Optimizer.step#{type(optimizer).__name__}.step" in {event.key for event in profile.key_averages()}


@everyone
def test_steps_within_the_backward_pass(make: Callable[..., Optimizer]) -> None:
    """One optimizer for each parameter, which steps as soon as its gradient is there and frees it."""
    model = network()
    optimizers = {param: make([param]) for param in model.parameters()}

    def step(param: Tensor) -> None:
        optimizers[param].step()  # type: ignore[index]
        optimizers[param].zero_grad()  # type: ignore[index]

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    before = backward(model)
    for _ in range(40):
        after = backward(model)
    assert after < before - 0.1
    assert all(param.grad is None for param in model.parameters())


def test_tensors_of_one_shape_go_together_as_they_go_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for most in (buckets_module.MAX_GROUPED, 0):
        monkeypatch.setattr(parameters, "MAX_GROUPED", most)
        monkeypatch.setattr(buckets_module, "MAX_GROUPED", most)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = [module for _ in range(4) for module in (nn.Linear(6, 6), nn.Tanh())]
            model = nn.Sequential(*layers, nn.Linear(6, 3)).double()
        optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=20)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(X.double()), Y).backward()
            optimizer.step()
        assert optimizer._cache is not None
        buckets = optimizer._cache.table.buckets
        assert len(buckets) == (1 if most else len(list(model.parameters())))
        assert max(len(group.rows) for bucket in buckets for group in bucket.groups) == (4 if most else 1)
        ends.append(list(model.parameters()))
    for one, other in zip(*ends):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_options_without_effect_are_refused(key: str) -> None:
    params = [nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match=f"LearnedTeleportOptimizer has no {key} "):
        LearnedTeleportOptimizer([{"params": params, key: UNSUPPORTED[key]}])
    with pytest.raises(TypeError, match=key):
        LearnedTeleportOptimizer(params, **{key: UNSUPPORTED[key]})  # type: ignore[arg-type]
    optimizer = LearnedTeleportOptimizer([{"params": params, "name": "mine", "lr_scale": 0.5}])
    assert optimizer.param_groups[0]["name"] == "mine"


def test_a_rate_of_adam_is_warned_about() -> None:
    model = network()
    with pytest.warns(UserWarning, match=r"lr=0\.001 is a factor on the learned rate") as record:
        LearnedTeleportOptimizer(model.parameters(), lr=1e-3)
    assert [warning.filename for warning in record] == [__file__]


def test_two_runs_agree_bit_for_bit() -> None:
    ends: list[Iterable[Tensor]] = []
    for _ in range(2):
        model = network()
        train(model, LearnedTeleportOptimizer.for_model(model, total_steps=50), 50)
        ends.append(model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(*ends))
