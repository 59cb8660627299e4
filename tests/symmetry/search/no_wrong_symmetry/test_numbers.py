"""Integers, truth values, buffers, and values that are set through the data of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.invariance import Case, assert_holds, between, by_kind, vectors
from tests.helpers.small_models import N, param

pytestmark = pytest.mark.private_torch


def as_bits(h: Tensor) -> Tensor:
    return h.view(torch.int32 if h.dtype == torch.float32 else torch.int64)


NUMBERS: dict[str, Case] = {
    "long": (between(lambda m, x: m.b((m.a(x) * 5).long().to(x.dtype))), vectors, "a:permutation"),
    "truth values": (
        between(lambda m, x: m.b(m.a(x).relu().bool().to(x.dtype) + m.c(x)), c=lambda: nn.Linear(3, N)),
        vectors,
        "a:permutation",
    ),
    "eight bits": (
        between(lambda m, x: m.b((m.a(x).tanh() * 100).to(torch.int8).type_as(x))),
        vectors,
        "a:permutation",
    ),
    "in the type of another": (
        between(lambda m, x, k: m.b((4 * m.a(x).relu()).type_as(k).to(x.dtype))),
        lambda: [(torch.randn(4, 3), torch.ones(1, dtype=torch.int32))],
        "a:permutation",
    ),
    "sum in integers": (
        between(lambda m, x: m.b(m.a(x).relu()) * (3 * m.a(x)).detach().relu().sum(1, keepdim=True, dtype=torch.int64)),
        vectors,
        "a:permutation",
    ),
    "bits": (between(lambda m, x: m.b(-as_bits(m.a(x).relu()).to(x.dtype) / 1e9)), vectors, "a:permutation"),
    "a weight in integers": (
        between(lambda m, x: m.b(F.linear(m.a(x).relu(), (3 * m.w).int().to(x.dtype))), w=lambda: param(N, N)),
        vectors,
        "a:permutation w:permutation",
    ),
    "a parameter as it is in integers": (
        between(lambda m, x: m.b(m.a(x) * m.w.int()), w=lambda: nn.Parameter(3 * torch.randn(N))),
        vectors,
        "a:permutation a:scaling a:sign",
    ),
    "to another precision": (
        between(lambda m, x: m.b(m.a(x).relu().double().to(x.dtype))),
        vectors,
        "a:permutation a:scaling",
    ),
    "uint8 buffer": (
        between(lambda m, x: m.b(m.a(x).relu() * m.m), m=lambda: torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.uint8)),
        vectors,
        "a:permutation a:scaling",
    ),
    "bool buffer": (
        between(
            lambda m, x: m.b(F.linear(m.a(x).relu(), m.w * m.m)),
            w=lambda: param(N, N),
            m=lambda: torch.rand(N, N) > 0.4,
        ),
        vectors,
        "a:permutation m:permutation a:scaling w:scaling w:sign",
    ),
    "int16 buffer": (
        between(lambda m, x: m.b((m.a(x) * m.m).relu()), m=lambda: torch.arange(1, N + 1, dtype=torch.int16)),
        vectors,
        "a:permutation a:scaling",
    ),
    "integer parameter": (
        between(
            lambda m, x: m.b(F.linear(m.a(x).relu(), m.w.to(x.dtype) * m.s)),
            w=lambda: nn.Parameter(torch.randint(-8, 8, (N, N), dtype=torch.int8), requires_grad=False),
            s=lambda: param(N, 1),
        ),
        vectors,
        "a:permutation s:permutation s:scaling s:sign",
    ),
    "float mask": (
        between(
            lambda m, x: m.b(F.linear(m.a(x).relu(), m.w * m.m)),
            w=lambda: param(N, N),
            m=lambda: (torch.rand(N, N) > 0.4) * 1.0,
        ),
        vectors,
        "a:permutation m:permutation a:scaling w:scaling w:sign",
    ),
    "constant offset": (
        between(lambda m, x: m.b((m.a(x) + m.c).relu()), c=lambda: torch.randn(N)),
        vectors,
        "a:permutation",
    ),
    "batch norm": (
        between(lambda m, x: m.b(m.n(m.a(x)).relu()), n=lambda: nn.BatchNorm1d(N)),
        vectors,
        "a:permutation n:scaling a:sign",
    ),
    "batch norm, variance read again": (
        between(lambda m, x: m.b(m.n(m.a(x)) * m.n.running_var), n=lambda: nn.BatchNorm1d(N, affine=False)),
        vectors,
        "a:permutation a:sign",
    ),
    "batch norm with computed statistics": (
        between(
            lambda m, x: m.b(F.batch_norm(m.a(x), m.u * 1.0, m.v.exp()).relu()),
            u=lambda: torch.randn(N),
            v=lambda: torch.randn(N),
        ),
        vectors,
        "",
    ),
}


def put(target: Tensor, function: Callable[[Tensor], Any]) -> Tensor:
    function(target)
    return target


def set_data(target: Tensor, value: Tensor) -> None:
    target.data = value


ASSIGNED: dict[str, Case] = {
    "weights from a network": (
        between(
            lambda m, x: m.b(F.linear(m.a(x).relu(), put(m.w, lambda w: set_data(w, m.h(x.mean(0)).view(N, N))))),
            h=lambda: nn.Linear(3, N * N),
            w=lambda: param(N, N),
        ),
        vectors,
        "",
    ),
    "copied into the data": (
        between(
            lambda m, x: m.b(F.linear(m.a(x).relu(), put(m.w, lambda w: w.data.copy_(m.h(x.mean(0)).view(N, N))))),
            h=lambda: nn.Linear(3, N * N),
            w=lambda: param(N, N),
        ),
        vectors,
        "",
    ),
    "set": (
        between(
            lambda m, x: m.b(
                F.linear(m.a(x).relu(), put(torch.empty_like(m.a.weight[:, :1]), lambda w: w.set_(m.w * 2)))
            ),
            w=lambda: param(N, N),
        ),
        vectors,
        "",
    ),
    "bias scaled through its data": (
        between(
            lambda m, x: m.b((F.linear(x, m.a.weight) + put(m.c.clone(), lambda c: c.data.mul_(2).add_(1))).relu()),
            c=lambda: param(N),
        ),
        vectors,
        "a:permutation",
    ),
    "hidden values exchanged": (
        between(lambda m, x: m.b(put(m.a(x).relu(), lambda h: set_data(h, m.c(x).relu()))), c=lambda: nn.Linear(3, N)),
        vectors,
        "",
    ),
    "parameter made of hidden values": (
        between(
            lambda m, x: m.b(F.linear(m.a(x).relu(), nn.Parameter(m.h(x.mean(0)).view(N, N)))),
            h=lambda: nn.Linear(3, N * N),
        ),
        vectors,
        "a:permutation",
    ),
}

ALL = by_kind(numbers=NUMBERS, data=ASSIGNED)


@pytest.mark.parametrize("name", ALL)
def test_all_that_is_found_holds_with_other_inputs(name: str) -> None:
    assert_holds(ALL[name])
