"""The update rule: known optimizers as special cases, equivariance, the optimizer class against the unroll."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from teleport_optim import LearnedTeleportOptimizer, MetaOptimizer, act, act_dual, find_symmetries
from teleport_optim.controller.control import control
from teleport_optim.controller.features import NUM_FEATURES, compute_features
from teleport_optim.optim import buckets as bucket_module
from teleport_optim.optim import parameters
from teleport_optim.optim import rule as update_module
from teleport_optim.optim.buckets import ShapeGroup
from teleport_optim.optim.controls import PRIOR_MOMENTUM, Controls
from teleport_optim.optim.kernels import native
from teleport_optim.optim.orthogonalise import Mixing, Step, column_scales, compute_steps, row_mixers
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.records import HyperParameters, StepCoefficients, UpdateState, step_coefficients
from teleport_optim.optim.rule import Control, ema, update
from teleport_optim.optim.schedule import (
    TELEPORT_INTERVAL,
    Horizon,
    averaging_weight,
    is_control_step,
    prior_rate,
    rate_and_decay,
)
from teleport_optim.optim.shapes import BLOCK_ROWS, matrix_shape
from teleport_optim.optim.site_norms import log_ratio, site_log_norms
from teleport_optim.optim.teleport import MAX_LOG_SCALE, balance, teleport
from teleport_optim.symmetry.groups import GROUPS
from teleport_optim.symmetry.moves import move, move_scaling
from teleport_optim.symmetry.spec import Leg, Symmetry, SymmetrySpec


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perceptron(*widths: int, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for num_inputs, num_outputs in pairwise(widths):
            layers += [nn.Linear(num_inputs, num_outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1]).double()


def perceptron_of(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    return perceptron(*widths, seed=seed)


def trained_meta_optimizer(seed: int = 0, *, block_rows: int = BLOCK_ROWS) -> MetaOptimizer:
    """Random weights everywhere, so that every control moves."""
    meta_optimizer = MetaOptimizer(6, block_rows=block_rows)
    with torch.no_grad():
        for param in meta_optimizer.parameters():
            param.copy_(0.3 * torch.randn(param.shape, generator=generator(seed)))
    return meta_optimizer


def constant_controller(features: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(*features.shape[:-1], len(Controls._fields), dtype=torch.float64), hidden


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def loss_and_grads(
    model: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor
) -> tuple[float, dict[str, Tensor]]:
    leaves = {name: param.clone().requires_grad_() for name, param in params.items()}
    loss = F.mse_loss(torch.func.functional_call(model, leaves, (x,)), y)
    return loss.item(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))


def momentum_step(
    grads: dict[str, Tensor],
    momenta: dict[str, Tensor],
    coefficients: StepCoefficients,
    table: ParameterTable,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a step takes from parameters at zero, with the opposite sign, and the new momenta."""
    averages = {name: ema(momentum, grads[name], coefficients.beta) for name, momentum in momenta.items()}
    steps = compute_steps(averages, coefficients, table)
    return {name: -steps[name].taken_from(torch.zeros_like(average)) for name, average in averages.items()}, averages


def blocks_of(rows: Tensor, block_rows: int) -> list[Tensor]:
    """As few blocks of at most so many rows as can be, or fewer than twice as many if these have the same size."""
    least = math.ceil(len(rows) / block_rows)
    even = [number for number in range(least, 2 * least) if len(rows) % number == 0]
    return list(rows.split(math.ceil(len(rows) / (even or [least])[0])))


def direction(block: Tensor) -> Tensor:
    """One block before its rows get their lengths: columns are divided by a power of their norms, before and after."""
    rows = block / block.norm(dim=1, keepdim=True).clamp_min(1e-30)
    scales = rows.norm(dim=0).clamp_min(1e-30).pow(-3 / 8)
    return scales * nearly_orthogonal(scales * rows)


