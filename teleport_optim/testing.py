"""Property tests for symmetries: strategies for hypothesis, and assertions that name the site that is wrong.

For the tests of models, of specs written by hand and of optimizers; it needs ``hypothesis``. The strategies draw models,
inputs and group elements that shrink to small ones. The assertions work on float64 copies with generic parameters and
leave model and random state as they were.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from teleport_optim.action import act, act_dual
from teleport_optim.symmetry import (
    APPROXIMATE_TOLERANCE,
    Element,
    Symmetry,
    SymmetrySpec,
    VerificationReport,
    find_symmetries,
    verify_symmetries,
)
from teleport_optim.symmetry.inputs import ExampleInputs, Inputs
from teleport_optim.symmetry.verify import _randomise

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("teleport_optim.testing needs hypothesis: pip install hypothesis") from error

__all__ = [
    "Sample",
    "assert_equivariant_gradient",
    "assert_invariant",
    "assert_optimizer_equivariant",
    "example_inputs",
    "group_elements",
    "modules",
    "sequential_models",
]

_BATCH = 3
_SEED = 0
_MAX_MOVED = 16
"""Of a group element, how many channels (entries of a matrix) are drawn at most."""

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Sample:
    """A model and an input that it takes."""

    model: nn.Module
    inputs: Tensor

    def __repr__(self) -> str:
        return f"Sample({self.model}, inputs of shape {tuple(self.inputs.shape)})"


# Group elements and inputs


def group_elements(spec: SymmetrySpec) -> st.SearchStrategy[Element]:
    r"""Elements for the sites of ``spec``, which shrink to the identity ``{}``.

    An element has an entry for each site that it moves, and moves few channels of it: permutations are products of
    transpositions, log-scales lie in [-2, 2], general linear maps are :math:`\exp(A)` for a sparse ``A`` with entries in
    [-0.5, 0.5], and so have a condition number below ``e ** 4``. All shrink site by site and channel by channel.

    Args:
        spec: The symmetries.

    Returns:
        A strategy for elements as :func:`~teleport_optim.action.act` takes them: tensors of the shape ``[size]`` or,
        for the linear group, ``[size, size]``; int64 for permutations, float64 for the others.

    Raises:
        ValueError: if a symmetry has a group other than those of ``teleport_optim.groups.GROUPS``.

    Example:
        >>> from hypothesis import find
        >>> spec = find_symmetries(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3))
        >>> find(group_elements(spec), lambda element: True)
        {}
        >>> find(group_elements(spec), lambda element: "0:permutation" in element and (
        ...     element["0:permutation"][0] != 0))
        {'0:permutation': tensor([1, 0, 2, 3])}
    """
    return st.fixed_dictionaries({}, optional={symmetry.id: _parts_of(symmetry) for symmetry in spec})


def _parts_of(symmetry: Symmetry) -> st.SearchStrategy[Tensor]:
    """The elements of one site."""
    size, channels = symmetry.size, st.integers(0, symmetry.size - 1)
    limit = min(size, _MAX_MOVED)

    def sparse(shape: tuple[int, ...], entries: Mapping[Any, float]) -> Tensor:
        tensor = torch.zeros(shape, dtype=torch.float64)
        for place, entry in entries.items():
            tensor[place] = entry
        return tensor

    match symmetry.group.name:
        case "permutation":

            def permutation(swaps: Sequence[tuple[int, int]]) -> Tensor:
                element = torch.arange(size)
                for one, other in swaps:
                    element[[one, other]] = element[[other, one]]
                return element

            return st.lists(st.tuples(channels, channels), max_size=limit).map(permutation)
        case "scaling":
            log_scales = st.dictionaries(channels, _numbers(2.0), max_size=limit)
            return log_scales.map(lambda entries: symmetry.group.exp(sparse((size,), entries)))
        case "sign":
            flipped = st.sets(channels, max_size=limit)
            return flipped.map(lambda flips: 1.0 - 2.0 * sparse((size,), dict.fromkeys(flips, 1.0)))
        case "linear":
            entries = st.dictionaries(st.tuples(channels, channels), _numbers(0.5), max_size=min(size**2, _MAX_MOVED))
            return entries.map(lambda entries: symmetry.group.exp(sparse((size, size), entries)))
        case name:
            raise ValueError(f"no elements are known for the group {name!r} of site {symmetry.id!r}")


def _numbers(bound: float) -> st.SearchStrategy[float]:
    return st.floats(-bound, bound, allow_subnormal=False)


def example_inputs(template: ExampleInputs, *, max_batch: int = 5, batch_axis: int = 0) -> st.SearchStrategy[Any]:
    """Inputs like ``template``, with another batch size and other numbers; they shrink to batches of two.

    Floating point tensors are normal, integers lie between 0 and the largest of the template (token ids stay token ids),
    and boolean tensors (masks) repeat the examples of the template, since a mask of random entries could hide everything.
    What is no tensor stays as it is.

    Args:
        template: An input of the model, a tuple of inputs or a dictionary of named ones. Tensors whose ``batch_axis`` is
            as long as that of the first tensor get the new batch size there, the others keep their shape.
        max_batch: The largest batch; the smallest is two, below which BatchNorm cannot train.
        batch_axis: The axis of examples.

    Returns:
        A strategy for what ``template`` is: a tensor, a tuple or a dictionary. The global random state is not used.

    Raises:
        TypeError: if ``template`` is nothing of that kind.
        ValueError: if no tensor in it has a batch axis, or ``max_batch`` is below two.

    Example:
        >>> from hypothesis import find
        >>> tokens = torch.tensor([[4, 0, 2]])
        >>> find(example_inputs(tokens), lambda inputs: True).shape
        torch.Size([2, 3])
    """
    leaves = tree_leaves(Inputs.of(template))
    sizes = [v.shape[batch_axis] for v in leaves if isinstance(v, Tensor) and v.dim() > batch_axis]
    if not sizes:
        raise ValueError(f"no input is a tensor with an axis {batch_axis}, so none has a batch of examples")
    if max_batch < 2:
        raise ValueError(f"max_batch must be at least 2, got {max_batch}")

    def draw_one(value: Any, batch: int, generator: torch.Generator) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        if value.dim() > batch_axis and value.shape[batch_axis] == sizes[0] > 0:
            value = value.index_select(batch_axis, torch.arange(batch, device=value.device) % sizes[0])
        if value.is_floating_point() or value.is_complex():
            drawn = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        elif value.dtype != torch.bool and value.numel() > 0:
            low, high = min(0, int(value.min())), int(value.max()) + 1
            drawn = torch.randint(low, max(high, 1), value.shape, generator=generator, dtype=value.dtype)
        else:
            drawn = value.clone()
        return drawn.to(value.device)

    def build(batch: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return tree_map(lambda value: draw_one(value, batch, generator), template)

    return st.builds(build, st.integers(2, max_batch), _seeds())


def _seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**16)


# Sequential models


_POINTWISE: list[Callable[[], nn.Module]] = [
    *(nn.ReLU, nn.LeakyReLU, nn.RReLU, nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.ReLU6, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Hardtanh, nn.PReLU, nn.Identity, nn.Dropout, nn.AlphaDropout),
    *(lambda: nn.Hardtanh(-0.5, 1.0), lambda: nn.Threshold(0.1, 0.2), lambda: nn.Sequential()),
    *(lambda: nn.Sequential(nn.ReLU(), nn.Sequential(nn.Identity())),),
]


_Layer = Callable[[st.DrawFn, tuple[int, ...]], nn.Module]


def _divisor(draw: st.DrawFn, number: int) -> int:
    return draw(st.sampled_from([n for n in range(1, number + 1) if number % n == 0]))


def _pointwise(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    return draw(st.sampled_from(_POINTWISE))()


def _linear(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    return nn.Linear(shape[-1], draw(st.integers(1, 6)), bias=draw(st.booleans()))


def _channel_prelu(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    return nn.PReLU(shape[1])


def _norm(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    num_spatial, options = len(shape) - 2, {"affine": draw(st.booleans()), "track_running_stats": draw(st.booleans())}
    kinds = ["group", "layer", "rms"]
    kinds += ["batch"] if num_spatial <= 3 else []
    kinds += ["instance"] if 1 <= num_spatial <= 3 and math.prod(shape[2:]) > 1 else []
    kind = draw(st.sampled_from(kinds))
    if kind in ("layer", "rms"):
        last = list(shape[-draw(st.integers(1, len(shape) - 1)) :])
        is_affine = draw(st.booleans())
        if kind == "rms":
            return nn.RMSNorm(last, elementwise_affine=is_affine)
        return nn.LayerNorm(last, elementwise_affine=is_affine, bias=draw(st.booleans()))
    if kind == "group":
        return nn.GroupNorm(_divisor(draw, shape[1]), shape[1], affine=options["affine"])
    if kind == "instance":
        return (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[num_spatial - 1](shape[1], **options)
    return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[num_spatial](shape[1], **options)


def _convolution(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    num_spatial, num_inputs = len(shape) - 2, shape[1]
    groups = draw(st.sampled_from([1, num_inputs, _divisor(draw, num_inputs)]))
    is_transposed = draw(st.booleans())
    kernels = [1, 2] if is_transposed or min(shape[2:]) > 2 else [1]
    modes = ["zeros"] if is_transposed else ["zeros", "replicate", "circular"]
    kind = getattr(nn, ("ConvTranspose" if is_transposed else "Conv") + f"{num_spatial}d")
    layer: nn.Module = kind(
        num_inputs,
        groups * draw(st.integers(1, max(1, 6 // groups))),
        draw(st.sampled_from(kernels)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(modes)),
    )
    return layer


def _spatial(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    stems = ["ZeroPad", "ReplicationPad", "ConstantPad", "AdaptiveAvgPool", "AdaptiveMaxPool"]
    stems += ["AvgPool", "MaxPool", "ReflectionPad", "CircularPad"] if min(shape[2:]) > 1 else []
    stem = draw(st.sampled_from(stems))
    kind: Callable[..., nn.Module] = getattr(nn, f"{stem}{len(shape) - 2}d")
    if stem == "ConstantPad":
        return kind(1, draw(st.sampled_from([0.0, 0.7])))
    if stem in ("AvgPool", "MaxPool"):
        return kind(2, stride=1, padding=draw(st.integers(0, 1)))
    return kind(draw(st.integers(1, 2)) if stem.startswith("Adaptive") else 1)


def _upsample(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    modes = {1: ["nearest", "linear"], 2: ["nearest", "bilinear", "bicubic"], 3: ["nearest", "trilinear"]}
    return nn.Upsample(scale_factor=2, mode=draw(st.sampled_from(modes[len(shape) - 2])))


def _flatten_axes(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    return nn.Flatten(draw(st.integers(1, len(shape) - 1)))


def _unflatten(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    channels = _divisor(draw, shape[-1])
    pixels = shape[-1] // channels
    height = _divisor(draw, pixels)
    return nn.Unflatten(len(shape) - 1, (channels, height, pixels // height))


def _pixel_unshuffle(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    return nn.PixelUnshuffle(2)


def _pixel_shuffle(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    return nn.PixelShuffle(2)


def _layers_after(shape: tuple[int, ...]) -> list[_Layer]:
    """What may follow an activation of this shape. Layers that write channels come more often."""
    choices: list[_Layer] = [_pointwise, _pointwise, _linear, _norm, _channel_prelu, _flatten_axes]
    if len(shape) == 2:
        choices += [_linear, _unflatten]
    if 3 <= len(shape) <= 5:
        choices += [_convolution] * 4 + [_spatial, _upsample]
    if len(shape) == 4:
        choices += [_pixel_unshuffle] if shape[2] % 2 == shape[3] % 2 == 0 else []
        choices += [_pixel_shuffle] if shape[1] % 4 == 0 else []
    return choices


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw parameters and inputs from ``seed``, and leave the global random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@st.composite
def sequential_models(draw: st.DrawFn, max_layers: int = 8) -> Sample:
    """Random :class:`torch.nn.Sequential` models in float64, with an input; they shrink to few narrow layers.

    Perceptrons, embeddings and convolutional networks in one to three dimensions, with the activations, norms, poolings,
    paddings and reshapes of ``torch.nn``, at most six channels written by a layer, and batches of three examples.

    Args:
        draw: Given by hypothesis; call it as ``sequential_models(max_layers=4)``.
        max_layers: The largest number of layers between the input and a last linear layer.

    Returns:
        A strategy for a :class:`Sample`. Drawing one runs the model about ``max_layers`` times.

    Example:
        >>> from hypothesis import find
        >>> sample = find(sequential_models(max_layers=2), lambda sample: True)
        >>> type(sample.model).__name__, len(sample.inputs)
        ('Sequential', 3)
    """
    with _seeded(draw(_seeds())):
        num_spatial = draw(st.integers(-1, 3))
        layers: list[nn.Module] = []
        if num_spatial == -1:
            inputs = torch.randint(5, (_BATCH, 2))
            layers.append(nn.Embedding(5, draw(st.integers(1, 5)), padding_idx=draw(st.sampled_from([None, 0]))))
        else:
            sizes = [draw(st.integers(1, 4)) for _ in range(1 + num_spatial)]
            inputs = torch.randn(_BATCH, *sizes, dtype=torch.float64)
        for _ in range(draw(st.integers(1, max_layers))):
            shape = _output_shape(layers, inputs)
            if math.prod(shape) > 3000:
                break
            layers.append(draw(st.sampled_from(_layers_after(shape)))(draw, shape).double())
        shape = _output_shape(layers, inputs)
        if 3 <= len(shape) <= 5 and draw(st.booleans()):
            layers.append(getattr(nn, f"Conv{len(shape) - 2}d")(shape[1], 2, 1))
        else:
            layers += [nn.Flatten(), nn.Linear(math.prod(shape[1:]), 2)]
        return Sample(nn.Sequential(*layers).double(), inputs)


def _output_shape(layers: Sequence[nn.Module], inputs: Tensor) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(nn.Sequential(*layers).double().eval()(inputs).shape)


# Models that are no sequence of layers


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


# Each block keeps the shape of what flows through it, so that any of them can be left out.
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
    grouped = nn.Conv2d(hidden, hidden, 3, padding=1, groups=draw(st.sampled_from([hidden, _divisor(draw, hidden)])))
    write, read = stream.map(draw, stream.width, hidden), stream.map(draw, hidden, stream.width)
    return nn.Sequential(write, _activation(draw), grouped, *stream.norm(draw, hidden), _activation(draw), read)


def _attention_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    return _SelfAttention(stream.width, _divisor(draw, stream.width))


def _encoder_block(draw: st.DrawFn, stream: _Stream) -> nn.Module:
    return nn.TransformerEncoderLayer(
        stream.width,
        _divisor(draw, stream.width),
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


_BLOCKS: list[_Block] = [_plain_block, _hidden_block, _residual_block, _shared_block]
_BLOCKS += [_concatenation_block, _split_block, _gated_block]
_SEQUENCE_BLOCKS: list[_Block] = [*_BLOCKS, _attention_block, _encoder_block, _recurrent_block]
_BLOCKS_OF: dict[str, list[_Block]] = {
    "vector": _BLOCKS,
    "image": [*_BLOCKS, _excitation_block, _grouped_block],
    "sequence": _SEQUENCE_BLOCKS,
    "tokens": _SEQUENCE_BLOCKS,
}


@st.composite
def modules(draw: st.DrawFn, max_blocks: int = 3) -> Sample:
    """Random models that are no plain sequence of layers, in float64, with an input; they shrink block by block.

    Vectors, images, sequences or tokens flow through blocks: layers that are used twice, residual additions,
    concatenation, splits, gates (squeeze and excitation among them), grouped and depthwise convolutions, attention,
    transformer encoder layers, LSTM and GRU, and embeddings whose weight is also that of the last layer. At most five
    features flow from block to block; batches have three examples.

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
    with _seeded(draw(_seeds())):
        stream = _Stream(draw(st.sampled_from(list(_BLOCKS_OF))), draw(st.integers(1, 5)))
        length = draw(st.integers(2, 3))
        choices = st.sampled_from(_BLOCKS_OF[stream.kind])
        blocks = draw(st.lists(choices.flatmap(lambda block: _built(block, stream)), min_size=1, max_size=max_blocks))
        if stream.kind == "tokens":
            inputs = torch.randint(_VOCABULARY, (_BATCH, length))
            embedding = nn.Embedding(_VOCABULARY, stream.width)
            head = nn.Linear(stream.width, _VOCABULARY, bias=draw(st.booleans()))
            head.weight = embedding.weight
            return Sample(nn.Sequential(embedding, *blocks, head).double(), inputs)
        shape = {"vector": [stream.width], "sequence": [length, stream.width]}.get(
            stream.kind, [stream.width, length, length]
        )
        inputs = torch.randn(_BATCH, *shape, dtype=torch.float64)
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


