"""Sequences, and attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.small_models import Entry, Model, N, mlp, param, x_sequence, x_tokens, x_vector


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2).sum(-1)


def loop(cell: nn.GRUCell, x: Tensor, size: int) -> Tensor:
    h = x.new_zeros(len(x), size)
    for step in x.unbind(1):
        h = cell(step, h)
    return h


class Rotary(nn.Module):
    """Attention whose queries and keys are turned by an angle that depends on the position."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, 8) for _ in range(3))
        self.register_buffer("angles", torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.1])))

    def forward(self, x: Tensor) -> Tensor:
        return attend(self.turn(self.q(x)), self.turn(self.k(x)), self.v(x), 2)

    def turn(self, x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (2, 2, 2)).unbind(-1)
        cos, sin = self.angles.cos()[:, None], self.angles.sin()[:, None]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-3)


MODELS: dict[str, Entry] = {
    "attention with packed projections": (
        lambda: Model(
            lambda m, x: m.b(m.att(h := m.a(x), h, h)[0]),
            a=nn.Linear(3, 8),
            att=nn.MultiheadAttention(8, 2, batch_first=True),
            b=nn.Linear(8, 2),
        ),
        x_sequence,
        None,
    ),
    "attention that returns its weights": (
        lambda: Model(
            lambda m, x: m.att(x, x, x, need_weights=True, average_attn_weights=False),
            att=nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        lambda: torch.randn(3, 5, 4),
        None,
    ),
    "attention with keys of another size": (
        lambda: Model(
            lambda m, x, y: m.att(x, y, y)[0], att=nn.MultiheadAttention(8, 2, kdim=3, vdim=3, batch_first=True)
        ),
        lambda: (torch.randn(3, 5, 8), torch.randn(3, 4, 3)),
        None,
    ),
    "attention with biases for keys": (
        lambda: Model(
            lambda m, x: m.att(x, x, x)[0], att=nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)
        ),
        lambda: torch.randn(3, 5, 8),
        None,
    ),
    "rotary positions": (lambda: Rotary(), x_sequence, None),
    "relative positions": (
        lambda: Model(
            lambda m, x: attend(m.q(x), m.k(x), m.v(x), 2, m.bias),
            q=nn.Linear(3, 8),
            k=nn.Linear(3, 8),
            v=nn.Linear(3, 8),
            bias=param(2, 5, 5),
        ),
        x_sequence,
        None,
    ),
    "queries normalised": (
        lambda: Model(
            lambda m, x: attend(F.normalize(m.q(x), dim=-1), m.k(x), m.v(x), 2),
            q=nn.Linear(3, 8),
            k=nn.Linear(3, 8),
            v=nn.Linear(3, 8),
        ),
        x_sequence,
        None,
    ),
    "linear attention": (
        lambda: Model(
            lambda m, x: (m.q(x) @ (m.k(x).transpose(1, 2) @ m.v(x))).sum(1) @ m.o,
            q=nn.Linear(3, 4),
            k=nn.Linear(3, 4),
            v=nn.Linear(3, 4),
            o=param(4, 2),
        ),
        x_sequence,
        None,
    ),
    "einsum attention": (
        lambda: Model(
            lambda m, x: (
                torch.einsum(
                    "bhqk,bkhd->bqhd",
                    torch.einsum("bqhd,bkhd->bhqk", m.q(x).unflatten(-1, (2, 4)), m.k(x).unflatten(-1, (2, 4))).softmax(
                        -1
                    ),
                    m.v(x).unflatten(-1, (2, 4)),
                ).flatten(2)
                @ m.o
            ),
            q=nn.Linear(3, 8),
            k=nn.Linear(3, 8),
            v=nn.Linear(3, 8),
            o=param(8, 2),
        ),
        x_sequence,
        None,
    ),
    "projections kept per head": (
        lambda: Model(
            lambda m, x: torch.einsum(
                "bqhd,hdo->bqo",
                torch.einsum(
                    "bhqk,bkhd->bqhd",
                    torch.einsum(
                        "bqhd,bkhd->bhqk", torch.einsum("bqi,hid->bqhd", x, m.q), torch.einsum("bki,hid->bkhd", x, m.k)
                    ).softmax(-1),
                    torch.einsum("bki,hid->bkhd", x, m.v),
                ),
                m.o,
            ),
            q=param(2, 3, 4),
            k=param(2, 3, 4),
            v=param(2, 3, 4),
            o=param(2, 4, 2),
        ),
        x_sequence,
        None,
    ),
    "grouped queries": (
        lambda: Model(
            lambda m, x: attend(m.q(x), m.k(x).repeat_interleave(2, -1), m.v(x).repeat(1, 1, 2), 4),
            q=nn.Linear(3, 16),
            k=nn.Linear(3, 8),
            v=nn.Linear(3, 8),
        ),
        x_sequence,
        None,
    ),
    "softmax over channels": (mlp(lambda m, x: m.b(m.a(x).softmax(1))), x_vector, "a:permutation"),
    "softmax over channels within groups": (
        mlp(lambda m, x: m.b(m.a(x).unflatten(1, (2, 3)).softmax(2).flatten(1))),
        x_vector,
        "a:permutation[0] a:permutation[1] a:heads",
    ),
    "mixer": (
        lambda: Model(
            lambda m, x: m.o(m.d(m.c(m.e(x).transpose(1, 2)).relu()).transpose(1, 2)).mean(1),
            e=nn.Linear(3, N),
            c=nn.Linear(5, 7),
            d=nn.Linear(7, 5),
            o=nn.Linear(N, 2),
        ),
        x_sequence,
        None,
    ),
    "recurrent": (
        lambda: Model(
            lambda m, x: m.b(m.c(m.r(x)[0])[1][0][-1]),
            r=nn.GRU(3, N, 2, batch_first=True, bidirectional=True),
            c=nn.LSTM(2 * N, N, batch_first=True),
            b=nn.Linear(N, 2),
        ),
        x_sequence,
        None,
    ),
    "recurrent with relu": (
        lambda: Model(
            lambda m, x: m.b(m.r(x)[0]), r=nn.RNN(3, N, 2, nonlinearity="relu", batch_first=True), b=nn.Linear(N, 2)
        ),
        x_sequence,
        None,
    ),
    "recurrent with tanh": (
        lambda: Model(lambda m, x: m.b(m.r(x)[0]), r=nn.RNN(3, N, batch_first=True), b=nn.Linear(N, 2)),
        x_sequence,
        "r:permutation r:sign",
    ),
    "recurrent, state from the input": (
        lambda: Model(
            lambda m, x: m.b(m.r(x, (h := x.new_ones(1, len(x), N), h))[0]),
            r=nn.LSTM(3, N, batch_first=True),
            b=nn.Linear(N, 2),
        ),
        x_sequence,
        None,
    ),
    "recurrent, projected": (
        lambda: Model(lambda m, x: m.b(m.r(x)[0]), r=nn.LSTM(3, N, proj_size=4, batch_first=True), b=nn.Linear(4, 2)),
        x_sequence,
        "",
    ),
    "recurrent cell in a loop": (
        lambda: Model(lambda m, x: m.b(loop(m.r, x, N)), r=nn.GRUCell(3, N), b=nn.Linear(N, 2)),
        x_sequence,
        "",
    ),
    "transformer": (
        lambda: Model(
            lambda m, x: m.o(m.t(m.e(x), m.e(x))),
            e=nn.Embedding(7, 8),
            t=nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
            o=nn.Linear(8, 7),
        ),
        x_tokens,
        None,
    ),
}
