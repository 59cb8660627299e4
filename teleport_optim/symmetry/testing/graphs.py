"""A strategy for models that are no chains: residuals, branches, shared layers, gates, attention, recurrence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from teleport_optim.symmetry.testing.sequential import BATCH, Sample, divisor, seeded, seeds

__all__ = ["modules"]


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return x + self.inner(x)


class _Concatenation(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module, read: nn.Module, axis: int) -> None:
        super().__init__()
        self.first, self.second, self.read, self.axis = first, second, read, axis

    def forward(self, x: Tensor) -> Any:
        return self.read(torch.cat([self.first(x), self.second(x)], self.axis))


class _Split(nn.Module):
    """Two parts of unequal size that take different ways and come back in the other order."""

    def __init__(self, write: nn.Module, read: nn.Module, sizes: Sequence[int], axis: int) -> None:
        super().__init__()
        self.write, self.read, self.sizes, self.axis = write, read, list(sizes), axis

    def forward(self, x: Tensor) -> Any:
        one, other = self.write(x).split(self.sizes, self.axis)
        return self.read(torch.cat([other.tanh(), one.relu()], self.axis))


class _Gated(nn.Module):
    def __init__(self, write: nn.Module, read: nn.Module, axis: int) -> None:
        super().__init__()
        self.write, self.read, self.axis = write, read, axis

    def forward(self, x: Tensor) -> Any:
        value, gate = self.write(x).chunk(2, self.axis)
        return self.read(value * gate.sigmoid())


class _Excitation(nn.Module):
    """A gate for each channel of an image, computed from the means of all channels."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Any:
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


class _SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x, need_weights=False)[0]


class _Recurrent(nn.Module):
    def __init__(self, cell: nn.Module, read: nn.Module) -> None:
        super().__init__()
        self.cell, self.read = cell, read

    def forward(self, x: Tensor) -> Any:
        return self.read(self.cell(x)[0])


class _DerivedKernel(nn.Conv2d):
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


class _TransposedKernel(nn.Module):
    """A grouped convolution whose weight is kept with its axes in another order."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups, self.weight = groups, nn.Parameter(torch.randn(width // groups, 3, width))

    def forward(self, x: Tensor) -> Any:
        return F.conv2d(x, self.weight.permute(2, 0, 1).unsqueeze(2), padding=(0, 1), groups=self.groups)


class _Positions(nn.Module):
    """A table that is longer than the sequence, read up to its length."""

    def __init__(self, width: int, length: int, *, is_computed: bool) -> None:
        super().__init__()
        self.table, self.is_computed = nn.Parameter(torch.randn(length, width)), is_computed

    def forward(self, x: Tensor) -> Any:
        return x + (self.table.tanh() if self.is_computed else self.table)[: x.shape[1]]


class _Prompt(nn.Module):
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


class _Cast(nn.Module):
    """Hidden values as integers or truth values, and back."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Any:
        return (4 * x).tanh().mul(5).to(self.dtype).to(x.dtype) + x.relu().sum(-1, keepdim=True)


class _MaskedLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a mask that is no parameter."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", (torch.rand(outputs, inputs) > 0.3).to(dtype))

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight * self.mask, self.bias)


class _Replaced(nn.Module):
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


class _OwnBackward(nn.Module):
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


class _Branch(nn.Module):
    """An activation that depends on grad mode, or on the size of the batch."""

    def __init__(self, *, asks_for_size: bool) -> None:
        super().__init__()
        self.asks_for_size = asks_for_size

    def forward(self, x: Tensor) -> Any:
        is_first = x.shape[0] % 2 == 1 if self.asks_for_size else torch.is_grad_enabled()
        return x.relu() if is_first else F.gelu(x)


