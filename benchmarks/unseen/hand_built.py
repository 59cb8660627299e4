"""Forty small models of the kinds in which a symmetry is easily misread, three of each kind and one of several."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.unseen.case import Case, Sizes

__all__ = ["CASES"]

_CHANNELS, _CLASSES = 6, 3
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


def _linear(inputs: int = _CHANNELS, outputs: int = _CHANNELS, **options: Any) -> nn.Linear:
    return nn.Linear(inputs, outputs, **options)


def _conv(inputs: int = _CHANNELS, outputs: int = _CHANNELS, **options: Any) -> nn.Conv2d:
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


def _pooled(x: Tensor) -> Tensor:
    return x.flatten(2).mean(2)


# Kernels that are computed from parameters


def _softmax_kernel(m: Any, x: Tensor) -> Any:
    """Each tap is a probability: the kernel's taps are not interchangeable with channels."""
    kernel = m.taps.flatten(2).softmax(-1).view_as(m.taps) * m.gain.view(-1, 1, 1, 1)
    return m.head(_pooled(F.conv2d(m.stem(x).relu(), kernel, padding=1).relu()))


def _separable_kernel(m: Any, x: Tensor) -> Any:
    """An outer product of a column and a row for each pair of channels."""
    kernel = m.column.unsqueeze(-1) * m.row.unsqueeze(-2)
    return m.head(_pooled(F.conv2d(m.stem(x).tanh(), kernel, padding=1).tanh()))


def _generated_kernel(m: Any, x: Tensor) -> Any:
    """Kernel of a signal from a small network of the tap's position."""
    positions = torch.linspace(-1, 1, 3, dtype=x.dtype).unsqueeze(1)
    kernel = m.second(m.first(positions).sin()).t().reshape(_CHANNELS, 2, 3)
    return m.head(F.conv1d(x, kernel, padding=1).relu().mean(2))


# Entries of a parameter that no operation of the example reads


def _positions(m: Any, x: Tensor) -> Any:
    return m.head((m.embed(x) + m.places[: x.shape[1]]).relu().mean(1))


def _relative_bias(m: Any, x: Tensor) -> Any:
    length = x.shape[1]
    offsets = (torch.arange(length)[:, None] - torch.arange(length)).clamp(-8, 8) + 8
    scores = (m.query(x) @ m.key(x).transpose(1, 2) + m.bias[offsets]).softmax(-1)
    return m.head(scores @ m.value(x)).mean(1)


def _sliced_width(m: Any, x: Tensor) -> Any:
    """As many hidden units as the sequence is long."""
    width = x.shape[1]
    return F.linear(F.linear(x.mean(1), m.into[:width]).relu(), m.out[:, :width])


# Causal attention and convolution


def _causal_prefix(m: Any, x: Tensor) -> Any:
    tokens = torch.cat([m.prefix.expand(len(x), -1, -1), m.embed(x)], 1)
    mixed = F.scaled_dot_product_attention(m.query(tokens), m.key(tokens), m.value(tokens), is_causal=True)
    return m.head(mixed[:, -1])


def _causal_keys(m: Any, x: Tensor) -> Any:
    """Queries of the input look at learned memory, in order."""
    queries = m.query(x)
    memory = m.memory.expand(len(x), -1, -1)
    mixed = F.scaled_dot_product_attention(queries, m.key(memory), m.value(memory), is_causal=True)
    return m.head(mixed.mean(1))


def _causal_layer(m: Any, x: Tensor) -> Any:
    tokens = torch.cat([m.prefix.expand(len(x), -1, -1), m.embed(x)], 1)
    mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype)
    return m.head(m.layer(tokens, src_mask=mask, is_causal=True)[:, -1])


# Recurrent layers: learned inputs along the sequence, learned initial states


def _recurrent_prompt(m: Any, x: Tensor) -> Any:
    sequence = torch.cat([m.prompt.expand(len(x), -1, -1), x], 1)
    return m.head(m.cell(sequence)[0][:, -1])


def _recurrent_start(m: Any, x: Tensor) -> Any:
    state = m.start.expand(-1, len(x), -1).contiguous()
    return m.head(m.cell(x, (state, state.tanh()))[0].mean(1))


