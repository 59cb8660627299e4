"""What is found: layer by layer, leg by leg, and for random models."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from strategies import Sample, legs_of, reasons_of, sequential_models
from torch import Tensor, nn

from teleport_optim.symmetry import find_symmetries, verify_symmetries
from teleport_optim.symmetry.rules import RULES

ALL, HOMOGENEOUS, ODD, ANY = "permutation scaling sign", "permutation scaling", "permutation sign", "permutation"
ModelFactory = Callable[[], nn.Module]


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
            *(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(16, 2)),
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
                f"4 {W0} {B0} 2.running_mean[0x2]^+1 2.running_var[0x2]^+2 2.weight[0x2]^+1 2.bias[0x2]^+1 "
                "4.weight[1x2]^-1"
            ),
            "0:sign": f"4 {W0} {B0} 2.running_mean[0x2]^+1 2.running_var[0x2]^+2 2.weight[0x2]^-1",
        },
    ),
    "separable": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 2, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1)
        ),
        torch.randn(2, 3, 4, 4),
        {
            "0:permutation": f"4 {W0} {B0} 2.weight[0x2]^-1 2.bias[0x2]^+1 4.weight[1x2]^-1",
            "0:scaling": f"4 {W0} {B0} 2.weight[0x2]^-1",
            "2:scaling": "8 2.weight[0]^+1 2.bias[0]^+1 4.weight[1]^-1",
        },
    ),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 6, 1, groups=2), nn.Sigmoid(), nn.Conv1d(6, 2, 1)
        ),
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
        lambda: nn.Sequential(
            nn.Conv1d(3, 4, 1), nn.GELU(), nn.ConvTranspose1d(4, 8, 1, groups=4), nn.GELU(), nn.Conv1d(8, 1, 1)
        ),
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


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_layers_have_no_symmetries() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(8, 0), nn.Flatten(), nn.Linear(0, 2))
    spec = find_symmetries(model)
    assert {symmetry.writers[0].name for symmetry in spec} == {"0.weight"}
    assert spec.refusals == ()
