"""Nothing breaks quietly: bad gradients, divergence, teleports out of range, and models that are changed from outside."""

from __future__ import annotations

import copy
import math
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from teleport_optim.optim.guard import Guard
from test_optimizer import X, Y, network, seeded, train
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.tensorboard import SummaryWriter

from teleport_optim import LearnedTeleportOptimizer, MetaOptimizer
from teleport_optim.optim.controls import PRIOR_MOMENTUM
from teleport_optim.optim.schedule import TELEPORT_INTERVAL
from teleport_optim.testing import sequential_models

pytestmark = [
    pytest.mark.filterwarnings("ignore:the state of an open-ended run is saved"),
    pytest.mark.filterwarnings("ignore:lr has changed"),
    pytest.mark.filterwarnings("ignore:an optimizer of a single matrix"),
    pytest.mark.filterwarnings("ignore:lr=1e-35 is a factor"),
]
NO_STEP = 1e-35
"""A rate at which nothing moves but by teleports; at a rate of 0 these rest, too."""

PRIOR_LOGIT = math.log(PRIOR_MOMENTUM / (1.0 - PRIOR_MOMENTUM))


def snapshot(model: nn.Module, optimizer: LearnedTeleportOptimizer) -> list[Tensor]:
    """Parameters and all state but the counts of skipped steps."""
    slots = [value for own in optimizer.state.values() for key, value in own.items() if key != "skipped"]
    return [value.clone() for value in [*model.parameters(), *slots]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [0, 3, 20, 40])
def test_a_bad_gradient_skips_the_step_and_is_counted(value: float, step: int) -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=80)
    train(model, optimizer, step)
    before = snapshot(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        model[2].weight.grad[1, 2] = value  # type: ignore[index]
        if optimizer.stats().num_skipped_steps == 0:
            with pytest.warns(UserWarning, match=r"gradient of 2\.weight is not finite.*stats") as record:
                optimizer.step()
            assert [warning.filename for warning in record] == [__file__]
        else:
            optimizer.step()
    after = snapshot(model, optimizer)
    if step:
        assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))
    assert all(bool(torch.isfinite(entry).all()) or entry.shape == (2,) for entry in after)
    stats = optimizer.stats()
    assert (stats.num_steps, stats.num_skipped_steps) == (step, 3)
    assert {name for name, own in stats.tensors.items() if own.num_skipped_steps == 3} == {"2.weight"}
    shadow = network()
    unharmed = LearnedTeleportOptimizer.for_model(shadow, total_steps=80)
    train(shadow, unharmed, step)
    assert train(model, optimizer, 20) == train(shadow, unharmed, 20)


def losses_with_bad_gradients(seed: int) -> tuple[float, float, int]:
    """First and last loss of a random small network on a random task, one gradient in ten of which is spoilt."""
    source = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    width, depth = source.choice([4, 8, 16, 32]), source.choice([1, 2, 3])
    activation = source.choice([nn.ReLU, nn.Tanh, nn.GELU, nn.LeakyReLU])
    is_classifier = source.random() < 0.5

    def make() -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(5, width)]
        for _ in range(depth):
            layers += [activation(), nn.Linear(width, width)]
        if source.random() < 0.3:
            layers.append(nn.BatchNorm1d(width))
        return nn.Sequential(*layers, activation(), nn.Linear(width, 3))

    model = seeded(make, seed)
    x = torch.randn(64, 5, generator=generator)
    y = torch.randint(3, (64,), generator=generator) if is_classifier else torch.randn(64, 3, generator=generator)
    optimizer = LearnedTeleportOptimizer.for_model(
        model, total_steps=source.choice([None, 60]), guard=source.random() < 0.5
    )
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        output = model(x)
        loss = F.cross_entropy(output, y) if is_classifier else F.mse_loss(output, y)
        loss.backward()
        losses.append(loss.item())
        if source.random() < 0.1:
            param = source.choice(list(model.parameters()))
            param.grad.view(-1)[source.randrange(param.numel())] = source.choice([math.nan, math.inf, -math.inf])  # type: ignore[union-attr]
        optimizer.step()
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    return losses[0], losses[-1], optimizer.stats().num_skipped_steps


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a step is skipped")
def test_none_of_a_hundred_networks_diverges_under_bad_gradients() -> None:
    results = [losses_with_bad_gradients(seed) for seed in range(100)]
    assert sum(skipped for *_, skipped in results) > 300
    assert [seed for seed, (first, last, _) in enumerate(results) if not last < first] == []


