"""The action on parameters, gradients and optimizer slots, on models with every group and every form of leg."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from teleport_optim.symmetry import Element, Leg, Symmetry, SymmetrySpec, find_symmetries
from teleport_optim.symmetry.action import SlotKind, act, act_dual, channel_norms, transport
from teleport_optim.symmetry.groups import GROUPS
from teleport_optim.testing import Sample, sequential_models

MODELS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), (7, 3)),
    "grouped": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 8, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 2, groups=2), nn.ReLU()),
            *(nn.Conv2d(6, 12, 1, groups=6), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)),
        ),
        (5, 2, 4, 4),
    ),
    "decoder": (
        lambda: nn.Sequential(
            nn.Linear(3, 24), nn.ReLU(), nn.Unflatten(1, (6, 2, 2)), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.Tanh(),
            nn.Conv2d(4, 1, 1),
        ),
        (5, 3),
    ),
    "shuffled": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, 2), nn.ReLU(), nn.ChannelShuffle(2), nn.Conv2d(6, 4, 2, groups=2)),
            *(nn.Tanh(), nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 2)),
        ),
        (5, 2, 4, 4),
    ),
}  # fmt: skip
ONE_ENTRY = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Linear(1, 1), nn.Flatten(), nn.Linear(2, 2))
"""A bias of one entry is added along another axis than that of the channels, which linear maps must not mix then."""
TWO_NORMS = nn.Sequential(
    nn.Conv1d(1, 1, 1, bias=False),
    nn.ReplicationPad1d(1),
    nn.GroupNorm(1, 1, affine=False),
    nn.RMSNorm(3, eps=1e-5),
    nn.Flatten(),
    nn.Linear(3, 2),
)
"""The first norm leaves rounding errors of a signal that does not vary, and the second one enlarges them."""
every_model = pytest.mark.parametrize("name", MODELS)
relaxed = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])


def build(name: str) -> tuple[nn.Sequential, Tensor, SymmetrySpec]:
    torch.manual_seed(0)
    factory, shape = MODELS[name]
    model = factory().double()
    inputs = torch.randn(shape, dtype=torch.float64)
    return model, inputs, find_symmetries(model, inputs)


def element_of(spec: SymmetrySpec, seed: int = 1) -> Element:
    return spec.random_element(torch.Generator().manual_seed(seed))


def gradient(model: nn.Module, tensors: dict[str, Tensor], inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradient; the loss is a generic function of the outputs."""
    names = [name for name, parameter in model.named_parameters()]
    leaves = {name: tensors[name].detach().clone().requires_grad_() for name in names}
    buffers = {name: tensor.clone() for name, tensor in tensors.items() if name not in leaves}
    output = functional_call(model, leaves | buffers, (inputs,))
    loss = (output.cos() * torch.arange(1.0, output.numel() + 1).reshape_as(output)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(names, grads))


def assert_equal(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12, least: float = 1e-3
) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max().item() if expected[name].numel() else 0.0
        torch.testing.assert_close(actual[name], expected[name], rtol=tolerance, atol=tolerance * max(scale, least))


@every_model
def test_the_models_carry_all_forms_of_legs(name: str) -> None:
    spec = build(name)[2]
    legs = [leg for symmetry in spec for leg in symmetry.legs]
    assert {"permutation", "scaling"} <= {symmetry.group.name for symmetry in spec}
    if name != "mlp":
        assert any(leg.repeat > 1 for leg in legs)
        assert any(leg.offset > 0 for leg in legs)
        assert any(leg.within for leg in legs)
    if name == "shuffled":
        assert any(leg.index for leg in legs)
        assert [symmetry.id for symmetry in spec.of_group("linear")] == ["0:linear", "7:linear"]


@every_model
@pytest.mark.parametrize("group", GROUPS)
@given(seed=st.integers(0, 2**20))
@settings(deadline=None, max_examples=10)
def test_action_of_one_group_is_an_action(name: str, group: str, seed: int) -> None:
    model, _, spec = build(name)
    part, theta = spec.of_group(group), model.state_dict()
    first, second = element_of(part, seed), element_of(part, seed + 1)
    assert_equal(act(part, part.compose(first, second), theta), act(part, first, act(part, second, theta)))
    assert_equal(act(part, part.inverse(first), act(part, first, theta)), theta)
    assert_equal(act(part, part.identity(), theta), theta, 0.0)


