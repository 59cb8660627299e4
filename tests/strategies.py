"""Hypothesis strategies for random sequential models that exercise every known layer, and readable views of specs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from teleport_optim.symmetry import SymmetrySpec

BATCH = 3
Draw = Callable[[st.SearchStrategy], object]


@dataclass(frozen=True)
class Sample:
    """A model and an input that it takes."""

    model: nn.Sequential
    inputs: Tensor

    def __repr__(self) -> str:
        return f"Sample({self.model}, inputs of shape {tuple(self.inputs.shape)})"


POINTWISE = [
    *(nn.ReLU, nn.LeakyReLU, nn.RReLU, nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.ReLU6, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Hardtanh, nn.PReLU, nn.Identity, nn.Dropout, nn.AlphaDropout),
    *(lambda: nn.Hardtanh(-0.5, 1.0), lambda: nn.Threshold(0.1, 0.2), lambda: nn.Sequential()),
    *(lambda: nn.Sequential(nn.ReLU(), nn.Sequential(nn.Identity())),),
]


def _divisor(draw: Draw, *numbers: int) -> int:
    common = math.gcd(*numbers)
    return draw(st.sampled_from([n for n in range(1, common + 1) if common % n == 0]))


def _pointwise(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    return draw(st.sampled_from(POINTWISE))()


def _linear(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    return nn.Linear(shape[-1], draw(st.integers(1, 6)), bias=draw(st.booleans()))


def _channel_prelu(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    return nn.PReLU(shape[1])


def _norm(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    num_spatial, options = len(shape) - 2, {"affine": draw(st.booleans()), "track_running_stats": draw(st.booleans())}
    kinds = ["group", "layer", "rms"]
    kinds += ["batch"] if num_spatial <= 3 else []
    kinds += ["instance"] if 1 <= num_spatial <= 3 and math.prod(shape[2:]) > 1 else []
    kind = draw(st.sampled_from(kinds))
    if kind in ("layer", "rms"):
        last = shape[-draw(st.integers(1, len(shape) - 1)) :]
        is_affine = draw(st.booleans())
        if kind == "rms":
            return nn.RMSNorm(last, elementwise_affine=is_affine)
        return nn.LayerNorm(last, elementwise_affine=is_affine, bias=draw(st.booleans()))
    if kind == "group":
        return nn.GroupNorm(_divisor(draw, shape[1]), shape[1], affine=options["affine"])
    if kind == "instance":
        return (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[num_spatial - 1](shape[1], **options)
    return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[num_spatial](shape[1], **options)


def _convolution(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    num_spatial, num_inputs = len(shape) - 2, shape[1]
    groups = draw(st.sampled_from([1, num_inputs, _divisor(draw, num_inputs)]))
    is_transposed = draw(st.booleans())
    kernels = [1, 2] if is_transposed or min(shape[2:]) > 2 else [1]
    names = ("ConvTranspose" if is_transposed else "Conv") + f"{num_spatial}d"
    modes = ["zeros"] if is_transposed else ["zeros", "replicate", "circular"]
    return getattr(nn, names)(
        num_inputs,
        groups * draw(st.integers(1, max(1, 6 // groups))),
        draw(st.sampled_from(kernels)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(modes)),
    )


def _spatial(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    num_spatial = len(shape) - 2
    stems = ["ZeroPad", "ReplicationPad", "ConstantPad", "AdaptiveAvgPool", "AdaptiveMaxPool"]
    stems += ["AvgPool", "MaxPool", "ReflectionPad", "CircularPad"] if min(shape[2:]) > 1 else []
    stem = draw(st.sampled_from(stems))
    kind = getattr(nn, f"{stem}{num_spatial}d")
    if stem == "ConstantPad":
        return kind(1, draw(st.sampled_from([0.0, 0.7])))
    if stem == "AvgPool" or stem == "MaxPool":
        return kind(2, stride=1, padding=draw(st.integers(0, 1)))
    return kind(draw(st.integers(1, 2)) if stem.startswith("Adaptive") else 1)


def _upsample(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    modes = {1: ["nearest", "linear"], 2: ["nearest", "bilinear", "bicubic"], 3: ["nearest", "trilinear"]}
    return nn.Upsample(scale_factor=2, mode=draw(st.sampled_from(modes[len(shape) - 2])))


def _flatten(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    return nn.Flatten(draw(st.integers(1, len(shape) - 1)))


def _unflatten(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    channels = _divisor(draw, shape[-1])
    pixels = shape[-1] // channels
    height = _divisor(draw, pixels)
    return nn.Unflatten(len(shape) - 1, (channels, height, pixels // height))


def _pixel_unshuffle(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    return nn.PixelUnshuffle(2)


def _pixel_shuffle(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    return nn.PixelShuffle(2)


def _choices(shape: tuple[int, ...]) -> list[Callable[[Draw, tuple[int, ...]], nn.Module]]:
    """What may follow an activation of this shape. Layers that write channels come more often."""
    choices = [_pointwise, _pointwise, _linear, _norm, _channel_prelu, _flatten]
    if len(shape) == 2:
        choices += [_linear, _unflatten]
    if 3 <= len(shape) <= 5:
        choices += [_convolution] * 4 + [_spatial, _upsample]
    if len(shape) == 4:
        choices += [_pixel_unshuffle] if shape[2] % 2 == shape[3] % 2 == 0 else []
        choices += [_pixel_shuffle] if shape[1] % 4 == 0 else []
    return choices


@st.composite
def sequential_models(draw: Draw, max_layers: int = 8) -> Sample:
    """A random :class:`torch.nn.Sequential` in float64 and an input that it takes."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    num_spatial = draw(st.integers(-1, 3))
    shape = (BATCH, draw(st.integers(1, 4)), *[draw(st.integers(1, 4)) for _ in range(num_spatial)])
    layers: list[nn.Module] = []
    if num_spatial == -1:
        inputs = torch.randint(5, (BATCH, 2))
        layers.append(nn.Embedding(5, draw(st.integers(1, 5)), padding_idx=draw(st.sampled_from([None, 0]))))
    else:
        inputs = torch.randn(shape, dtype=torch.float64)
    for _ in range(draw(st.integers(1, max_layers))):
        shape = tuple(_forward(layers, inputs).shape)
        if math.prod(shape) > 3000:
            break
        layers.append(draw(st.sampled_from(_choices(shape)))(draw, shape).double())
    shape = tuple(_forward(layers, inputs).shape)
    if 3 <= len(shape) <= 5 and draw(st.booleans()):
        layers.append(getattr(nn, f"Conv{len(shape) - 2}d")(shape[1], 2, 1))
    else:
        layers += [nn.Flatten(), nn.Linear(math.prod(shape[1:]), 2)]
    return Sample(nn.Sequential(*layers).double(), inputs)


def _forward(layers: list[nn.Module], inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return nn.Sequential(*layers).double().eval()(inputs)


def legs_of(spec: SymmetrySpec) -> dict[str, str]:
    """``"size legs"`` of every site, in the notation in which a spec prints."""
    rows = [line.split() for line in str(SymmetrySpec(spec.symmetries)).splitlines()[1:]]
    return {row[0]: " ".join([row[1], *row[3:]]) for row in rows}


def reasons_of(spec: SymmetrySpec) -> dict[str, str]:
    return {refusal.name: refusal.reason for refusal in spec.refusals}
