"""Weights that are computed from parameters: all that is found holds, with other inputs too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.invariance import Case, assert_holds, between, by_kind, images, vectors
from tests.helpers.small_models import Model, N, conv, param

pytestmark = pytest.mark.private_torch


def kernel(weight: Callable[[nn.Module], Tensor], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A convolutional network whose middle kernel is computed."""
    return lambda: Model(
        lambda m, x: m.c(F.conv2d(m.a(x).relu(), weight(m), padding=1).relu()).mean((2, 3)),
        a=conv(2),
        c=conv(N, 2),
        **{name: part() for name, part in parts.items()},
    )


def standardised(w: Tensor) -> Tensor:
    return (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()


def rounded(w: Tensor) -> Tensor:
    return w + ((w * 8).round() / 8 - w).detach()


def kernel_mask() -> Tensor:
    mask = torch.ones(1, 1, 3, 3)
    mask[..., 2, :] = 0
    return mask


KERNELS: dict[str, Case] = {
    "standardised": (
        kernel(lambda m: standardised(m.w), w=lambda: param(N, N, 3, 3)),
        images,
        "a:permutation w:permutation",
    ),
    "scaled by its size": (
        kernel(lambda m: m.w / 7.3, w=lambda: param(N, N, 3, 3)),
        images,
        "a:permutation w:permutation a:scaling w:scaling",
    ),
    "masked": (
        kernel(lambda m: m.w * m.m, w=lambda: param(N, N, 3, 3), m=kernel_mask),
        images,
        "a:permutation w:permutation a:scaling w:scaling",
    ),
    "rounded": (
        kernel(lambda m: rounded(m.w), w=lambda: param(N, N, 3, 3)),
        images,
        "a:permutation w:permutation",
    ),
    "low rank": (
        kernel(lambda m: (m.u @ m.v).view(N, N, 3, 3), u=lambda: param(N, 4), v=lambda: param(4, N * 9)),
        images,
        "a:permutation u:permutation v:permutation a:scaling u:scaling",
    ),
    "kernel and difference": (
        kernel(lambda m: m.w + m.d.tanh(), w=lambda: param(N, N, 3, 3), d=lambda: param(N, N, 3, 3)),
        images,
        "a:permutation d:permutation",
    ),
    "positive": (
        kernel(lambda m: F.softplus(m.w), w=lambda: param(N, N, 3, 3)),
        images,
        "a:permutation w:permutation",
    ),
    "rows times columns": (
        kernel(lambda m: m.w * m.r[:, None] * m.s, w=lambda: param(N, N, 1, 1), r=lambda: param(3), s=lambda: param(3)),
        images,
        "a:permutation w:permutation a:scaling w:scaling",
    ),
    "used twice": (
        lambda: Model(
            lambda m, x: m.c((F.conv1d(m.a(x), m.w * 2, padding=1) + F.conv1d(m.a(x), m.w, padding=1)).relu()).mean(2),
            a=nn.Conv1d(3, N, 1),
            c=nn.Conv1d(N, 2, 1),
            w=param(N, N, 3),
        ),
        lambda: [torch.randn(3, 3, 8), torch.randn(2, 3, 11)],
        "a:permutation w:permutation a:scaling w:scaling a:sign",
    ),
    "transposed": (
        lambda: Model(
            lambda m, x: m.c(F.conv_transpose1d(m.a(x).relu(), m.w.tanh()).relu()).mean(2),
            a=nn.Conv1d(3, N, 1),
            c=nn.Conv1d(4, 2, 1),
            w=param(N, 4, 3),
        ),
        lambda: [torch.randn(3, 3, 8), torch.randn(2, 3, 11)],
        "a:permutation w:permutation",
    ),
}

ITSELF: dict[str, Case] = {
    "kernel and its transpose": (
        kernel(lambda m: m.w + m.w.mT, w=lambda: param(N, N, 3, 3)),
        images,
        "a:permutation w:permutation a:scaling w:scaling",
    ),
    "sum": (
        between(lambda m, x: m.b(F.linear(m.a(x).relu(), m.w + m.w).relu()), w=lambda: param(N, N)),
        vectors,
        "a:permutation w:permutation a:scaling w:scaling",
    ),
    "product": (
        between(lambda m, x: m.b(F.linear(m.a(x).relu(), m.w * m.w).relu()), w=lambda: param(N, N)),
        vectors,
        "a:permutation w:permutation w:scaling",
    ),
    "product with its transpose": (
        between(lambda m, x: m.b(F.linear(m.a(x).relu(), m.w * m.w.t()).relu()), w=lambda: param(N, N)),
        vectors,
        "a:permutation a:scaling",
    ),
    "matrix product": (
        between(lambda m, x: m.b(F.linear(m.a(x).relu(), m.w @ m.w).relu()), w=lambda: param(N, N)),
        vectors,
        "a:permutation a:scaling",
    ),
    "quotient": (
        between(
            lambda m, x: m.b(F.linear(m.a(x).relu(), m.w / (m.w * m.w).sum(1, keepdim=True)).relu()),
            w=lambda: param(N, N),
        ),
        vectors,
        "a:permutation w:permutation w:scaling",
    ),
    "side by side": (
        between(
            lambda m, x: m.c(F.linear(m.a(x).relu(), torch.cat([m.w, m.w])).relu()),
            w=lambda: param(N, N),
            c=lambda: nn.Linear(2 * N, 2),
        ),
        vectors,
        "a:permutation w:permutation a:scaling w:scaling",
    ),
    "outer product": (
        between(lambda m, x: m.b((m.a(x) @ torch.outer(m.v, m.v)).relu()), v=lambda: param(N)),
        vectors,
        "a:permutation a:scaling",
    ),
}

ALL = by_kind(kernel=KERNELS, itself=ITSELF)


@pytest.mark.parametrize("name", ALL)
def test_all_that_is_found_holds_with_other_inputs(name: str) -> None:
    assert_holds(ALL[name])
