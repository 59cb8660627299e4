"""The rule of an update: known optimizers as special cases, equivariance, the class against the pure function."""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from teleport_optim import LearnedTeleportOptimizer, MetaOptimizer, act, act_dual, find_symmetries
from teleport_optim.controller.control import control
from teleport_optim.optim import rule as update_module
from teleport_optim.optim.controls import PRIOR_MOMENTUM, Controls
from teleport_optim.optim.orthogonalise import compute_steps
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.records import HyperParameters, UpdateState, step_coefficients
from teleport_optim.optim.rule import update
from teleport_optim.optim.schedule import TELEPORT_INTERVAL, Horizon, is_control_step, prior_rate, rate_and_decay
from teleport_optim.optim.shapes import BLOCK_ROWS
from tests.helpers.perceptrons import generator, loss_and_grads, named, perceptron, perceptron_of, stacked_runs
from tests.helpers.reference import blocks_of, direction, momentum_step


def trained_meta_optimizer(seed: int = 0, *, block_rows: int = BLOCK_ROWS) -> MetaOptimizer:
    """Random weights everywhere, so that every control moves."""
    meta_optimizer = MetaOptimizer(6, block_rows=block_rows)
    with torch.no_grad():
        for param in meta_optimizer.parameters():
            param.copy_(0.3 * torch.randn(param.shape, generator=generator(seed)))
    return meta_optimizer