def assert_invariant(
    model: nn.Module,
    inputs: ExampleInputs,
    spec: SymmetrySpec | None = None,
    element: Element | None = None,
    *,
    tolerance: float = 1e-10,
) -> None:
    """Assert that symmetries leave the function of ``model`` unchanged.

    Each site alone, and all exact ones together, move a float64 copy with generic parameters; its outputs may not
    change, in evaluation and in training mode with dropout off, nor what the forward pass leaves in buffers. See
    :func:`~teleport_optim.symmetry.verify_symmetries`, which does the work.

    Args:
        model: The model. Neither it nor the random state changes.
        inputs: An input of the model, a tuple of inputs or a dictionary of named ones, with at least two examples.
        spec: The symmetries, by default those that :func:`~teleport_optim.symmetry.find_symmetries` finds. One without
            any holds: also assert that it has the sites that you expect.
        element: What to move by, for some or all sites; by default a random element that moves every site.
        tolerance: The largest change, relative to the largest output; ``APPROXIMATE_TOLERANCE`` for sites that are not
            exact.

    Raises:
        AssertionError: if a site changes the function; the message names the site, its group, the change and its legs.
        ValueError: if the model cannot take ``inputs``, or spec or element do not fit.

    Cost: four forward passes for each group, and more where a site is wrong.

    Example:
        >>> from teleport_optim.groups import GROUPS
        >>> from teleport_optim.symmetry import Leg
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
        >>> assert_invariant(model, torch.randn(4, 3))
        >>> legs = (Leg("0.weight", 0, +1), Leg("0.bias", 0, +1), Leg("2.weight", 1, -1))
        >>> spec = SymmetrySpec((Symmetry("0:scaling", GROUPS["scaling"], 8, legs),))
        >>> assert_invariant(model, torch.randn(4, 3), spec)  # doctest: +ELLIPSIS, +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        AssertionError: site '0:scaling' (scaling of 8 channels) changes the function by ...
    """
    spec, element = _complete(model, inputs, spec, element)
    fixed = SymmetrySpec(tuple(_with_fixed_draw(symmetry, element[symmetry.id]) for symmetry in spec))
    report = verify_symmetries(model, fixed, inputs, tolerance=tolerance)
    _raise_if_failed(spec, report, "changes the function")