@every_model
def test_action_is_pure_and_its_result_loads(name: str) -> None:
    model, inputs, spec = build(name)
    theta = model.state_dict()
    before = {key: tensor.clone() for key, tensor in theta.items()}
    output = model.eval()(inputs)
    moved = act(spec, element_of(spec), theta)
    assert moved is not theta
    assert type(moved) is OrderedDict
    assert moved._metadata == theta._metadata  # type: ignore[attr-defined]
    assert_equal(dict(theta), before, 0.0)
    touched = {leg.name for symmetry in spec for leg in symmetry.legs}
    assert any(not torch.equal(moved[key], theta[key]) for key in touched)
    assert all(moved[key] is theta[key] for key in theta if key not in touched)
    model.load_state_dict(moved)
    torch.testing.assert_close(model(inputs), output, rtol=1e-11, atol=1e-12)


def test_an_element_may_leave_sites_out() -> None:
    model, _, spec = build("mlp")
    moved = act(spec, {"0:permutation": torch.tensor([1, 0, 2, 3, 4, 5])}, model.state_dict())
    assert {name for name, tensor in moved.items() if tensor is not model.state_dict()[name]} >= {"0.weight"}
    assert torch.equal(moved["4.weight"], model[4].weight)


@every_model
@pytest.mark.parametrize("is_training", [False, True])
def test_the_gradient_moves_by_the_dual(name: str, is_training: bool) -> None:
    model, inputs, spec = build(name)
    model.train(is_training)
    theta, element = model.state_dict(), element_of(spec)
    loss, grads = gradient(model, theta, inputs)
    moved_loss, moved_grads = gradient(model, act(spec, element, theta), inputs)
    torch.testing.assert_close(moved_loss, loss, rtol=1e-12, atol=1e-12)
    assert_equal(moved_grads, act_dual(spec, element, grads))


@given(sequential_models(), st.integers(0, 2**20))
@example(Sample(ONE_ENTRY.double(), torch.ones(3, 1, 1, dtype=torch.float64)), 0)
@example(Sample(TWO_NORMS.double(), torch.tensor([[[1.5]], [[-0.3]], [[-2.2]]], dtype=torch.float64)), 3)
@relaxed
def test_the_gradient_of_random_models_moves_by_the_dual(sample: Sample, seed: int) -> None:
    """Random shifts keep the units away from the kinks of their activations, where rounding decides the gradient."""
    spec = find_symmetries(sample.model, sample.inputs)
    theta, element = sample.model.eval().state_dict(), element_of(spec, seed)
    source = torch.Generator().manual_seed(seed)
    for name, param in sample.model.named_parameters():
        theta[name] = param.detach() + 0.1 * torch.randn(param.shape, generator=source, dtype=param.dtype)
    _, grads = gradient(sample.model, theta, sample.inputs)
    _, moved_grads = gradient(sample.model, act(spec, element, theta), sample.inputs)
    # Where a normalisation makes a gradient vanish, what is left of it are rounding errors, divided by eps for every layer.
    has_norm = any("Norm" in type(layer).__name__ for layer in sample.model)
    assert_equal(moved_grads, act_dual(spec, element, grads), 1e-9, least=1.0 if has_norm else 1e-2)


@every_model
def test_teleport_sgd_and_back_is_preconditioned_sgd(name: str) -> None:
    """rho^-1 (rho theta - lr rho^-T g) = theta - lr rho^-1 rho^-T g: for scaling by s, g / s^2 on writers."""
    model, inputs, spec = build(name)
    part, lr = spec.of_group("scaling"), 0.1
    element = element_of(part)
    theta = {key: parameter.detach() for key, parameter in model.named_parameters()}
    model.eval()
    _, grads = gradient(model, model.state_dict(), inputs)
    moved = act(part, element, theta)
    moved_grads = act_dual(part, element, grads)
    there = {key: moved[key] - lr * moved_grads[key] for key in moved}
    back = act(part, part.inverse(element), there)
    square = {key: scale.square() for key, scale in element.items()}
    preconditioned = act_dual(part, square, grads)  # degree -1 of s^2 is rho^-1 rho^-T, as rho is diagonal
    assert_equal(back, {key: theta[key] - lr * preconditioned[key] for key in theta})


