"""A strategy for models that are no chains: residuals, branches, shared layers, gates, attention, recurrence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import nn

from teleport_optim.symmetry.testing.idioms import (
    Branch,
    Cast,
    Concatenation,
    DerivedKernel,
    Excitation,
    Gated,
    MaskedLinear,
    OwnBackward,
    Positions,
    Prompt,
    Recurrent,
    Replaced,
    Residual,
    SelfAttention,
    Split,
    TransposedKernel,
)
from teleport_optim.symmetry.testing.sequential import BATCH, Sample, divisor, seeded, seeds

__all__ = ["modules"]


@dataclass(frozen=True)
class _Stream:
    """Tensor that flows from block to block: images ``[batch, width, height, height]``, or vectors with ``width`` last."""

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
    return Residual(_hidden_block(draw, stream))


def _shared_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    layer = stream.map(draw, stream.width, stream.width)
    return nn.Sequential(layer, _activation(draw), layer)


def _concatenation_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    one, other = _hidden_width(draw), _hidden_width(draw)
    first = nn.Sequential(stream.map(draw, stream.width, one), _activation(draw))
    second, read = stream.map(draw, stream.width, other), stream.map(draw, one + other, stream.width)
    return Concatenation(first, second, read, stream.axis)


def _split_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    sizes = [_hidden_width(draw), _hidden_width(draw)]
    write, read = stream.map(draw, stream.width, sum(sizes)), stream.map(draw, sum(sizes), stream.width)
    return Split(write, read, sizes, stream.axis)


def _gated_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    return Gated(stream.map(draw, stream.width, 2 * hidden), stream.map(draw, hidden, stream.width), stream.axis)


def _excitation_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    reduce, expand = nn.Conv2d(stream.width, hidden, 1), nn.Conv2d(hidden, stream.width, 1)
    return nn.Sequential(
        stream.map(draw, stream.width, stream.width), Excitation(nn.Sequential(reduce, _activation(draw), expand))
    )


def _grouped_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = draw(st.integers(1, 6))
    grouped = nn.Conv2d(hidden, hidden, 3, padding=1, groups=draw(st.sampled_from([hidden, divisor(draw, hidden)])))
    write, read = stream.map(draw, stream.width, hidden), stream.map(draw, hidden, stream.width)
    return nn.Sequential(write, _activation(draw), grouped, *stream.norm(draw, hidden), _activation(draw), read)


def _attention_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    return SelfAttention(stream.width, divisor(draw, stream.width))


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
    return Recurrent(kind(stream.width, hidden, batch_first=True), stream.map(draw, hidden, stream.width))


def _derived_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    kernel = DerivedKernel(stream.width, hidden, draw(st.sampled_from(["centred", "factors", "masked", "sum"])))
    return nn.Sequential(kernel, _activation(draw), stream.map(draw, hidden, stream.width))


def _transposed_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = draw(st.integers(1, 6))
    write, read = stream.map(draw, stream.width, hidden), stream.map(draw, hidden, stream.width)
    return nn.Sequential(write, _activation(draw), TransposedKernel(hidden, divisor(draw, hidden)), read)


def _positions_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    return Positions(stream.width, draw(st.integers(3, 6)), is_computed=draw(st.booleans()))


def _prompt_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    return Prompt(stream.width, draw(st.integers(1, 3)), draw(st.sampled_from(["causal", "GRU", "LSTM", "RNN"])))


def _cast_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    cast = Cast(draw(st.sampled_from([torch.int64, torch.int8, torch.bool])))
    return nn.Sequential(stream.map(draw, stream.width, hidden), cast, stream.map(draw, hidden, stream.width))


def _masked_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    dtype = draw(st.sampled_from([torch.bool, torch.uint8, torch.int16, torch.float64]))
    return nn.Sequential(
        MaskedLinear(stream.width, hidden, dtype), _activation(draw), stream.map(draw, hidden, stream.width)
    )


def _replaced_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    maps = [stream.map(draw, stream.width, hidden) for _ in range(2)]
    return nn.Sequential(Replaced(*maps), stream.map(draw, hidden, stream.width))


def _backward_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    write, read = stream.map(draw, stream.width, hidden), stream.map(draw, hidden, stream.width)
    return nn.Sequential(write, OwnBackward(has_hook=draw(st.booleans())), _activation(draw), read)


def _branch_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    hidden = _hidden_width(draw)
    write, read = stream.map(draw, stream.width, hidden), stream.map(draw, hidden, stream.width)
    return nn.Sequential(write, Branch(asks_for_size=draw(st.booleans())), read)


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