def nearly_orthogonal(rows: Tensor) -> Tensor:
    """Singular values are moved towards 1, by polynomials."""
    o = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)  # rows of dead units are zero
    o = o / torch.linalg.svdvals(o).pow(4).sum().pow(0.25).clamp_min(1e-30)
    for b1, b3, b5 in ((7.9424, -22.2873, 15.8239), (3.5875, -2.5845, 0.4893), (2.6604, -1.9134, 0.4194)):
        gram = o @ o.T
        o = b1 * o + b3 * gram @ o + b5 * gram @ gram @ o
    return o


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


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6))
def test_rows_in_blocks_of_their_own_are_normalised(rows: int, columns: int, seed: int) -> None:
    """Every row keeps its direction and is as long as a row that is mixed with others; vectors do not notice."""
    source = generator(seed)
    shapes = {"w": (rows, columns), "k": (rows, columns, 2, 1), "v": (columns,)}
    grads, momenta = (
        {name: torch.randn(shape, generator=source).double() for name, shape in shapes.items()} for _ in range(2)
    )
    grads["w"][0] = momenta["w"][0] = 0.0
    table = ParameterTable.of(grads)
    controls = Controls.from_outputs(torch.randn(3, len(Controls._fields), generator=source))
    coefficients = step_coefficients(controls, step=3, hyper=HyperParameters.default(3, 20), table=table)
    (steps, new_momenta), (usual, usual_momenta) = (
        momentum_step(grads, momenta, coefficients, table.with_blocks_of(block_rows)) for block_rows in (1, BLOCK_ROWS)
    )
    rest = (1 - coefficients.beta).double()  # beta is single precision
    for row, name in enumerate(shapes):
        m = (1 - rest) * momenta[name] + rest * grads[name]
        torch.testing.assert_close(new_momenta[name], m, rtol=1e-12, atol=1e-12)
        assert torch.equal(new_momenta[name], usual_momenta[name])
        direction = F.normalize(m.reshape(table.matrices.get(name, -1)), dim=-1).reshape(m.shape)
        torch.testing.assert_close(
            steps[name], coefficients.step_lengths[row].double() * direction, rtol=1e-5, atol=1e-6
        )
    assert torch.equal(steps["v"], usual["v"])
    for name in table.matrices:
        lengths, usual_lengths = (each[name].reshape(table.matrices[name]).norm(dim=1) for each in (steps, usual))
        torch.testing.assert_close(lengths, usual_lengths, rtol=1e-6, atol=1e-9)
    if "k" in table.matrices:
        has_one_row = table.matrices["k"][0] == 1
        assert torch.allclose(steps["k"], usual["k"], rtol=1e-3) == has_one_row


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.sampled_from([(), (3,), (2, 3)]), st.floats(0.0, 10.0), st.integers(0, 10**6))
def test_momentum_is_one_number_for_a_network(num_tensors: int, runs: tuple[int, ...], size: float, seed: int) -> None:
    outputs = size * torch.randn(*runs, num_tensors, len(Controls._fields), generator=generator(seed))
    controls = Controls.from_outputs(outputs)
    assert controls.momentum.shape == runs
    assert all(value.shape == (*runs, num_tensors) for value in controls._replace(momentum=controls.rate))
    logits = torch.logit(controls.momentum) - math.log(PRIOR_MOMENTUM / (1 - PRIOR_MOMENTUM))
    assert (logits.abs() < 2.0001).all()
    assert Controls.prior(num_tensors).momentum == pytest.approx(PRIOR_MOMENTUM)
    order = torch.randperm(num_tensors, generator=generator(seed))
    torch.testing.assert_close(Controls.from_outputs(outputs[..., order, :]).momentum, controls.momentum)
    alike = Controls.from_outputs(outputs[..., :1, :].expand_as(outputs))
    torch.testing.assert_close(alike.momentum, Controls.from_outputs(outputs[..., :1, :]).momentum)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), max_size=4).map(tuple), min_size=1, max_size=8),
    st.sampled_from([0, 6, 2**15]),
    st.sampled_from([(), (2,), (2, 3)]),
)
def test_buckets_hold_every_tensor_once(shapes: list[tuple[int, ...]], most: int, runs: tuple[int, ...]) -> None:
    tensors = {str(row): torch.randn([*runs, *shape], generator=generator(row)) for row, shape in enumerate(shapes)}
    table = ParameterTable({name: torch.Size(shape) for name, shape in zip(tensors, shapes)}, SymmetrySpec())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameters, "MAX_GROUPED", most)
        patch.setattr(bucket_module, "MAX_GROUPED", most)
        buckets = table.buckets
    rows = [row for bucket in buckets for group in bucket.groups for row in group.rows]
    assert sorted(rows) == list(range(len(shapes)))
    assert [name for bucket in buckets for name in bucket.names] == [table.names[row] for row in rows]
    for bucket in buckets:
        assert len(bucket.names) == 1 or all(table.shapes[name].numel() <= most for name in bucket.names)
        vector = bucket.gather(tensors, len(runs))
        assert vector.shape == (*runs, sum(table.shapes[name].numel() for name in bucket.names))
        for group, view in zip(bucket.groups, bucket.views(vector)):
            for index, row in enumerate(group.rows):
                name = table.names[row]
                assert group.is_matrix == (name in table.matrices)
                own = view.select(len(runs), index)
                assert own.shape[len(runs) :] == (table.matrices.get(name) or (table.shapes[name].numel(),))
                assert torch.equal(own.flatten(), tensors[name].flatten())
                blocks = group.blocks_of(view)
                assert blocks.shape[-3:] == (len(group.rows) * group.num_blocks, group.block_size, group.entries[-1])
                assert torch.equal(group.tensors_of(blocks)[index], own)
            assert not group.is_large or (len(group.rows) == 1 and table.shapes[name].numel() > most)
    table = table.tensors(torch.zeros(()))
    assert torch.equal(torch.tensor(rows)[table.inverse_order], torch.arange(len(rows)))
    groups = [group for bucket in buckets for group in bucket.groups]
    assert table.block_tensors.tolist() == [row for g in groups for row in g.rows for _ in range(g.num_blocks)]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 500), st.integers(1, 40), st.integers(1, 64))