def test_the_guard_does_nothing_where_nothing_diverges() -> None:
    ends = []
    for guard in (False, True):
        model = network()
        optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=60, guard=guard)
        ends.append(train(model, optimizer, 60))
        assert optimizer.stats().num_guarded_steps == 0
    assert ends[0] == ends[1]


@pytest.mark.parametrize("with_loss", [False, True])
def test_the_guard_takes_safe_steps_while_batches_are_bad(with_loss: bool) -> None:
    moved = {}
    for guard in (False, True):
        model = network()
        optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=150, guard=guard)
        train(model, optimizer, 30)
        start = copy.deepcopy(model.state_dict())

        def closure(model: nn.Module = model, optimizer: LearnedTeleportOptimizer = optimizer) -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(100.0 * model(100.0 * X), (Y + 1) % 3)
            loss.backward()
            return loss.item()

        for _ in range(10):
            if with_loss:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        moved[guard] = math.sqrt(sum(float((model.state_dict()[key] - start[key]).square().sum()) for key in start))
        assert optimizer.stats().num_guarded_steps == (10 if guard else 0)
        train(model, optimizer, 110)
        assert optimizer.stats().num_guarded_steps >= (20 if guard else 0)
        assert F.cross_entropy(model(X), Y).item() < (
            0.1 if guard else 1.0
        )  # Units may have died where none was on guard.
    assert moved[True] < 0.3 * moved[False]


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50))
def test_the_guard_lets_gradients_grow_by_less_than_ten_times(norms: list[float]) -> None:
    guard, peak = Guard(), math.inf
    for norm in norms:
        guard = guard.watch(norm, None)
        is_alarm = norm > 10.0 * peak * 1.0001
        assert not is_alarm or guard.num_safe_steps == 20
        peak = norm if math.isinf(peak) else max(peak * math.exp(-0.02), min(norm, 10.0 * peak))


def test_the_guard_watches_losses() -> None:
    guard = Guard().watch(1.0, 2.0).watch(1.0, 2.15)
    assert guard.num_safe_steps == 0
    assert guard.watch(1.0, 2.25).num_safe_steps == 20
    assert guard.watch(1.0, math.nan).num_safe_steps == 20
    assert Guard().watch(1.0, math.inf).num_safe_steps == 20
    safe = guard.watch(1.0, 3.0)
    for left in (*range(19, -1, -1), 0):
        safe = safe.watch(1.0, 2.0)
        assert safe.num_safe_steps == left
    assert Guard().watch(0.0, None) == Guard()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([torch.bfloat16, torch.float16]), st.integers(0, 10**6), st.floats(0.1, 2.0))
def test_teleports_of_sixteen_bits_round_nothing(dtype: torch.dtype, seed: int, spread: float) -> None:
    """Scales are powers of two: the outputs stay the same to the bit, where no weight is near the end of the range."""
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)), seed)
    scales = torch.exp(spread * torch.randn(10, generator=torch.Generator().manual_seed(seed)))
    with torch.no_grad():
        model[0].weight.mul_(scales[:, None])  # type: ignore[index]
        model[2].weight.div_(scales)  # type: ignore[index]
        for param in model.parameters():  # Below 6e-5 numbers of float16 lose digits.
            param.copy_(torch.where(param.abs() < 1e-3, 1e-3, param))
    model = model.to(dtype)
    optimizer = LearnedTeleportOptimizer.for_model(model, lr=NO_STEP, checkpoint=balancing())
    outputs = model(X.to(dtype))
    weights = model[0].weight.clone()  # type: ignore[index]
    F.cross_entropy(outputs.float(), Y).backward()
    optimizer.step()
    assert torch.equal(model(X.to(dtype)), outputs)
    ratios = model[0].weight / weights  # type: ignore[index]
    assert torch.equal(torch.log2(ratios.float()).round(), torch.log2(ratios.float()))
    assert optimizer.teleport_size > 0 or not (ratios != 1).any()


