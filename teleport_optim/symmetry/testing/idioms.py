"""Modules that are written as users write them, each with something that a search may misread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Branch",
    "Cast",
    "Concatenation",
    "DerivedKernel",
    "Excitation",
    "Gated",
    "MaskedLinear",
    "OwnBackward",
    "Positions",
    "Prompt",
    "Recurrent",
    "Replaced",
    "Residual",
    "SelfAttention",
    "Split",
    "TransposedKernel",
]


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return x + self.inner(x)


class Concatenation(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module, read: nn.Module, axis: int) -> None:
        super().__init__()
        self.first, self.second, self.read, self.axis = first, second, read, axis

    def forward(self, x: Tensor) -> Any:
        return self.read(torch.cat([self.first(x), self.second(x)], self.axis))


class Split(nn.Module):
    """Two parts of unequal size that take different ways and come back in the other order."""

    def __init__(self, write: nn.Module, read: nn.Module, sizes: Sequence[int], axis: int) -> None:
        super().__init__()
        self.write, self.read, self.sizes, self.axis = write, read, list(sizes), axis

    def forward(self, x: Tensor) -> Any:
        one, other = self.write(x).split(self.sizes, self.axis)
        return self.read(torch.cat([other.tanh(), one.relu()], self.axis))


class Gated(nn.Module):
    def __init__(self, write: nn.Module, read: nn.Module, axis: int) -> None:
        super().__init__()
        self.write, self.read, self.axis = write, read, axis

    def forward(self, x: Tensor) -> Any:
        value, gate = self.write(x).chunk(2, self.axis)
        return self.read(value * gate.sigmoid())


class Excitation(nn.Module):
    """A gate for each channel of an image, computed from the means of all channels."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Any:
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, cell: nn.Module, read: nn.Module) -> None:
        super().__init__()
        self.cell, self.read = cell, read

    def forward(self, x: Tensor) -> Any:
        return self.read(self.cell(x)[0])


class DerivedKernel(nn.Conv2d):
    """A convolution whose kernel is computed: centred, with factors, masked, or the sum of two."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.kind = kind
        self.delta = nn.Parameter(torch.randn(inputs, 3, 3) if kind == "sum" else torch.randn(3))
        self.register_buffer("mask", (torch.arange(9) < 5).double().view(3, 3))

    def forward(self, x: Tensor) -> Any:
        weight = {
            "centred": lambda: self.weight - self.weight.mean((1, 2, 3), keepdim=True),
            "factors": lambda: 0.5 * self.weight * self.delta,
            "masked": lambda: self.weight * self.mask,
            "sum": lambda: self.weight + self.delta,
        }[self.kind]()
        return F.conv2d(x, weight, self.bias, padding=1)


class TransposedKernel(nn.Module):
    """A grouped convolution whose weight is kept with its axes in another order."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups, self.weight = groups, nn.Parameter(torch.randn(width // groups, 3, width))

    def forward(self, x: Tensor) -> Any:
        return F.conv2d(x, self.weight.permute(2, 0, 1).unsqueeze(2), padding=(0, 1), groups=self.groups)


class Positions(nn.Module):
    """A table that is longer than the sequence, read up to its length."""

    def __init__(self, width: int, length: int, *, is_computed: bool) -> None:
        super().__init__()
        self.table, self.is_computed = nn.Parameter(torch.randn(length, width)), is_computed

    def forward(self, x: Tensor) -> Any:
        return x + (self.table.tanh() if self.is_computed else self.table)[: x.shape[1]]


class Prompt(nn.Module):
    """Learned tokens in front of a layer for which the order counts."""

    def __init__(self, width: int, count: int, kind: str) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(count, width))
        self.projections = nn.Linear(width, 3 * width)
        self.cell = None if kind == "causal" else getattr(nn, kind)(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        h = torch.cat([self.tokens.expand(len(x), -1, -1), x], 1)
        for _ in range(2):
            query, key, value = self.projections(h).chunk(3, -1)
            h = h + F.scaled_dot_product_attention(query, key, value, is_causal=self.cell is None)
            h = h if self.cell is None else self.cell(h)[0]
        return h[:, len(self.tokens) :]


class Cast(nn.Module):
    """Hidden values as integers or truth values, and back."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Any:
        return (4 * x).tanh().mul(5).to(self.dtype).to(x.dtype) + x.relu().sum(-1, keepdim=True)


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a mask that is no parameter."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", (torch.rand(outputs, inputs) > 0.3).to(dtype))

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight * self.mask, self.bias)


class Replaced(nn.Module):
    """Hidden values in whose place others are put."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        h.data = self.second(x).relu().data
        return h


class _ClippedGradient(torch.autograd.Function):
    """The identity, with another backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-0.01, 0.01)


class OwnBackward(nn.Module):
    """Hidden values whose gradient is changed, by a function of its own or by a hook."""

    def __init__(self, *, has_hook: bool) -> None:
        super().__init__()
        self.has_hook = has_hook

    def forward(self, x: Tensor) -> Any:
        if not self.has_hook:
            return _ClippedGradient.apply(x)
        h = x * 1.0
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))  # type: ignore[no-untyped-call]
        return h


class Branch(nn.Module):
    """An activation that depends on grad mode, or on the size of the batch."""

    def __init__(self, *, asks_for_size: bool) -> None:
        super().__init__()
        self.asks_for_size = asks_for_size

    def forward(self, x: Tensor) -> Any:
        is_first = x.shape[0] % 2 == 1 if self.asks_for_size else torch.is_grad_enabled()
        return x.relu() if is_first else F.gelu(x)