def test_blocks_are_few_and_even_where_they_can_be(num_rows: int, columns: int, most: int) -> None:
    group = ShapeGroup.of((num_rows, columns), [0], most)
    least = max(1, math.ceil(num_rows / most))
    assert 1 <= group.block_size <= most
    assert least <= group.num_blocks < 2 * least
    assert group.num_blocks * group.block_size >= num_rows > (group.num_blocks - 1) * group.block_size - (num_rows == 0)
    is_even = group.num_blocks * group.block_size == num_rows
    divisors = [number for number in range(least, 2 * least) if num_rows > 0 and num_rows % number == 0]
    assert is_even == bool(divisors)
    assert group.num_blocks == (divisors or [least])[0]
    assert group.is_mixed == (group.block_size > 1)
    matrix = torch.arange(float(num_rows * columns)).reshape(1, num_rows, columns)
    rows = group.blocks_of(matrix).flatten(0, 1)
    assert torch.equal(rows[:num_rows], matrix[0])
    assert not rows[num_rows:].any()
    if num_rows:
        assert len(blocks_of(matrix[0], most)[0]) == group.block_size
    vector = ShapeGroup.of((num_rows,), [0], most)
    assert (vector.num_blocks, vector.block_size, vector.is_mixed) == (1, 1, False)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([0, 2**15]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from([BLOCK_ROWS, 4, 2, 1]),
    st.booleans(),
)
def test_a_step_changes_nothing_but_what_it_may(
    most: int, dtype: torch.dtype, block_rows: int, may_be_native: bool
) -> None:
    """The class changes parameters and momenta where they lie, to what the pure rule says, and leaves gradients alone."""
    source = generator()
    shapes = ((4, 6), (6, 4), (5,), (), (2, 3, 2, 2))
    params = {
        str(row): nn.Parameter(torch.randn(shape, generator=source).to(dtype)) for row, shape in enumerate(shapes)
    }
    grads = {name: torch.randn(param.shape, generator=source).to(dtype) for name, param in params.items()}
    meta_optimizer = MetaOptimizer(block_rows=block_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameters, "MAX_GROUPED", most)
        patch.setattr(bucket_module, "MAX_GROUPED", most)
        if not may_be_native:
            patch.setattr(native, "_native", None)
        table = ParameterTable.of(params, block_rows=block_rows)
        assert len(table.buckets) == (1 if most else len(shapes))
        optimizer = LearnedTeleportOptimizer(params.values(), total_steps=20, checkpoint=meta_optimizer)
        expected = {name: param.detach().clone() for name, param in params.items()}
        state = UpdateState.initial(expected, meta_optimizer.initial_hidden(len(params)))
        places: dict[str, int] = {}
        for step in range(3):
            for name, param in params.items():
                param.grad = grads[name].clone()
            optimizer.step()
            with torch.no_grad():
                expected, state = update(
                    meta_optimizer.control,
                    expected,
                    grads,
                    state,
                    step=step,
                    hyper=HyperParameters.default(len(params), 20),
                    table=table,
                )
            for name, param in params.items():
                assert param.grad is not None
                assert torch.equal(param.grad, grads[name])
                momentum = optimizer.state[param]["exp_avg"]
                is_native = native._native is not None and dtype == torch.float32
                if (most or dtype == torch.bfloat16) and not is_native:
                    assert torch.equal(param, expected[name])
                else:  # A product that is subtracted as it is made may be rounded once less; in C much is.
                    rounding = (40 if is_native else 4) * torch.finfo(dtype).eps
                    torch.testing.assert_close(param.detach(), expected[name], rtol=rounding, atol=rounding)
                if is_native:
                    torch.testing.assert_close(momentum, state.momenta[name])
                else:
                    assert torch.equal(momentum, state.momenta[name])
                assert places.setdefault(name, momentum.data_ptr()) == momentum.data_ptr()


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
    moved, moved_grads, moved_momenta, moved_offsets, sizes = teleport(params, grads, momenta, offsets, controls, table)
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
        moved, moved_grads, moved_momenta, moved_offsets, sizes = balance(start, grads, grads, start, table)
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
    assert balance(params, grads, grads, params, ParameterTable.of(params))[:4] == (params, grads, grads, params)


