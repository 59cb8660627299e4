"""Forward passes that are easily misread, three or more of every kind."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 6
"""Channels of most of the models."""


def _pooled(x: Tensor) -> Tensor:
    return x.flatten(2).mean(2)


def softmax_kernel(m: Any, x: Tensor) -> Any:
    """Each tap is a probability: the kernel's taps are not interchangeable with channels."""
    kernel = m.taps.flatten(2).softmax(-1).view_as(m.taps) * m.gain.view(-1, 1, 1, 1)
    return m.head(_pooled(F.conv2d(m.stem(x).relu(), kernel, padding=1).relu()))


def separable_kernel(m: Any, x: Tensor) -> Any:
    """An outer product of a column and a row for each pair of channels."""
    kernel = m.column.unsqueeze(-1) * m.row.unsqueeze(-2)
    return m.head(_pooled(F.conv2d(m.stem(x).tanh(), kernel, padding=1).tanh()))


def generated_kernel(m: Any, x: Tensor) -> Any:
    """Kernel of a signal from a small network of the tap's position."""
    positions = torch.linspace(-1, 1, 3, dtype=x.dtype).unsqueeze(1)
    kernel = m.second(m.first(positions).sin()).t().reshape(CHANNELS, 2, 3)
    return m.head(F.conv1d(x, kernel, padding=1).relu().mean(2))


def positions(m: Any, x: Tensor) -> Any:
    return m.head((m.embed(x) + m.places[: x.shape[1]]).relu().mean(1))


def relative_bias(m: Any, x: Tensor) -> Any:
    length = x.shape[1]
    offsets = (torch.arange(length)[:, None] - torch.arange(length)).clamp(-8, 8) + 8
    scores = (m.query(x) @ m.key(x).transpose(1, 2) + m.bias[offsets]).softmax(-1)
    return m.head(scores @ m.value(x)).mean(1)


def sliced_width(m: Any, x: Tensor) -> Any:
    """As many hidden units as the sequence is long."""
    width = x.shape[1]
    return F.linear(F.linear(x.mean(1), m.into[:width]).relu(), m.out[:, :width])


def causal_prefix(m: Any, x: Tensor) -> Any:
    tokens = torch.cat([m.prefix.expand(len(x), -1, -1), m.embed(x)], 1)
    mixed = F.scaled_dot_product_attention(m.query(tokens), m.key(tokens), m.value(tokens), is_causal=True)
    return m.head(mixed[:, -1])


def causal_keys(m: Any, x: Tensor) -> Any:
    """Queries of the input look at learned memory, in order."""
    queries = m.query(x)
    memory = m.memory.expand(len(x), -1, -1)
    mixed = F.scaled_dot_product_attention(queries, m.key(memory), m.value(memory), is_causal=True)
    return m.head(mixed.mean(1))


def causal_layer(m: Any, x: Tensor) -> Any:
    tokens = torch.cat([m.prefix.expand(len(x), -1, -1), m.embed(x)], 1)
    mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype)
    return m.head(m.layer(tokens, src_mask=mask, is_causal=True)[:, -1])


def recurrent_prompt(m: Any, x: Tensor) -> Any:
    sequence = torch.cat([m.prompt.expand(len(x), -1, -1), x], 1)
    return m.head(m.cell(sequence)[0][:, -1])


def recurrent_start(m: Any, x: Tensor) -> Any:
    state = m.start.expand(-1, len(x), -1).contiguous()
    return m.head(m.cell(x, (state, state.tanh()))[0].mean(1))


def recurrent_memory(m: Any, x: Tensor) -> Any:
    """A learned sequence is read in both directions; the input looks at what comes out."""
    memory = m.cell(m.slots.unsqueeze(0))[0][0]
    return m.head((m.query(x) @ memory.t()).softmax(-1) @ memory)


def rounded(m: Any, x: Tensor) -> Any:
    hidden = m.body(x).relu()
    return m.head(hidden + (4 * hidden).to(torch.int64).to(x.dtype))


def gated_by_bool(m: Any, x: Tensor) -> Any:
    return m.head(m.body(x).relu() * m.gate.bool())


def bits(m: Any, x: Tensor) -> Any:
    hidden = m.body(x)
    exponent = (hidden.double().view(torch.int64) >> 52) & 7
    return m.head(hidden * exponent.to(x.dtype))


def float_mask(m: Any, x: Tensor) -> Any:
    return m.head(m.body(x).relu() * m.mask)


def bool_mask(m: Any, x: Tensor) -> Any:
    return m.head(m.body(x).tanh().masked_fill(m.mask, 0.0))


def quantised(m: Any, x: Tensor) -> Any:
    weight = m.levels.to(x.dtype) * m.scale.unsqueeze(1)
    return m.head(F.linear(m.body(x).relu(), weight).relu())


