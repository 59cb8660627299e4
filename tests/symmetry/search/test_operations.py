"""Every operation and every layer, one by one: what each group can pass."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teleport_optim.symmetry import find_symmetries
from teleport_optim.symmetry.search import operations
from teleport_optim.symmetry.search.graph import Call
from teleport_optim.symmetry.search.operations import entrywise
from teleport_optim.symmetry.search.operations.call import Rule
from tests.helpers.odd_models import MODELS
from tests.helpers.small_models import Model, N, build, certified, mlp

pytestmark = pytest.mark.private_torch

ALL, HOMOGENEOUS, ODD, ANY = "permutation scaling sign", "permutation scaling", "permutation sign", "permutation"


# --------------------------------------------------------------------------- every layer type, in the middle of a model

VECTOR_LAYERS: list[tuple[nn.Module, str]] = [
    *((layer, ALL) for layer in (nn.Identity(), nn.Dropout(), nn.Dropout1d(), nn.Sequential())),
    *((layer, HOMOGENEOUS) for layer in (nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(), nn.RReLU())),
    *((layer, HOMOGENEOUS) for layer in (nn.PReLU(), nn.PReLU(4))),
    *((layer, ODD) for layer in (nn.Tanh(), nn.Softsign(), nn.Tanhshrink(), nn.Softshrink(), nn.Hardshrink())),
    *((layer, ODD) for layer in (nn.Hardtanh(), nn.Hardtanh(-0.3, 0.3))),
    *((layer, ANY) for layer in (nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Sigmoid(), nn.LogSigmoid())),
    *((layer, ANY) for layer in (nn.ELU(), nn.SELU(), nn.CELU(), nn.Softplus(), nn.ReLU6(), nn.Hardswish())),
    *((layer, ANY) for layer in (nn.Hardsigmoid(), nn.Hardtanh(-0.3, 1.0), nn.Threshold(0.1, 0.0))),
    *((layer, ANY) for layer in (nn.AlphaDropout(), nn.FeatureAlphaDropout())),
    (nn.BatchNorm1d(4), ODD + " 1:scaling 1:sign"),
    (nn.BatchNorm1d(4, affine=False), ODD),
    (nn.BatchNorm1d(4, track_running_stats=False), ODD + " 1:scaling 1:sign"),
    (nn.LayerNorm(4), ANY + " 1:scaling 1:sign"),
    (nn.LayerNorm(4, bias=False), ANY + " 1:scaling 1:sign"),
    (nn.LayerNorm(4, elementwise_affine=False), ANY),
    (nn.RMSNorm(4), ODD + " 1:scaling 1:sign"),
    (nn.RMSNorm(4, elementwise_affine=False), ODD),
    (nn.GroupNorm(1, 4), ANY + " 1:scaling 1:sign"),
    (nn.GroupNorm(1, 4, affine=False), ANY),
    (nn.GroupNorm(2, 4), "permutation[0] permutation[1] 1:scaling 1:sign"),
    (nn.Flatten(), ALL),
    (nn.Unflatten(1, (4,)), ALL),
    (nn.Linear(4, 4), ALL + " 1:permutation 1:scaling 1:sign"),
]


@pytest.mark.parametrize(("layer", "expected"), VECTOR_LAYERS, ids=lambda value: str(value))
def test_what_passes_between_two_linear_layers(layer: nn.Module, expected: str) -> None:
    check_between(nn.Linear(3, 4), layer, nn.Linear(4, 2), expected, torch.randn(6, 3))


IMAGE_LAYERS: list[tuple[str, dict[str, object] | tuple[object, ...], str]] = [
    *((stem, (2,), ALL) for stem in ("AvgPool{}", "AdaptiveAvgPool{}")),
    *((stem, (1,), ALL) for stem in ("ZeroPad{}", "ReflectionPad{}", "ReplicationPad{}", "CircularPad{}")),
    ("ConstantPad{}", (1, 0.0), ALL),
    ("ConstantPad{}", (1, 0.5), ANY),
    *((stem, (2,), HOMOGENEOUS) for stem in ("MaxPool{}", "AdaptiveMaxPool{}")),
    ("MaxPool{}", {"kernel_size": 2, "padding": 1}, HOMOGENEOUS),
    ("LPPool{}", (2, 2), ODD),
    ("Dropout{}", (), ALL),
    ("BatchNorm{}", (4,), ODD + " 1:scaling 1:sign"),
    ("BatchNorm{}", (4, 1e-5, 0.1, False), ODD),
    ("InstanceNorm{}", (4,), ODD),
    ("InstanceNorm{}", (4, 1e-5, 0.1, True, True), ODD + " 1:scaling 1:sign"),
    ("Conv{}", (4, 4, 1), ALL + " 1:permutation 1:scaling 1:sign"),
    ("Conv{}", {"in_channels": 4, "out_channels": 4, "kernel_size": 1, "groups": 4}, ALL + " 1:scaling 1:sign"),
    ("ConvTranspose{}", (4, 4, 1), ALL + " 1:permutation 1:scaling 1:sign"),
    (
        "ConvTranspose{}",
        {"in_channels": 4, "out_channels": 4, "kernel_size": 1, "groups": 4, "bias": False},
        ALL + " 1:scaling 1:sign",
    ),
]


@pytest.mark.parametrize("num_spatial", [1, 2, 3])
@pytest.mark.parametrize(("stem", "options", "expected"), IMAGE_LAYERS, ids=lambda value: str(value))
def test_what_passes_between_two_convolutions(
    num_spatial: int, stem: str, options: dict[str, object] | tuple[object, ...], expected: str
) -> None:
    kind = getattr(nn, stem.format(f"{num_spatial}d"))
    layer = kind(**options) if isinstance(options, dict) else kind(*options)
    convolution = getattr(nn, f"Conv{num_spatial}d")
    inputs = torch.randn(2, 3, *[4] * num_spatial)
    check_between(convolution(3, 4, 1), layer, convolution(4, 2, 1), expected, inputs)


PLANE_LAYERS: list[tuple[nn.Module, str]] = [
    (nn.Upsample(scale_factor=2), ALL),
    (nn.Upsample(scale_factor=2, mode="bicubic"), ALL),
    (nn.UpsamplingNearest2d(scale_factor=2), ALL),
    (nn.UpsamplingBilinear2d(scale_factor=2), ALL),
    (nn.LayerNorm((4, 4, 4)), ANY + " 1:scaling 1:sign"),
    (nn.RMSNorm((4, 4, 4)), ODD + " 1:scaling 1:sign"),
    (nn.PReLU(4), HOMOGENEOUS),
    (nn.GroupNorm(2, 4), "permutation[0] permutation[1] 1:scaling 1:sign"),
    (nn.GroupNorm(4, 4), ODD + " 1:scaling 1:sign"),
    (nn.Sequential(nn.PixelUnshuffle(2), nn.ReLU(), nn.PixelShuffle(2)), HOMOGENEOUS),
]


@pytest.mark.parametrize(("layer", "expected"), PLANE_LAYERS, ids=lambda value: str(value))
def test_what_passes_between_two_image_convolutions(layer: nn.Module, expected: str) -> None:
    check_between(nn.Conv2d(3, 4, 1), layer, nn.Conv2d(4, 2, 1), expected, torch.randn(2, 3, 4, 4))


def layer_models() -> Iterator[tuple[nn.Module, Tensor]]:
    """All layers of the tables, each between two others."""
    for layer, _ in VECTOR_LAYERS:
        yield nn.Sequential(nn.Linear(3, 4), copy.deepcopy(layer), nn.Linear(4, 2)), torch.randn(6, 3)
    for layer, _ in PLANE_LAYERS:
        yield nn.Sequential(nn.Conv2d(3, 4, 1), copy.deepcopy(layer), nn.Conv2d(4, 2, 1)), torch.randn(2, 3, 4, 4)
    for stem, options, _ in IMAGE_LAYERS:
        for n in (1, 2, 3):
            kind, convolution = getattr(nn, stem.format(f"{n}d")), getattr(nn, f"Conv{n}d")
            layer = kind(**options) if isinstance(options, dict) else kind(*options)
            yield nn.Sequential(convolution(3, 4, 1), layer, convolution(4, 2, 1)), torch.randn(2, 3, *[4] * n)


def check_between(first: nn.Module, layer: nn.Module, last: nn.Module, expected: str, inputs: Tensor) -> None:
    model = nn.Sequential(first, copy.deepcopy(layer), last)
    names = {word if ":" in word else f"0:{word}" for word in expected.split()}
    spec = certified(model, inputs)
    assert {symmetry.id for symmetry in spec if symmetry.group.name != "linear" and "heads" not in symmetry.id} == names
    assert spec.refusals == ()


# ------------------------------------------------------------------------------------------------ operations one by one


ELEMENTWISE = {
    name: rule.keywords["tags"]
    for name, rule in operations.RULES.items()
    if isinstance(rule, partial) and rule.func is entrywise.each_entry
}
ARGUMENTS: dict[str, tuple[Any, ...]] = {"threshold": (0.1, 0.2), "leaky_relu": (0.1,), "type_as": (torch.zeros(1),)}
DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("asin", "atanh"), torch.tanh),
    **dict.fromkeys(("log", "log10", "log1p", "log2", "sqrt", "rsqrt"), lambda h: h.square() + 0.1),
}
"""What brings hidden values to where a function is defined."""
UNNATURAL = {"zero_", "native_dropout", "rrelu_with_noise", "lift", "lift_fresh", "_to_copy", "to", "alias", "detach"}
"""Operations that models call under other names, or as a part of others."""


@pytest.mark.parametrize("name", sorted(set(ELEMENTWISE) - UNNATURAL))
def test_each_function_of_an_entry_lets_through_what_it_commutes_with(name: str) -> None:
    if "dropout" in name:
        arguments: tuple[Any, ...] = (0.5, False)
    else:
        arguments = ARGUMENTS.get(name, ())
    name_in_torch = name.replace("log_sigmoid", "logsigmoid")
    function = next(
        getattr(home, name_in_torch) for home in (torch, nn.functional, Tensor) if hasattr(home, name_in_torch)
    )
    inner = DOMAINS.get(name, lambda h: h)
    model = build(mlp(lambda m, x: m.b(function(inner(m.a(x)), *arguments).to(x.dtype))))
    groups = {symmetry.group.name for symmetry in certified(model, torch.randn(4, 3))}
    expected = {"permutation"} | (ELEMENTWISE[name] & {"scaling", "sign", "linear"})
    if "even" in ELEMENTWISE[name] or inner(torch.tensor(-2.0)) == inner(torch.tensor(2.0)):
        expected |= {"sign"}
    assert groups == expected


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "maximum": lambda h: torch.maximum(h, 0.5 * h),
    "minimum": lambda h: torch.minimum(h, torch.zeros_like(h)),
    "max of two": lambda h: torch.max(h, 2 * h),
    "max over channels": lambda h: h.max(1, keepdim=True).values.expand_as(h),
    "min over examples": lambda h: h.min(0, keepdim=True).values + h,
    "comparison": lambda h: (h > 0.3) * h,
    "comparisons": lambda h: ((h >= 0) & (h <= 1)) * h + (h < 2) * 1.0,
    "either": lambda h: torch.logical_or(h > 1, h < 0) * h,
    "deviations": lambda h: h * torch.std_mean(h, 1, keepdim=True)[0],
    "logic": lambda h: (torch.logical_and(h > 0, h != 1) | (h == 2)) * h,
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "where with a constant": lambda h: torch.where(h > 0, h, torch.ones_like(h)),
    "masked by position": lambda h: h.masked_fill(torch.tensor([True, False, False, True, False, False]), 0.0),
    "masked by sign": lambda h: h.masked_fill(h > 0, -1.0),
    "clamped": lambda h: h.clamp(-0.5, 0.5) + h.clamp(max=0.0) + h.clamp(min=0.0),
    "clamped to one side": lambda h: h.clamp_min(0.3) + h.clamp_max(0.4),
    "hardtanh": nn.functional.hardtanh,
    "power": lambda h: h**3 + h**1,
    "even power": lambda h: h**2,
    "fractional power": lambda h: h.abs() ** 0.5,
    "power of a tensor": lambda h: h.abs() ** h,
    "quotient": lambda h: h / h.norm(dim=1, keepdim=True),
    "quotient of channels": lambda h: h / (1 + h.square()),
    "floored quotient": lambda h: torch.div(h, 0.3, rounding_mode="floor"),
    "rest": lambda h: torch.fmod(h, 0.7) + torch.remainder(h, 0.7) + torch.floor_divide(h, 0.7),
    "angle": lambda h: torch.atan2(h, 1 + h.abs()),
    "difference": lambda h: torch.rsub(h, h.mean(0), alpha=0.5),
    "interpolation": lambda h: torch.lerp(h, 3 * h, 0.3),
    "standard deviation": lambda h: h + h.std(0),
    "variance": lambda h: h * torch.var_mean(h, 1, keepdim=True)[0],
    "sum of everything": lambda h: h * h.sum(),
    "extremes": lambda h: h * (h.amax(1, keepdim=True) - h.amin((0, 1))),
    "product": lambda h: h * h.prod(1, keepdim=True),
    "soft maximum": lambda h: h + h.logsumexp(1, keepdim=True) + h.logsumexp(0),
    "log of softmax": lambda h: h.log_softmax(1) * h.softmax(0),
    "any and all": lambda h: h * (h > 0).any(0) + (h > -1).all(1, keepdim=True) * 1.0,
    "matrix products": lambda h: h @ (h.t().mm(h)),
    "matrix and vector": lambda h: h * torch.mv(h, h[0]).unsqueeze(1),
    "dot product": lambda h: h * torch.dot(h[0], h[1]),
    "added products": lambda h: (
        torch.addmm(h, torch.eye(4, dtype=h.dtype), h, beta=0.5) + torch.addmv(h[:, 0], h, h[0]).unsqueeze(1)
    ),
    "batched products": lambda h: torch.baddbmm(
        h.unsqueeze(0), torch.eye(4, dtype=h.dtype).unsqueeze(0), h.unsqueeze(0)
    )[0],
    "outer product": lambda h: torch.outer(h.mean(0), torch.arange(4.0, dtype=h.dtype)).t() + h,
    "einsum of one": lambda h: torch.einsum("bc->cb", h).t() * torch.einsum("bc->b", h).unsqueeze(1),
    "rolled by examples": lambda h: h.roll(1, 0) + h.flip(0),
    "narrow": lambda h: torch.cat([h.narrow(1, 2, 4), h.narrow(1, 0, 2)], 1),
    "selected": lambda h: h.index_select(1, torch.tensor([1, 0, 2, 3, 4, 5])),
    "expanded": lambda h: h.unsqueeze(1).expand(-1, 3, -1).mean(1) + h.expand_as(h),
    "tiled": lambda h: h.tile(1, 2)[:, :6] * 1.0,
    "moved axes": lambda h: h.movedim(0, 1).swapaxes(0, 1).T.mT.unsqueeze(2).squeeze(2),
    "splits": lambda h: torch.cat([*reversed(h.split(2, 1)), *h.tensor_split(3, 1)], 1),
    "unbound": lambda h: torch.stack(h.unbind(1), 1),
    "reshaped": lambda h: h.reshape(4, 2, 3).view(4, 3, 2).flatten(1).unflatten(1, (6,)),
    "padded at the end": lambda h: nn.functional.pad(h, (0, 2)),
    "gated": lambda h: nn.functional.glu(h),
    "rms norm": lambda h: nn.functional.rms_norm(h, (6,)),
    "local response": lambda h: nn.functional.local_response_norm(h.unsqueeze(2), 3).squeeze(2),
}
IMAGE_OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        f"{mode} interpolation": partial(nn.functional.interpolate, scale_factor=2.0, mode=mode)
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic")
    },
    "antialiased": partial(nn.functional.interpolate, size=(3, 3), mode="bilinear", antialias=True),
    "bicubic, antialiased": partial(nn.functional.interpolate, size=(3, 3), mode="bicubic", antialias=True),
    "pools": lambda h: nn.functional.avg_pool2d(h, 2) + nn.functional.max_pool2d(h, 2),
    "adaptive pools": lambda h: nn.functional.adaptive_avg_pool2d(h, 2) + nn.functional.adaptive_max_pool2d(h, 2),
    "pool with indices": lambda h: nn.functional.max_pool2d(h, 2, return_indices=True)[0],
    "reflected": lambda h: nn.functional.pad(h, (1, 1, 1, 1), mode="reflect"),
    "replicated": lambda h: nn.functional.pad(h, (1, 1, 1, 1), mode="replicate"),
    "circular": lambda h: nn.functional.pad(h, (1, 1, 1, 1), mode="circular"),
    "padded with ones": lambda h: nn.functional.pad(h, (1, 1), value=1.0),
    "unshuffled": lambda h: nn.functional.pixel_unshuffle(h, 2),
    "flattened lines": lambda h: nn.functional.max_pool1d(nn.functional.avg_pool1d(h.flatten(2), 2), 2),
    "interpolated lines": lambda h: nn.functional.interpolate(h.flatten(2), scale_factor=2.0, mode="linear"),
    "interpolated lines, nearest": lambda h: nn.functional.interpolate(h.flatten(2), scale_factor=2.0),
    "exactly nearest lines": lambda h: nn.functional.interpolate(h.flatten(2), scale_factor=2.0, mode="nearest-exact"),
    "volumes": lambda h: nn.functional.interpolate(h.unsqueeze(2), scale_factor=2.0, mode="trilinear"),
    "nearest volumes": lambda h: nn.functional.interpolate(h.unsqueeze(2), scale_factor=2.0),
    "exactly nearest volumes": lambda h: nn.functional.interpolate(
        h.unsqueeze(2), scale_factor=2.0, mode="nearest-exact"
    ),
    "pooled volumes": lambda h: nn.functional.max_pool3d(nn.functional.avg_pool3d(h.unsqueeze(2), 1), 1),
    "replicated lines": lambda h: nn.functional.pad(h.flatten(2), (1, 1), mode="replicate"),
    "reflected lines": lambda h: nn.functional.pad(h.flatten(2), (1, 1), mode="reflect"),
    "replicated volumes": lambda h: nn.functional.pad(h.unsqueeze(2), (1, 1, 1, 1, 1, 1), mode="replicate"),
}
"""Functions of hidden channels, the first of vectors ``[4, N]``, the second of images ``[3, N, 4, 4]``."""


def with_operation(function: Callable[[Tensor], Tensor], first: nn.Module, inputs: Tensor) -> nn.Module:
    """``first``, the function, and a linear layer that reads all that it gives."""
    size = function(first(inputs)).flatten(1).shape[1]
    return Model(lambda m, x: m.b(function(m.a(x)).flatten(1)), a=first, b=nn.Linear(size, 2))


def operation_models() -> dict[str, tuple[nn.Module, Tensor]]:
    vectors, images = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    return {
        name: (with_operation(f, nn.Linear(3, N).double(), vectors).double(), vectors) for name, f in OPERATIONS.items()
    } | {
        name: (with_operation(f, nn.Conv2d(2, N, 3, padding=1).double(), images).double(), images)
        for name, f in IMAGE_OPERATIONS.items()
    }


@pytest.mark.parametrize("name", [*OPERATIONS, *IMAGE_OPERATIONS])
def test_operations_are_followed_rightly(name: str) -> None:
    certified(*build(operation_models)[name])


def test_every_operation_with_a_rule_is_met_by_some_test_model(monkeypatch: pytest.MonkeyPatch) -> None:
    met: set[str] = set()

    def watched(name: str, rule: Rule) -> Rule:
        def apply(call: Call, analysis: Any) -> Any:
            met.add(name)
            return rule(call, analysis)

        return apply

    monkeypatch.setattr(
        "teleport_optim.symmetry.search.analyse.RULES",
        {name: watched(name, rule) for name, rule in operations.RULES.items()},
    )
    for factory, make_inputs, _ in MODELS.values():
        find_symmetries(build(factory), build(make_inputs), groups=["permutation"])
    for model, inputs in [*build(operation_models).values(), *layer_models()]:
        find_symmetries(model, inputs, groups=["permutation"])
    missed = set(operations.RULES) - met - operations.CREATIONS - operations.COPIES - set(ELEMENTWISE)
    assert sorted(missed) == []
