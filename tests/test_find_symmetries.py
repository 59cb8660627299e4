"""What is found: layer by layer, leg by leg, and for random models; and what is refused, with its reason."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from strategies import Sample, sequential_models
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from teleport_optim.symmetry import SymmetrySpec, find_symmetries, verify_symmetries
from teleport_optim.symmetry.rules import RULES

ALL, HOMOGENEOUS, ODD, ANY = "permutation scaling sign", "permutation scaling", "permutation sign", "permutation"
ModelFactory = Callable[[], nn.Module]


def legs_of(spec: SymmetrySpec) -> dict[str, str]:
    """``"size legs"`` of every site, in the notation in which a spec prints."""
    rows = [line.split() for line in str(SymmetrySpec(spec.symmetries)).splitlines()[1:]]
    return {row[0]: " ".join([row[1], *row[3:]]) for row in rows}


def reasons_of(spec: SymmetrySpec) -> dict[str, str]:
    return {refusal.name: refusal.reason for refusal in spec.refusals}


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
    ("LPPool{}", (2, 2), ANY),
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


def check_between(first: nn.Module, layer: nn.Module, last: nn.Module, expected: str, inputs: Tensor) -> None:
    model = nn.Sequential(first, copy.deepcopy(layer), last)
    names = {word if ":" in word else f"0:{word}" for word in expected.split()}
    for spec in (find_symmetries(model), find_symmetries(model, inputs)):
        assert {symmetry.id for symmetry in spec} == names
        assert spec.refusals == ()
        assert verify_symmetries(model, spec, inputs).ok, str(verify_symmetries(model, spec, inputs))


def test_every_rule_is_in_a_table() -> None:
    seen = {type(module) for layer, _ in VECTOR_LAYERS + PLANE_LAYERS for module in layer.modules()}
    seen |= {getattr(nn, stem.format(f"{n}d")) for stem, _, _ in IMAGE_LAYERS for n in (1, 2, 3)}
    assert set(RULES) - seen == {nn.Embedding}


# ---------------------------------------------------------------------------------- the exact legs of chosen models

W0, B0 = "0.weight[0]^+1", "0.bias[0]^+1"
MODELS: dict[str, tuple[ModelFactory, Tensor, dict[str, str]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
        torch.randn(5, 3),
        {"0:permutation": f"4 {W0} {B0} 2.weight[1]^-1", "0:scaling": f"4 {W0} {B0} 2.weight[1]^-1"},
    ),
    "flattened image": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)),
        torch.randn(5, 3, 2, 2),
        {"1:permutation": "4 1.weight[0]^+1 3.weight[1]^-1", "1:sign": "4 1.weight[0]^+1 3.weight[1]^-1"},
    ),
    "nested, and one channel": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 1), nn.ReLU()), nn.Sequential(nn.Linear(1, 2))),
        torch.randn(5, 3),
        {"0.0:scaling": "1 0.0.weight[0]^+1 0.0.bias[0]^+1 1.0.weight[1]^-1"},
    ),
    "batch norm, pool, flatten": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)
        ),
        torch.randn(3, 3, 6, 6),
        {
            "0:permutation": (
                f"4 {W0} 1.running_mean[0]^+1 1.running_var[0]^+2 1.weight[0]^+1 1.bias[0]^+1 5.weight[1x4]^-1"
            ),
            "0:sign": f"4 {W0} 1.running_mean[0]^+1 1.running_var[0]^+2 1.weight[0]^-1",
            "1:scaling": "4 1.weight[0]^+1 1.bias[0]^+1 5.weight[1x4]^-1",
        },
    ),
    "batch norm after flatten": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 2)),
        torch.randn(3, 3, 2),
        {
            "0:permutation": (
                f"4 {W0} {B0} 2.running_mean[0x2]^+1 2.running_var[0x2]^+2 2.weight[0x2]^+1 2.bias[0x2]^+1 4.weight[1x2]^-1"
            ),
            "0:sign": f"4 {W0} {B0} 2.running_mean[0x2]^+1 2.running_var[0x2]^+2 2.weight[0x2]^-1",
        },
    ),
    "separable": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 2, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        torch.randn(2, 3, 4, 4),
        {
            "0:permutation": f"4 {W0} {B0} 2.weight[0x2]^-1 2.bias[0x2]^+1 4.weight[1x2]^-1",
            "0:scaling": f"4 {W0} {B0} 2.weight[0x2]^-1",
            "2:scaling": "8 2.weight[0]^+1 2.bias[0]^+1 4.weight[1]^-1",
        },
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 6, 1, groups=2), nn.Sigmoid(), nn.Conv1d(6, 2, 1)),
        torch.randn(2, 3, 4),
        {
            "0:permutation[0]": f"4 {W0} {B0} 2.weight[1|0:0+3]^-1",
            "0:permutation[1]": "4 0.weight[0+4]^+1 0.bias[0+4]^+1 2.weight[1|0:3+3]^-1",
            "0:scaling[0]": f"4 {W0} {B0} 2.weight[1|0:0+3]^-1",
            "0:scaling[1]": "4 0.weight[0+4]^+1 0.bias[0+4]^+1 2.weight[1|0:3+3]^-1",
            "2:permutation[0]": "3 2.weight[0]^+1 2.bias[0]^+1 4.weight[1]^-1",
            "2:permutation[1]": "3 2.weight[0+3]^+1 2.bias[0+3]^+1 4.weight[1+3]^-1",
        },
    ),
    "groups of two sizes": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 12, 1), nn.GroupNorm(2, 12, affine=False), nn.GELU(), nn.Conv1d(12, 3, 1, groups=3)
        ),
        torch.randn(2, 3, 4),
        {
            f"0:permutation[{k}]": (
                f"2 0.weight[0{f'+{2 * k}' if k else ''}]^+1 0.bias[0{f'+{2 * k}' if k else ''}]^+1 "
                f"3.weight[1{'+2' if k % 2 else ''}|0:{k // 2}+1]^-1"
            )
            for k in range(6)
        },
    ),
    "decoder": (
        lambda: nn.Sequential(
            nn.Linear(3, 32), nn.ReLU(), nn.Unflatten(1, (8, 2, 2)), nn.ConvTranspose2d(8, 4, 2), nn.Tanh(),
            nn.ConvTranspose2d(4, 4, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 1, 1),
        ),
        torch.randn(2, 3),
        {
            "0:permutation": "8 0.weight[0x4]^+1 0.bias[0x4]^+1 3.weight[0]^-1",
            "0:scaling": "8 0.weight[0x4]^+1 0.bias[0x4]^+1 3.weight[0]^-1",
            "3:permutation[0]": "2 3.weight[1]^+1 3.bias[0]^+1 5.weight[0]^-1",
            "3:permutation[1]": "2 3.weight[1+2]^+1 3.bias[0+2]^+1 5.weight[0+2]^-1",
            "3:sign": "4 3.weight[1]^+1 3.bias[0]^+1 5.weight[0]^-1",
            "5:permutation[0]": "2 5.weight[1|0:0+2]^+1 5.bias[0]^+1 7.weight[1]^-1",
            "5:permutation[1]": "2 5.weight[1|0:2+2]^+1 5.bias[0+2]^+1 7.weight[1+2]^-1",
            "5:scaling[0]": "2 5.weight[1|0:0+2]^+1 5.bias[0]^+1 7.weight[1]^-1",
            "5:scaling[1]": "2 5.weight[1|0:2+2]^+1 5.bias[0+2]^+1 7.weight[1+2]^-1",
        },
    ),
    "transposed, one output per group": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 2, 1, groups=2), nn.ReLU(), nn.Conv1d(2, 1, 1)),
        torch.randn(2, 4, 3),
        {"0:scaling": "2 0.weight[0x2]^+1 0.bias[0]^+1 2.weight[1]^-1"},
    ),
    "transposed depthwise": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 1), nn.GELU(), nn.ConvTranspose1d(4, 8, 1, groups=4), nn.GELU(), nn.Conv1d(8, 1, 1)),
        torch.randn(2, 3, 4),
        {"0:permutation": f"4 {W0} {B0} 2.weight[0]^-1 2.bias[0x2]^+1 4.weight[1x2]^-1"},
    ),
    "super-resolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 12, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(3, 1, 1)),
        torch.randn(2, 3, 4, 4),
        {
            "0:permutation": "3 0.weight[0x4]^+1 0.bias[0x4]^+1 3.weight[1]^-1",
            "0:scaling": "3 0.weight[0x4]^+1 0.bias[0x4]^+1 3.weight[1]^-1",
        },
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)),
        torch.randint(7, (2, 3)),
        {
            "0:permutation": "4 0.weight[1]^+1 1.weight[0]^+1 1.bias[0]^+1 2.weight[1]^-1",
            "1:scaling": "4 1.weight[0]^+1 1.bias[0]^+1 2.weight[1]^-1",
            "1:sign": "4 1.weight[0]^+1 1.bias[0]^+1 2.weight[1]^-1",
            "2:permutation": "6 2.weight[0]^+1 2.bias[0]^+1 4.weight[1]^-1",
        },
    ),
    "slopes after flatten": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.PReLU(8), nn.Linear(8, 2)),
        torch.randn(3, 3, 2),
        {
            "0:permutation": f"4 {W0} {B0} 2.weight[0x2]^+1 3.weight[1x2]^-1",
            "0:scaling": f"4 {W0} {B0} 3.weight[1x2]^-1",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_legs_of_chosen_models(name: str) -> None:
    factory, inputs, expected = MODELS[name]
    model = factory()
    for spec in (find_symmetries(model), find_symmetries(model, inputs)):
        assert legs_of(spec) == expected
        assert list(legs_of(spec)) == list(expected)
        assert spec.refusals == ()
        assert verify_symmetries(model, spec, inputs).ok


def test_an_unflatten_of_flattened_channels_gives_them_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.ReLU(), nn.Unflatten(1, (8, 1, 2)), nn.Conv2d(8, 1, 1))
    inputs = torch.randn(2, 3, 2, 2)
    spec = find_symmetries(model, inputs)
    assert legs_of(spec)["0:scaling"] == f"4 {W0} {B0} 4.weight[1x2]^-1"
    assert verify_symmetries(model, spec, inputs).ok
    assert len(find_symmetries(model)) == 0
    assert "example_inputs" in reasons_of(find_symmetries(model))["3"]


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (nn.BatchNorm2d(4), f"4 ~ {W0} {B0} 1.running_mean[0]^+1 1.running_var[0]^+2"),
        (nn.InstanceNorm2d(4), f"4 ~ {W0} {B0}"),
        (nn.GroupNorm(4, 4), f"4 ~ {W0} {B0}"),
    ],
)
def test_approximate_scaling_is_listed_on_request(norm: nn.Module, expected: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert "0:scaling" not in legs_of(find_symmetries(model))
    spec = find_symmetries(model, include_approximate=True)
    assert legs_of(spec)["0:scaling"] == expected
    assert [symmetry.id for symmetry in spec if not symmetry.exact] == ["0:scaling"]
    report = verify_symmetries(model, spec, torch.randn(3, 3, 5, 5))
    assert report.ok
    assert 1e-10 < report.errors["0:scaling"] < 0.05


@given(sequential_models())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_all_that_is_found_in_random_models_holds(sample: Sample) -> None:
    spec = find_symmetries(sample.model, sample.inputs)
    report = verify_symmetries(sample.model, spec, sample.inputs)
    assert report.ok, f"{spec}\n{report}"


# ----------------------------------------------------------------------------------- shapes, with and without inputs


def test_example_inputs_settle_what_batch_norm_normalises() -> None:
    """On (batch, channels, length) BatchNorm1d works on axis 1, while Linear writes the last axis."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    assert {"0:permutation", "1:scaling"} <= set(legs_of(find_symmetries(model, torch.randn(5, 4))))
    spec = find_symmetries(model, torch.randn(5, 4, 4))
    assert legs_of(spec) == {}
    assert "normalises axis -2" in reasons_of(spec)["1"]
    assert not verify_symmetries(model, find_symmetries(model), torch.randn(5, 4, 4)).ok