def balancing() -> MetaOptimizer:
    """A meta-optimizer that always balances at full strength."""
    meta_optimizer = MetaOptimizer(4)
    with torch.no_grad():
        meta_optimizer.readout_bias[-2] = 20.0
    return meta_optimizer


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 3e4), (torch.float32, 1e25), (torch.float32, 1e-25)])
def test_channels_that_could_leave_the_range_stay(dtype: torch.dtype, size: float) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)))
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = size, 0.0  # type: ignore[index]
        model[0].weight[1:] *= 8.0  # type: ignore[index]
    model = model.to(dtype)
    optimizer = LearnedTeleportOptimizer.for_model(model, lr=NO_STEP, checkpoint=balancing())
    before = copy.deepcopy(model.state_dict())
    model(X.to(dtype))
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e-3)
    optimizer.step()
    after = model.state_dict()
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert torch.equal(after["0.weight"][0], before["0.weight"][0])
    assert not torch.equal(after["0.weight"][1], before["0.weight"][1])


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_zero_gradients_change_nothing_at_rate_zero(data: st.DataObject) -> None:
    """What torch.distributed.checkpoint does to make an optimizer have a state."""
    sample = data.draw(sequential_models())
    model, inputs = sample.model, sample.inputs
    optimizer = LearnedTeleportOptimizer.for_model(model, lr=0.0)
    model(inputs)
    before = copy.deepcopy(model.state_dict())
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert optimizer.teleport_size == 0.0


def rms_where_it_moves(step: Tensor) -> float:
    """RMS of a step, without the rows of a matrix that belong to dead units."""
    rows = step.flatten(1) if step.dim() > 1 else step[None]
    is_moved = rows.abs().amax(dim=1) > 1e-6
    assert is_moved.float().mean() > 0.5
    return rows[is_moved].square().mean().sqrt().item()


def test_stats_tell_what_the_steps_did() -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=2 * TELEPORT_INTERVAL)
    assert optimizer.stats() == (0, 0, 0, 0.0, {})
    train(model, optimizer, TELEPORT_INTERVAL)
    train(model, optimizer, 1)
    assert optimizer.stats().teleport_size == optimizer.teleport_size > 0
    assert all((own.teleport_size > 0) == (name != "4.bias") for name, own in optimizer.stats().tensors.items())
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    train(model, optimizer, 1)
    stats = optimizer.stats()
    num_steps = TELEPORT_INTERVAL + 2
    assert (stats.num_steps, stats.num_skipped_steps) == (num_steps, 0)
    assert (stats.num_guarded_steps, stats.teleport_size) == (0, 0.0)
    assert len({own.momentum for own in stats.tensors.values()}) == 1
    assert list(stats.tensors) == [name for name, _ in model.named_parameters()]
    for name, param in model.named_parameters():
        own = stats.tensors[name]
        step = (param.detach() - (1.0 - own.decay) * before[name]) * (param != before[name])  # idle rows do not decay
        assert rms_where_it_moves(step) == pytest.approx(own.rate, rel=1e-3)
        assert abs(math.log(own.momentum / (1.0 - own.momentum)) - PRIOR_LOGIT) < 2.0
        assert all(-1.0 < value < 1.0 for value in (own.balance, own.gradient_balance))
        assert (own.decay > 0) == name.endswith("weight")


def test_stats_of_a_safe_step_are_those_of_that_step() -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=40, guard=True)
    train(model, optimizer, 12)
    before = model[4].weight.detach().clone()
    usual = optimizer.stats().tensors["4.weight"]
    (100.0 * F.cross_entropy(100.0 * model(100.0 * X), (Y + 1) % 3)).backward()
    optimizer.step()
    own = optimizer.stats().tensors["4.weight"]
    assert optimizer.stats().num_guarded_steps == 1
    step = model[4].weight.detach() - (1.0 - own.decay) * before
    assert step.square().mean().sqrt().item() == pytest.approx(own.rate, rel=1e-3)
    assert own.rate < 0.3 * usual.rate
    assert own.momentum == pytest.approx(PRIOR_MOMENTUM)


def test_stats_are_logged(tmp_path: Path) -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=40)
    train(model, optimizer, 3)
    written: dict[str, tuple[float, int]] = {}

    class Writer:
        def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> None:
            written[tag] = (scalar_value, global_step)

    optimizer.log(Writer())
    assert len(written) == 4 + 7 * 6
    assert written["optimizer/num_steps"] == (3, 3)
    assert written["optimizer_momentum/2.weight"] == (optimizer.stats().tensors["2.weight"].momentum, 3)
    optimizer.log(Writer(), step=7, prefix="mine")
    assert written["mine_rate/4.bias"][1] == 7
    with SummaryWriter(str(tmp_path)) as writer:  # type: ignore[no-untyped-call]
        optimizer.log(writer)
    assert list(tmp_path.iterdir())


