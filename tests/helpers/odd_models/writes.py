"""Views, and work in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.small_models import Entry, Model, N, in_place, mlp, param, x_vector


def keep(model: nn.Module, h: Tensor) -> Tensor:
    model.kept = h
    return h


MODELS: dict[str, Entry] = {
    "relu in place": (mlp(lambda m, x: m.b(F.relu_(m.a(x)))), x_vector, "a:permutation a:scaling"),
    "relu in place on a view": (
        mlp(lambda m, x: m.b(in_place(m.a(x), lambda h: h[:, :2].relu_()))),
        x_vector,
        "a:permutation[0] a:permutation[1] a:scaling",
    ),
    "one channel multiplied in place": (
        mlp(lambda m, x: m.b(in_place(m.a(x).relu(), lambda h: h[:, 0].mul_(3)))),
        x_vector,
        "a:permutation a:scaling",
    ),
    "shift in place through a view": (
        mlp(lambda m, x: m.b(in_place(m.a(x), lambda h: h.t().add_(1)).relu())),
        x_vector,
        "a:permutation",
    ),
    "part of a copied bias set to zero": (
        lambda: Model(
            lambda m, x: F.linear(F.linear(x, m.w, in_place(m.c.clone(), lambda c: c[2:4].zero_())).relu(), m.v),
            w=param(N, 3),
            c=param(N),
            v=param(2, N),
        ),
        x_vector,
        "c:permutation[0] c:permutation[1] c:scaling",
    ),
    "written into a buffer of zeros": (
        mlp(lambda m, x: m.b(in_place(x.new_zeros(len(x), N), lambda h: h[:, :N].copy_(m.a(x).relu())))),
        x_vector,
        "",
    ),
    "assigned by slices": (
        mlp(lambda m, x: m.b(in_place(m.a(x).relu(), lambda h: h.__setitem__((slice(None), 0), 1.0)))),
        x_vector,
        "a:permutation",
    ),
    "running average kept by hand": (
        mlp(
            lambda m, x: m.b((h := m.a(x)).relu() - in_place(m.avg, lambda s: s.mul_(0.9).add_(0.1 * h.mean(0)))),
            avg=lambda: torch.zeros(N),
        ),
        x_vector,
        "a:permutation",
    ),
    "hidden values kept on the module": (mlp(lambda m, x: m.b(keep(m, m.a(x).relu()))), x_vector, ""),
}
