"""Models in which symmetries are easily seen that are none: all that is found holds, with other inputs too.

Each is moved with ``act`` and called, in float64, on inputs of other batch sizes and lengths than those of the search. The ids
that must be found show that the rest of a model is not given up.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_optim import LearnedTeleportOptimizer, act, act_dual
from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.symmetry import SymmetrySpec, find_symmetries
from tests.helpers.odd_models import Model, build, conv, param
from tests.helpers.specs import reasons_of

N = 6


def moved(model: nn.Module, spec: SymmetrySpec, seed: int) -> nn.Module:
    """A copy of a model, moved by a random element."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(act(spec, spec.random_element(torch.Generator().manual_seed(seed)), model.state_dict()))
    return twin


def outputs_of(model: nn.Module, x: Any) -> list[Tensor]:
    torch.manual_seed(0)
    output = copy.deepcopy(model)(*(x if isinstance(x, tuple) else (x,)))
    return [output] if isinstance(output, Tensor) else list(output)


def in_double(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(in_double, x))
    return x.double() if x.is_floating_point() else x


def generic(model: nn.Module) -> nn.Module:
    """A copy in float64 without zero biases, which would hide a wrong symmetry."""
    twin = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in filter(Tensor.is_floating_point, twin.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return twin


def change(model: nn.Module, spec: SymmetrySpec, inputs: Iterable[Any]) -> float:
    """The largest relative change of an output in float64 by random elements, in both modes, with and without gradients."""
    largest = 0.0
    for is_training in (False, True):
        twin = generic(model).train(is_training)
        for seed in range(3):
            other = moved(twin, spec, seed)
            for x in map(in_double, inputs):
                for has_gradients in (False, True):
                    with torch.set_grad_enabled(has_gradients):
                        for before, after in zip(outputs_of(twin, x), outputs_of(other, x), strict=True):
                            difference = (before - after).abs().max() / before.abs().max().clamp_min(1e-3)
                            largest = max(largest, difference.item())
    return largest


def ids(spec: SymmetrySpec) -> str:
    return " ".join(symmetry.id for symmetry in spec if symmetry.group.name != "linear")


Case = tuple[Callable[[], nn.Module], Callable[[], list[Any]], str]


def images() -> list[Any]:
    return [torch.randn(3, 2, 6, 6), torch.randn(2, 2, 7, 5)]


def vectors() -> list[Any]:
    return [torch.randn(4, 3), torch.randn(3, 3), torch.randn(9, 3)]


def sequences() -> list[Any]:
    return [torch.randn(3, 5, 3), torch.randn(2, 3, 3), torch.randn(4, 12, 3)]


def between(forward: Callable[..., Any], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A model with ``a`` from 3 to N features, ``b`` from N to 2 and more parts."""
    return lambda: Model(
        forward, a=nn.Linear(3, N), b=nn.Linear(N, 2), **{name: part() for name, part in parts.items()}
    )


def kernel(weight: Callable[[nn.Module], Tensor], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A convolutional network whose middle kernel is computed."""
    return lambda: Model(
        lambda m, x: m.c(F.conv2d(m.a(x).relu(), weight(m), padding=1).relu()).mean((2, 3)),
        a=conv(2),
        c=conv(N, 2),
        **{name: part() for name, part in parts.items()},
    )


def standardised(w: Tensor) -> Tensor:
    return (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()


def rounded(w: Tensor) -> Tensor:
    return w + ((w * 8).round() / 8 - w).detach()


def kernel_mask() -> Tensor:
    mask = torch.ones(1, 1, 3, 3)
    mask[..., 2, :] = 0
    return mask


KERNELS: dict[str, Case] = {
    "standardised": (
        kernel(lambda m: standardised(m.w), w=lambda: param(N, N, 3, 3)),
        images,
        "a:permutation w:permutation",
    ),
    "scaled by its size": (
        kernel(lambda m: m.w / 7.3, w=lambda: param(N, N, 3, 3)),
        images,
        "a:permutation w:permutation a:scaling w:scaling",
    ),
    "masked": (
        kernel(lambda m: m.w * m.m, w=lambda: param(N, N, 3, 3), m=kernel_mask),
        images,
        "a:permutation w:permutation a:scaling w:scaling",
    ),
    "rounded": (
        kernel(lambda m: rounded(m.w), w=lambda: param(N, N, 3, 3)),
        images,
        "a:permutation w:permutation",
    ),
    "low rank": (
        kernel(lambda m: (m.u @ m.v).view(N, N, 3, 3), u=lambda: param(N, 4), v=lambda: param(4, N * 9)),
        images,
        "a:permutation u:permutation v:permutation a:scaling u:scaling",
    ),
    "kernel and difference": (
        kernel(lambda m: m.w + m.d.tanh(), w=lambda: param(N, N, 3, 3), d=lambda: param(N, N, 3, 3)),
        images,
        "a:permutation d:permutation",
    ),
    "positive": (
        kernel(lambda m: F.softplus(m.w), w=lambda: param(N, N, 3, 3)),
        images,
        "a:permutation w:permutation",
    ),
    "rows times columns": (
        kernel(lambda m: m.w * m.r[:, None] * m.s, w=lambda: param(N, N, 1, 1), r=lambda: param(3), s=lambda: param(3)),
        images,
        "a:permutation w:permutation a:scaling w:scaling",
    ),
    "used twice": (
        lambda: Model(
            lambda m, x: m.c((F.conv1d(m.a(x), m.w * 2, padding=1) + F.conv1d(m.a(x), m.w, padding=1)).relu()).mean(2),
            a=nn.Conv1d(3, N, 1),
            c=nn.Conv1d(N, 2, 1),
            w=param(N, N, 3),
        ),
        lambda: [torch.randn(3, 3, 8), torch.randn(2, 3, 11)],
        "a:permutation w:permutation a:scaling w:scaling a:sign",
    ),
    "transposed": (
        lambda: Model(
            lambda m, x: m.c(F.conv_transpose1d(m.a(x).relu(), m.w.tanh()).relu()).mean(2),
            a=nn.Conv1d(3, N, 1),
            c=nn.Conv1d(4, 2, 1),
            w=param(N, 4, 3),
        ),
        lambda: [torch.randn(3, 3, 8), torch.randn(2, 3, 11)],
        "a:permutation w:permutation",
    ),
}

ITSELF: dict[str, Case] = {
    "kernel and its transpose": (
        kernel(lambda m: m.w + m.w.mT, w=lambda: param(N, N, 3, 3)),
        images,
        "a:permutation w:permutation a:scaling w:scaling",
    ),
    "sum": (
        between(lambda m, x: m.b(F.linear(m.a(x).relu(), m.w + m.w).relu()), w=lambda: param(N, N)),
        vectors,
        "a:permutation w:permutation a:scaling w:scaling",
    ),
    "product": (
        between(lambda m, x: m.b(F.linear(m.a(x).relu(), m.w * m.w).relu()), w=lambda: param(N, N)),
        vectors,
        "a:permutation w:permutation w:scaling",
    ),
    "product with its transpose": (
        between(lambda m, x: m.b(F.linear(m.a(x).relu(), m.w * m.w.t()).relu()), w=lambda: param(N, N)),
        vectors,
        "a:permutation a:scaling",
    ),
    "matrix product": (
        between(lambda m, x: m.b(F.linear(m.a(x).relu(), m.w @ m.w).relu()), w=lambda: param(N, N)),
        vectors,
        "a:permutation a:scaling",
    ),
    "quotient": (
        between(
            lambda m, x: m.b(F.linear(m.a(x).relu(), m.w / (m.w * m.w).sum(1, keepdim=True)).relu()),
            w=lambda: param(N, N),
        ),
        vectors,
        "a:permutation w:permutation w:scaling",
    ),
    "side by side": (
        between(
            lambda m, x: m.c(F.linear(m.a(x).relu(), torch.cat([m.w, m.w])).relu()),
            w=lambda: param(N, N),
            c=lambda: nn.Linear(2 * N, 2),
        ),
        vectors,
        "a:permutation w:permutation a:scaling w:scaling",
    ),
    "outer product": (
        between(lambda m, x: m.b((m.a(x) @ torch.outer(m.v, m.v)).relu()), v=lambda: param(N)),
        vectors,
        "a:permutation a:scaling",
    ),
}

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


def grouped(
    weight: Callable[[nn.Module], Tensor], shape: tuple[int, ...], groups: int, num: int = N
) -> Callable[[], nn.Module]:
    return lambda: Model(
        lambda m, x: m.c(F.conv1d(m.a(x).relu(), weight(m), groups=groups).relu()).mean(2),
        a=nn.Conv1d(3, N, 1),
        c=nn.Conv1d(num, 2, 1),
        w=param(*shape),
    )


def lines() -> list[Any]:
    return [torch.randn(3, 3, 8), torch.randn(2, 3, 11)]


GROUPED: dict[str, Case] = {
    "transposed": (
        grouped(lambda m: m.w.transpose(0, 1), (3, N, 2), 2),
        lines,
        "a:permutation[0] a:permutation[1] w:permutation[0] w:permutation[1] a:scaling[0] a:scaling[1] w:scaling",
    ),
    "permuted": (
        grouped(lambda m: m.w.permute(2, 0, 1), (3, 1, 4), 2, 4),
        lines,
        "a:permutation[0] a:permutation[1] w:permutation[0] w:permutation[1] a:scaling[0] a:scaling[1] w:scaling",
    ),
    "depthwise from a matrix": (grouped(lambda m: m.w[:, None], (N, 3), N), lines, "a:permutation a:scaling w:scaling"),
    "depthwise, kernels in front": (
        grouped(lambda m: m.w.t()[:, None], (3, N), N),
        lines,
        "a:permutation a:scaling w:scaling",
    ),
    "one kernel for all": (grouped(lambda m: m.w.expand(N, 1, 3), (1, 1, 3), N), lines, ""),
    "one kernel for all groups": (grouped(lambda m: m.w.expand(4, 3, 2), (1, 3, 2), 2, 4), lines, ""),
    "transposed convolution, weight transposed": (
        lambda: Model(
            lambda m, x: m.c(F.conv_transpose1d(m.a(x).relu(), m.w.transpose(0, 1), groups=2).relu()).mean(2),
            a=nn.Conv1d(3, N, 1),
            c=nn.Conv1d(8, 2, 1),
            w=param(4, N, 3),
        ),
        lines,
        "a:permutation[0] a:permutation[1] w:permutation[0] w:permutation[1] a:scaling w:scaling[0] w:scaling[1]",
    ),
    "depthwise on hidden channels and on inputs": (
        lambda: Model(
            lambda m, x: m.c(
                (F.conv1d(m.a(x).relu(), m.w, groups=N) + F.conv1d(x.repeat(1, 2, 1), m.w, groups=N)).relu()
            ).mean(2),
            a=nn.Conv1d(3, N, 1),
            c=nn.Conv1d(N, 2, 1),
            w=param(N, 1, 3),
        ),
        lines,
        "",
    ),
    "grouped on inputs, then on hidden channels": (
        lambda: Model(
            lambda m, x: m.c(
                (F.conv1d(x.repeat(1, 2, 1), m.w, groups=2) + F.conv1d(m.a(x).relu(), m.w, groups=2)).relu()
            ).mean(2),
            a=nn.Conv1d(3, N, 1),
            c=nn.Conv1d(N, 2, 1),
            w=param(N, 3, 3),
        ),
        lines,
        "",
    ),
    "as one weight of all groups, too": (
        lambda: Model(
            lambda m, x: (
                m.c(F.conv1d(m.a(x).relu(), m.w, groups=2).relu()).mean(2) + m.d((m.w.flatten(1) @ m.v).t()).sum()
            ),
            a=nn.Conv1d(3, N, 1),
            c=nn.Conv1d(N, 2, 1),
            w=param(N, 3, 3),
            v=param(9, 2),
            d=nn.Linear(N, 1),
        ),
        lines,
        "w:permutation[0] w:permutation[1] v:permutation w:scaling",
    ),
}


def put(target: Tensor, function: Callable[[Tensor], Any]) -> Tensor:
    function(target)
    return target


def set_data(target: Tensor, value: Tensor) -> None:
    target.data = value


def blurred(is_kept: bool) -> nn.Module:
    """A network with a filter for each channel that is not learned."""
    model = Model(
        lambda m, x: m.c(F.conv1d(m.a(x).relu(), m.f, groups=N)).mean(2), a=nn.Conv1d(3, N, 1), c=nn.Conv1d(N, 2, 1)
    )
    model.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]).repeat(N, 1, 1), persistent=is_kept)
    return model


