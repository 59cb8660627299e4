"""Residuals, and branches that are joined."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.small_models import Entry, Model, N, conv, image, mlp, param, pooled, x_image, x_vector


def in_residual(model: nn.Module, h: Tensor) -> Tensor:
    return h + model.d(model.c(h).relu())


MODELS: dict[str, Entry] = {
    "residual": (
        mlp(lambda m, x: m.b(in_residual(m, m.a(x))), c=lambda: nn.Linear(N, 5), d=lambda: nn.Linear(5, N)),
        x_vector,
        "a:permutation c:permutation a:scaling c:scaling a:sign a:linear",
    ),
    "residual of the input": (
        lambda: Model(lambda m, x: x + m.b(m.a(x).relu()), a=nn.Linear(3, N), b=nn.Linear(N, 3)),
        x_vector,
        "a:permutation a:scaling",
    ),
    "residual with a shift of channels": (
        mlp(lambda m, x: m.b((h := m.a(x).relu()) + h.roll(1, 1))),
        x_vector,
        "a:scaling",
    ),
    "residual with a flip of channels": (
        mlp(lambda m, x: m.b((h := m.a(x).relu()) + h.flip(1))),
        x_vector,
        "a:scaling",
    ),
    "difference of neighbours": (
        mlp(lambda m, x: m.c(torch.diff(m.a(x).relu())), c=lambda: nn.Linear(N - 1, 2)),
        x_vector,
        "a:scaling",
    ),
    "concatenation with itself": (
        mlp(lambda m, x: m.c(torch.cat([h := m.a(x).relu(), h], 1)), c=lambda: nn.Linear(2 * N, 2)),
        x_vector,
        "a:permutation a:scaling",
    ),
    "positive and negative part": (
        mlp(lambda m, x: m.c(torch.cat([(h := m.a(x)).relu(), (-h).relu()], 1)), c=lambda: nn.Linear(2 * N, 2)),
        x_vector,
        "a:permutation a:scaling",
    ),
    "concatenation, then the sum of its parts": (
        mlp(
            lambda m, x: m.c(torch.cat([h := m.a(x).relu(), g := m.d(x).relu()], 1)) + m.b(h + g),
            c=lambda: nn.Linear(2 * N, 2),
            d=lambda: nn.Linear(3, N),
        ),
        x_vector,
        "a:scaling",
    ),
    "concatenation in the other order, then the sum": (
        mlp(
            lambda m, x: m.c(torch.cat([h := m.a(x).relu(), (g := m.d(x).relu()).flip(1)], 1)) + m.b(h + g),
            c=lambda: nn.Linear(2 * N, 2),
            d=lambda: nn.Linear(3, N),
        ),
        x_vector,
        "a:scaling",
    ),
    "halves of which one passes a relu": (
        mlp(lambda m, x: m.b(torch.cat([(h := m.a(x))[:, :2].relu(), h[:, 2:]], 1))),
        x_vector,
        "a:permutation[0] a:permutation[1] a:scaling a:sign a:linear",
    ),
    "chunks that change places": (
        mlp(lambda m, x: m.b(torch.cat(m.a(x).relu().chunk(2, 1)[::-1], 1))),
        x_vector,
        "a:permutation[0] a:permutation[1] a:scaling",
    ),
    "chunks that are multiplied": (
        mlp(lambda m, x: m.c((h := m.a(x).chunk(2, 1))[0] * h[1].sigmoid()), c=lambda: nn.Linear(N // 2, 2)),
        x_vector,
        "a:permutation a:scaling a:sign",
    ),
    "channels multiplied with themselves": (
        mlp(lambda m, x: m.b((h := m.a(x)) * h)),
        x_vector,
        "a:permutation a:scaling a:sign",
    ),
    "maximum of two halves": (
        mlp(lambda m, x: m.c(torch.maximum(*m.a(x).chunk(2, 1))), c=lambda: nn.Linear(N // 2, 2)),
        x_vector,
        "a:permutation a:scaling",
    ),
    "maxout over neighbours": (
        mlp(lambda m, x: m.c(m.a(x).view(-1, N // 2, 2).amax(2)), c=lambda: nn.Linear(N // 2, 2)),
        x_vector,
        "a:permutation[0] a:permutation[1] a:permutation[2] a:heads a:scaling",
    ),
    "squeeze and excitation": (
        image(
            lambda m, x: m.b(pooled((h := m.a(x).relu()) * m.d(m.c(pooled(h)).relu()).sigmoid()[:, :, None, None])),
            c=lambda: nn.Linear(N, 3),
            d=lambda: nn.Linear(3, N),
        ),
        x_image,
        "a:permutation c:permutation a:scaling c:scaling",
    ),
    "mixture that a third layer decides": (
        mlp(
            lambda m, x: m.b(torch.lerp(m.a(x), m.c(x).tanh(), m.d(x).sigmoid())),
            c=lambda: nn.Linear(3, N),
            d=lambda: nn.Linear(3, N),
        ),
        x_vector,
        "a:permutation a:sign",
    ),
    "number of active channels": (
        mlp(lambda m, x: m.b(torch.linalg.vector_norm(m.a(x).relu().unsqueeze(2), 0, dim=2))),
        x_vector,
        "a:permutation",
    ),
    "gate for one half": (
        mlp(lambda m, x: m.b(torch.cat([(h := m.a(x).relu())[:, :3] * h[:, 3:].sigmoid(), h[:, 3:]], 1))),
        x_vector,
        "a:permutation a:scaling",
    ),
    "dense block": (
        image(
            lambda m, x: m.b(pooled(m.d(torch.cat([h := m.a(x).relu(), m.c(h).relu()], 1)).relu())),
            c=lambda: conv(N, 4),
            d=lambda: conv(N + 4),
        ),
        x_image,
        "a:permutation c:permutation d:permutation a:scaling c:scaling d:scaling",
    ),
    "padded shortcut": (
        image(
            lambda m, x: pooled(F.pad(h := m.a(x).relu(), (0, 0, 0, 0, 2, 2)) + m.c(h)) @ m.w,
            c=lambda: conv(N, N + 4),
            w=lambda: param(N + 4, 2),
        ),
        x_image,
        "a:permutation a:scaling",
    ),
}