def grouped_transposed(m: Any, x: Tensor) -> Any:
    kernel = m.weight.transpose(0, 1)  # [inputs of a group, outputs, ...] as they are stored
    return m.head(_pooled(F.conv2d(m.stem(x).relu(), kernel, padding=1, groups=2).relu()))


def grouped_folded(m: Any, x: Tensor) -> Any:
    """Examples folded into groups, each with the kernel of its own."""
    gates = m.gate(_pooled(x)).sigmoid()
    kernels = (m.weight * gates[:, :, None, None, None]).flatten(0, 1)
    mixed = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, padding=1, groups=len(x))
    return m.head(_pooled(mixed.view(len(x), CHANNELS, *x.shape[2:]).relu()))


def grouped_slices(m: Any, x: Tensor) -> Any:
    hidden = m.stem(x).relu()
    kernel = torch.cat([m.weight[::2], m.weight[1::2]])
    return m.head(_pooled(F.conv2d(hidden, kernel, m.bias, padding=1, groups=3).relu()))


def assigned_norm(m: Any, x: Tensor) -> Any:
    m.body.weight.data = m.body.weight.data / m.body.weight.data.norm()
    return m.head(m.body(x).relu())


def assigned_clamp(m: Any, x: Tensor) -> Any:
    m.gain.data = m.gain.data.clamp(-0.4, 0.4)
    return m.head(m.body(x).relu() * m.gain)


def assigned_copy(m: Any, x: Tensor) -> Any:
    m.twin.weight.data = m.body.weight.data.flip(0)
    return m.head(m.body(x).relu() + m.twin(x).relu())


def other_without_grad(m: Any, x: Tensor) -> Any:
    hidden = m.body(x)
    return m.head(hidden.relu() if torch.is_grad_enabled() else hidden.sigmoid())


def head_without_grad(m: Any, x: Tensor) -> Any:
    hidden = m.body(x).tanh()
    return m.head(hidden) if torch.is_grad_enabled() else m.head(hidden) + m.second(hidden)


def by_requires_grad(m: Any, x: Tensor) -> Any:
    hidden = m.body(x)
    return m.head(hidden.relu() if hidden.requires_grad else hidden.relu() * m.scale)


def random_branch(m: Any, x: Tensor) -> Any:
    hidden = m.body(x)
    return m.head(hidden.relu() if random.random() < 0.5 else F.gelu(hidden))


def random_order(m: Any, x: Tensor) -> Any:
    for place in np.random.permutation(3):  # noqa: NPY002
        x = m.layers[place](x).relu()
    return m.head(x)


def random_channel(m: Any, x: Tensor) -> Any:
    hidden = m.body(x).relu()
    channel = random.randrange(CHANNELS)
    return m.head(hidden) + m.extra * hidden[:, channel, None]


def large_batches(m: Any, x: Tensor) -> Any:
    hidden = m.body(x).relu()
    return m.head(hidden if len(x) < 4 else hidden - m.shift)


def long_sequences(m: Any, x: Tensor) -> Any:
    hidden = m.body(x)
    hidden = hidden.relu() if x.shape[1] <= 6 else hidden.cumsum(1).tanh()
    return m.head(hidden).mean(1)


def as_many_layers(m: Any, x: Tensor) -> Any:
    hidden = m.embed(x)
    for layer in list(m.layers)[: x.shape[1] - 3]:
        hidden = layer(hidden).relu()
    return m.head(hidden).mean(1)


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


def straight_through(m: Any, x: Tensor) -> Any:
    return m.head(_Straight.apply(m.body(x)))


def clipped_gradient(m: Any, x: Tensor) -> Any:
    return m.head(_Clipped.apply(m.body(x).relu()))


def hooked(m: Any, x: Tensor) -> Any:
    hidden = m.body(x).relu()
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: grad.sign() * 0.01)
    return m.head(hidden)


def standardised(m: Any, x: Tensor) -> Any:
    return m.head(m.body((x - m.mean) / m.deviation).relu())


def listed(m: Any, x: Tensor) -> Any:
    return m.head(torch.stack([m.body(x * scale) for scale in m.scales]).relu().mean(0))


def channel_constant(m: Any, x: Tensor) -> Any:
    """One constant for each hidden channel: they are not interchangeable."""
    return m.head(torch.relu(m.body(x)) * m.constants["gains"])


def several(m: Any, x: Tensor) -> Any:
    tokens = torch.cat([m.prompt.expand(len(x), -1, -1), m.embed(x)], 1) + m.places[: x.shape[1] + 2]
    mixed = F.scaled_dot_product_attention(m.query(tokens), m.key(tokens), m.value(tokens), is_causal=True)
    return m.head(m.cell(mixed, m.start.expand(-1, len(x), -1).contiguous())[0][:, -1] * m.mask)
