"""What is refused, where and why: the search fails closed."""

import re
from collections.abc import Callable

import pytest
import torch
from strategies import legs_of, reasons_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from teleport_optim.symmetry import SymmetrySpec, find_symmetries

ModelFactory = Callable[[], nn.Module]


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
    "embedding with max_norm": (
        lambda: nn.Sequential(nn.Embedding(3, 4, max_norm=1.0), nn.Linear(4, 2)), "0", "max_norm"
    ),
    "pool over features": (between(nn.MaxPool1d(2, 1, 0)), "1", "takes inputs of 3 axes"),
    "adaptive pool over features": (between(nn.AdaptiveAvgPool1d(4)), "1", "lead to 2"),
    "pad of features": (between(nn.ZeroPad1d(0)), "1", "takes inputs of 3 axes"),
    "linear on pixels": (lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4)), "1", "reads axis -1"),
    "convolution on features": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv1d(2, 4, 1)), "1", "takes inputs of 3 axes"),
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
        "flattens the axes 2 to 3 of the 2",
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
        lambda: nn.Sequential(
            nn.Conv1d(3, 3, 1), nn.Flatten(), nn.BatchNorm1d(6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 1)
        ),
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


@pytest.mark.parametrize("layer", [nn.MaxPool1d(2, 1), nn.AdaptiveAvgPool1d(4), nn.ZeroPad1d(0)])
def test_a_pool_straight_after_a_linear_layer_pools_over_features(layer: nn.Module) -> None:
    """On (batch, features) it takes the batch for channels and mixes the features."""
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.ReLU(), nn.LazyLinear(2))
    model(torch.randn(3, 4))
    spec = find_symmetries(model, torch.randn(3, 4))
    assert len(spec) == 0
    assert "mixes the channels of '0', which lie on axis -1" in reasons_of(spec)["1"]


def test_a_convolution_after_a_linear_layer_reads_another_axis() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Conv1d(4, 2, 1))
    spec = find_symmetries(model, torch.randn(3, 2, 4))
    assert set(legs_of(spec)) == {"2:permutation", "2:scaling"}
    assert "reads axis -2 of its input, but the channels of '0' lie on axis -1" in reasons_of(spec)["2"]


def test_a_contradiction_drops_what_was_found_before() -> None:
    """If the sizes do not fit then the inputs are not what was assumed, and nothing found so far is certain."""
    head = (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
    assert len(find_symmetries(nn.Sequential(*head, nn.ReLU(), nn.Linear(4, 2)))) > 0
    model = nn.Sequential(*head, nn.Flatten(), nn.Linear(16, 2))  # runs on (batch, 4, 4) only
    spec = find_symmetries(model)
    assert len(spec) == 0
    assert "pass example_inputs" in reasons_of(spec)["5"]
    assert len(find_symmetries(model, torch.randn(3, 4, 4))) == 0
