"""What is found, leg by leg, and for random models."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from teleport_optim.symmetry import SymmetrySpec, find_symmetries, verify_symmetries
from teleport_optim.testing import Sample, sequential_models
from tests.helpers.specs import legs_of

pytestmark = pytest.mark.private_torch

ModelFactory = Callable[[], nn.Module]


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
            "0:permutation": f"4 {W0} {B0} 2.weight[0x2]^+1 2.bias[0x2]^+1 4.weight[1x2]^-1",
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
            "0:permutation[0]": f"4 {W0} {B0} 3.weight[1|0:0+1]^-1",
            "0:permutation[1]": "2 0.weight[0+4]^+1 0.bias[0+4]^+1 3.weight[1|0:1+1]^-1",
            "0:permutation[2]": "2 0.weight[0+6]^+1 0.bias[0+6]^+1 3.weight[1+2|0:1+1]^-1",
            "0:permutation[3]": "4 0.weight[0+8]^+1 0.bias[0+8]^+1 3.weight[1|0:2+1]^-1",
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
        {"0:permutation": f"4 {W0} {B0} 2.weight[0]^+1 2.bias[0x2]^+1 4.weight[1x2]^-1"},
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
    spec = find_symmetries(model, inputs)
    assert legs_of(SymmetrySpec(tuple(s for s in spec if s.group.name != "linear"))) == expected
    assert spec.refusals == ()
    assert verify_symmetries(model, spec, inputs).ok


def test_an_unflatten_of_flattened_channels_gives_them_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.ReLU(), nn.Unflatten(1, (8, 1, 2)), nn.Conv2d(8, 1, 1))
    inputs = torch.randn(2, 3, 2, 2)
    spec = find_symmetries(model, inputs)
    assert legs_of(spec)["0:scaling"] == f"4 {W0} {B0} 4.weight[1x2]^-1"
    assert verify_symmetries(model, spec, inputs).ok


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
    assert "0:scaling" not in legs_of(find_symmetries(model, torch.randn(3, 3, 5, 5)))
    spec = find_symmetries(model, torch.randn(3, 3, 5, 5), include_approximate=True)
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


# ----------------------------------------------------------------------------------- what the shapes of inputs decide


def test_example_inputs_settle_what_batch_norm_normalises() -> None:
    """On (batch, channels, length) BatchNorm1d works on axis 1, while Linear writes the last axis."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    assert {"0:permutation", "1:scaling"} <= set(legs_of(find_symmetries(model, torch.randn(5, 4))))
    assert legs_of(find_symmetries(model, torch.randn(5, 4, 4))) == {}


def test_inputs_without_a_batch_axis() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(0), nn.Linear(16, 2))
    inputs = torch.randn(3, 2, 2)
    spec = find_symmetries(model, inputs)
    assert legs_of(spec)["0:scaling"] == f"4 {W0} {B0} 3.weight[1x4]^-1"
    assert verify_symmetries(model, spec, inputs).ok


def test_a_pool_straight_after_a_linear_layer_pools_over_features() -> None:
    """On (batch, features) it takes the batch for channels and mixes the features."""
    for layer in (nn.MaxPool1d(2, 1), nn.AdaptiveAvgPool1d(4)):
        model = nn.Sequential(nn.Linear(4, 4), layer, nn.ReLU(), nn.LazyLinear(2))
        inputs = torch.randn(3, 4)
        model(inputs)
        spec = find_symmetries(model, inputs)
        assert not any(symmetry.group.name == "permutation" for symmetry in spec)
        assert verify_symmetries(model, spec, inputs).ok


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
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(5, 2)), torch.randn(2, 3), "cannot take example_inputs"),
        (nn.Sequential(nn.Linear(3, 4)), (torch.randn(2, 3), torch.randn(2, 3)), "positional arguments"),
        (nn.Bilinear(3, 4, 2), torch.randn(2, 3), "missing 1 required positional argument"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model: nn.Module, inputs: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_symmetries(model, inputs)


@pytest.mark.parametrize(("model", "inputs"), [("Linear", torch.zeros(1)), (nn.Linear(2, 2), [torch.zeros(1, 2)])])
def test_other_types_are_refused(model: nn.Module, inputs: object) -> None:
    with pytest.raises(TypeError, match=r"find_symmetries takes|must be a tensor, a tuple"):
        find_symmetries(model, inputs)  # type: ignore[arg-type]