def test_full_strength_balances_a_site() -> None:
    model = perceptron(4, 7, 2)
    params = named(model)
    table = ParameterTable.of(params, find_symmetries(model, torch.zeros(2, 4).double()))
    controls = Controls.prior(len(params))._replace(balance=torch.ones(len(params)))
    zeros = {name: torch.zeros_like(param) for name, param in params.items()}
    moved, *_ = teleport(params, zeros, zeros, zeros, controls, table)
    (symmetry,) = table.spec
    assert log_ratio(site_log_norms(symmetry, params)).abs().max() > 0.1
    assert log_ratio(site_log_norms(symmetry, moved)).abs().max() < 1e-5


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


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_features_do_not_see_the_scale_of_the_loss(seed: int, scale: float) -> None:
    model = perceptron(4, 7, 6, 2, seed=seed)
    params = named(model)
    source = generator(seed)
    table = ParameterTable.of(params, find_symmetries(model, torch.zeros(2, 4).double()))
    grads, momenta = ({n: torch.randn(p.shape, generator=source).double() for n, p in params.items()} for _ in range(2))
    unseen = torch.full((len(params), 2), math.nan)

    def features(factor: float) -> Tensor:
        scaled = [{name: factor * value for name, value in slot.items()} for slot in (grads, momenta)]
        return compute_features(params, *scaled, unseen, table=table, step=0, total_steps=None)[0]

    assert features(1.0).shape == (len(params), NUM_FEATURES)
    torch.testing.assert_close(features(scale), features(1.0), rtol=0, atol=1e-3)
    assert features(1.0).abs().max() <= 4.0