def assert_equivariant_gradient(
    model: nn.Module,
    inputs: ExampleInputs,
    spec: SymmetrySpec | None = None,
    element: Element | None = None,
    *,
    loss: Loss | None = None,
    tolerance: float = 1e-9,
) -> None:
    """Assert that the gradient at moved parameters is :func:`~teleport_optim.action.act_dual` of the gradient.

    As in :func:`assert_invariant`, each site alone and all exact ones together move a float64 copy with generic parameters.
    It is in training mode with dropout layers off.

    Args:
        model: The model. Neither it nor the random state changes.
        inputs: An input of the model, a tuple of inputs or a dictionary of named ones, with at least two examples.
        spec: The symmetries, by default those that are found.
        element: What to move by, for some or all sites; by default a random element that moves every site.
        loss: A loss of the model's output, by default the squared distance from fixed random targets.
        tolerance: The largest error, relative to the largest entry of the expected gradient.

    Raises:
        AssertionError: if the gradient is another one; the message names the site, its group, the error and its legs.
        KeyError: if the spec acts on a tensor that the model does not have.
        ValueError: if the element does not fit the spec, or the model returns no floating point tensor.

    Cost: a forward and a backward pass for each site.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
        >>> assert_equivariant_gradient(model, torch.randn(4, 3))
    """
    spec, element = _complete(model, inputs, spec, element)
    loss = loss or _squared_distance
    with _generic_twin(model, inputs, spec) as (twin, start, values):
        reference = _gradient(twin, start, values, loss)

        def error(part: SymmetrySpec) -> float:
            own = {symmetry.id: element[symmetry.id] for symmetry in part}
            expected = act_dual(part, own, reference)
            actual = _gradient(twin, act(part, own, start), values, loss)
            return _distance(expected, actual) / _largest(expected.values())

        report = _report(spec, error, tolerance)
    _raise_if_failed(spec, report, "does not move the gradient by its dual: the error is", "")