class Mask(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (weight.detach().abs() > 0.1)


def changed(change: Callable[[nn.Sequential], object]) -> nn.Sequential:
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.nn.utils.weight_norm is deprecated
        change(model)
    return model


CHANGED: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    "weight_norm": (lambda m: [parametrizations.weight_norm(m[0]), parametrizations.weight_norm(m[2])], "weight_norm"),
    "weight_norm by hooks": (lambda m: nn.utils.weight_norm(m[2]), "has forward hooks"),
    "spectral_norm": (lambda m: parametrizations.spectral_norm(m[2]), "vdot"),
    "spectral_norm by hooks": (lambda m: nn.utils.spectral_norm(m[2]), "hooks|cannot be copied"),
    "pruning": (lambda m: prune.l1_unstructured(m[2], "weight", 0.3), "has forward hooks"),
    "a mask as parametrization": (lambda m: nn.utils.parametrize.register_parametrization(m[2], "weight", Mask()), ""),
}


@pytest.mark.parametrize(("change", "reason"), CHANGED.values(), ids=CHANGED)
def test_models_that_are_changed_from_outside_train_without_wrong_teleports(
    change: Callable[[nn.Sequential], object], reason: str
) -> None:
    model = changed(change)
    optimizer = LearnedTeleportOptimizer.for_model(model, lr=NO_STEP, total_steps=60, checkpoint=balancing())
    before = F.cross_entropy(model(X), Y)
    before.backward()
    outputs = model.eval()(X)
    optimizer.step()
    torch.testing.assert_close(model(X), outputs, rtol=1e-5, atol=1e-6)
    model.train()
    assert re.search(reason, " ".join(refusal.reason for refusal in optimizer.spec.refusals))
    moving = {leg.name for symmetry in optimizer.spec for leg in symmetry.legs}
    assert not any(name.startswith("2.") and name != "2.bias" for name in moving)
    optimizer.param_groups[0]["lr"] = 1.0
    assert train(model, optimizer, 40) < before.item() - 0.5


def test_masks_that_a_loop_multiplies_in_stay_through_teleports() -> None:
    model = network()
    mask = (torch.rand(10, 10, generator=torch.Generator().manual_seed(3)) > 0.3).float()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=60)
    for _ in range(60):
        with torch.no_grad():
            model[2].weight.mul_(mask)
        train(model, optimizer, 1)
    with torch.no_grad():
        model[2].weight.mul_(mask)
    assert F.cross_entropy(model(X), Y) < 0.2
    assert optimizer.teleport_size == 0.0
    assert optimizer.stats().tensors["2.weight"].teleport_size > 0


UNUSABLE: dict[str, Callable[[], Tensor]] = {
    "meta device": lambda: nn.Parameter(torch.empty(3, 2, device="meta")),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:.*quantize.*")
@pytest.mark.parametrize("reason", UNUSABLE)
def test_tensors_that_cannot_be_optimized_are_refused_at_once(reason: str) -> None:
    param = UNUSABLE[reason]()
    with pytest.raises(ValueError, match=reason):
        LearnedTeleportOptimizer([param])
    optimizer = LearnedTeleportOptimizer([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=reason):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def test_parameters_on_several_devices_are_refused() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = LearnedTeleportOptimizer([first, second])
    first.grad = torch.ones(2)
    elsewhere = nn.Parameter(torch.ones(2, device="meta"))
    elsewhere.grad = torch.ones(2, device="meta")
    torch.utils.swap_tensors(second, elsewhere)
    with pytest.raises(RuntimeError, match=r"several devices \(cpu, meta\): make one optimizer for each"):
        optimizer.step()
    assert torch.equal(first, torch.ones(2))
    assert not optimizer.state


def test_lazy_modules_train_once_they_have_shapes() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=60)
        model(X)
    assert train(model, optimizer, 60) < 0.2
    assert len(optimizer.spec) == 1


def test_weights_of_another_optimizer_do_not_teleport() -> None:
    model = network()
    other = torch.optim.AdamW(model[2].parameters(), lr=1e-3)
    optimizer = LearnedTeleportOptimizer([*model[0].parameters(), *model[4].parameters()], model=model, total_steps=40)
    with pytest.warns(UserWarning, match=r"no teleports where .*2\.weight"):
        train(model, optimizer, 1)
    for _ in range(20):
        train(model, optimizer, 1)
        other.step()
    assert not len(optimizer.spec)
