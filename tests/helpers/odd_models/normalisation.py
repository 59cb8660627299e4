"""Normalisation, scales of channels, and layers for each channel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.small_models import Entry, N, conv, image, mlp, param, pooled, x_image, x_vector

MODELS: dict[str, Entry] = {
    "batch norm without affine, then scale by hand": (
        image(
            lambda m, x: m.b(pooled((m.n(m.a(x)) * m.g[:, None, None] + m.h[:, None, None]).relu())),
            n=lambda: nn.BatchNorm2d(N, affine=False),
            g=lambda: param(N),
            h=lambda: param(N),
        ),
        x_image,
        "a:permutation g:scaling a:sign",
    ),
    "one batch norm used twice": (
        image(lambda m, x: m.b(pooled(m.n(m.c(m.n(m.a(x)).relu())).relu())), n=lambda: nn.BatchNorm2d(N), c=conv),
        x_image,
        "a:permutation n:scaling a:sign",
    ),
    "layer norm by hand": (
        mlp(
            lambda m, x: m.b(((h := m.a(x)) - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True) + 1e-5).sqrt() * m.g),
            g=lambda: param(N),
        ),
        x_vector,
        "a:permutation g:scaling g:sign",
    ),
    "group norm after a shuffle": (
        image(lambda m, x: m.b(pooled(m.n(F.channel_shuffle(m.a(x), 2)).relu())), n=lambda: nn.GroupNorm(3, N)),
        x_image,
        None,
    ),
    "layer scale": (
        mlp(
            lambda m, x: m.b((h := m.a(x)) + m.g * m.d(m.c(h).relu())),
            c=lambda: nn.Linear(N, 5),
            d=lambda: nn.Linear(5, N),
            g=lambda: param(N),
        ),
        x_vector,
        None,
    ),
    "depthwise with a multiplier": (
        image(
            lambda m, x: pooled(m.c(m.d(m.a(x).relu()).relu())),
            d=lambda: conv(N, 2 * N, groups=N),
            c=lambda: conv(2 * N, 2),
        ),
        x_image,
        "a:permutation a:scaling d:scaling",
    ),
    "depthwise in place of a sum": (
        image(lambda m, x: m.b(pooled(m.d(h := m.a(x).relu()) + h)), d=lambda: conv(groups=N)),
        x_image,
        "a:permutation a:scaling",
    ),
    "complex numbers": (
        mlp(lambda m, x: m.b(torch.fft.rfft(m.a(x), dim=0).abs()[: len(x) // 2 + 1].repeat(2, 1)[: len(x)])),
        x_vector,
        "",
    ),
    "distances to prototypes": (mlp(lambda m, x: torch.cdist(m.a(x), m.p), p=lambda: param(4, N)), x_vector, ""),
    "attribute of a weight": (
        mlp(lambda m, x: m.b(m.a(x).relu()) * math.prod(m.a.weight.shape)),
        x_vector,
        "a:permutation a:scaling",
    ),
}
