"""Entries in another order: flattened axes, and channels that are cut, repeated and indexed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.small_models import Entry, N, conv, image, mlp, pooled, x_image, x_vector

MODELS: dict[str, Entry] = {
    "channels first, flattened": (
        image(lambda m, x: m.c(m.a(x).relu().flatten(1)), c=lambda: nn.Linear(16 * N, 2)),
        x_image,
        "a:permutation a:scaling",
    ),
    "channels last, flattened": (
        image(lambda m, x: m.c(m.a(x).relu().permute(0, 2, 3, 1).flatten(1)), c=lambda: nn.Linear(16 * N, 2)),
        x_image,
        "a:permutation a:scaling",
    ),
    "channels between rows and columns": (
        image(lambda m, x: m.c(m.a(x).relu().permute(0, 2, 1, 3).reshape(len(x), -1)), c=lambda: nn.Linear(16 * N, 2)),
        x_image,
        "a:permutation a:scaling",
    ),
    "flattened, then a batch norm": (
        image(
            lambda m, x: m.c(m.n(m.a(x).flatten(1)).relu()),
            n=lambda: nn.BatchNorm1d(16 * N),
            c=lambda: nn.Linear(16 * N, 2),
        ),
        x_image,
        "a:permutation n:scaling a:sign",
    ),
    "two flattenings in different orders": (
        image(
            lambda m, x: m.c((h := m.a(x).relu()).flatten(1)) + m.d(h.flatten(2).transpose(1, 2).flatten(1)),
            c=lambda: nn.Linear(16 * N, 2),
            d=lambda: nn.Linear(16 * N, 2),
        ),
        x_image,
        "a:permutation a:scaling",
    ),
    "sum of two orders": (
        image(
            lambda m, x: m.c((h := m.a(x).relu()).flatten(1) + h.flatten(2).transpose(1, 2).flatten(1)),
            c=lambda: nn.Linear(16 * N, 2),
        ),
        x_image,
        "a:scaling",
    ),
    "one channel mirrored": (
        image(
            lambda m, x: m.c(torch.cat([(h := m.a(x).relu())[:, :1], h[:, 1:].flip(3)], 1).flatten(1)),
            c=lambda: nn.Linear(16 * N, 2),
        ),
        x_image,
        "a:permutation a:scaling",
    ),
    "channel shuffle": (
        image(
            lambda m, x: m.b(pooled(m.d(F.channel_shuffle(m.c(m.a(x)).relu(), 2)).relu())),
            c=lambda: conv(groups=2),
            d=lambda: conv(groups=2),
        ),
        x_image,
        "a:permutation[0] a:permutation[1] c:permutation[0] c:permutation[1] d:permutation[0] d:permutation[1]"
        " a:scaling[0] a:scaling[1] c:scaling[0] c:scaling[1] d:scaling a:sign[0] a:sign[1]",
    ),
    "pixel shuffle": (
        image(
            lambda m, x: pooled(m.c(F.pixel_shuffle(m.d(m.a(x)).relu(), 2))),
            d=lambda: conv(N, 4 * N),
            c=lambda: conv(N, 2),
        ),
        x_image,
        "a:permutation d:permutation a:scaling d:scaling a:sign a:linear",
    ),
    "interleaved channels": (
        mlp(
            lambda m, x: m.c(torch.stack([m.a(x).relu(), m.d(x).relu()], 2).flatten(1)),
            d=lambda: nn.Linear(3, N),
            c=lambda: nn.Linear(2 * N, 2),
        ),
        x_vector,
        "a:permutation a:scaling",
    ),
    "repeated channels": (
        mlp(lambda m, x: m.c(m.a(x).relu().repeat(1, 2)), c=lambda: nn.Linear(2 * N, 2)),
        x_vector,
        "a:permutation a:scaling",
    ),
    "channels repeated one by one": (
        mlp(lambda m, x: m.c(m.a(x).relu().repeat_interleave(2, 1)), c=lambda: nn.Linear(2 * N, 2)),
        x_vector,
        "a:permutation a:scaling",
    ),
    "every second channel": (
        mlp(lambda m, x: m.c(m.a(x).relu()[:, ::2]), c=lambda: nn.Linear(N // 2, 2)),
        x_vector,
        "a:permutation[0] a:permutation[1] a:scaling[0] a:scaling[1]",
    ),
    "indexed with a buffer": (
        mlp(lambda m, x: m.b(m.a(x).relu()[:, m.i]), i=lambda: torch.tensor([3, 1, 0, 2, 5, 4])),
        x_vector,
        "a:permutation a:scaling",
    ),
    "indexed with a buffer that repeats": (
        mlp(lambda m, x: m.b(m.a(x).relu()[:, m.i]), i=lambda: torch.tensor([3, 3, 0, 2, 5, 4])),
        x_vector,
        "a:permutation a:scaling[0] a:scaling[1] a:scaling[2]",
    ),
    "indexed with inputs": (
        mlp(lambda m, x, i: m.b(m.a(x).relu().gather(1, i))),
        lambda: (torch.randn(4, 3), torch.randint(N, (4, N))),
        "",
    ),
    "sorted channels": (mlp(lambda m, x: m.b(m.a(x).sort(1).values)), x_vector, ""),
    "largest channels": (mlp(lambda m, x: m.c(m.a(x).topk(3, 1).values), c=lambda: nn.Linear(3, 2)), x_vector, ""),
    "index of the largest channel": (mlp(lambda m, x: (m.b(m.a(x).relu()), m.a(x).argmax(1))), x_vector, ""),
    "cumulative sum over channels": (mlp(lambda m, x: m.b(m.a(x).cumsum(1))), x_vector, ""),
    "batch and channels flattened together": (
        mlp(lambda m, x: m.b(m.a(x).relu().flatten().view(-1, N))),
        x_vector,
        "a:permutation a:scaling",
    ),
}
