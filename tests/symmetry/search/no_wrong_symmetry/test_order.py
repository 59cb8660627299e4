"""Tables of positions, tokens in front, and recurrent layers, in which the order counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_optim.symmetry import find_symmetries
from tests.helpers.invariance import Case, assert_holds, between, by_kind, change, sequences, vectors
from tests.helpers.small_models import Model, N, build, param

pytestmark = pytest.mark.private_torch

TABLES: dict[str, Case] = {
    "narrow": (
        between(lambda m, x: m.b((m.a(x) + m.t.narrow(0, 0, x.shape[1])).relu()), t=lambda: param(16, N)),
        sequences,
        "a:permutation a:scaling",
    ),
    "computed, then sliced": (
        between(lambda m, x: m.b((m.a(x) + (m.t * 0.1).tanh()[: x.shape[1]]).relu()), t=lambda: param(16, N)),
        sequences,
        "a:permutation",
    ),
    "along the last axis": (
        between(lambda m, x: m.b((m.a(x) + m.t[:, : x.shape[1]].t()).relu()), t=lambda: param(N, 16)),
        sequences,
        "a:permutation a:scaling",
    ),
    "mean of what was sliced": (
        between(lambda m, x: m.b((m.a(x) + m.t[: x.shape[1]].mean(0)).relu()), t=lambda: param(16, N)),
        sequences,
        "a:permutation a:scaling",
    ),
    "mean of a full table": (
        between(lambda m, x: m.b((m.a(x) + m.t[: x.shape[1]].mean(0)).relu()), t=lambda: param(5, N)),
        lambda: [torch.randn(3, 5, 3), torch.randn(3, 3, 3), torch.randn(2, 4, 3)],
        "a:permutation a:scaling",
    ),
    "one row": (
        between(lambda m, x: m.b((m.a(x) + m.t[2]).relu()), t=lambda: param(4, N)),
        vectors,
        "a:permutation a:scaling",
    ),
    "a part that is dropped": (
        between(lambda m, x: m.b((m.a(x) + m.t.chunk(3)[1]).relu()), t=lambda: param(3 * N)),
        vectors,
        "a:permutation a:scaling",
    ),
    "chosen by constants": (
        between(
            lambda m, x: m.b((m.a(x) + m.t.exp()[m.i].sum(0)).relu()),
            t=lambda: param(5, N),
            i=lambda: torch.tensor([0, 3]),
        ),
        vectors,
        "a:permutation t:permutation",
    ),
    "steps of a schedule": (
        between(lambda m, x: m.b((m.a(x) + sum(m.t[k] for k in range(x.shape[1]))).relu()), t=lambda: param(16, N)),
        sequences,
        "a:permutation a:scaling",
    ),
}


class Prompted(nn.Module):
    """Learned tokens in front of what a function of the module does with a sequence."""

    def __init__(self, mix: Callable[[nn.Module, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.prompt, self.e, self.mix, self.o = nn.Parameter(torch.randn(4, 8)), nn.Linear(3, 8), mix, nn.Linear(8, 2)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.prompt.expand(len(x), -1, -1), self.e(x)], 1)
        output: Tensor = self.o(self.mix(self, tokens).mean(1))
        return output


def causal_mask(h: Tensor) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(h.shape[1]).to(h)


def dot_product(m: nn.Module, h: Tensor, is_causal: bool) -> Tensor:
    for _ in range(2):
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in m.qkv(h).chunk(3, -1))
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2).flatten(2)
    return h


def multihead(m: nn.Module, h: Tensor) -> Tensor:
    for _ in range(2):
        h = h + m.att(h, h, h, attn_mask=causal_mask(h), is_causal=True, need_weights=False)[0]
    return h


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


ORDERED: dict[str, Case] = {
    "dot products": (
        lambda: Prompted(lambda m, h: dot_product(m, h, True), qkv=nn.Linear(8, 24)),
        sequences,
        (
            "e:permutation[0] e:permutation[1] qkv:permutation[0] qkv:permutation[1] e:heads e:scaling qkv:scaling "
            "e:sign qkv:sign"
        ),
    ),
    "multihead": (
        lambda: Prompted(multihead, att=nn.MultiheadAttention(8, 2, batch_first=True)),
        sequences,
        "e:permutation e:scaling att:scaling[0] att:scaling[1] e:sign att:sign[0] att:sign[1]",
    ),
    "encoder": (
        lambda: Prompted(
            lambda m, h: m.u(m.t(h, src_mask=causal_mask(h), is_causal=True), src_mask=causal_mask(h)),
            t=encoder(),
            u=encoder(),
        ),
        sequences,
        (
            "e:permutation t.self_attn:permutation[0] t.self_attn:permutation[1] t.self_attn:permutation[2] "
            "t.self_attn:permutation[3] t.linear1:permutation u.linear1:permutation t.self_attn:heads "
            "t.self_attn:scaling[0] t.self_attn:scaling[1] t.linear1:scaling u.self_attn:scaling[0] "
            "u.self_attn:scaling[1] u.linear1:scaling u.norm2:scaling t.self_attn:sign[0] t.self_attn:sign[1] "
            "u.self_attn:sign[0] u.self_attn:sign[1] u.norm2:sign"
        ),
    ),
    "gru": (
        lambda: Prompted(lambda m, h: m.r(h)[0], r=nn.GRU(8, 8, batch_first=True)),
        sequences,
        "e:permutation r:permutation e:scaling e:sign r:sign",
    ),
    "lstm in two directions": (
        lambda: Prompted(lambda m, h: m.r(h)[0], r=nn.LSTM(8, 4, 2, bidirectional=True, batch_first=True)),
        sequences,
        (
            "e:permutation r:permutation[0] r:permutation[1] r:permutation[2] r:permutation[3] e:scaling e:sign "
            "r:sign[0] r:sign[1] r:sign[2] r:sign[3]"
        ),
    ),
    "rnn, time in front": (
        lambda: Prompted(lambda m, h: m.r(h.transpose(0, 1))[0].transpose(0, 1), r=nn.RNN(8, 8, nonlinearity="relu")),
        sequences,
        "e:permutation r:permutation e:scaling r:scaling e:sign",
    ),
    "cell in a loop": (
        lambda: Prompted(lambda m, h: torch.stack(states(m.r, h), 1), r=nn.GRUCell(8, 8)),
        sequences,
        "e:permutation e:scaling e:sign",
    ),
    "factor for each step": (
        lambda: Model(
            lambda m, x: m.o(m.r(x * m.s)[0].mean(1)),
            s=param(5, 1),
            r=nn.GRU(3, N, batch_first=True),
            o=nn.Linear(N, 2),
        ),
        lambda: [torch.randn(3, 5, 3), torch.randn(2, 5, 3)],
        "r:permutation r:sign",
    ),
    "one layer on two gains": (
        lambda: Model(
            lambda m, x: m.o((m.r(x * m.s)[0] + m.r(x * m.t)[0]).mean(1)),
            s=param(),
            t=param(),
            r=nn.RNN(3, N, batch_first=True),
            o=nn.Linear(N, 2),
        ),
        sequences,
        "r:permutation r:sign",
    ),
    "learned first state": (
        lambda: Model(
            lambda m, x: m.o(m.r(x, m.h.expand(-1, len(x), -1).contiguous())[0][:, -1]),
            h=param(2, 1, N),
            r=nn.GRU(3, N, 2, batch_first=True),
            o=nn.Linear(N, 2),
        ),
        sequences,
        "",
    ),
    "learned first states of an lstm": (
        lambda: Model(
            lambda m, x: m.o(
                m.r(x, (m.h.tanh().expand(-1, len(x), -1), m.c.expand(-1, len(x), -1).contiguous()))[0][:, -1]
            ),
            h=param(1, 1, N),
            c=param(1, 1, N),
            r=nn.LSTM(3, N, batch_first=True),
            o=nn.Linear(N, 2),
        ),
        sequences,
        "",
    ),
    "learned first state of a cell": (
        lambda: Model(
            lambda m, x: m.o(states(m.r, x, m.h.expand(len(x), -1))[-1]),
            h=param(N),
            r=nn.RNNCell(3, N),
            o=nn.Linear(N, 2),
        ),
        sequences,
        "r:permutation",
    ),
}


def states(cell: Any, x: Tensor, state: Tensor | None = None) -> list[Tensor]:
    result = []
    for step in x.unbind(1):
        state = cell(step, state)
        result.append(state)
    return result


ALL = by_kind(table=TABLES, order=ORDERED)


@pytest.mark.parametrize("name", ALL)
def test_all_that_is_found_holds_with_other_inputs(name: str) -> None:
    assert_holds(ALL[name])


def test_entries_that_nothing_reads_are_on_no_leg() -> None:
    for name, entries in (("one row", {2}), ("a part that is dropped", set(range(N, 2 * N)))):
        factory, make_inputs, _ = TABLES[name]
        spec = find_symmetries(build(factory), build(make_inputs)[0])
        for symmetry in spec:
            for leg in symmetry.legs:
                if leg.name == "t" and leg.axis == 0:
                    count = symmetry.size * leg.repeat
                    assert set(leg.index or range(leg.offset, leg.offset + count)) <= entries


def test_tokens_in_front_move_where_the_order_does_not_count() -> None:
    """The negative control of causal attention: the same model without it."""
    model = build(lambda: Prompted(lambda m, h: dot_product(m, h, False), qkv=nn.Linear(8, 24)))
    spec = find_symmetries(model, torch.randn(3, 5, 3))
    tokens = [s for s in spec if any(leg.name == "prompt" and leg.axis == 0 for leg in s.legs)]
    assert tokens
    assert change(model, spec, build(sequences)) < 1e-9