def mixed(blocks: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Steps of blocks of rows ``[..., blocks, k, columns]``; lengths are 1 by default."""
    lengths = torch.ones(blocks.shape[:-2]) if lengths is None else lengths
    scales = column_scales(blocks)
    gram = (scales * blocks) @ (scales * blocks).mT
    return Step(blocks, lengths, Mixing(scales, row_mixers(gram))).product()


def orthogonal(blocks: Tensor) -> Tensor:
    """Rows of norm 1 after they are mixed, columns as they are."""
    return F.normalize(row_mixers(blocks @ blocks.mT) @ blocks, dim=-1)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([(), (2,), (2, 3)]),
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 10**6),
)
def test_mixed_rows_are_those_of_the_reference_and_have_the_lengths_asked_for(
    runs: tuple[int, ...], num_blocks: int, rows: int, columns: int, rank: int, seed: int
) -> None:
    """Also of blocks of low rank: those with more rows than columns, and others."""
    source = generator(seed)
    parts = [torch.randn(*runs, num_blocks, *shape, generator=source) for shape in ((rows, rank), (rank, columns))]
    blocks = parts[0].double() @ parts[1].double()
    lengths = torch.rand(*runs, num_blocks, generator=source).double() + 0.1
    result = mixed(blocks, lengths)
    torch.testing.assert_close(result.norm(dim=-1), lengths.unsqueeze(-1).expand(*runs, num_blocks, rows))
    for place in itertools.product(*map(range, lengths.shape)):
        expected = lengths[place] * F.normalize(direction(blocks[place]), dim=1)
        torch.testing.assert_close(result[place], expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 12), st.integers(0, 20), st.floats(0.0, 1.5), st.integers(0, 10**6))
def test_mixed_rows_are_nearly_orthogonal(rows: int, more: int, spread: float, seed: int) -> None:
    """Singular values go to 0.7 .. 1.3 before rows get one length; that bounds cosines, by the inequality of Wielandt."""
    source = generator(seed)
    sizes = torch.exp(spread * torch.randn(rows, 1, generator=source)).double()
    block = torch.randn(rows, rows + more, generator=source).double()
    block = F.normalize(block + 0.5 * block.mean(dim=0), dim=1)  # Without that, long rows are orthogonal already.
    u, s, v = torch.linalg.svd(block, full_matrices=False)
    before = u.T @ nearly_orthogonal(block) @ v.T
    assert (before - torch.diag(before.diagonal())).abs().max() < 1e-9
    large = s > 0.01 * s.pow(4).sum().pow(0.25)
    assert ((before.diagonal()[large] > 0.7) & (before.diagonal()[large] < 1.3)).all()
    if large.all():
        result = orthogonal(sizes * block)
        least, most = torch.linalg.svdvals(result)[[-1, 0]].tolist()
        assert 0.7 / 1.3 < least <= most < 1.3 / 0.7
        condition = (1.3 / 0.7) ** 2
        cosines = result @ result.T - torch.eye(rows).double()
        assert cosines.abs().max() < (condition - 1) / (condition + 1)


def test_mixing_makes_rows_more_orthogonal() -> None:
    """The bound for any block is wide; most are far inside."""
    blocks = torch.randn(100, 16, 32, generator=generator()).double() + 1.0
    cosines = [F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).mT - torch.eye(16) for x in (blocks, orthogonal(blocks))]
    before, after = (float(x.square().mean().sqrt()) for x in cosines)
    assert before > 0.4
    assert after < 0.1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(2, 12), st.floats(-4.0, 4.0), st.integers(0, 10**6))
def test_columns_are_rescaled_by_a_power_of_their_norms_whatever_those_of_rows(
    rows: int, columns: int, log_scale: float, seed: int
) -> None:
    source = generator(seed)
    block = torch.randn(rows, columns, generator=source).double()
    block[:, 0] = 0.0
    scales = column_scales(block)
    sizes = torch.exp(log_scale * torch.randn(rows, 1, generator=source)).double()
    assert scales.shape == (1, columns)
    assert scales[0, 0] == 0.0
    torch.testing.assert_close(column_scales(sizes * block), scales)
    norms = F.normalize(block, dim=1).norm(dim=0)
    torch.testing.assert_close(scales[0, 1:], norms[1:] ** (-3 / 8))
    assert not mixed(block[None])[0, :, 0].any()


def test_inputs_with_small_gradients_move_more_than_rows_alone_would_have_them() -> None:
    block = torch.randn(8, 8, generator=generator()).double()
    block[:, :4] *= 0.1
    shares = [float(x[..., :4].norm() / x.norm()) for x in (mixed(block[None]), orthogonal(block))]
    assert shares[0] > 1.2 * shares[1]


@pytest.mark.parametrize("columns", [1, 4, 40])
def test_rows_of_zeros_stay_so_and_leave_the_others_alone(columns: int) -> None:
    """Values and derivatives are those of the block without them."""
    source = generator()
    is_zero = torch.tensor([False, True, False, False, True])
    blocks = torch.randn(3, 5, columns, generator=source).double()
    blocks[:, is_zero] = 0.0
    blocks[1] = 0.0
    weights, lengths = torch.randn(3, 5, columns, generator=source).double(), torch.tensor([0.5, 1.0, 2.0])
    ends = []
    for kept in (slice(None), ~is_zero):
        leaf = blocks[:, kept].clone().requires_grad_()
        result = mixed(leaf, lengths)
        (slope,) = torch.autograd.grad((weights[:, kept] * result).sum(), leaf)
        ends.append((result.detach(), slope))
    whole, without = ends
    for own, expected in zip(whole, without):
        assert torch.isfinite(own).all()
        assert not own[:, is_zero].any()
        assert not own[1].any()
        torch.testing.assert_close(own[:, ~is_zero], expected, rtol=1e-6, atol=1e-9)
    assert (whole[1].abs().max() > 1e-3) == (columns > 1)


@pytest.mark.parametrize("shape", [(6, 6), (4, 13), (13, 4)])
def test_mixed_rows_see_no_scale_and_no_neighbour(shape: tuple[int, int]) -> None:
    source = generator()
    block = torch.randn(shape, generator=source)
    alone = mixed(block[None])[0]
    scales = 10.0 ** torch.linspace(-14, 14, shape[0])[:, None]
    others = [torch.zeros(shape), 1e14 * torch.randn(shape, generator=source), 1e-14 * block, scales * block]
    together = mixed(torch.stack([*others, block]))
    assert torch.isfinite(together).all()
    assert not together[0].any()
    for result in together[2:]:
        torch.testing.assert_close(result, alone, rtol=0, atol=1e-3)
    beside_zeros = mixed(
        torch.stack([*map(torch.zeros_like, others), block])
    )  # at the same place: that decides on rounding
    assert torch.equal(together[-1], beside_zeros[-1])


@pytest.mark.parametrize("shape", [(32, 1000), (32, 32), (32, 5), (128, 200), (8, 3)])
@pytest.mark.parametrize("rank", [1, 5, 1000])
def test_mixed_rows_in_float32_are_near_those_in_float64(shape: tuple[int, int], rank: int) -> None:
    """Also of blocks of low rank, where what is added up is much larger than the sum."""
    coefficients = [torch.randn(10, size, min(rank, *shape), generator=generator(size)) for size in shape]
    x = coefficients[0] @ coefficients[1].mT
    result, exact = mixed(x), mixed(x.double())
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=0.01)
    torch.testing.assert_close(result.norm(dim=-1), torch.ones(10, shape[0]), rtol=0, atol=0.01)


SHAPES = {"even": (40, 6), "odd": (37, 5), "prime": (7, 11), "kernel": (24, 3, 2, 2), "row": (1, 5), "bias": (37,)}


@pytest.mark.parametrize("runs", [(), (3,)])
@pytest.mark.parametrize("block_rows", [1, 4, 8, BLOCK_ROWS, 100])
def test_large_tensors_step_like_grouped_ones(
    block_rows: int, runs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = generator()
    grads, momenta = (
        {name: torch.randn(*runs, *shape, generator=source).double() for name, shape in SHAPES.items()}
        for _ in range(2)
    )
    outputs = torch.randn(*runs, len(SHAPES), len(Controls._fields), generator=source)
    shapes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
    ends, steps = [], []
    for most in (bucket_module.MAX_GROUPED, 0):
        monkeypatch.setattr(parameters, "MAX_GROUPED", most)
        monkeypatch.setattr(bucket_module, "MAX_GROUPED", most)
        table = ParameterTable(shapes, SymmetrySpec(), block_rows=block_rows)
        assert len(table.buckets) == (1 if most else len(SHAPES))
        hyper = HyperParameters.default(len(SHAPES), 20)
        coefficients = step_coefficients(Controls.from_outputs(outputs), step=3, hyper=hyper, table=table)
        ends.append(momentum_step(grads, momenta, coefficients, table)[0])
        steps.append(compute_steps(grads, coefficients, table))
    assert all(step.lengths is None for step in steps[0].values())
    late = {name for name, step in steps[1].items() if step.lengths is not None}
    uneven = {"odd", "prime"} if 1 < block_rows < 7 else {"odd"} if 1 < block_rows < 37 else set()
    assert late == set(SHAPES) - uneven
    for name in SHAPES:
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=1e-9, atol=1e-12)
    if not runs:  # In place, wherever the entries lie.
        for name, step in steps[1].items():
            start = torch.randn(SHAPES[name], generator=source).double()
            turned = start.clone().mT.contiguous().mT if start.dim() > 1 else start.repeat_interleave(2)[::2]
            assert start.numel() in start.shape or not turned.is_contiguous()
            for param in (start.clone(), turned):
                step.take_from_(param)
                torch.testing.assert_close(param, start - steps[0][name].product(), rtol=1e-9, atol=1e-12)


def test_blocks_of_more_rows_than_there_are_make_no_difference() -> None:
    source = generator()
    grads = {name: torch.randn(shape, generator=source).double() for name, shape in SHAPES.items()}
    zeros = {name: torch.zeros_like(grad) for name, grad in grads.items()}
    table = ParameterTable.of(grads, block_rows=40)
    coefficients = step_coefficients(
        Controls.prior(len(SHAPES)), step=0, hyper=HyperParameters.default(len(SHAPES), 20), table=table
    )
    steps = {
        block_rows: momentum_step(grads, zeros, coefficients, table.with_blocks_of(block_rows))[0]
        for block_rows in (20, 40, 41, 1000)
    }
    for block_rows in (41, 1000):
        assert all(torch.equal(steps[block_rows][name], steps[40][name]) for name in SHAPES)
    assert not torch.allclose(steps[20]["even"], steps[40]["even"], rtol=0.1)
    assert table.with_blocks_of(40) is table
    assert table.with_blocks_of(20).with_blocks_of(40).block_rows == 40
    for name, step in steps[40].items():
        if name in table.matrices:
            row = table.names.index(name)
            rows = grads[name].reshape(table.matrices[name])
            expected = F.normalize(direction(rows) if len(rows) > 1 else rows, dim=1)
            expected = coefficients.step_lengths[row].double() * expected.reshape(step.shape)
            torch.testing.assert_close(step, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_rows", [1, 8, BLOCK_ROWS])
def test_parameters_that_are_not_contiguous_step_like_others(
    block_rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones and small ones."""
    shapes = {"even": (40, 6), "odd": (37, 5), "kernel": (24, 3, 2, 2)}
    starts, grads = (
        [torch.randn(shape, generator=generator(seed)).to(dtype) for shape in shapes.values()] for seed in range(2)
    )
    ends = []
    for most, is_turned in itertools.product((bucket_module.MAX_GROUPED, 0), (False, True)):
        monkeypatch.setattr(parameters, "MAX_GROUPED", most)
        monkeypatch.setattr(bucket_module, "MAX_GROUPED", most)
        params = [nn.Parameter(x.mT.contiguous().mT if is_turned else x.clone()) for x in starts]
        assert all(param.is_contiguous() != is_turned for param in params)
        optimizer = LearnedTeleportOptimizer(params, total_steps=20, checkpoint=MetaOptimizer(4, block_rows=block_rows))
        for _ in range(3):
            for param, grad in zip(params, grads):
                param.grad = grad.mT.contiguous().mT if is_turned else grad.clone()
            optimizer.step()
        ends.append([param.detach() for param in params])
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.02}[dtype]
    for end in ends[1:]:
        for one, other in zip(end, ends[0]):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert all((end - start).abs().max() > 0.1 for end, start in zip(ends[0], starts))