def assert_optimizer_equivariant(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    model: nn.Module,
    inputs: ExampleInputs,
    spec: SymmetrySpec | None = None,
    *,
    num_steps: int = 3,
    groups: Sequence[str] = ("permutation",),
    loss: Loss | None = None,
    tolerance: float = 1e-6,
) -> None:
    """Assert that training from moved parameters, and moving after training, give the same.

    Every optimizer that treats entries alike is equivariant to permutations. To sign flips are SGD, with momentum and weight
    decay, and AdamW; none of them is to positive scalings or to general linear maps. One that takes the sign of a gradient
    is held up by entries whose gradient is zero but for rounding, such as a bias in front of BatchNorm.

    As in :func:`assert_invariant`, each site alone and all together move a float64 copy with generic parameters. It trains in
    training mode with dropout off, on one batch.

    Args:
        make_optimizer: Makes an optimizer for a model; called for every training run, with the random state the same.
        model: The model. Neither it nor the random state changes.
        inputs: An input of the model, a tuple of inputs or a dictionary of named ones, with at least two examples.
        spec: The symmetries, by default those that are found.
        num_steps: The number of steps.
        groups: The names of the groups to test, of ``"permutation"``, ``"scaling"``, ``"sign"`` and ``"linear"``.
        loss: A loss of the model's output, by default the squared distance from fixed random targets.
        tolerance: The largest error of a trained parameter, relative to the largest change that training made.

    Raises:
        AssertionError: if the results differ; the message names the site, its group, the error and its legs.
        KeyError: if the spec acts on a tensor that the model does not have.
        ValueError: if a group is unknown, or the model returns no floating point tensor.

    Cost: a training run of ``num_steps`` for each site.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> assert_optimizer_equivariant(lambda model: torch.optim.AdamW(model.parameters()), model, torch.randn(4, 3))
    """
    whole, element = _complete(model, inputs, spec, None)
    spec = SymmetrySpec(tuple(symmetry for name in groups for symmetry in whole.of_group(name)))
    loss = loss or _squared_distance
    with _generic_twin(model, inputs, spec) as (twin, start, values):
        reference = _train(make_optimizer, twin, start, values, loss, num_steps)

        def error(part: SymmetrySpec) -> float:
            own = {symmetry.id: element[symmetry.id] for symmetry in part}
            moved = act(part, own, start)
            expected = act(part, own, start | reference)
            actual = _train(make_optimizer, twin, moved, values, loss, num_steps)
            return _distance(actual, expected) / _largest(expected[name] - moved[name] for name in actual)

        report = _report(spec, error, tolerance)
    _raise_if_failed(spec, report, "does not commute with training: the error is", "")


