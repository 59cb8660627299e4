"""Buckets and blocks: every tensor is there once, and where it lies makes no difference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from teleport_optim import LearnedTeleportOptimizer, MetaOptimizer
from teleport_optim.optim import buckets as bucket_module
from teleport_optim.optim import parameters
from teleport_optim.optim.buckets import ShapeGroup
from teleport_optim.optim.controls import Controls
from teleport_optim.optim.orthogonalise import compute_steps
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.records import HyperParameters, step_coefficients
from teleport_optim.optim.shapes import BLOCK_ROWS
from teleport_optim.symmetry.spec import SymmetrySpec
from tests.helpers.perceptrons import generator
from tests.helpers.reference import blocks_of, direction, momentum_step


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
