"""Parameters and layers that are used more than once, computed or tied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.small_models import Entry, Model, N, mlp, param, x_tokens, x_vector


def tied_linears() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(3, N), nn.GELU(), nn.Linear(N, 5), nn.GELU(), nn.Linear(5, N), nn.GELU(), nn.Linear(N, 2)
    )
    model[4].weight = nn.Parameter(model[2].weight.detach().t().clone())
    model[6].weight = nn.Parameter(torch.randn(2, N))
    return model


MODELS: dict[str, Entry] = {
    "reused activation": (
        mlp(lambda m, x: m.b(m.r(m.c(m.r(m.a(x))))), c=lambda: nn.Linear(N, N), r=nn.ReLU),
        x_vector,
        "a:permutation c:permutation a:scaling c:scaling",
    ),
    "layer used twice in a row": (
        mlp(lambda m, x: m.b(m.c(m.c(m.a(x)).relu()).relu()), c=lambda: nn.Linear(N, N)),
        x_vector,
        "a:permutation a:scaling",
    ),
    "layer used on two branches": (
        mlp(lambda m, x: m.b(m.a(x).relu() + m.a(-x).relu())),
        x_vector,
        "a:permutation a:scaling",
    ),
    "siamese difference": (
        mlp(lambda m, x: (m.a(x).relu() - m.a(x + 1).relu()).abs().sum(1)),
        x_vector,
        "a:permutation",
    ),
    "one weight in two layers": (lambda: tied_linears(), x_vector, "0:permutation 2:permutation 4:permutation"),
    "w and its transpose": (
        lambda: Model(lambda m, x: F.linear(F.linear(x, m.w).relu(), m.w.t()), w=param(N, 3)),
        x_vector,
        "w:permutation",
    ),
    "autoencoder with tied weights and biases": (
        lambda: Model(
            lambda m, x: F.linear(F.linear(x, m.w, m.b).relu(), m.w.t(), m.c), w=param(N, 3), b=param(N), c=param(3)
        ),
        x_vector,
        "w:permutation",
    ),
    "w plus its transpose": (
        mlp(lambda m, x: m.b(F.linear(m.a(x).relu(), m.w + m.w.t())), w=lambda: param(N, N)),
        x_vector,
        "a:permutation a:scaling",
    ),
    "w times its transpose": (
        mlp(lambda m, x: m.b(m.a(x) @ (m.w @ m.w.t())), w=lambda: param(N, 4)),
        x_vector,
        "a:permutation w:permutation a:scaling a:sign w:sign a:linear",
    ),
    "penalty on a weight": (
        mlp(lambda m, x: (m.b(m.a(x).relu()), m.a.weight.square().sum())),
        x_vector,
        "a:permutation",
    ),
    "weight is an output": (mlp(lambda m, x: (m.b(m.a(x).relu()), m.a.weight)), x_vector, ""),
    "one column of a weight is an output": (
        mlp(lambda m, x: (m.b(m.a(x).relu()), m.b.weight[:, 0])),
        x_vector,
        "a:permutation a:scaling",
    ),
    "norm of each row of a weight": (
        mlp(lambda m, x: (m.b(m.a(x).relu()), m.a.weight.norm(dim=1).max())),
        x_vector,
        "a:permutation",
    ),
    "normalised weight": (
        mlp(lambda m, x: m.b(F.linear(x, F.normalize(m.w, dim=1)).relu()), w=lambda: param(N, 3)),
        x_vector,
        "w:permutation",
    ),
    "masked weight": (
        mlp(
            lambda m, x: m.b(F.linear(x, m.w * m.mask).relu()),
            w=lambda: param(N, 3),
            mask=lambda: torch.tensor([1.0, 0, 1, 1, 0, 1])[:, None].expand(N, 3).clone(),
        ),
        x_vector,
        "mask:permutation w:scaling",
    ),
    "sliced weight": (
        mlp(
            lambda m, x: m.b(F.linear(x, m.w[:N], m.v[2 : N + 2]).relu()),
            w=lambda: param(N + 2, 3),
            v=lambda: param(N + 2),
        ),
        x_vector,
        "w:permutation w:scaling",
    ),
    "flat parameter": (
        lambda: Model(lambda m, x: (x @ m.w[: 3 * N].view(3, N)).relu() @ m.w[3 * N :].view(N, 2), w=param(5 * N)),
        x_vector,
        "",
    ),
    "embedding tied to the output": (
        lambda: Model(lambda m, x: m.n(m.e(x)) @ m.e.weight.t(), e=nn.Embedding(7, N), n=nn.LayerNorm(N)),
        x_tokens,
        "e:permutation",
    ),
    "unused parameter": (
        mlp(lambda m, x: m.b(m.a(x).relu()), u=lambda: nn.Linear(N, N)),
        x_vector,
        "a:permutation a:scaling",
    ),
    "hypernetwork": (
        mlp(lambda m, x: torch.einsum("bi,bio->bo", x, m.h(m.a(x).relu()).view(-1, 3, 2)), h=lambda: nn.Linear(N, 6)),
        x_vector,
        "a:permutation a:scaling",
    ),
}
