"""Sizes out of the ordinary."""

from __future__ import annotations

import torch
from torch import nn

from tests.helpers.small_models import Entry, Model, N, mlp, param, x_vector


class Empty(nn.Linear):
    """A layer without channels, which torch warns of when it draws their values."""

    def reset_parameters(self) -> None:
        pass


MODELS: dict[str, Entry] = {
    "zero channels": (lambda: nn.Sequential(Empty(3, 0), nn.ReLU(), Empty(0, 2)), x_vector, ""),
    "one channel": (lambda: nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 2)), x_vector, "0:scaling"),
    "one input": (
        lambda: nn.Sequential(nn.Linear(1, N), nn.ReLU(), nn.Linear(N, 1)),
        lambda: torch.randn(4, 1),
        "0:permutation 0:scaling",
    ),
    "one channel, broadcast": (
        mlp(lambda m, x: m.b(m.a(x).relu() * m.c(x)), c=lambda: nn.Linear(3, 1)),
        x_vector,
        "a:permutation a:scaling",
    ),
    "one-channel kernels concatenated": (
        lambda: Model(
            lambda m, x: m.b(torch.cat([f(x) for f in m.f], 1).relu()),
            f=nn.ModuleList(nn.Linear(3, 1) for _ in range(N)),
            b=nn.Linear(N, 2),
        ),
        x_vector,
        "",
    ),
    "as many channels as examples": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
        x_vector,
        "0:permutation 2:permutation 0:scaling 2:scaling",
    ),
    "scalar parameters": (
        mlp(lambda m, x: m.b(m.s * m.a(x).relu() + m.t), s=lambda: param(), t=lambda: param()),
        x_vector,
        "a:permutation",
    ),
}