def _recurrent_memory(m: Any, x: Tensor) -> Any:
    """A learned sequence is read in both directions; the input looks at what comes out."""
    memory = m.cell(m.slots.unsqueeze(0))[0][0]
    return m.head((m.query(x) @ memory.t()).softmax(-1) @ memory)


# Casts to integers and bools, and other readings of the same bits


def _rounded(m: Any, x: Tensor) -> Any:
    hidden = m.body(x).relu()
    return m.head(hidden + (4 * hidden).to(torch.int64).to(x.dtype))


def _gated_by_bool(m: Any, x: Tensor) -> Any:
    return m.head(m.body(x).relu() * m.gate.bool())


def _bits(m: Any, x: Tensor) -> Any:
    hidden = m.body(x)
    exponent = (hidden.double().view(torch.int64) >> 52) & 7
    return m.head(hidden * exponent.to(x.dtype))


# Buffers of small integers and bools, masks of floats


def _float_mask(m: Any, x: Tensor) -> Any:
    return m.head(m.body(x).relu() * m.mask)


def _bool_mask(m: Any, x: Tensor) -> Any:
    return m.head(m.body(x).tanh().masked_fill(m.mask, 0.0))


def _quantised(m: Any, x: Tensor) -> Any:
    weight = m.levels.to(x.dtype) * m.scale.unsqueeze(1)
    return m.head(F.linear(m.body(x).relu(), weight).relu())


# Grouped convolutions of views of weights


def _grouped_transposed(m: Any, x: Tensor) -> Any:
    kernel = m.weight.transpose(0, 1)  # [inputs of a group, outputs, ...] as they are stored
    return m.head(_pooled(F.conv2d(m.stem(x).relu(), kernel, padding=1, groups=2).relu()))


def _grouped_folded(m: Any, x: Tensor) -> Any:
    """Examples folded into groups, each with the kernel of its own."""
    gates = m.gate(_pooled(x)).sigmoid()
    kernels = (m.weight * gates[:, :, None, None, None]).flatten(0, 1)
    mixed = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, padding=1, groups=len(x))
    return m.head(_pooled(mixed.view(len(x), _CHANNELS, *x.shape[2:]).relu()))


def _grouped_slices(m: Any, x: Tensor) -> Any:
    hidden = m.stem(x).relu()
    kernel = torch.cat([m.weight[::2], m.weight[1::2]])
    return m.head(_pooled(F.conv2d(hidden, kernel, m.bias, padding=1, groups=3).relu()))


# Assignments to .data in the forward pass


def _assigned_norm(m: Any, x: Tensor) -> Any:
    m.body.weight.data = m.body.weight.data / m.body.weight.data.norm()
    return m.head(m.body(x).relu())


def _assigned_clamp(m: Any, x: Tensor) -> Any:
    m.gain.data = m.gain.data.clamp(-0.4, 0.4)
    return m.head(m.body(x).relu() * m.gain)


def _assigned_copy(m: Any, x: Tensor) -> Any:
    m.twin.weight.data = m.body.weight.data.flip(0)
    return m.head(m.body(x).relu() + m.twin(x).relu())


# Branches on the grad mode


def _other_without_grad(m: Any, x: Tensor) -> Any:
    hidden = m.body(x)
    return m.head(hidden.relu() if torch.is_grad_enabled() else hidden.sigmoid())


def _head_without_grad(m: Any, x: Tensor) -> Any:
    hidden = m.body(x).tanh()
    return m.head(hidden) if torch.is_grad_enabled() else m.head(hidden) + m.second(hidden)


def _by_requires_grad(m: Any, x: Tensor) -> Any:
    hidden = m.body(x)
    return m.head(hidden.relu() if hidden.requires_grad else hidden.relu() * m.scale)


# Choices of Python's and numpy's random numbers


def _random_branch(m: Any, x: Tensor) -> Any:
    hidden = m.body(x)
    return m.head(hidden.relu() if random.random() < 0.5 else F.gelu(hidden))


def _random_order(m: Any, x: Tensor) -> Any:
    for place in np.random.permutation(3):  # noqa: NPY002
        x = m.layers[place](x).relu()
    return m.head(x)