FILTERS: dict[str, Case] = {
    "kept": (lambda: blurred(True), lines, "a:permutation a:scaling"),
    "not kept": (lambda: blurred(False), lines, "a:scaling"),
}

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


def chain(layers: Iterable[nn.Module], h: Tensor) -> Tensor:
    for layer in layers:
        h = layer(h).relu()
    return h


def kernel_of_one() -> nn.Module:
    return nn.Conv2d(2, N, 1)


def mixed(model: Any, h: Tensor) -> Tensor:
    """A sum with entries that are read in another order: ``[pixels, channels]`` as if these were ``[channels, pixels]``."""
    other: Tensor = model.c(h).flatten(2).transpose(1, 2).reshape(len(h), N, h.shape[2], h.shape[3])
    return h + other


def restored(model: Any, h: Tensor) -> Tensor:
    """The same sum with the entries in their order."""
    other: Tensor = model.c(h).flatten(2).transpose(1, 2).transpose(1, 2).reshape(len(h), N, h.shape[2], h.shape[3])
    return h + other


PATHS: dict[str, Case] = {
    "grad mode": (
        between(lambda m, x: m.b((F.gelu if torch.is_grad_enabled() else torch.relu)(m.a(x)))),
        vectors,
        "a:permutation",
    ),
    "skipped without gradients": (
        between(
            lambda m, x: m.b(m.c(h).relu() if (h := m.a(x).relu()).requires_grad else h), c=lambda: nn.Linear(N, N)
        ),
        vectors,
        "a:permutation a:scaling",
    ),
    "only in training with gradients": (
        between(lambda m, x: m.b(m.a(x).sigmoid() if m.training and torch.is_grad_enabled() else m.a(x).relu())),
        vectors,
        "a:permutation",
    ),
    "even batches": (
        between(lambda m, x: m.b(m.a(x).relu() if len(x) % 2 == 0 else m.a(x).sigmoid())),
        vectors,
        "a:permutation",
    ),
    "long sequences": (
        between(lambda m, x: m.b((m.a(x).relu() if x.shape[1] > 6 else m.a(x).tanh()).mean(1))),
        sequences,
        "a:permutation",
    ),
    "short sequences": (
        between(lambda m, x: m.b((m.a(x).relu() if x.size(1) >= 4 else m.c(x)).mean(1)), c=lambda: nn.Linear(3, N)),
        sequences,
        "a:permutation a:scaling",
    ),
    "number of entries": (
        between(lambda m, x: m.b((m.a(x).relu() if x.shape[0] * x.shape[1] < 16 else m.a(x).tanh()).mean(1))),
        sequences,
        "a:permutation",
    ),
    "as many layers as the sequence is long": (
        between(
            lambda m, x: m.b(chain(list(m.layers)[: x.shape[1] - 3], m.a(x)).mean(1)),
            layers=lambda: nn.ModuleList([nn.Linear(N, N) for _ in range(4)]),
        ),
        sequences,
        "",
    ),
    "a loop over the sequence": (
        between(
            lambda m, x: m.b(sum(m.a(x[:, k]).relu() for k in range(x.shape[1]))),
        ),
        sequences,
        "a:permutation a:scaling",
    ),
    "large images": (
        between(lambda m, x: m.b((m.k(x).relu() if x.shape[-1] < 9 else m.k(x).tanh()).mean((2, 3))), k=kernel_of_one),
        lambda: [*images(), torch.randn(2, 2, 9, 9)],
        "k:permutation",
    ),
    "channels cut by the size of images": (
        between(lambda m, x: m.b(mixed(m, m.k(x).relu()).mean((2, 3))), k=kernel_of_one, c=lambda: nn.Conv2d(N, N, 1)),
        lambda: [torch.randn(3, 2, 2, 1), torch.randn(2, 2, 2, 3), torch.randn(2, 2, 5, 3)],
        "k:scaling",
    ),
    "channels cut and joined again": (
        between(
            lambda m, x: m.b(restored(m, m.k(x).relu()).mean((2, 3))), k=kernel_of_one, c=lambda: nn.Conv2d(N, N, 1)
        ),
        images,
        "k:permutation k:scaling",
    ),
    "looked up by its length": (
        between(lambda m, x: m.b({5: F.relu}.get(x.shape[1], F.gelu)(m.a(x)).mean(1))),
        sequences,
        "a:permutation",
    ),
}

