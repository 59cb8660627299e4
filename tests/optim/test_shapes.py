"""Shapes of tensors as matrices."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from teleport_optim.optim.shapes import matrix_shape


@given(st.lists(st.integers(1, 5), max_size=4))
def test_matrix_shape_keeps_the_number_of_entries(shape: list[int]) -> None:
    matrix = matrix_shape(torch.Size(shape))
    if len(shape) == 2:
        assert matrix == tuple(shape)
    if matrix is not None:
        assert math.prod(matrix) == math.prod(shape)
    else:
        assert len(shape) < 2 or len(shape) > 2