def _random_channel(m: Any, x: Tensor) -> Any:
    hidden = m.body(x).relu()
    channel = random.randrange(_CHANNELS)
    return m.head(hidden) + m.extra * hidden[:, channel, None]


# Control flow on the size of the batch or of the sequence


def _large_batches(m: Any, x: Tensor) -> Any:
    hidden = m.body(x).relu()
    return m.head(hidden if len(x) < 4 else hidden - m.shift)


def _long_sequences(m: Any, x: Tensor) -> Any:
    hidden = m.body(x)
    hidden = hidden.relu() if x.shape[1] <= 6 else hidden.cumsum(1).tanh()
    return m.head(hidden).mean(1)


def _as_many_layers(m: Any, x: Tensor) -> Any:
    hidden = m.embed(x)
    for layer in list(m.layers)[: x.shape[1] - 3]:
        hidden = layer(hidden).relu()
    return m.head(hidden).mean(1)


# Backward passes that are not autograd's own


class _Straight(torch.autograd.Function):
    """Signs, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _Clipped(torch.autograd.Function):
    """The identity, whose gradient is bounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].clamp(-0.01, 0.01)


def _straight_through(m: Any, x: Tensor) -> Any:
    return m.head(_Straight.apply(m.body(x)))


def _clipped_gradient(m: Any, x: Tensor) -> Any:
    return m.head(_Clipped.apply(m.body(x).relu()))


def _hooked(m: Any, x: Tensor) -> Any:
    hidden = m.body(x).relu()
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: grad.sign() * 0.01)
    return m.head(hidden)


# Tensors as attributes


def _standardised(m: Any, x: Tensor) -> Any:
    return m.head(m.body((x - m.mean) / m.deviation).relu())


def _listed(m: Any, x: Tensor) -> Any:
    return m.head(torch.stack([m.body(x * scale) for scale in m.scales]).relu().mean(0))


def _channel_constant(m: Any, x: Tensor) -> Any:
    """One constant for each hidden channel: they are not interchangeable."""
    return m.head(torch.relu(m.body(x)) * m.constants["gains"])


# Several kinds at once


def _several(m: Any, x: Tensor) -> Any:
    tokens = torch.cat([m.prompt.expand(len(x), -1, -1), m.embed(x)], 1) + m.places[: x.shape[1] + 2]
    mixed = F.scaled_dot_product_attention(m.query(tokens), m.key(tokens), m.value(tokens), is_causal=True)
    return m.head(m.cell(mixed, m.start.expand(-1, len(x), -1).contiguous())[0][:, -1] * m.mask)


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