@every_model
def test_permutations_commute_with_sgd(name: str) -> None:
    model, inputs, spec = build(name)
    part, lr = spec.of_group("permutation"), 0.1
    element = element_of(part)

    def step(theta: dict[str, Tensor]) -> dict[str, Tensor]:
        _, grads = gradient(model.eval(), theta, inputs)
        return {key: tensor - lr * grads[key] if key in grads else tensor for key, tensor in theta.items()}

    theta = dict(model.state_dict())
    assert_equal(step(act(part, element, theta)), act(part, element, step(theta)))


@every_model
def test_derivative_of_the_gradient_norm_along_scalings(name: str) -> None:
    """d|grad|^2 / d log s_j = 2 (|g_read,j|^2 - |g_written,j|^2) at the identity: readers grow, writers shrink."""
    model, inputs, spec = build(name)
    _, grads = gradient(model.eval(), model.state_dict(), inputs)

    def norm(element: Element) -> float:
        return sum(grad.square().sum().item() for grad in act_dual(spec, element, grads).values())

    for symmetry in spec.of_group("scaling"):
        read = sum(channel_norms(symmetry, leg, grads[leg.name]) for leg in symmetry.readers)
        written = sum(channel_norms(symmetry, leg, grads[leg.name]) for leg in symmetry.writers)
        expected = 2.0 * (read - written)
        for channel in range(symmetry.size):
            step = torch.zeros(symmetry.size, dtype=torch.float64)
            step[channel] = 1e-5
            ends = [norm({symmetry.id: symmetry.group.exp(sign * step)}) for sign in (1, -1)]
            assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(expected[channel].item(), rel=1e-5, abs=1e-6)


def test_the_gradient_norm_grows_at_both_ends_of_a_scaling_orbit() -> None:
    model, inputs, spec = build("mlp")
    _, grads = gradient(model, model.state_dict(), inputs)
    norms = []
    for scale in (1e-3, 1.0, 1e3):
        element = {"0:scaling": torch.full((6,), scale, dtype=torch.float64)}
        norms.append(sum(grad.square().sum().item() for grad in act_dual(spec, element, grads).values()))
    assert norms[0] > 100 * norms[1] < norms[2]


def test_channel_norms_sum_to_the_norm() -> None:
    model, _, spec = build("grouped")
    weight = model[3].weight.detach()
    blocks = [spec[f"1:scaling[{block}]"] for block in range(2)]
    reads = [channel_norms(site, leg, weight) for site in blocks for leg in site.legs if leg.name == "3.weight"]
    torch.testing.assert_close(torch.cat(reads), weight.square().sum((2, 3)).reshape(2, 3, 4).sum(1).flatten())


@every_model
def test_slots_move_by_their_kind(name: str) -> None:
    model, _, spec = build(name)
    element = element_of(spec)
    tensors = {key: torch.rand_like(parameter) for key, parameter in model.named_parameters()}
    entrywise = SymmetrySpec(tuple(symmetry for symmetry in spec if symmetry.group.name != "linear"))
    entrywise_element = {symmetry.id: element[symmetry.id] for symmetry in entrywise}
    squared = {"SQUARED_COVECTOR": tensors}
    slots = {kind.name: tensors for kind in SlotKind if kind.name not in squared}
    moved = transport(spec, element, slots, SlotKind.__members__)
    moved |= transport(entrywise, entrywise_element, squared, SlotKind.__members__)
    parameters = {leg.name for site in spec for leg in site.legs if leg.name in tensors}
    assert parameters
    partial = SymmetrySpec(tuple(s for s in spec if all(leg.name in tensors for leg in s.legs)))
    covered = {key: part for key, part in element.items() if key in {s.id for s in partial}}
    assert_equal(transport(partial, covered, slots, SlotKind.__members__)["VECTOR"], act(partial, covered, tensors))
    assert_equal(moved["COVECTOR"], act_dual(spec, element, tensors))
    assert_equal(moved["INVARIANT"], tensors, 0.0)
    squares = act_dual(entrywise, entrywise_element, {key: tensor.sqrt() for key, tensor in tensors.items()})
    assert_equal(moved["SQUARED_COVECTOR"], {key: root.square() for key, root in squares.items()})


