"""Kernels of convolutions with groups: all that is found holds, with other inputs too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.invariance import Case, assert_holds, by_kind, lines
from tests.helpers.small_models import Model, N, param

pytestmark = pytest.mark.private_torch


def grouped(
    weight: Callable[[nn.Module], Tensor], shape: tuple[int, ...], groups: int, num: int = N
) -> Callable[[], nn.Module]:
    return lambda: Model(
        lambda m, x: m.c(F.conv1d(m.a(x).relu(), weight(m), groups=groups).relu()).mean(2),
        a=nn.Conv1d(3, N, 1),
        c=nn.Conv1d(num, 2, 1),
        w=param(*shape),
    )


GROUPED: dict[str, Case] = {
    "transposed": (
        grouped(lambda m: m.w.transpose(0, 1), (3, N, 2), 2),
        lines,
        "a:permutation[0] a:permutation[1] w:permutation[0] w:permutation[1] a:scaling[0] a:scaling[1] w:scaling",
    ),
    "permuted": (
        grouped(lambda m: m.w.permute(2, 0, 1), (3, 1, 4), 2, 4),
        lines,
        "a:permutation[0] a:permutation[1] w:permutation[0] w:permutation[1] a:scaling[0] a:scaling[1] w:scaling",
    ),
    "depthwise from a matrix": (grouped(lambda m: m.w[:, None], (N, 3), N), lines, "a:permutation a:scaling w:scaling"),
    "depthwise, kernels in front": (
        grouped(lambda m: m.w.t()[:, None], (3, N), N),
        lines,
        "a:permutation a:scaling w:scaling",
    ),
    "one kernel for all": (grouped(lambda m: m.w.expand(N, 1, 3), (1, 1, 3), N), lines, ""),
    "one kernel for all groups": (grouped(lambda m: m.w.expand(4, 3, 2), (1, 3, 2), 2, 4), lines, ""),
    "transposed convolution, weight transposed": (
        lambda: Model(
            lambda m, x: m.c(F.conv_transpose1d(m.a(x).relu(), m.w.transpose(0, 1), groups=2).relu()).mean(2),
            a=nn.Conv1d(3, N, 1),
            c=nn.Conv1d(8, 2, 1),
            w=param(4, N, 3),
        ),
        lines,
        "a:permutation[0] a:permutation[1] w:permutation[0] w:permutation[1] a:scaling w:scaling[0] w:scaling[1]",
    ),
    "depthwise on hidden channels and on inputs": (
        lambda: Model(
            lambda m, x: m.c(
                (F.conv1d(m.a(x).relu(), m.w, groups=N) + F.conv1d(x.repeat(1, 2, 1), m.w, groups=N)).relu()
            ).mean(2),
            a=nn.Conv1d(3, N, 1),
            c=nn.Conv1d(N, 2, 1),
            w=param(N, 1, 3),
        ),
        lines,
        "",
    ),
    "grouped on inputs, then on hidden channels": (
        lambda: Model(
            lambda m, x: m.c(
                (F.conv1d(x.repeat(1, 2, 1), m.w, groups=2) + F.conv1d(m.a(x).relu(), m.w, groups=2)).relu()
            ).mean(2),
            a=nn.Conv1d(3, N, 1),
            c=nn.Conv1d(N, 2, 1),
            w=param(N, 3, 3),
        ),
        lines,
        "",
    ),
    "as one weight of all groups, too": (
        lambda: Model(
            lambda m, x: (
                m.c(F.conv1d(m.a(x).relu(), m.w, groups=2).relu()).mean(2) + m.d((m.w.flatten(1) @ m.v).t()).sum()
            ),
            a=nn.Conv1d(3, N, 1),
            c=nn.Conv1d(N, 2, 1),
            w=param(N, 3, 3),
            v=param(9, 2),
            d=nn.Linear(N, 1),
        ),
        lines,
        "w:permutation[0] w:permutation[1] v:permutation w:scaling",
    ),
}


def blurred(is_kept: bool) -> nn.Module:
    """A network with a filter for each channel that is not learned."""
    model = Model(
        lambda m, x: m.c(F.conv1d(m.a(x).relu(), m.f, groups=N)).mean(2), a=nn.Conv1d(3, N, 1), c=nn.Conv1d(N, 2, 1)
    )
    model.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]).repeat(N, 1, 1), persistent=is_kept)
    return model


FILTERS: dict[str, Case] = {
    "kept": (lambda: blurred(True), lines, "a:permutation a:scaling"),
    "not kept": (lambda: blurred(False), lines, "a:scaling"),
}

ALL = by_kind(groups=GROUPED, filter=FILTERS)


@pytest.mark.parametrize("name", ALL)
def test_all_that_is_found_holds_with_other_inputs(name: str) -> None:
    assert_holds(ALL[name])