def test_a_vector_may_become_an_image_first() -> None:
    model = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    assert find_symmetries(model) == find_symmetries(model, torch.randn(2, 16))
    assert set(legs_of(find_symmetries(model))) == {"1:permutation", "1:scaling"}


def test_unbatched_inputs_work_as_example_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(0), nn.Linear(16, 2))
    inputs = torch.randn(3, 2, 2)
    spec = find_symmetries(model, inputs)
    assert legs_of(spec)["0:scaling"] == f"4 {W0} {B0} 3.weight[1x4]^-1"
    assert verify_symmetries(model, spec, inputs).ok
    assert "interleaves" in reasons_of(find_symmetries(model))["2"]


def test_finding_leaves_everything_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU(inplace=True), nn.Linear(4, 2))
    model[3].eval()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    inputs, random_state = torch.ones(5, 3, requires_grad=True) * 2, torch.get_rng_state()
    find_symmetries(nn.Sequential(nn.ReLU(inplace=True), model), inputs - 4)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(inputs, torch.full((5, 3), 2.0))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_random_layer_does_not_move_the_random_state() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    model, inputs = nn.Sequential(nn.Linear(3, 4), Noise(), nn.Linear(4, 2)), torch.randn(2, 3)
    random_state = torch.get_rng_state()
    find_symmetries(model, inputs)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (
            nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(5, 2)),
            torch.randn(2, 3),
            r"layer '2' \(Linear\).*\(2, 4\)",
        ),
        (nn.Sequential(nn.Linear(3, 4)), (torch.randn(2, 3), torch.randn(2, 3)), "takes one input"),
        (nn.Bilinear(3, 4, 2), torch.randn(2, 3), "Bilinear"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model: nn.Module, inputs: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_symmetries(model, inputs)


@pytest.mark.parametrize(("model", "inputs"), [("Linear", None), (nn.Linear(2, 2), [torch.zeros(1, 2)])])
def test_other_types_are_refused(model: nn.Module, inputs: object) -> None:
    with pytest.raises(TypeError, match=r"find_symmetries takes|must be a tensor or a tuple"):
        find_symmetries(model, inputs)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- what is refused


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Renamed(nn.Sequential):
    """Runs like its parent."""


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def changed(change: Callable[[nn.Sequential], object]) -> ModelFactory:
    def build() -> nn.Sequential:
        model = mlp()
        change(model)
        return model

    return build


def share_parameter(model: nn.Sequential) -> None:
    model[2].weight = model[0].weight


def share_storage(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(model[0].weight.detach().t())


def replace_forward(model: nn.Sequential) -> None:
    model[2].forward = torch.sin


def between(layer: nn.Module) -> ModelFactory:
    return lambda: nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4))