def _attention(inputs: int = _CHANNELS) -> dict[str, Callable[[], nn.Module]]:
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
                    _image(_softmax_kernel, taps=lambda: _weight(6, 6, 3, 3), gain=lambda: _weight(6)),
                    *(_images, _IMAGES),
                ),
                (
                    "outer product",
                    _image(_separable_kernel, column=lambda: _weight(6, 6, 3), row=lambda: _weight(6, 6, 3)),
                    *(_images, _IMAGES),
                ),
                (
                    "from positions",
                    _sequence(_generated_kernel, first=lambda: _linear(1, 5), second=lambda: _linear(5, 12)),
                    *(_signals, _SEQUENCES),
                ),
            )
        ),
        *(
            _case("unread entries", *entry)
            for entry in (
                (
                    "positions",
                    _sequence(_positions, embed=lambda: nn.Embedding(9, 6), places=lambda: _weight(12, 6)),
                    *(_tokens, _SEQUENCES),
                ),
                (
                    "relative bias",
                    _sequence(_relative_bias, bias=lambda: _weight(17), **_attention(4)),
                    *(_sequences, _SEQUENCES),
                ),
                (
                    "sliced width",
                    lambda: _Net(_sliced_width, into=_weight(10, 4), out=_weight(3, 10)),
                    *(_sequences, _SEQUENCES),
                ),
            )
        ),
        *(
            _case("causal", *entry)
            for entry in (
                (
                    "prefix",
                    _sequence(_causal_prefix, prefix=lambda: _weight(3, 6), embed=lambda: _linear(4), **_attention()),
                    *(_sequences, _SEQUENCES),
                ),
                (
                    "memory",
                    _sequence(
                        _causal_keys,
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
                        _causal_layer,
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
                        _recurrent_prompt, prompt=lambda: _weight(3, 4), cell=lambda: nn.GRU(4, 6, batch_first=True)
                    ),
                    *(_sequences, _SEQUENCES),
                ),
                (
                    "initial state",
                    _sequence(
                        _recurrent_start,
                        start=lambda: _weight(2, 1, 6),
                        cell=lambda: nn.LSTM(4, 6, num_layers=2, batch_first=True),
                    ),
                    *(_sequences, _SEQUENCES),
                ),
                (
                    "memory",
                    _sequence(
                        _recurrent_memory,
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
                ("to integers", _vector(_rounded)),
                ("to bools", _vector(_gated_by_bool, gate=lambda: nn.Parameter(_flags().float()))),
                ("view of bits", _vector(_bits)),
            )
        ),
        *(
            _case("buffer", *entry, _vectors, _VECTORS)
            for entry in (
                ("mask of floats", lambda: _with_buffers(_vector(_float_mask)(), mask=_flags().float())),
                ("mask of bools", lambda: _with_buffers(_vector(_bool_mask)(), mask=_flags())),
                (
                    "8-bit levels",
                    lambda: _with_buffers(
                        _vector(_quantised, scale=lambda: _weight(6))(),
                        levels=torch.randint(-7, 8, (6, 6), dtype=torch.int8),
                    ),
                ),
            )
        ),
        *(
            _case("grouped", *entry, _images, _IMAGES)
            for entry in (
                ("transposed", _image(_grouped_transposed, weight=lambda: _weight(3, 6, 3, 3))),
                (
                    "folded batch",
                    lambda: _Net(_grouped_folded, gate=_linear(2), weight=_weight(6, 2, 3, 3), head=_linear(outputs=3)),
                ),
                ("slices", _image(_grouped_slices, weight=lambda: _weight(6, 2, 3, 3), bias=lambda: _weight(6))),
            )
        ),
        *(
            _case("assigned data", *entry, _vectors, _VECTORS)
            for entry in (
                ("norm", _vector(_assigned_norm)),
                ("clamp", _vector(_assigned_clamp, gain=lambda: _weight(6))),
                ("copy", _vector(_assigned_copy, twin=lambda: _linear(4))),
            )
        ),
        *(
            _case("grad mode", *entry, _vectors, _VECTORS)
            for entry in (
                ("activation", _vector(_other_without_grad)),
                ("second head", _vector(_head_without_grad, second=lambda: _linear(outputs=_CLASSES))),
                ("requires_grad", _vector(_by_requires_grad, scale=lambda: _weight(6))),
            )
        ),
        *(
            _case("random choice", *entry, _vectors, _VECTORS)
            for entry in (
                ("branch", _vector(_random_branch)),
                (
                    "order of layers",
                    lambda: _Net(
                        _random_order,
                        layers=nn.ModuleList([_linear(4, 4) for _ in range(3)]),
                        head=_linear(4, _CLASSES),
                    ),
                ),
                ("channel", _vector(_random_channel, extra=lambda: _weight(_CLASSES))),
            )
        ),
        *(
            _case("size", *entry)
            for entry in (
                ("large batches", _vector(_large_batches, shift=lambda: _weight(6)), *(_vectors, _VECTORS)),
                ("long sequences", _vector(_long_sequences), *(_sequences, _SEQUENCES)),
                (
                    "as many layers",
                    _sequence(
                        _as_many_layers,
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
                ("straight through", _vector(_straight_through)),
                ("clipped", _vector(_clipped_gradient)),
                ("hook", _vector(_hooked)),
            )
        ),
        *(
            _case("attribute", *entry, _vectors, _VECTORS)
            for entry in (
                (
                    "mean and deviation",
                    _vector(_standardised, mean=lambda: torch.arange(4) / 4, deviation=lambda: torch.arange(1, 5)),
                ),
                ("list", _vector(_listed, scales=lambda: [torch.tensor(0.5), torch.tensor(2.0)])),
                ("dictionary", _vector(_channel_constant, constants=lambda: {"gains": torch.arange(1, 7) / 4})),
            )
        ),
        _case(
            "several",
            "prompt, places, causal attention, initial state, mask",
            lambda: _with_buffers(
                _sequence(
                    _several,
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
