"""Controls: what the outputs of a controller say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teleport_optim.optim.controls import PRIOR_MOMENTUM, Controls
from tests.helpers.perceptrons import generator


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