REFUSED: dict[str, tuple[ModelFactory, str, str]] = {
    "unknown layer": (between(nn.Softmax(-1)), "1", "Softmax is not a layer type"),
    "unknown root": (lambda: nn.TransformerEncoderLayer(4, 1), "(root)", "TransformerEncoderLayer is not"),
    "subclass of a layer": (between(Doubling(4, 4)), "1", "Doubling is not a layer type"),
    "subclass of Sequential": (between(Residual(nn.Linear(4, 4))), "1", "overrides what nn.Sequential does"),
    "attention": (between(nn.MultiheadAttention(4, 1)), "1", "MultiheadAttention is not"),
    "forward hook": (changed(lambda m: m[2].register_forward_hook(lambda *_: None)), "2", "has forward hooks"),
    "pre-hook": (changed(lambda m: m[1].register_forward_pre_hook(lambda *_: None)), "1", "has forward hooks"),
    "hook on the root": (changed(lambda m: m.register_forward_hook(lambda *_: None)), "(root)", "has forward hooks"),
    "replaced forward": (changed(replace_forward), "2", "its forward was replaced"),
    "weight norm": (changed(lambda m: parametrizations.weight_norm(m[2])), "2", "parametrized"),
    "spectral norm": (changed(lambda m: parametrizations.spectral_norm(m[2])), "2", "parametrized"),
    "old spectral norm": (changed(lambda m: nn.utils.spectral_norm(m[2])), "2", "has forward hooks"),
    "pruning": (changed(lambda m: prune.l1_unstructured(m[2], "weight", 0.5)), "2", "has forward hooks"),
    "frozen weight": (changed(lambda m: m[2].weight.requires_grad_(False)), "2", r"frozen .*: 2.weight"),
    "frozen bias": (changed(lambda m: m[2].bias.requires_grad_(False)), "2", "frozen"),
    "shared parameter": (changed(share_parameter), "2", "shares memory: 2.weight and 0.weight"),
    "shared storage": (changed(share_storage), "0", "shares memory: 0.weight and 2.weight"),
    "lazy": (between(nn.LazyLinear(4)), "1", "run one batch"),
    "embedding with max_norm": (lambda: nn.Sequential(nn.Embedding(3, 4, max_norm=1.0), nn.Linear(4, 2)), "0", "max_norm"),
    "pool over features": (between(nn.MaxPool1d(2, 1, 0)), "1", "mixes the channels of '0', which lie on axis -1"),
    "adaptive pool over features": (between(nn.AdaptiveAvgPool1d(4)), "1", "mixes the channels"),
    "pad of features": (between(nn.ZeroPad1d(0)), "1", "mixes the channels"),
    "linear on pixels": (lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4)), "1", "reads axis -1"),
    "convolution on features": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv1d(2, 4, 1)), "1", "reads axis -2"),
    "wrong size": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(5, 2)), "2", "reads 5 entries"),
    "pool with indices": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2, return_indices=True), nn.Conv2d(4, 1, 1)),
        "1",
        "returns indices",
    ),
    "indivisible flatten": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(6, 2)),
        "2",
        "pass example_inputs",
    ),
    "flatten of a sequence": (
        lambda: nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2)),
        "1",
        "interleaves the channels",
    ),
    "flatten of no axis": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Flatten(2, 3), nn.Linear(4, 4)),
        "1",
        "depends on the number of axes",
    ),
    "unknown axes": (
        lambda: nn.Sequential(nn.Softmax(-1), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)),
        "2",
        "depends on the number of axes",
    ),
    "named unflatten": (
        changed(lambda m: (m.insert(1, nn.Unflatten(1, (4,))), setattr(m[1], "dim", "features"))),
        "1",
        "depends on the number of axes",
    ),
    "open unflatten": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (-1, 2)), nn.Conv1d(4, 4, 1)),
        "1",
        "spell out every size",
    ),
    "unflatten across channels": (
        lambda: nn.Sequential(nn.Conv1d(3, 3, 1), nn.Flatten(), nn.BatchNorm1d(6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 1)),
        "3",
        "cuts through the channels",
    ),
    "groups across channels": (
        lambda: nn.Sequential(nn.Conv1d(3, 2, 1), nn.Conv1d(2, 12, 1, groups=2), nn.Conv1d(12, 4, 1, groups=4)),
        "2",
        "groups cut through the 2 channels",
    ),
    "slopes on another axis": (
        lambda: nn.Sequential(nn.Embedding(5, 4), nn.PReLU(4), nn.Linear(4, 4)),
        "1",
        "one slope for each entry of axis -2",
    ),
    "shuffle of features": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.Linear(4, 4), nn.PixelShuffle(2)), "2", "mixes the channels"
    ),
    "image layer on features": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), "1", "takes inputs of 4 axes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_place_and_the_reason(name: str) -> None:
    factory, layer, reason = REFUSED[name]
    spec = find_symmetries(factory())
    assert layer in reasons_of(spec)
    assert re.search(reason, reasons_of(spec)[layer])
    crossing = {
        symmetry.id
        for symmetry in spec
        if any(leg.name.split(".")[0] < layer for leg in symmetry.legs)
        and any(leg.name.split(".")[0] > layer for leg in symmetry.legs)
    }
    # An unflatten may cut through the channels of one site and keep those of another whole.
    assert crossing == ({"2:scaling", "2:sign"} if name == "unflatten across channels" else set())