@dataclass(frozen=True)
class _Stream:
    """What flows from block to block: images ``[batch, width, height, height]``, or vectors with ``width`` last."""

    kind: str
    width: int

    @property
    def axis(self) -> int:
        return 1 if self.kind == "image" else -1

    def map(self, draw: st.DrawFn, num_inputs: int, num_outputs: int) -> nn.Module:
        """A linear layer on the features."""
        if self.kind != "image":
            return nn.Linear(num_inputs, num_outputs, bias=draw(st.booleans()))
        kernel = draw(st.sampled_from([1, 3]))
        return nn.Conv2d(num_inputs, num_outputs, kernel, padding=kernel // 2, bias=draw(st.booleans()))

    def norm(self, draw: st.DrawFn, width: int) -> list[nn.Module]:
        options: dict[str, list[Callable[[int], nn.Module]]] = {
            "image": [nn.BatchNorm2d, lambda n: nn.GroupNorm(1, n), nn.InstanceNorm2d],
            "vector": [nn.BatchNorm1d, nn.LayerNorm],
        }
        kind = draw(st.sampled_from([None, *options.get(self.kind, [nn.LayerNorm, nn.RMSNorm])]))
        return [] if kind is None else [kind(width)]


_ACTIVATIONS: list[Callable[[], nn.Module]] = [nn.ReLU, nn.Tanh, nn.GELU, nn.LeakyReLU, nn.SiLU, nn.Sigmoid]


def _hidden_width(draw: st.DrawFn) -> int:
    return draw(st.integers(1, 5))


def _activation(draw: st.DrawFn) -> nn.Module:
    return draw(st.sampled_from(_ACTIVATIONS))()


_Block = Callable[[st.DrawFn, _Stream], nn.Module]


def _plain_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    return nn.Sequential(stream.map(draw, stream.width, stream.width), _activation(draw))


def _hidden_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    write, read = stream.map(draw, stream.width, hidden), stream.map(draw, hidden, stream.width)
    return nn.Sequential(write, *stream.norm(draw, hidden), _activation(draw), read)


def _residual_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    return _Residual(_hidden_block(draw, stream))


def _shared_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    layer = stream.map(draw, stream.width, stream.width)
    return nn.Sequential(layer, _activation(draw), layer)


def _concatenation_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    one, other = _hidden_width(draw), _hidden_width(draw)
    first = nn.Sequential(stream.map(draw, stream.width, one), _activation(draw))
    second, read = stream.map(draw, stream.width, other), stream.map(draw, one + other, stream.width)
    return _Concatenation(first, second, read, stream.axis)


def _split_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    sizes = [_hidden_width(draw), _hidden_width(draw)]
    write, read = stream.map(draw, stream.width, sum(sizes)), stream.map(draw, sum(sizes), stream.width)
    return _Split(write, read, sizes, stream.axis)


def _gated_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    return _Gated(stream.map(draw, stream.width, 2 * hidden), stream.map(draw, hidden, stream.width), stream.axis)


def _excitation_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    reduce, expand = nn.Conv2d(stream.width, hidden, 1), nn.Conv2d(hidden, stream.width, 1)
    return nn.Sequential(
        stream.map(draw, stream.width, stream.width), _Excitation(nn.Sequential(reduce, _activation(draw), expand))
    )


def _grouped_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = draw(st.integers(1, 6))
    grouped = nn.Conv2d(hidden, hidden, 3, padding=1, groups=draw(st.sampled_from([hidden, divisor(draw, hidden)])))
    write, read = stream.map(draw, stream.width, hidden), stream.map(draw, hidden, stream.width)
    return nn.Sequential(write, _activation(draw), grouped, *stream.norm(draw, hidden), _activation(draw), read)


def _attention_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    return _SelfAttention(stream.width, divisor(draw, stream.width))


def _encoder_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    return nn.TransformerEncoderLayer(
        stream.width,
        divisor(draw, stream.width),
        _hidden_width(draw),
        dropout=0.0,  # a mask over channels would not move along with them
        activation=draw(st.sampled_from(["relu", "gelu"])),
        norm_first=draw(st.booleans()),
        batch_first=True,
    )


def _recurrent_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    kind = draw(st.sampled_from([nn.GRU, nn.LSTM]))
    return _Recurrent(kind(stream.width, hidden, batch_first=True), stream.map(draw, hidden, stream.width))


def _derived_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    kernel = _DerivedKernel(stream.width, hidden, draw(st.sampled_from(["centred", "factors", "masked", "sum"])))
    return nn.Sequential(kernel, _activation(draw), stream.map(draw, hidden, stream.width))


def _transposed_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = draw(st.integers(1, 6))
    write, read = stream.map(draw, stream.width, hidden), stream.map(draw, hidden, stream.width)
    return nn.Sequential(write, _activation(draw), _TransposedKernel(hidden, divisor(draw, hidden)), read)


def _positions_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    return _Positions(stream.width, draw(st.integers(3, 6)), is_computed=draw(st.booleans()))


def _prompt_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    return _Prompt(stream.width, draw(st.integers(1, 3)), draw(st.sampled_from(["causal", "GRU", "LSTM", "RNN"])))


def _cast_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    cast = _Cast(draw(st.sampled_from([torch.int64, torch.int8, torch.bool])))
    return nn.Sequential(stream.map(draw, stream.width, hidden), cast, stream.map(draw, hidden, stream.width))


def _masked_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    dtype = draw(st.sampled_from([torch.bool, torch.uint8, torch.int16, torch.float64]))
    return nn.Sequential(
        _MaskedLinear(stream.width, hidden, dtype), _activation(draw), stream.map(draw, hidden, stream.width)
    )


def _replaced_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    maps = [stream.map(draw, stream.width, hidden) for _ in range(2)]
    return nn.Sequential(_Replaced(*maps), stream.map(draw, hidden, stream.width))


def _backward_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    write, read = stream.map(draw, stream.width, hidden), stream.map(draw, hidden, stream.width)
    return nn.Sequential(write, _OwnBackward(has_hook=draw(st.booleans())), _activation(draw), read)


def _branch_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    write, read = stream.map(draw, stream.width, hidden), stream.map(draw, hidden, stream.width)
    return nn.Sequential(write, _Branch(asks_for_size=draw(st.booleans())), read)


_BLOCKS: list[_Block] = [_plain_block, _hidden_block, _residual_block, _shared_block]
_BLOCKS += [_concatenation_block, _split_block, _gated_block, _replaced_block, _backward_block, _branch_block]
_FEATURE_BLOCKS: list[_Block] = [*_BLOCKS, _cast_block, _masked_block]
_SEQUENCE_BLOCKS: list[_Block] = [*_FEATURE_BLOCKS, _attention_block, _encoder_block, _recurrent_block]
_SEQUENCE_BLOCKS += [_positions_block, _prompt_block]
_BLOCKS_OF: dict[str, list[_Block]] = {
    "vector": _FEATURE_BLOCKS,
    "image": [*_BLOCKS, _excitation_block, _grouped_block, _derived_block, _transposed_block],
    "sequence": _SEQUENCE_BLOCKS,
    "tokens": _SEQUENCE_BLOCKS,
}


@st.composite
def modules(draw: st.DrawFn, max_blocks: int = 3) -> Sample:
    """Random models that are no plain sequence of layers, in float64, with an input; they shrink block by block.

    Vectors, images, sequences or tokens flow through blocks: layers that are used twice, residual additions,
    concatenation, splits, gates (squeeze and excitation among them), grouped and depthwise convolutions, attention,
    transformer encoder layers, LSTM and GRU, and embeddings whose weight is also that of the last layer. Among the blocks
    are some that are easily misread: computed and permuted kernels, tables that are longer than the sequence, learned
    tokens in front of causal layers, casts to integers, masks, assignments to ``.data``, backward passes of their own, and
    branches on grad mode and on the size of the batch. At most five features flow from block to block; batches have three
    examples.

    Args:
        draw: Given by hypothesis; call it as ``modules(max_blocks=2)``.
        max_blocks: The largest number of blocks.

    Returns:
        A strategy for a :class:`Sample`. Drawing one costs about as much as building the model.

    Example:
        >>> from hypothesis import find
        >>> sample = find(modules(max_blocks=1), lambda sample: True)
        >>> len(sample.model(sample.inputs)), sample.inputs.dtype
        (3, torch.float64)
    """
    with seeded(draw(seeds())):
        stream = _Stream(draw(st.sampled_from(list(_BLOCKS_OF))), draw(st.integers(1, 5)))
        length = draw(st.integers(2, 3))
        choices = st.sampled_from(_BLOCKS_OF[stream.kind])
        blocks = draw(st.lists(choices.flatmap(lambda block: _built(block, stream)), min_size=1, max_size=max_blocks))
        if stream.kind == "tokens":
            inputs = torch.randint(_VOCABULARY, (BATCH, length))
            embedding = nn.Embedding(_VOCABULARY, stream.width)
            head = nn.Linear(stream.width, _VOCABULARY, bias=draw(st.booleans()))
            head.weight = embedding.weight
            return Sample(nn.Sequential(embedding, *blocks, head).double(), inputs)
        shape = {"vector": [stream.width], "sequence": [length, stream.width]}.get(
            stream.kind, [stream.width, length, length]
        )
        inputs = torch.randn(BATCH, *shape, dtype=torch.float64)
        if stream.kind == "image":
            pool = [nn.AdaptiveAvgPool2d(1)] if draw(st.booleans()) else []
            size = stream.width * (1 if pool else length**2)
            return Sample(nn.Sequential(*blocks, *pool, nn.Flatten(), nn.Linear(size, 2)).double(), inputs)
        return Sample(nn.Sequential(*blocks, nn.Linear(stream.width, 2)).double(), inputs)


_VOCABULARY = 5


@st.composite
def _built(draw: st.DrawFn, block: _Block, stream: _Stream) -> nn.Module:
    return block(draw, stream)


# Assertions
