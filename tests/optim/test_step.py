"""A step of the class: it changes what it may, where it lies, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from teleport_optim import LearnedTeleportOptimizer, MetaOptimizer
from teleport_optim.optim import buckets as bucket_module
from teleport_optim.optim import parameters
from teleport_optim.optim.kernels import native
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.records import HyperParameters, UpdateState
from teleport_optim.optim.rule import update
from teleport_optim.optim.shapes import BLOCK_ROWS
from tests.helpers.perceptrons import generator


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