@pytest.mark.parametrize("name", ["frozen weight", "shared parameter", "shared storage", "weight norm", "forward hook"])
def test_nothing_acts_on_a_refused_layer(name: str) -> None:
    spec = find_symmetries(REFUSED[name][0]())
    assert not [leg for symmetry in spec for leg in symmetry.legs if leg.name.startswith("2.")]


def test_a_layer_used_twice_is_refused_unless_it_has_no_parameters() -> None:
    linear, activation = nn.Linear(4, 4), nn.ReLU()
    spec = find_symmetries(nn.Sequential(nn.Linear(4, 4), activation, linear, activation, linear, activation))
    assert len(spec) == 0
    assert "shares memory: 2.bias and 4.bias, 2.weight and 4.weight" in reasons_of(spec)["2"]
    spec = find_symmetries(nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 4), activation, nn.Linear(4, 4)))
    assert set(legs_of(spec)) == {"0:permutation", "0:scaling", "2:permutation", "2:scaling"}
    slope = nn.PReLU()
    assert len(find_symmetries(nn.Sequential(nn.Linear(4, 4), slope, nn.Linear(4, 4), slope, nn.Linear(4, 4)))) == 0


def test_views_of_one_flat_buffer_are_not_shared() -> None:
    model = mlp()
    expected = find_symmetries(model)
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())
    assert find_symmetries(model) == expected


def test_models_on_the_meta_device_are_read() -> None:
    assert find_symmetries(mlp().to("meta")) == find_symmetries(mlp())
    model = mlp().to("meta")
    share_parameter(model)
    assert "shares memory" in reasons_of(find_symmetries(model))["2"]


def test_a_lazy_model_is_understood_after_its_first_batch() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    inputs = torch.randn(2, 3)
    assert len(find_symmetries(model, inputs)) == 0
    model(inputs)
    assert set(legs_of(find_symmetries(model))) == {"0:permutation", "0:scaling"}


def test_a_sequential_that_only_has_another_name_is_walked() -> None:
    assert find_symmetries(Renamed(*mlp())).symmetries == find_symmetries(mlp()).symmetries


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Sequential(), nn.Sequential(nn.Linear(3, 2)), nn.ReLU()])
def test_models_without_hidden_channels_have_no_symmetries(model: nn.Module) -> None:
    assert find_symmetries(model) == SymmetrySpec()