def constant_controller(features: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(*features.shape[:-1], len(Controls._fields), dtype=torch.float64), hidden


def rule_h(
    params: dict[str, Tensor],
    grads: dict[str, Tensor],
    buffers: dict[str, Tensor],
    step: int,
    total: int,
    block_rows: int,
) -> None:
    """The prior, written tensor by tensor and block by block in the notation of its definition, as a slow reference."""
    num_layers = sum(param.dim() > 1 for param in params.values())
    left = min(1.0, (total - step) / (0.3 * total)) / num_layers**0.7
    a, shrink = 0.22 * min(1.0, math.sqrt(20 / max(step, 1))) * left, 1 - left / (2 * (step + 50))
    for name, p in params.items():
        m = buffers[name] = PRIOR_MOMENTUM * buffers[name] + (1 - PRIOR_MOMENTUM) * grads[name]
        is_idle = grads[name].reshape(len(p) if p.dim() > 1 else 1, -1).eq(0).all(dim=1)
        before = p.clone()
        m = torch.where(is_idle.reshape(-1, *[1] * (p.dim() - 1)), 0.0, m)
        if p.dim() < 2:
            p -= a / 6 * m / m.square().mean().sqrt()
            continue
        blocks = blocks_of(m.reshape(len(m), -1), block_rows)
        if min(len(m), block_rows) > 1:
            blocks = [direction(block) for block in blocks]
        o = torch.cat([block / block.norm(dim=1, keepdim=True).clamp_min(1e-30) for block in blocks])
        p *= shrink
        p -= a * min(1.0, math.sqrt(128 / (p.numel() / len(p)))) * o.reshape(p.shape)
        p[is_idle] = before[is_idle]


def test_the_prior_is_the_documented_one() -> None:
    text = update_module.__doc__ or ""
    assert f"beta = {PRIOR_MOMENTUM:g}\n" in text
    assert f"R = rows of m, {BLOCK_ROWS} at a time" in text


@pytest.mark.parametrize("sizes", [(5, 8, 7, 3), (200, 6, 3)])
@pytest.mark.parametrize("block_rows", [BLOCK_ROWS, 4, 3, 1])
def test_constant_controls_give_the_prior_over_fifty_steps(block_rows: int, sizes: tuple[int, ...]) -> None:
    model = perceptron(*sizes)
    table = ParameterTable.of(named(model), block_rows=block_rows)
    x, y = (
        torch.randn(20, sizes[0], generator=generator()).double(),
        torch.randn(20, 3, generator=generator(1)).double(),
    )
    ours, reference = named(model), named(model)
    state = UpdateState.initial(ours, torch.zeros(len(ours), 1))
    buffers = {name: torch.zeros_like(param) for name, param in reference.items()}
    average = named(model)
    hyper = HyperParameters.default(len(ours), 50)
    for step in range(50):
        _, grads = loss_and_grads(model, ours, x, y)
        ours, state = update(
            partial(control, constant_controller), ours, grads, state, step=step, hyper=hyper, table=table
        )
        _, grads = loss_and_grads(model, reference, x, y)
        rule_h(reference, grads, buffers, step, 50, block_rows)
        for name in reference:
            torch.testing.assert_close(ours[name], reference[name], rtol=0, atol=1e-9)
            torch.testing.assert_close(state.momenta[name], buffers[name], rtol=0, atol=1e-9)
            average[name] += max(7 / (step + 7), min(1.0, 3 / (50 - step))) * (reference[name] - average[name])
            torch.testing.assert_close(ours[name] + state.average_offsets[name], average[name], rtol=0, atol=1e-9)
        # All go on from one state: otherwise rounding of 1e-15 grows by half every step.
        average = {name: param + state.average_offsets[name] for name, param in ours.items()}
        reference = {name: param.clone() for name, param in ours.items()}
        buffers = {name: momentum.clone() for name, momentum in state.momenta.items()}
    assert not any(torch.allclose(param, named(model)[name], atol=1e-2) for name, param in ours.items())


@given(columns=st.integers(1, 700), is_embedding=st.booleans())
def test_rows_of_wide_matrices_take_shorter_steps_but_not_those_of_embeddings(columns: int, is_embedding: bool) -> None:
    params = {"w": torch.zeros(3, columns)}
    table = ParameterTable.of(params, embeddings=["w"] if is_embedding else [])
    coefficients = step_coefficients(Controls.prior(1), step=5, hyper=HyperParameters.default(1), table=table)
    steps = compute_steps({"w": torch.randn(3, columns, generator=generator())}, coefficients, table)
    rate, _ = rate_and_decay(5, Horizon(), table)
    length = rate if is_embedding else rate * min(1.0, math.sqrt(128 / columns))
    torch.testing.assert_close(steps["w"].product().norm(dim=1), torch.full((3,), length), rtol=1e-5, atol=0)


def test_vectors_move_like_normalised_sgd_with_momentum_of_torch() -> None:
    """m is, up to its length, the update of torch.optim.SGD with the same gradients."""
    table = ParameterTable.of({"v": torch.zeros(7)})
    theta = nn.Parameter(torch.zeros(7, dtype=torch.float64))
    sgd = torch.optim.SGD([theta], lr=1.0, momentum=PRIOR_MOMENTUM)
    momenta = {"v": torch.zeros(7, dtype=torch.float64)}
    hyper = HyperParameters.default(1, 1000)
    source = generator()
    for step in range(50):
        grad = torch.randn(7, generator=source, dtype=torch.float64)
        before = theta.detach().clone()
        theta.grad = grad
        sgd.step()
        expected = theta.detach() - before
        coefficients = step_coefficients(Controls.prior(1), step=step, hyper=hyper, table=table)
        steps, momenta = momentum_step({"v": grad}, momenta, coefficients, table)
        move = -steps["v"]
        torch.testing.assert_close(move / move.norm(), expected / expected.norm(), rtol=0, atol=1e-6)
        rate, _ = prior_rate(step, Horizon(1000), 1)
        assert move.square().mean().sqrt().item() == pytest.approx(rate / 6, rel=1e-6)


def test_matrices_move_like_muon_of_torch_with_rows_normalised() -> None:
    theta = nn.Parameter(torch.zeros(6, 9))
    muon = torch.optim.Muon([theta], lr=1.0, momentum=PRIOR_MOMENTUM, nesterov=False, weight_decay=0.0)
    table = ParameterTable.of({"w": theta.detach()})
    momenta = {"w": torch.zeros(6, 9)}
    source = generator()
    for step in range(10):
        grad = torch.randn(6, 9, generator=source)
        before, theta.grad = theta.detach().clone(), grad
        muon.step()
        expected = theta.detach() - before
        expected = expected / expected.square().mean(dim=1, keepdim=True).sqrt()
        coefficients = step_coefficients(
            Controls.prior(1), step=step, hyper=HyperParameters.default(1, 1000), table=table
        )
        steps, momenta = momentum_step({"w": grad}, momenta, coefficients, table)
        move = -steps["w"]
        assert F.cosine_similarity(move.flatten(), expected.flatten(), dim=0) > 0.9  # Muon has other polynomials.


@pytest.mark.parametrize("block_rows", [BLOCK_ROWS, 3, 1])
@pytest.mark.parametrize("teleports", [True, False])
def test_the_class_equals_the_pure_rule_bit_for_bit(teleports: bool, block_rows: int) -> None:
    model = perceptron(5, 8, 8, 3)
    meta_optimizer = trained_meta_optimizer(block_rows=block_rows)
    x, y = torch.randn(20, 5, generator=generator()).double(), torch.randn(20, 3, generator=generator(1)).double()
    spec = find_symmetries(model, x) if teleports else None
    params = named(model)
    table = ParameterTable.of(params, spec, block_rows=block_rows)
    assert len(table.spec) == (2 if teleports else 0)
    state = UpdateState.initial(params, meta_optimizer.initial_hidden(len(params)))
    hyper = HyperParameters.default(len(params), 90)
    optimizer = LearnedTeleportOptimizer(
        model.parameters(), model=model, total_steps=90, checkpoint=meta_optimizer, teleport=teleports
    )
    sizes = []
    options: dict[str, Any] = {"hyper": hyper, "table": table}
    for step in range(90):
        _, grads = loss_and_grads(model, params, x, y)
        with torch.no_grad():
            params, state = update(meta_optimizer.control, params, grads, state, step=step, **options)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        sizes.append(optimizer.teleport_size)
        for name, param in model.named_parameters():
            assert torch.equal(param, params[name]), (step, name)
    assert all((size > 0) == (teleports and is_control_step(step)) for step, size in enumerate(sizes))


def test_the_meta_optimizer_is_asked_ever_less_often_and_its_controls_are_held_in_between() -> None:
    assert [step for step in range(1000) if is_control_step(step)] == [0, 80, 160, 320, 640]
    asked: list[int] = []
    model = perceptron(5, 8, 3)
    x, y = torch.randn(20, 5, generator=generator()).double(), torch.randn(20, 3, generator=generator(1)).double()
    meta_optimizer = trained_meta_optimizer()
    optimizer = LearnedTeleportOptimizer.for_model(model, checkpoint=meta_optimizer)
    assert isinstance(optimizer._controller, MetaOptimizer)
    optimizer._controller.register_forward_pre_hook(lambda *_: asked.append(len(held)))
    held: list[list[Tensor]] = []
    for _ in range(165):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        held.append([optimizer.state[param]["outputs"].clone() for param in model.parameters()])
    assert asked == [0, 80, 160]
    for step, (before, after) in enumerate(pairwise(held), start=1):
        assert all(map(torch.equal, before, after)) == (step not in asked)


def permuted_within(size: int, block_rows: int) -> Tensor:
    """Blocks in another order, and rows in another order in every one."""
    blocks = torch.arange(size).split(block_rows)
    mixed = [block[torch.randperm(len(block), generator=generator(int(block[0])))] for block in blocks]
    return torch.cat(mixed[::-1])


@pytest.mark.parametrize(("block_rows", "keeps_blocks"), [(BLOCK_ROWS, False), (1, False), (4, True), (4, False)])
def test_steps_are_equivariant_under_permutation_of_hidden_units(block_rows: int, keeps_blocks: bool) -> None:
    """Training permuted units is permuting trained units: no feature looks at their order, and no direction at that in a block."""
    model = perceptron(5, 8, 8, 3)
    meta_optimizer = trained_meta_optimizer(block_rows=block_rows)
    x, y = torch.randn(20, 5, generator=generator()).double(), torch.randn(20, 3, generator=generator(1)).double()
    found = find_symmetries(model, x)
    spec, scalings = found.of_group("permutation"), found.of_group("scaling")
    element = spec.random_element(generator())
    if keeps_blocks:
        element = {key: permuted_within(len(order), block_rows).to(order) for key, order in element.items()}
    params = named(model)
    state = UpdateState.initial(params, meta_optimizer.initial_hidden(len(params)))
    num_steps = 2 * TELEPORT_INTERVAL
    table, hyper = (
        ParameterTable.of(params, scalings, block_rows=block_rows),
        HyperParameters.default(len(params), num_steps),
    )

    def train(params: dict[str, Tensor], state: UpdateState, step: int) -> tuple[dict[str, Tensor], UpdateState]:
        _, grads = loss_and_grads(model, params, x, y)
        with torch.no_grad():
            return update(meta_optimizer.control, params, grads, state, step=step, hyper=hyper, table=table)

    largest = 0.0
    for step in range(num_steps):  # Every step from one state: over many, the rounding of float32 features would grow.
        moved_state = state._replace(momenta=act_dual(spec, element, state.momenta))
        moved, _ = train(act(spec, element, params), moved_state, step)
        params, state = train(params, state, step)
        for name, value in act(spec, element, params).items():
            largest = max(largest, float((moved[name] - value).abs().max()))
    if 1 < block_rows < 8 and not keeps_blocks:
        assert largest > 0.01  # Which rows share a block makes a difference.
    else:
        assert largest < 1e-5
    assert not torch.allclose(moved["0.weight"], params["0.weight"], atol=0.1)


def test_zero_gradients_move_nothing_but_decay() -> None:
    model = perceptron(4, 6, 2)
    params = named(model)
    zeros = {name: torch.zeros_like(param) for name, param in params.items()}
    hyper = HyperParameters(torch.ones(len(params)), torch.zeros(len(params)), Horizon(10))
    table, state = ParameterTable.of(params), UpdateState.initial(params, torch.zeros(len(params), 12))
    with torch.no_grad():
        moved, state = update(trained_meta_optimizer().control, params, zeros, state, step=0, hyper=hyper, table=table)
    for name, param in params.items():
        assert torch.equal(moved[name], param)
    assert torch.isfinite(state.hidden).all()


def test_update_leaves_its_arguments_alone() -> None:
    model = perceptron(4, 6, 2)
    params = named(model)
    table = ParameterTable.of(params, find_symmetries(model, torch.zeros(2, 4).double()))
    state = UpdateState.initial(params, torch.zeros(len(params), 12))
    grads = {name: torch.ones_like(param) for name, param in params.items()}
    before = copy.deepcopy((params, grads, state))
    with torch.no_grad():
        update(
            trained_meta_optimizer().control,
            params,
            grads,
            state,
            step=0,
            hyper=HyperParameters.default(len(params)),
            table=table,
        )
    torch.testing.assert_close((params, grads, state), before, rtol=0, atol=0, equal_nan=True)


def test_training_can_be_differentiated_where_gradients_vanish() -> None:
    """Two steps, differentiated in the controls, through the gradients too; those of one run are zero in places."""
    x = torch.randn(9, 4, generator=generator()).double()
    params, _, table = stacked_runs(partial(perceptron_of, (4, 6, 5, 2)), x, 3, 0)
    params["0.bias"] = params["0.bias"] - torch.tensor([0.0, 0.0, 100.0]).double()[:, None]  # The last run is dead.
    outputs = (0.1 * torch.randn(3, len(params), len(Controls._fields), generator=generator())).double()
    outputs.requires_grad_()
    model, hyper = perceptron(4, 6, 5, 2), HyperParameters.default(len(params), 20)
    state = UpdateState.initial(params, torch.zeros(3, len(params), 1))
    loss = torch.zeros(())
    for step in (0, 1):
        leaves = {name: param if step else param.requires_grad_() for name, param in params.items()}
        losses = torch.vmap(lambda own: functional_call(model, own, (x,)).square().mean())(leaves)
        grads = dict(zip(leaves, torch.autograd.grad(losses.sum(), list(leaves.values()), create_graph=True)))
        assert not grads["0.weight"][-1].any()
        params, state = update(
            partial(control, lambda features, hidden: (outputs + 0.01 * features.sum(-1, keepdim=True), hidden)),
            leaves,
            grads,
            state,
            step=step,
            hyper=hyper,
            table=table,
        )
        loss = losses.sum() + sum(param.square().sum() for param in params.values())
    (slope,) = torch.autograd.grad(loss, outputs)
    assert torch.isfinite(slope).all()
    assert slope[0].any()
    assert slope.abs().max() < 1e6


@pytest.mark.filterwarnings("ignore:an optimizer of a single matrix")
def test_only_what_is_known_to_be_a_model_of_one_matrix_steps_further() -> None:
    """A single parameter of a deep network, given to an optimizer of its own, is not taken for a linear model."""

    def first_step(model: nn.Module, names: set[str], whole: nn.Module | None) -> float:
        params = [param for name, param in model.named_parameters() if name in names]
        optimizer = LearnedTeleportOptimizer(
            params, total_steps=100, checkpoint=MetaOptimizer(), model=whole, teleport=False
        )
        x = torch.ones(5, 4)
        model(x).square().sum().backward()
        before = params[0].detach().clone()
        optimizer.step()
        return float((params[0].detach() - before).norm(dim=1).max())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear, deep = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    rate, _ = prior_rate(0, Horizon(100), 1)
    assert first_step(copy.deepcopy(linear), {"weight", "bias"}, None) == pytest.approx(rate, rel=0.1)
    model = copy.deepcopy(linear)
    assert first_step(model, {"weight", "bias"}, model) == pytest.approx(3 * rate, rel=0.1)
    deep_rate, _ = prior_rate(0, Horizon(100), 2)
    assert first_step(copy.deepcopy(deep), set(dict(deep.named_parameters())), None) == pytest.approx(
        deep_rate, rel=0.1
    )
    model = copy.deepcopy(deep)
    assert first_step(model, {"0.weight"}, model) == pytest.approx(deep_rate, rel=0.1)