def _complete(
    model: nn.Module, inputs: ExampleInputs, spec: SymmetrySpec | None, element: Element | None
) -> tuple[SymmetrySpec, Element]:
    """The sites to check, by default all that are found, and what to move them by."""
    spec = find_symmetries(model, inputs) if spec is None else spec
    if element is None:
        generator = torch.Generator().manual_seed(_SEED)
        return spec, {symmetry.id: _moving_part(symmetry, generator) for symmetry in spec}
    spec.check(element)
    return SymmetrySpec(tuple(symmetry for symmetry in spec if symmetry.id in element)), element


def _moving_part(symmetry: Symmetry, generator: torch.Generator) -> Tensor:
    """A random element that is not the identity, which would show nothing, unless the group has no other."""
    identity = symmetry.group.identity(symmetry.size)
    part = identity
    for _ in range(30):
        if not torch.equal(part, identity):
            break
        part = symmetry.group.random(symmetry.size, generator)
    return part


def _with_fixed_draw(symmetry: Symmetry, part: Tensor) -> Symmetry:
    """The same symmetry, of whose group only ``part`` is ever drawn."""
    group = copy.copy(symmetry.group)
    group.random = lambda size, generator: part  # type: ignore[method-assign]
    return replace(symmetry, group=group)


_Twin = tuple[nn.Module, dict[str, Tensor], Inputs]