def test_linear_maps_do_not_move_squares() -> None:
    model, _, spec = build("shuffled")
    squares = {key: parameter.detach().square() for key, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"cannot act with degree -2.*reset it"):
        transport(spec, element_of(spec), {"exp_avg_sq": squares}, {"exp_avg_sq": SlotKind.SQUARED_COVECTOR})


def test_slots_without_a_kind_are_refused() -> None:
    _, _, spec = build("mlp")
    with pytest.raises(ValueError, match="no kind is given for the slots"):
        transport(spec, {}, {"exp_avg": {}}, {})


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ({"0:scaling": torch.ones(5)}, "must have shape"),
        ({"0:scaling": torch.zeros(6)}, "not all positive"),
        ({"0:permutation": torch.zeros(6, dtype=torch.int64)}, "exactly once"),
        ({"9:scaling": torch.ones(6)}, "the spec has only"),
        ({"9:linear": torch.eye(6)}, "the spec has only"),
    ],
)
def test_elements_that_do_not_fit_are_refused(element: Element, message: str) -> None:
    model, _, spec = build("mlp")
    assert_refused(model, spec, element, message)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(4), r"must have shape \(4, 4\)"),
        (torch.eye(3), r"must have shape \(4, 4\)"),
        (torch.ones(4, 4), "condition number"),
        (torch.eye(4, dtype=torch.int64), "floating point"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(matrix: Tensor, message: str) -> None:
    model, _, spec = build("shuffled")
    assert_refused(model, spec, {"0:linear": matrix}, message)


def assert_refused(model: nn.Module, spec: SymmetrySpec, element: Element, message: str) -> None:
    for function in (act, act_dual):
        with pytest.raises(ValueError, match=message):
            function(spec, element, model.state_dict())


def test_a_missing_tensor_is_named() -> None:
    model, _, spec = build("mlp")
    theta = model.state_dict()
    del theta["0.bias"]
    with pytest.raises(KeyError, match=r"0\.bias"):
        act(spec, element_of(spec), theta)
    assert "0.bias" not in act_dual(spec, element_of(spec), theta)


@every_model
def test_the_action_is_differentiable(name: str) -> None:
    model, _, spec = build(name)
    part = spec.of_group("scaling")
    theta = {key: parameter.detach() for key, parameter in model.named_parameters()}
    sites = list(part)

    def moved(*logs: Tensor) -> tuple[Tensor, ...]:
        element = {site.id: site.group.exp(log) for site, log in zip(sites, logs)}
        return tuple(act_dual(part, element, theta).values())

    logs = tuple(torch.zeros(site.size, dtype=torch.float64, requires_grad=True) for site in sites)
    assert torch.autograd.gradcheck(moved, logs)


def test_legs_act_on_slices_only() -> None:
    leg = Leg("w", axis=1, degree=1, repeat=2, offset=1, within=(0, 1, 1))
    spec = SymmetrySpec((Symmetry("site", GROUPS["scaling"], 2, (leg,)),))
    moved = act(spec, {"site": torch.tensor([2.0, 3.0])}, {"w": torch.ones(3, 6)})["w"]
    assert moved.tolist() == [[1] * 6, [1, 2, 2, 3, 3, 1], [1] * 6]


def test_legs_act_on_the_entries_that_they_list() -> None:
    leg = Leg("w", axis=1, degree=1, repeat=2, within=(0, 1, 1), index=(4, 0, 1, 3))
    tensor = torch.arange(1.0, 13.0).reshape(2, 6)
    spec = SymmetrySpec((Symmetry("site", GROUPS["scaling"], 2, (leg,)),))
    moved = act(spec, {"site": torch.tensor([2.0, 3.0])}, {"w": tensor})["w"]
    assert moved.tolist() == [[1, 2, 3, 4, 5, 6], [14, 24, 9, 30, 22, 12]]
    spec = SymmetrySpec((Symmetry("site", GROUPS["permutation"], 2, (leg,)),))
    moved = act(spec, {"site": torch.tensor([1, 0])}, {"w": tensor})["w"]
    assert moved.tolist() == [[1, 2, 3, 4, 5, 6], [10, 11, 9, 7, 8, 12]]
    assert channel_norms(spec["site"], leg, tensor).tolist() == [11**2 + 7**2, 8**2 + 10**2]
