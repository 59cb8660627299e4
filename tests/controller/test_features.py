"""Features of the controller."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teleport_optim import find_symmetries
from teleport_optim.controller.features import NUM_FEATURES, compute_features
from teleport_optim.optim.parameters import ParameterTable
from tests.helpers.perceptrons import generator, named, perceptron


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
