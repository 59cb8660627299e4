"""A strategy for sequential models of every known layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["BATCH", "Sample", "divisor", "seeded", "seeds", "sequential_models"]

BATCH = 3


@dataclass(frozen=True)
class Sample:
    """A model and an input that it takes.

    Example:
        >>> import torch
        >>> Sample(nn.Linear(2, 1), torch.ones(3, 2))
        Sample(Linear(in_features=2, out_features=1, bias=True), inputs of shape (3, 2))
    """

    model: nn.Module
    inputs: Tensor

    def __repr__(self) -> str:
        return f"Sample({self.model}, inputs of shape {tuple(self.inputs.shape)})"


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**16)


_POINTWISE: list[Callable[[], nn.Module]] = [
    *(nn.ReLU, nn.LeakyReLU, nn.RReLU, nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.ReLU6, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Hardtanh, nn.PReLU, nn.Identity, nn.Dropout, nn.AlphaDropout),
    *(lambda: nn.Hardtanh(-0.5, 1.0), lambda: nn.Threshold(0.1, 0.2), lambda: nn.Sequential()),
    *(lambda: nn.Sequential(nn.ReLU(), nn.Sequential(nn.Identity())),),
]


_Layer = Callable[[st.DrawFn, tuple[int, ...]], nn.Module]


def divisor(draw: st.DrawFn, number: int) -> int:
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
            # Its usual eps, of the order of rounding errors, makes signals of those that another norm leaves of a constant.
            return nn.RMSNorm(last, eps=1e-5, elementwise_affine=is_affine)
        return nn.LayerNorm(last, elementwise_affine=is_affine, bias=draw(st.booleans()))
    if kind == "group":
        return nn.GroupNorm(divisor(draw, shape[1]), shape[1], affine=options["affine"])
    if kind == "instance":
        return (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[num_spatial - 1](shape[1], **options)
    return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[num_spatial](shape[1], **options)


def _convolution(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    num_spatial, num_inputs = len(shape) - 2, shape[1]
    groups = draw(st.sampled_from([1, num_inputs, divisor(draw, num_inputs)]))
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
    channels = divisor(draw, shape[-1])
    pixels = shape[-1] // channels
    height = divisor(draw, pixels)
    return nn.Unflatten(len(shape) - 1, (channels, height, pixels // height))


def _pixel_unshuffle(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    return nn.PixelUnshuffle(2)


def _pixel_shuffle(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    return nn.PixelShuffle(2)


def _layers_after(shape: tuple[int, ...]) -> list[_Layer]:
    """Layers that may follow an activation of this shape. Those that write channels come more often."""
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
def seeded(seed: int) -> Iterator[None]:
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
    with seeded(draw(seeds())):
        num_spatial = draw(st.integers(-1, 3))
        layers: list[nn.Module] = []
        if num_spatial == -1:
            inputs = torch.randint(5, (BATCH, 2))
            layers.append(nn.Embedding(5, draw(st.integers(1, 5)), padding_idx=draw(st.sampled_from([None, 0]))))
        else:
            sizes = [draw(st.integers(1, 4)) for _ in range(1 + num_spatial)]
            inputs = torch.randn(BATCH, *sizes, dtype=torch.float64)
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
