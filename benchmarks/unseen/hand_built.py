"""Forty small models of the kinds in which a symmetry is easily misread, three of each kind and one of several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.unseen import idioms
from benchmarks.unseen.case import Case, Sizes
from benchmarks.unseen.idioms import CHANNELS

__all__ = ["CASES"]

_CLASSES = 3
_VECTORS, _SEQUENCES, _IMAGES = Sizes((3, 4), (5, 4)), Sizes((3, 5), (4, 7)), Sizes((3, 6), (4, 8))


class _Net(nn.Module):
    """A module whose forward pass is a function of itself and its input."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self._function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self._function(self, x)


def _with_buffers(net: nn.Module, **buffers: Tensor) -> nn.Module:
    for name, buffer in buffers.items():
        net.register_buffer(name, buffer)
    return net


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.5 * torch.randn(shape))


def _linear(inputs: int = CHANNELS, outputs: int = CHANNELS, **options: Any) -> nn.Linear:
    return nn.Linear(inputs, outputs, **options)


def _conv(inputs: int = CHANNELS, outputs: int = CHANNELS, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def _vectors(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length)


def _sequences(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, 4)


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(9, (batch, length))


def _images(batch: int, length: int) -> Tensor:
    return torch.randn(batch, 2, length, length)


def _signals(batch: int, length: int) -> Tensor:
    return torch.randn(batch, 2, length)


# Kernels that are computed from parameters


# Entries of a parameter that no operation of the example reads


# Causal attention and convolution


# Recurrent layers: learned inputs along the sequence, learned initial states


# Casts to integers and bools, and other readings of the same idioms.bits


# Buffers of small integers and bools, masks of floats


# Grouped convolutions of views of weights


# Assignments to .data in the forward pass


# Branches on the grad mode


# Choices of Python's and numpy's random numbers


# Control flow on the size of the batch or of the sequence


# Backward passes that are not autograd's own


# Tensors as attributes


# Several kinds at once


def _image(function: Callable[..., Any], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: _Net(
        function, stem=_conv(2), head=_linear(outputs=_CLASSES), **{name: part() for name, part in parts.items()}
    )


def _vector(function: Callable[..., Any], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: _Net(
        function, body=_linear(4), head=_linear(outputs=_CLASSES), **{name: part() for name, part in parts.items()}
    )


def _sequence(function: Callable[..., Any], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: _Net(function, head=_linear(outputs=_CLASSES), **{name: part() for name, part in parts.items()})


def _attention(inputs: int = CHANNELS) -> dict[str, Callable[[], nn.Module]]:
    return {name: lambda: _linear(inputs) for name in ("query", "key", "value")}


def _flags() -> Tensor:
    return torch.tensor([True, False, False, True, False, True])


def _case(
    kind: str, name: str, build: Callable[[], nn.Module], inputs: Callable[[int, int], Any], sizes: Sizes
) -> tuple[str, Case]:
    return f"{kind}: {name}", Case("hand-built", build, inputs, sizes)


CASES: dict[str, Case] = dict(
    [
        *(
            _case("computed kernel", *entry)
            for entry in (
                (
                    "softmax over taps",
                    _image(idioms.softmax_kernel, taps=lambda: _weight(6, 6, 3, 3), gain=lambda: _weight(6)),
                    *(_images, _IMAGES),
                ),
                (
                    "outer product",
                    _image(idioms.separable_kernel, column=lambda: _weight(6, 6, 3), row=lambda: _weight(6, 6, 3)),
                    *(_images, _IMAGES),
                ),
                (
                    "from positions",
                    _sequence(idioms.generated_kernel, first=lambda: _linear(1, 5), second=lambda: _linear(5, 12)),
                    *(_signals, _SEQUENCES),
                ),
            )
        ),
        *(
            _case("unread entries", *entry)
            for entry in (
                (
                    "positions",
                    _sequence(idioms.positions, embed=lambda: nn.Embedding(9, 6), places=lambda: _weight(12, 6)),
                    *(_tokens, _SEQUENCES),
                ),
                (
                    "relative bias",
                    _sequence(idioms.relative_bias, bias=lambda: _weight(17), **_attention(4)),
                    *(_sequences, _SEQUENCES),
                ),
                (
                    "sliced width",
                    lambda: _Net(idioms.sliced_width, into=_weight(10, 4), out=_weight(3, 10)),
                    *(_sequences, _SEQUENCES),
                ),
            )
        ),
        *(
            _case("causal", *entry)
            for entry in (
                (
                    "prefix",
                    _sequence(
                        idioms.causal_prefix, prefix=lambda: _weight(3, 6), embed=lambda: _linear(4), **_attention()
                    ),
                    *(_sequences, _SEQUENCES),
                ),
                (
                    "memory",
                    _sequence(
                        idioms.causal_keys,
                        memory=lambda: _weight(6, 4),
                        query=lambda: _linear(4, 5),
                        key=lambda: _linear(4, 5),
                        value=lambda: _linear(4),
                    ),
                    *(_sequences, _SEQUENCES),
                ),
                (
                    "encoder layer",
                    _sequence(
                        idioms.causal_layer,
                        prefix=lambda: _weight(3, 6),
                        embed=lambda: _linear(4),
                        layer=lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
                    ),
                    *(_sequences, _SEQUENCES),
                ),
            )
        ),
        *(
            _case("recurrent", *entry)
            for entry in (
                (
                    "prompt",
                    _sequence(
                        idioms.recurrent_prompt,
                        prompt=lambda: _weight(3, 4),
                        cell=lambda: nn.GRU(4, 6, batch_first=True),
                    ),
                    *(_sequences, _SEQUENCES),
                ),
                (
                    "initial state",
                    _sequence(
                        idioms.recurrent_start,
                        start=lambda: _weight(2, 1, 6),
                        cell=lambda: nn.LSTM(4, 6, num_layers=2, batch_first=True),
                    ),
                    *(_sequences, _SEQUENCES),
                ),
                (
                    "memory",
                    _sequence(
                        idioms.recurrent_memory,
                        slots=lambda: _weight(5, 4),
                        cell=lambda: nn.RNN(4, 3, batch_first=True, bidirectional=True),
                        query=lambda: _linear(4),
                    ),
                    *(_sequences, _SEQUENCES),
                ),
            )
        ),
        *(
            _case("cast", *entry, _vectors, _VECTORS)
            for entry in (
                ("to integers", _vector(idioms.rounded)),
                ("to bools", _vector(idioms.gated_by_bool, gate=lambda: nn.Parameter(_flags().float()))),
                ("view of bits", _vector(idioms.bits)),
            )
        ),
        *(
            _case("buffer", *entry, _vectors, _VECTORS)
            for entry in (
                ("mask of floats", lambda: _with_buffers(_vector(idioms.float_mask)(), mask=_flags().float())),
                ("mask of bools", lambda: _with_buffers(_vector(idioms.bool_mask)(), mask=_flags())),
                (
                    "8-bit levels",
                    lambda: _with_buffers(
                        _vector(idioms.quantised, scale=lambda: _weight(6))(),
                        levels=torch.randint(-7, 8, (6, 6), dtype=torch.int8),
                    ),
                ),
            )
        ),
        *(
            _case("grouped", *entry, _images, _IMAGES)
            for entry in (
                ("transposed", _image(idioms.grouped_transposed, weight=lambda: _weight(3, 6, 3, 3))),
                (
                    "folded batch",
                    lambda: _Net(
                        idioms.grouped_folded, gate=_linear(2), weight=_weight(6, 2, 3, 3), head=_linear(outputs=3)
                    ),
                ),
                ("slices", _image(idioms.grouped_slices, weight=lambda: _weight(6, 2, 3, 3), bias=lambda: _weight(6))),
            )
        ),
        *(
            _case("assigned data", *entry, _vectors, _VECTORS)
            for entry in (
                ("norm", _vector(idioms.assigned_norm)),
                ("clamp", _vector(idioms.assigned_clamp, gain=lambda: _weight(6))),
                ("copy", _vector(idioms.assigned_copy, twin=lambda: _linear(4))),
            )
        ),
        *(
            _case("grad mode", *entry, _vectors, _VECTORS)
            for entry in (
                ("activation", _vector(idioms.other_without_grad)),
                ("second head", _vector(idioms.head_without_grad, second=lambda: _linear(outputs=_CLASSES))),
                ("requires_grad", _vector(idioms.by_requires_grad, scale=lambda: _weight(6))),
            )
        ),
        *(
            _case("random choice", *entry, _vectors, _VECTORS)
            for entry in (
                ("branch", _vector(idioms.random_branch)),
                (
                    "order of layers",
                    lambda: _Net(
                        idioms.random_order,
                        layers=nn.ModuleList([_linear(4, 4) for _ in range(3)]),
                        head=_linear(4, _CLASSES),
                    ),
                ),
                ("channel", _vector(idioms.random_channel, extra=lambda: _weight(_CLASSES))),
            )
        ),
        *(
            _case("size", *entry)
            for entry in (
                ("large batches", _vector(idioms.large_batches, shift=lambda: _weight(6)), *(_vectors, _VECTORS)),
                ("long sequences", _vector(idioms.long_sequences), *(_sequences, _SEQUENCES)),
                (
                    "as many layers",
                    _sequence(
                        idioms.as_many_layers,
                        embed=lambda: _linear(4),
                        layers=lambda: nn.ModuleList([_linear() for _ in range(4)]),
                    ),
                    *(_sequences, _SEQUENCES),
                ),
            )
        ),
        *(
            _case("backward", *entry, _vectors, _VECTORS)
            for entry in (
                ("straight through", _vector(idioms.straight_through)),
                ("clipped", _vector(idioms.clipped_gradient)),
                ("hook", _vector(idioms.hooked)),
            )
        ),
        *(
            _case("attribute", *entry, _vectors, _VECTORS)
            for entry in (
                (
                    "mean and deviation",
                    _vector(
                        idioms.standardised, mean=lambda: torch.arange(4) / 4, deviation=lambda: torch.arange(1, 5)
                    ),
                ),
                ("list", _vector(idioms.listed, scales=lambda: [torch.tensor(0.5), torch.tensor(2.0)])),
                ("dictionary", _vector(idioms.channel_constant, constants=lambda: {"gains": torch.arange(1, 7) / 4})),
            )
        ),
        _case(
            "several",
            "prompt, places, causal attention, initial state, mask",
            lambda: _with_buffers(
                _sequence(
                    idioms.several,
                    prompt=lambda: _weight(2, 6),
                    places=lambda: _weight(12, 6),
                    embed=lambda: _linear(4),
                    cell=lambda: nn.GRU(6, 6, batch_first=True),
                    start=lambda: _weight(1, 1, 6),
                    **_attention(),
                )(),
                mask=_flags().float(),
            ),
            *(_sequences, _SEQUENCES),
        ),
    ]
)