@contextmanager
def _generic_twin(model: nn.Module, inputs: ExampleInputs, spec: SymmetrySpec) -> Iterator[_Twin]:
    """A float64 copy in training mode with dropout off and generic parameters, its tensors, and the inputs in float64."""
    values: Inputs = tree_map_only(
        Tensor, lambda value: value.double() if value.is_floating_point() else value, Inputs.of(inputs)
    )
    devices = sorted({tensor.get_device() for tensor in _tensors(model).values() if tensor.is_cuda})
    with torch.random.fork_rng(devices):
        twin = copy.deepcopy(model).double().train()
        for module in twin.modules():
            if isinstance(module, (_DropoutNd, nn.RReLU)):
                module.eval()
            elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
                module.dropout = 0.0
        with torch.no_grad():
            _randomise(twin, torch.Generator().manual_seed(_SEED))
        yield twin, {name: tensor.detach().clone() for name, tensor in _tensors(twin).items()}, values


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, under every name that they have."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _load(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Write ``tensors`` into a model; its parameters, under every name that they have, which train."""
    torch.manual_seed(_SEED)
    with torch.no_grad():
        for name, tensor in _tensors(model).items():
            tensor.copy_(tensors[name])
    return {name: value for name, value in model.named_parameters(remove_duplicate=False) if value.requires_grad}


