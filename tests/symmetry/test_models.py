"""Symmetries of models of every kind: what is found holds, and what is not understood is refused."""

import copy
import random

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from teleport_optim.symmetry import find_symmetries
from tests.helpers.odd_models import MODELS
from tests.helpers.small_models import Model, N, build, certified

pytestmark = pytest.mark.private_torch

# ------------------------------------------------------------------------------------------------------- odd models


@pytest.mark.parametrize("name", MODELS)
def test_odd_models_are_invariant_or_refused(name: str) -> None:
    factory, make_inputs, expected = MODELS[name]
    model, inputs = build(factory), build(make_inputs)
    if expected == "refused":
        spec = find_symmetries(model, inputs)
        assert len(spec) == 0
        assert spec.refusals
        return
    spec = certified(model, inputs)
    if expected is not None:
        assert " ".join(symmetry.id for symmetry in spec) == expected


def test_there_are_many_odd_models() -> None:
    assert len(MODELS) >= 60


@pytest.mark.parametrize("name", ["attention with packed projections", "einsum attention"])
def test_attention_has_its_own_groups(name: str) -> None:
    """Queries and keys, values and outputs: two heads of four channels, exchanged, scaled, mixed."""
    factory, make_inputs, _ = MODELS[name]
    model, inputs = build(factory), build(make_inputs)
    spec = certified(model, inputs)
    mixed = [symmetry for symmetry in spec.of_group("linear") if symmetry.size == 4]
    assert len(mixed) == 4
    assert {leg.degree for symmetry in mixed[:2] for leg in symmetry.legs} == {1, -1}
    permuted = [symmetry.size for symmetry in spec.of_group("permutation")]
    assert permuted.count(4) == 4


@pytest.mark.parametrize("is_grouped", [False, True])
def test_whole_heads_are_exchanged(is_grouped: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    spec = certified(layer, torch.randn(3, 5, 8))
    (heads,) = [symmetry for symmetry in spec if symmetry.id == "self_attn:heads"]
    assert heads.size == 4
    assert {leg.repeat for leg in heads.legs} == {2}


# ----------------------------------------------------------------------------------------------------- known networks


@pytest.mark.parametrize(
    ("name", "size", "least"),
    [
        ("resnet18", 64, 0.999),
        ("shufflenet_v2_x0_5", 64, 0.998),
        ("mobilenet_v3_small", 64, 0.999),
        ("densenet121", 64, 0.999),
        ("regnet_y_400mf", 64, 0.999),
        ("squeezenet1_1", 64, 0.998),
    ],
)
def test_classifiers_of_torchvision_hold(name: str, size: int, least: float) -> None:
    model = build(lambda: torchvision.models.get_model(name, weights=None))
    spec = certified(model, torch.randn(3, 3, size, size))
    assert spec.of_group("permutation").share_of(model) > least
    assert not spec.refusals


def test_vision_transformers_have_the_symmetries_of_attention() -> None:
    model = build(lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=3))
    spec = certified(model, torch.randn(2, 3, 32, 32))
    assert spec.of_group("permutation").share_of(model) > 0.99
    assert len([symmetry for symmetry in spec if "heads" in symmetry.id]) == 2
    assert len(spec.of_group("linear")) == 8


def test_swin_transformers_have_the_symmetries_of_attention() -> None:
    model = build(
        lambda: torchvision.models.SwinTransformer(
            [4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.1, num_classes=3
        )
    )
    spec = certified(model, torch.randn(2, 3, 32, 32))
    assert spec.of_group("permutation").share_of(model) > 0.99
    assert len([symmetry for symmetry in spec if "heads" in symmetry.id]) >= 4
    assert spec.of_group("linear").share_of(model) > 0.2


def test_auxiliary_heads_of_training_are_honoured() -> None:
    """Read in training only, they would be missed by a look at the evaluation graph."""
    model = build(lambda: torchvision.models.googlenet(weights=None, init_weights=False, num_classes=5))
    spec = certified(model, torch.randn(2, 3, 64, 64))
    assert any("aux1" in leg.name for symmetry in spec for leg in symmetry.legs)


# -------------------------------------------------------------------------------------------- the model stays as it was


def test_a_search_changes_nothing() -> None:
    model = build(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(16, 2)
        )
    )
    model.train()
    model[1].eval()
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    calls = []
    model[3].register_forward_hook(lambda *arguments: calls.append(arguments))
    inputs = torch.randn(2, 3, 4, 4)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    grads = {name: param.grad.clone() for name, param in model.named_parameters()}
    original = inputs.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    attention = torch.backends.mha.get_fastpath_enabled()
    spec = find_symmetries(model, inputs)
    assert "hooks" in " ".join(refusal.reason for refusal in spec.refusals)
    assert calls == []
    assert torch.equal(inputs, original)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert attention == torch.backends.mha.get_fastpath_enabled()
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, param in model.named_parameters():
        assert torch.equal(param.grad, grads[name])


def test_the_result_does_not_depend_on_dtype_device_mode_or_batch() -> None:
    model = build(lambda: torchvision.models.resnet18(num_classes=5))
    expected = find_symmetries(model, torch.randn(2, 3, 32, 32))
    for changed, inputs in (
        (copy.deepcopy(model).bfloat16(), torch.zeros(2, 3, 32, 32, dtype=torch.bfloat16)),
        (copy.deepcopy(model).to("meta"), torch.zeros(2, 3, 32, 32)),
        (copy.deepcopy(model).eval().requires_grad_(False), torch.zeros(7, 3, 64, 64)),
        (copy.deepcopy(model).to(memory_format=torch.channels_last), torch.zeros(2, 3, 32, 32)),
    ):
        assert find_symmetries(changed, inputs) == expected


def test_a_buffer_that_state_dicts_leave_out_does_not_move() -> None:
    def make(persistent: bool) -> nn.Module:
        model = Model(lambda m, x: m.b(m.a(x) + m.shift), a=nn.Linear(3, N), b=nn.Linear(N, 2))
        model.register_buffer("shift", torch.randn(N), persistent=persistent)
        return model

    assert {symmetry.id for symmetry in certified(make(True), torch.randn(4, 3))} >= {"a:permutation"}
    assert len(certified(make(False), torch.randn(4, 3))) == 0
