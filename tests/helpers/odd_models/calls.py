"""Control flow, inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.small_models import Entry, Model, N, mlp, x_vector


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Opaque:
    """An output whose tensors a tree of containers does not show."""

    logits: Tensor


class Hidden:
    """An object with a tensor among its attributes."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def heads_of(model: nn.Module, h: Tensor) -> Any:
    return (model.b(h), model.c(h[:, :3])) if model.training else model.b(h)


MODELS: dict[str, Entry] = {
    "control flow on data": (mlp(lambda m, x: m.b(m.a(x).relu() if x.sum() > 0 else m.a(x))), x_vector, "refused"),
    "control flow on an item": (mlp(lambda m, x: m.b(m.a(x).relu() * int(x[0, 0].item()))), x_vector, "refused"),
    "control flow on shapes": (
        mlp(lambda m, x: m.b(m.a(x).relu() if len(x) > 1 else m.a(x))),
        x_vector,
        "a:permutation a:scaling",
    ),
    "shape that depends on data": (mlp(lambda m, x: m.b(m.a(x[x[:, 0] > 0]).relu())), x_vector, "refused"),
    "other branch in training": (
        mlp(lambda m, x: m.b((F.gelu if m.training else F.relu)(m.a(x)))),
        x_vector,
        "a:permutation",
    ),
    "auxiliary head in training": (
        mlp(lambda m, x: heads_of(m, m.a(x).relu()), c=lambda: nn.Linear(3, 2)),
        x_vector,
        "a:permutation[0] a:permutation[1] a:scaling[0] a:scaling[1]",
    ),
    "dropout of the function": (
        mlp(lambda m, x: m.b(F.dropout(m.a(x).relu(), 0.5, m.training))),
        x_vector,
        "a:permutation a:scaling",
    ),
    "two inputs": (
        lambda: Model(
            lambda m, x, y: m.b(m.a(x).relu() + m.c(y)), a=nn.Linear(3, N), c=nn.Linear(4, N), b=nn.Linear(N, 2)
        ),
        lambda: (torch.randn(4, 3), torch.randn(4, 4)),
        "a:permutation a:scaling",
    ),
    "bilinear in two inputs": (
        lambda: Model(lambda m, x, y: m.b(m.a(x) * m.c(y)), a=nn.Linear(3, N), c=nn.Linear(4, N), b=nn.Linear(N, 2)),
        lambda: (torch.randn(4, 3), torch.randn(4, 4)),
        "a:permutation a:scaling c:scaling a:sign c:sign",
    ),
    "named input": (
        lambda: Model(lambda m, *, x: m.b(m.a(x).relu()), a=nn.Linear(3, N), b=nn.Linear(N, 2)),
        lambda: {"x": torch.randn(4, 3)},
        "a:permutation a:scaling",
    ),
    "dictionary output": (
        mlp(lambda m, x: {"logits": m.b(m.a(x).relu()), "size": 3}),
        x_vector,
        "a:permutation a:scaling",
    ),
    "hidden channels among the outputs": (
        mlp(lambda m, x: {"logits": m.b(h := m.a(x).relu()), "hidden": h}),
        x_vector,
        "",
    ),
    "named tuple output": (mlp(lambda m, x: Pair(m.b(h := m.a(x).relu()), h.sum(1))), x_vector, "a:permutation"),
    "dataclass output": (mlp(lambda m, x: Opaque(m.b(m.a(x).relu()))), x_vector, "a:permutation a:scaling"),
    "output in an object": (mlp(lambda m, x: Hidden(m.b(m.a(x).relu()))), x_vector, "a:permutation a:scaling"),
    "hidden channels in an object": (mlp(lambda m, x: (m.b(h := m.a(x).relu()), Hidden(h))), x_vector, ""),
    "output that is drawn": (mlp(lambda m, x: iter([m.b(m.a(x).relu())])), x_vector, "refused"),
    "no output": (mlp(lambda m, x: None), x_vector, "refused"),
}
