"""Teleports: they keep the function, carry gradients and momenta along, and stay within bounds."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from teleport_optim import LearnedTeleportOptimizer, act, act_dual, find_symmetries
from teleport_optim.optim.controls import Controls
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.site_norms import log_ratio, site_log_norms
from teleport_optim.optim.teleport import MAX_LOG_SCALE, Point, balance, teleport
from teleport_optim.symmetry.groups import GROUPS
from teleport_optim.symmetry.moves import move_scaling
from teleport_optim.symmetry.spec import Leg, Symmetry
from teleport_optim.testing import sequential_models
from tests.helpers.classification import NO_STEP, X, Y, balancing, seeded
from tests.helpers.expected_warnings import OF_OURS, RATE_OF_NO_STEP
from tests.helpers.perceptrons import generator, loss_and_grads, named, perceptron

pytestmark = [*OF_OURS, RATE_OF_NO_STEP]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_teleports_keep_the_function_and_transport_gradient_and_momentum(seed: int) -> None:
    model = perceptron(4, 7, 6, 2, seed=seed)
    params = named(model)
    source = generator(seed)
    x, y = torch.randn(9, 4, generator=source).double(), torch.randn(9, 2, generator=source).double()
    table = ParameterTable.of(params, find_symmetries(model, x))
    loss, grads = loss_and_grads(model, params, x, y)
    momenta = {name: 2.0 * grad for name, grad in grads.items()}
    controls = Controls.from_outputs(torch.randn(len(params), len(Controls._fields), generator=source))
    offsets = {name: torch.randn(param.shape, generator=source).double() for name, param in params.items()}
    point, sizes = teleport(Point(params, grads, momenta, offsets), controls, table)
    moved, moved_grads, moved_momenta, moved_offsets = point
    loss_there, grads_there = loss_and_grads(model, dict(moved), x, y)
    assert (sizes > 0).all()
    assert loss_there == pytest.approx(loss, rel=1e-12)
    for name in params:
        torch.testing.assert_close(moved_grads[name], grads_there[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moved_momenta[name], 2.0 * grads_there[name], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(moved["0.weight"], params["0.weight"])
    average, there = (
        {name: p + offset[name] for name, p in own.items()}
        for own, offset in ((params, offsets), (moved, moved_offsets))
    )
    assert loss_and_grads(model, there, x, y)[0] == pytest.approx(loss_and_grads(model, average, x, y)[0], rel=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 2.0))
def test_a_run_begins_at_the_balanced_point_of_the_orbit(seed: int, spread: float) -> None:
    """It is the same function; gradients go along, and where on the orbit the parameters were makes no difference."""
    model = perceptron(4, 7, 6, 2, seed=seed)
    source = generator(seed)
    x, y = torch.randn(9, 4, generator=source).double(), torch.randn(9, 2, generator=source).double()
    params = named(model)
    table = ParameterTable.of(params, find_symmetries(model, x))
    element = {site.id: torch.exp(spread * torch.randn(site.size, generator=source).double()) for site in table.spec}
    ends = []
    for start in (params, act(table.spec, element, params)):
        loss, grads = loss_and_grads(model, start, x, y)
        point, sizes = balance(Point(start, grads, grads, start), table)
        moved, moved_grads, moved_momenta, moved_offsets = point
        assert all(torch.allclose(moved_momenta[name], moved_grads[name], rtol=1e-9) for name in grads)
        assert all(torch.allclose(moved_offsets[name], moved[name], rtol=1e-9) for name in start)
        for symmetry, size in zip(table.spec, sizes):
            (bias,) = (leg.name for leg in symmetry.writers if leg.name.endswith("bias"))
            way = torch.log(moved[bias] / start[bias])
            assert size.item() == pytest.approx(way.square().mean().sqrt().item(), rel=1e-4)
        loss_there, grads_there = loss_and_grads(model, dict(moved), x, y)
        assert loss_there == pytest.approx(loss, rel=1e-9)
        torch.testing.assert_close(dict(moved_grads), grads_there, rtol=1e-8, atol=1e-12)
        for symmetry in table.spec:
            assert 0.25 * log_ratio(site_log_norms(symmetry, moved)).abs().max() < 0.02
        ends.append(dict(moved))
    torch.testing.assert_close(*ends, rtol=0.1, atol=1e-6)
    point = Point(params, grads, grads, params)
    assert balance(point, ParameterTable.of(params))[0] == point


def test_full_strength_balances_a_site() -> None:
    model = perceptron(4, 7, 2)
    params = named(model)
    table = ParameterTable.of(params, find_symmetries(model, torch.zeros(2, 4).double()))
    controls = Controls.prior(len(params))._replace(balance=torch.ones(len(params)))
    zeros = {name: torch.zeros_like(param) for name, param in params.items()}
    (moved, *_), _ = teleport(Point(params, zeros, zeros, zeros), controls, table)
    (symmetry,) = table.spec
    assert log_ratio(site_log_norms(symmetry, params)).abs().max() > 0.1
    assert log_ratio(site_log_norms(symmetry, moved)).abs().max() < 1e-5


@pytest.mark.parametrize("imbalance", [1.0, 2.0, 30.0])
def test_a_teleport_has_a_bound_and_the_balanced_start_has_none(imbalance: float) -> None:
    """At full strength channels move back to balance, up to the bound; the start moves all the way."""
    model = perceptron(4, 6, 2)
    start = named(model)
    table = ParameterTable.of(start, find_symmetries(model, torch.zeros(2, 4).double()))
    nothing = {name: torch.zeros_like(param) for name, param in start.items()}
    params = dict(balance(Point(start, nothing, nothing, {}), table)[0].params)
    log_scale = torch.full((6,), imbalance).double()
    (site,) = table.spec
    far = dict(move_scaling(site, log_scale.exp(), params, 1))
    zeros = {name: torch.zeros_like(param) for name, param in params.items()}
    controls = Controls.prior(len(params))._replace(balance=torch.ones(len(params)))
    _, sizes = teleport(Point(far, zeros, zeros, {}), controls, table)
    assert sizes.item() == pytest.approx(min(imbalance, MAX_LOG_SCALE), rel=1e-3)
    (there, *_), way = balance(Point(far, zeros, zeros, {}), table)
    assert way.item() == pytest.approx(imbalance, rel=1e-3)
    for name, param in params.items():
        torch.testing.assert_close(there[name], param, rtol=1e-2, atol=1e-6)


def test_teleported_momentum_is_the_dual_not_the_vector() -> None:
    """A negative control: moving the momentum like a parameter would be something else."""
    model = perceptron(4, 6, 2)
    spec = find_symmetries(model, torch.zeros(2, 4).double()).of_group("scaling")
    element = spec.random_element(generator())
    params = named(model)
    assert not torch.allclose(act(spec, element, params)["0.weight"], act_dual(spec, element, params)["0.weight"])


def test_factors_beyond_float16_move_tensors_of_float16() -> None:
    legs = (Leg("a", axis=0, degree=1), Leg("b", axis=1, degree=-1))
    site = Symmetry("a:scaling", GROUPS["scaling"], 2, legs)
    tensors = {"a": torch.full((2, 3), 2.0**-14).half(), "b": torch.full((3, 2), 2.0**14).half()}
    moved = move_scaling(site, torch.tensor([2.0**18, 2.0**26]).double(), tensors, 1)
    expected = {
        "a": torch.tensor([[2.0**4] * 3, [2.0**12] * 3]).half(),
        "b": torch.tensor([[2.0**-4, 2.0**-12]] * 3).half(),
    }
    assert all(torch.equal(moved[name], value) for name, value in expected.items())
    for name in tensors:
        moved.write(name)
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())


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
