"""Models that are easily misread: each is invariant under all that is found in it, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_optim.symmetry import SymmetrySpec, find_symmetries, verify_symmetries

N = 6
"""Hidden channels of most of the models."""


class Model(nn.Module):
    """A module whose forward pass is a function of itself and its inputs."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self._function = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self, *args, **kwargs)


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


class Empty(nn.Linear):
    """A layer without channels, which torch warns of when it draws their values."""

    def reset_parameters(self) -> None:
        pass


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def conv(inputs: int = N, outputs: int = N, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def mlp(forward: Callable[..., Any], **parts: Any) -> Callable[[], nn.Module]:
    """A model with a layer ``a`` from 3 to N features, a layer ``b`` from N to 2, and more."""
    return lambda: Model(
        forward,
        a=nn.Linear(3, N),
        b=nn.Linear(N, 2),
        **{
            name: part() if callable(part) and not isinstance(part, nn.Module) else part for name, part in parts.items()
        },
    )


def image(forward: Callable[..., Any], **parts: Any) -> Callable[[], nn.Module]:
    """A model with a convolution ``a`` from 2 to N channels, a linear layer ``b`` from N to 2, and more."""
    return lambda: Model(forward, a=conv(2), b=nn.Linear(N, 2), **{name: part() for name, part in parts.items()})


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def in_place(x: Tensor, function: Callable[[Tensor], Any]) -> Tensor:
    """``x`` after ``function`` has written into it or a view of it."""
    function(x)
    return x


def x_vector() -> Tensor:
    return torch.randn(4, 3)


def x_image() -> Tensor:
    return torch.randn(3, 2, 4, 4)


def x_sequence() -> Tensor:
    return torch.randn(3, 5, 3)


def x_tokens() -> Tensor:
    return torch.randint(7, (3, 5))


Entry = tuple[Callable[[], nn.Module], Callable[[], Any], str]

MODELS: dict[str, Entry] = {
    # ------------------------------------------------------------------------------- how parameters and layers are shared
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
    # --------------------------------------------------------------------------------------------- residuals and branches
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
    # ------------------------------------------------------------------------------------------- orders of flattened axes
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
    # ------------------------------------------------------------------------------------------ views and work in place
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
    # --------------------------------------------------------------------------------------------- control flow, in and out
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
    # --------------------------------------------------------------------------------------------- sizes out of the ordinary
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
    # ------------------------------------------------------------------------------------------------ sequences, attention
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
    # ----------------------------------------------------------------------------------------------------- normalisation
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
"""By name: what makes the model, what makes its inputs, and the ids that must be found: all of them, or ``"refused"``. None where
only invariance is asked for."""


def in_residual(model: nn.Module, h: Tensor) -> Tensor:
    return h + model.d(model.c(h).relu())


def keep(model: nn.Module, h: Tensor) -> Tensor:
    model.kept = h
    return h


def build(factory: Callable[[], Any]) -> Any:
    """What a factory makes, always with the same random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return factory()


def certified(model: nn.Module, inputs: Any) -> SymmetrySpec:
    """What is found in a model, after a check that it holds."""
    spec = find_symmetries(model, inputs)
    report = verify_symmetries(model, spec, inputs)
    assert report.ok, f"{spec}\n{report}"
    assert not any("could not be followed" in refusal.reason for refusal in spec.refusals), spec.refusals
    return spec


def tied_linears() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(3, N), nn.GELU(), nn.Linear(N, 5), nn.GELU(), nn.Linear(5, N), nn.GELU(), nn.Linear(N, 2)
    )
    model[4].weight = nn.Parameter(model[2].weight.detach().t().clone())
    model[6].weight = nn.Parameter(torch.randn(2, N))
    return model


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


def heads_of(model: nn.Module, h: Tensor) -> Any:
    return (model.b(h), model.c(h[:, :3])) if model.training else model.b(h)