@given(st.lists(st.integers(1, 5), max_size=4))
def test_matrix_shape_keeps_the_number_of_entries(shape: list[int]) -> None:
    matrix = matrix_shape(torch.Size(shape))
    if len(shape) == 2:
        assert matrix == tuple(shape)
    if matrix is not None:
        assert math.prod(matrix) == math.prod(shape)
    else:
        assert len(shape) < 2 or len(shape) > 2


@pytest.mark.parametrize("total_steps", [1, 10, 300, 1200])
def test_prior_rate(total_steps: int) -> None:
    rates = [prior_rate(step, Horizon(total_steps), 4)[0] for step in range(total_steps + 3)]
    endless = [prior_rate(step, Horizon(), 4)[0] for step in range(1200)]
    assert rates[-1] == rates[total_steps - 1] > 0
    assert all(later <= earlier for earlier, later in pairwise(rates))
    assert endless[0] == pytest.approx(0.22 / 4**0.7)
    assert endless[80] == pytest.approx(0.11 / 4**0.7)
    assert prior_rate(0, Horizon(), 11) == prior_rate(0, Horizon(), 60) < prior_rate(0, Horizon(), 10)
    same = int(0.7 * total_steps)
    assert rates[:same] == endless[:same]
    assert rates[total_steps - 1] == pytest.approx(endless[total_steps - 1] * min(1.0, 1 / (0.3 * total_steps)))


