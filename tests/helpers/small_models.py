"""Models of a few layers, written as functions, and a check of what is found in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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


Entry = tuple[Callable[[], nn.Module], Callable[[], Any], str | None]


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