def _output(model: nn.Module, inputs: Inputs) -> Any:
    own = inputs.copy()
    return model(*own.args, **own.kwargs)


def _gradient(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs, loss: Loss) -> dict[str, Tensor]:
    parameters = _load(model, tensors)
    value = loss(_output(model, inputs))
    grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, grads) if grad is not None}


def _train(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    inputs: Inputs,
    loss: Loss,
    num_steps: int,
) -> dict[str, Tensor]:
    model = copy.deepcopy(model)  # an optimizer may leave hooks behind
    parameters = _load(model, tensors)
    optimizer = make_optimizer(model)

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(_output(model, inputs))
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    for _ in range(num_steps):
        optimizer.step(closure)
    return {name: parameter.detach() for name, parameter in parameters.items()}


def _squared_distance(output: Any) -> Tensor:
    """The squared distance of outputs from fixed random targets: generic, so that no gradient vanishes."""
    generator = torch.Generator().manual_seed(_SEED)
    terms = [
        (tensor - torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)).square().mean()
        for tensor in tree_leaves(output)
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    ]
    if not terms:
        raise ValueError("the model returns no floating point tensor: pass a loss of its output")
    return torch.stack(terms).sum()


def _largest(tensors: Any) -> float:
    """The largest entry, against which errors are measured; 1 where all are zero."""
    return max((tensor.abs().max().item() for tensor in tensors if tensor.numel() > 0), default=0.0) or 1.0


def _distance(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> float:
    """The largest difference of two entries; not a number where any is none."""
    differences = [(actual[name] - expected[name]).abs().max() for name in expected if actual[name].numel() > 0]
    return torch.stack(differences).max().item() if differences else 0.0


def _report(spec: SymmetrySpec, error: Callable[[SymmetrySpec], float], tolerance: float) -> VerificationReport:
    """The errors of each site alone and of all exact ones together."""
    errors = {symmetry.id: error(SymmetrySpec((symmetry,))) for symmetry in spec}
    exact = SymmetrySpec(tuple(symmetry for symmetry in spec if symmetry.exact))
    approximate = frozenset(symmetry.id for symmetry in spec if not symmetry.exact)
    return VerificationReport(errors, error(exact) if len(exact) else 0.0, approximate, spec.refusals, tolerance)


def _raise_if_failed(spec: SymmetrySpec, report: VerificationReport, fault: str, by: str = " by") -> None:
    lines = []
    for name in report.failed:
        symmetry = spec[name]
        limit = report.tolerance if symmetry.exact else max(report.tolerance, APPROXIMATE_TOLERANCE)
        legs = " ".join(map(str, symmetry.legs))
        lines.append(
            f"site {name!r} ({symmetry.group.name} of {symmetry.size} channels) {fault}{by} {report.errors[name]:.1e}, "
            f"more than {limit:.0e}; its legs: {legs}"
        )
    if not report.ok and not lines:
        lines.append(
            f"moving all sites together {fault}{by} {report.together:.1e}, more than {report.tolerance:.0e}, although "
            f"each of them alone holds; the sites: {', '.join(symmetry.id for symmetry in spec)}"
        )
    if lines:
        raise AssertionError("\n".join(lines))