@pytest.mark.parametrize("total_steps", [1, 2, 10, 300])
def test_the_average_ends_where_the_parameters_do(total_steps: int) -> None:
    horizon = Horizon(total_steps)
    kept = [1.0 - averaging_weight(step, horizon.steps_left(step)) for step in range(total_steps + 2)]
    assert all(0.0 <= share < 1.0 for share in kept)
    assert kept[0] == 0.0  # the point before the first step does not count
    assert kept[max(total_steps - 3, 0) :] == [0.0] * (min(total_steps, 3) + 2)


def test_iterates_are_averaged_with_the_sixth_power_of_their_number() -> None:
    """With rising factorials for powers, which makes the weights exact."""
    values, weights = torch.randn(40, generator=generator()).tolist(), [1.0]
    for step in range(1, 40):
        weights.append(weights[-1] * (step + 6) / step)
    average = 0.0
    for step, value in enumerate(values):
        average += averaging_weight(step) * (value - average)
    expected = sum(weight * value for weight, value in zip(weights, values)) / sum(weights)
    assert average == pytest.approx(expected)


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


@pytest.mark.parametrize("imbalance", [1.0, 2.0, 30.0])
def test_a_teleport_has_a_bound_and_the_balanced_start_has_none(imbalance: float) -> None:
    """At full strength channels move back to balance, up to the bound; the start moves all the way."""
    model = perceptron(4, 6, 2)
    start = named(model)
    table = ParameterTable.of(start, find_symmetries(model, torch.zeros(2, 4).double()))
    nothing = {name: torch.zeros_like(param) for name, param in start.items()}
    params = dict(balance(start, nothing, nothing, {}, table)[0])
    log_scale = torch.full((6,), imbalance).double()
    (site,) = table.spec
    far = dict(move_scaling(site, log_scale.exp(), params, 1))
    zeros = {name: torch.zeros_like(param) for name, param in params.items()}
    controls = Controls.prior(len(params))._replace(balance=torch.ones(len(params)))
    *_, sizes = teleport(far, zeros, zeros, {}, controls, table)
    assert sizes.item() == pytest.approx(min(imbalance, MAX_LOG_SCALE), rel=1e-3)
    there, *_, way = balance(far, zeros, zeros, {}, table)
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


def stacked_runs(
    make: Callable[[int], nn.Module], inputs: Tensor, num_runs: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], ParameterTable]:
    """Parameters and made-up gradients of several networks of one architecture, and its table."""
    models = [make(seed + run) for run in range(num_runs)]
    params = {name: value.detach() for name, value in stack_module_state(models)[0].items()}
    grads = {name: torch.randn(v.shape, generator=generator(seed), dtype=v.dtype) for name, v in params.items()}
    return params, grads, ParameterTable.of(named(models[0]), find_symmetries(models[0], inputs))