ALL = {
    f"{kind}: {name}": case
    for kind, cases in (
        ("kernel", KERNELS),
        ("itself", ITSELF),
        ("table", TABLES),
        ("order", ORDERED),
        ("numbers", NUMBERS),
        ("groups", GROUPED),
        ("filter", FILTERS),
        ("data", ASSIGNED),
        ("path", PATHS),
    )
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", ALL)
def test_all_that_is_found_holds_with_other_inputs(name: str) -> None:
    factory, make_inputs, expected = ALL[name]
    model, inputs = build(factory), build(make_inputs)
    spec = find_symmetries(model, inputs[0])
    assert change(model, spec, inputs) < 1e-9, spec
    assert ids(spec) == expected


# ------------------------------------------------------------------------------------- what is read, and what is asked for


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


class Counted(nn.Module):
    """A model that tells of its calls where the search puts nothing back."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(3, N), nn.Linear(N, 2), function

    def forward(self, x: Tensor) -> Tensor:
        print("called")
        output: Tensor = self.b(self.function(self.a(x)))
        return output


@pytest.mark.parametrize(
    ("function", "is_more"),
    [
        (lambda h: h.relu().flatten(1), False),
        (lambda h: h.relu().view(h.shape[0], -1), True),
        (lambda h: h.relu() if h.shape[0] > 5 else torch.relu(h), True),
        (lambda h: h.relu() if torch.is_grad_enabled() else torch.relu(h), True),
    ],
)
def test_a_model_is_followed_more_than_twice_only_where_it_asks(
    function: Callable[[Tensor], Tensor], is_more: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = find_symmetries(build(lambda: Counted(function)), torch.randn(4, 3))
    assert ids(spec) == "a:permutation a:scaling"
    assert (capsys.readouterr().out.count("called") > 2) is is_more


def test_sizes_that_a_model_keeps_are_plain_numbers_afterwards() -> None:
    kept: list[int] = []
    model = build(
        lambda: Counted(lambda h: h.relu() if kept.append(h.shape[0] * 2) is None and kept[-1] != 3 else h)  # type: ignore[func-returns-value]
    )
    done = threading.Event()
    other = threading.Thread(target=done.wait)  # beside it, the search leaves numbers where they are
    other.start()
    try:
        find_symmetries(model, torch.randn(4, 3))
    finally:
        done.set()
        other.join()
    assert kept[0] == 8
    assert kept[0] + 1 == 9
    assert {8: "found"}[kept[0]] == "found"


class Rolling(nn.Module):
    """A model that leaves out a layer now and then, by a draw of its own."""

    def __init__(self, draw: Callable[[nn.Module], float]) -> None:
        super().__init__()
        self.a, self.c, self.b, self.draw = nn.Linear(3, N), nn.Linear(N, N), nn.Linear(N, 2), draw
        self.own, self.numpy = random.Random(0), np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        if not self.training or self.draw(self) > 0.1:
            h = self.c(h).relu()
        output: Tensor = self.b(h)
        return output


@pytest.mark.parametrize(
    "draw",
    [
        lambda m: random.random(),
        lambda m: random.choice([0.0, 1.0]),
        lambda m: np.random.rand(),  # noqa: NPY002 - what models draw from
        lambda m: m.own.random(),
        lambda m: m.numpy.random(),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_draws_on_the_host_refuse_a_model(draw: Callable[[nn.Module], float], seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    inputs = torch.randn(4, 3)
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # type: ignore[union-attr]  # noqa: NPY002
    spec = find_symmetries(build(lambda: Rolling(draw)), inputs)
    assert len(spec) == 0
    assert "random numbers in training mode" in reasons_of(spec)["(root)"]
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before[:2]  # type: ignore[union-attr]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_model_that_draws_nothing_is_not_refused() -> None:
    spec = find_symmetries(build(lambda: Rolling(lambda m: 1.0)), torch.randn(4, 3))
    assert ids(spec) == "a:permutation c:permutation a:scaling c:scaling"


# --------------------------------------------------------------------------------------------------------- gradients


class Straight(torch.autograd.Function):
    """A step function whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.sign() * h.abs().amax(1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * torch.linspace(0.5, 1.5, gradient.shape[1], dtype=gradient.dtype)


class Weighted(torch.autograd.Function):
    """A product whose second factor gets no gradient beyond .01, with ``setup_context``."""

    @staticmethod
    def forward(h: Tensor, w: Tensor) -> Tensor:  # type: ignore[override]
        return h * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h, w = ctx.saved_tensors
        return gradient * w, (gradient * h).sum(0).clamp(-0.01, 0.01)


applied_elsewhere = Straight.apply


def clipped(gradient: Tensor) -> Tensor:
    return gradient.clamp(-0.01, 0.01)


def with_hook(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(clipped)
    return h


def first_rows(gradient: Tensor) -> Tensor:
    return gradient * (torch.arange(len(gradient)) < 2).to(gradient).view(-1, *[1] * (gradient.dim() - 1))


def zero_first(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad[:2] = 0


def hooked(attach: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, N), nn.ReLU(), nn.Linear(N, N), nn.ReLU(), nn.Linear(N, 2)).double()
        attach(model)
        return model

    return make


GRADIENTS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "function": (
        between(lambda m, x: m.b(m.c(Straight.apply(m.a(x))).relu()), c=lambda: nn.Linear(N, N)),
        "a.weight",
        "Straight has a backward pass of its own",
    ),
    "function under another name": (
        between(lambda m, x: m.b(m.c(applied_elsewhere(m.a(x))).relu()), c=lambda: nn.Linear(N, N)),
        "a.weight",
        "Straight has a backward pass of its own",
    ),
    "function of a parameter": (
        between(
            lambda m, x: m.b(m.c(Weighted.apply(m.a(x), m.w)).relu()), c=lambda: nn.Linear(N, N), w=lambda: param(N)
        ),
        "w",
        "Weighted has a backward pass of its own",
    ),
    "hook on hidden values": (
        between(lambda m, x: m.b(m.c(with_hook(m.a(x).relu())).relu()), c=lambda: nn.Linear(N, N)),
        "a.weight",
        "a hook in the forward pass",
    ),
    "hook on a parameter": (hooked(lambda m: m[0].weight.register_hook(first_rows)), "0.weight", "it has hooks"),
    "hook after accumulation": (
        hooked(lambda m: m[0].bias.register_post_accumulate_grad_hook(zero_first)),
        "0.bias",
        "it has hooks",
    ),
    "hook on a layer": (
        hooked(lambda m: m[1].register_full_backward_hook(lambda layer, inner, outer: (clipped(inner[0]),))),
        "0.weight",
        "it has backward hooks",
    ),
    "hook in front of a layer": (
        hooked(lambda m: m[1].register_full_backward_pre_hook(lambda layer, outer: (clipped(outer[0]),))),
        "0.weight",
        "it has backward hooks",
    ),
}


def gradients_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(x)
    (output * torch.linspace(1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_move_with_the_parameters_or_not_at_all(name: str) -> None:
    factory, pinned, reason = GRADIENTS[name]
    make = lambda: build(factory).double()  # noqa: E731
    model, x = make(), torch.randn(4, 3, dtype=torch.float64)
    spec = find_symmetries(model, x)
    assert any(reason in refusal.reason for refusal in spec.refusals)
    assert len(spec.of_group("scaling")) == 1, "what lies behind it moves on"
    assert not any(leg.name == pinned for symmetry in spec for leg in symmetry.legs)
    gradients = gradients_of(model, x)
    for seed in range(3):
        element = spec.random_element(torch.Generator().manual_seed(seed))
        other = make()
        other.load_state_dict(act(spec, element, model.state_dict()))
        expected = act_dual(spec, element, gradients)
        for key, gradient in gradients_of(other, x).items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-9)


def test_a_search_leaves_functions_and_torch_as_they_were() -> None:
    forward, asked, start = Straight.forward, torch.is_grad_enabled, torch.autograd.function.BackwardCFunction.__init__
    factory, _, _ = GRADIENTS["function"]
    find_symmetries(build(factory), torch.randn(4, 3))
    assert Straight.forward is forward
    assert torch.is_grad_enabled is asked
    assert torch.autograd.function.BackwardCFunction.__init__ is start


def test_rows_whose_gradient_a_hook_takes_away_stay_where_they_are() -> None:
    model = build(lambda: nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 2)))
    kept = model[0].weight[2:].detach().clone()
    model[0].weight.register_hook(first_rows)
    optimizer = LearnedTeleportOptimizer(model.parameters(), model=model, weight_decay=0.0)
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
    assert torch.equal(model[0].weight[2:], kept)


# ------------------------------------------------------------------------------------------- scalings of one tensor alone


class Directions(nn.Module):
    """A classifier by angles: rows of its weight are divided by their norms where they are used."""

    def __init__(self, *, has_bias: bool) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(3, N), nn.Parameter(torch.randn(4, N))
        self.c = nn.Parameter(torch.randn(4)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        rows = self.w if self.c is None else torch.cat([self.w, self.c[:, None]], 1)
        h = self.a(x).relu()
        h = h if self.c is None else torch.cat([h, torch.ones_like(h[:, :1])], 1)
        return F.linear(h, rows / rows.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_scaling_that_balances_nothing_is_left_to_the_optimizer(has_bias: bool) -> None:
    model = build(lambda: Directions(has_bias=has_bias))
    inputs = torch.randn(8, 3)
    spec = find_symmetries(model, inputs)
    assert change(model, spec, [inputs]) < 1e-9
    layout = ParameterTable.of(dict(model.named_parameters()), spec)
    assert all(symmetry.readers and symmetry.writers for symmetry in layout.spec)
    optimizer = LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=20)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), torch.arange(8) % 4)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_normalised_weight_has_a_scaling_of_its_own() -> None:
    spec = find_symmetries(build(lambda: Directions(has_bias=False)), torch.randn(8, 3))
    assert "w:scaling" in ids(spec)
    assert [str(leg) for leg in spec["w:scaling"].legs] == ["w[0]^+1"]
    assert len(ParameterTable.of(dict(build(lambda: Directions(has_bias=False)).named_parameters()), spec).spec) == 0
