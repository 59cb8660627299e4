"""Rows that are mixed: nearly orthogonal, of the lengths asked for, and none the worse for their neighbours."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teleport_optim.optim.controls import Controls
from teleport_optim.optim.orthogonalise import column_scales, row_mixers
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.records import HyperParameters, step_coefficients
from teleport_optim.optim.shapes import BLOCK_ROWS
from tests.helpers.perceptrons import generator, mixed
from tests.helpers.reference import direction, momentum_step, nearly_orthogonal


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