def convolutional(seed: int) -> nn.Sequential:
    """Legs of every kind: repeated neighbours after the flatten, and slices of a grouped convolution."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
        ).double()


ARCHITECTURES: dict[str, tuple[Callable[[int], nn.Module], Tensor]] = {
    "perceptron": (partial(perceptron_of, (4, 7, 6, 6, 2)), torch.zeros(2, 4).double()),
    "convolutional": (convolutional, torch.zeros(2, 1, 6, 6).double()),
}


def one_run(x: Any, run: tuple[int, ...]) -> Any:
    if isinstance(x, Tensor):
        return x[run]
    if isinstance(x, UpdateState):
        return UpdateState(*(one_run(value, run) for value in x))
    return {name: value[run] for name, value in x.items()}


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([*ARCHITECTURES]), st.sampled_from([(1,), (4,), (2, 3)]), st.integers(0, 10**6))
def test_many_runs_at_once_equal_run_by_run(architecture: str, runs: tuple[int, ...], seed: int) -> None:
    """With weights, controls and teleports of their own; float64, up to features and log-scales, which are float32."""
    make, inputs = ARCHITECTURES[architecture]
    params, grads, table = stacked_runs(make, inputs, math.prod(runs), seed)
    assert len(table.spec) >= 2
    unflatten = lambda tensors: {name: x.unflatten(0, runs) for name, x in tensors.items()}  # noqa: E731
    params, grads = unflatten(params), unflatten(grads)
    meta_optimizer = MetaOptimizer(6)
    weights = {
        name: 0.3 * torch.randn(*runs, *param.shape, generator=generator(seed))
        for name, param in meta_optimizer.named_parameters()
    }

    def controller(own_weights: dict[str, Tensor]) -> Control:
        return partial(
            control, lambda features, hidden: functional_call(meta_optimizer, own_weights, (features, hidden))
        )

    hyper = HyperParameters.default(len(params), 20)
    hidden = meta_optimizer.initial_hidden(len(params)).detach().expand(*runs, -1, -1)
    state = UpdateState.initial(params, hidden)
    for step in (0, 1, TELEPORT_INTERVAL):
        new_params, new_state = update(controller(weights), params, grads, state, step=step, hyper=hyper, table=table)
        for run in itertools.product(*map(range, runs)):
            expected = update(
                controller(one_run(weights, run)),
                *(one_run(x, run) for x in (params, grads, state)),
                step=step,
                hyper=hyper,
                table=table,
            )
            actual = one_run(new_params, run), one_run(new_state, run)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        params, state = new_params, new_state


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([*ARCHITECTURES]), st.integers(0, 10**6))
def test_momentum_steps_of_many_runs_equal_those_of_each(architecture: str, seed: int) -> None:
    make, inputs = ARCHITECTURES[architecture]
    params, grads, table = stacked_runs(make, inputs, 3, seed)
    momenta = {name: torch.randn(x.shape, generator=generator(seed + 1)).double() for name, x in params.items()}
    outputs = torch.randn(3, len(params), len(Controls._fields), generator=generator(seed)).double()

    def coefficients(outputs: Tensor) -> StepCoefficients:
        controls, hyper = Controls.from_outputs(outputs), HyperParameters.default(len(params), 20)
        return step_coefficients(controls, step=3, hyper=hyper, table=table)

    together = momentum_step(grads, momenta, coefficients(outputs), table)
    for run in range(3):
        of_run = (one_run(tensors, (run,)) for tensors in (grads, momenta))
        alone = momentum_step(*of_run, coefficients(outputs[run]), table)
        actual = tuple(one_run(tensors, (run,)) for tensors in together)
        torch.testing.assert_close(actual, alone, rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, -1]))
def test_scalings_of_many_runs_are_the_moves_of_each(seed: int, kind: int) -> None:
    params, _, table = stacked_runs(*ARCHITECTURES["convolutional"], 3, seed)
    assert any(leg.within for symmetry in table.spec for leg in symmetry.legs)
    assert any(leg.repeat > 1 for symmetry in table.spec for leg in symmetry.legs)
    for symmetry in table.spec:
        scales = torch.rand(3, symmetry.size, generator=generator(seed), dtype=torch.float64) + 0.5
        moved = move_scaling(symmetry, scales, params, kind)
        for run in range(3):
            alone = move(SymmetrySpec((symmetry,)), {symmetry.id: scales[run]}, one_run(params, (run,)), kind)
            torch.testing.assert_close(one_run(moved, (run,)), alone, rtol=1e-15, atol=0)


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
