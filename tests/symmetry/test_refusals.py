"""What is refused, where and why: the search fails closed."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from teleport_optim.symmetry import SymmetrySpec, find_symmetries
from teleport_optim.symmetry.action import act
from teleport_optim.symmetry.search import analyse
from tests.helpers.small_models import Model, N, build, certified
from tests.helpers.specs import legs_of, reasons_of

pytestmark = pytest.mark.private_torch

ModelFactory = Callable[[], nn.Module]


class Squaring(nn.Linear):
    """A subclass that computes something else than its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, N), nn.ReLU(), nn.Linear(N, N), nn.ReLU(), nn.Linear(N, 2))


def changed(change: Callable[[nn.Sequential], object]) -> ModelFactory:
    def make() -> nn.Sequential:
        model = mlp()
        change(model)
        return model

    return make


def between(layer: nn.Module) -> ModelFactory:
    return lambda: nn.Sequential(nn.Linear(4, N), layer, nn.Linear(N, 4))


def share_storage(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(model[0].weight.detach()[:, :1].expand(N, N))


REFUSED: dict[str, tuple[ModelFactory, str, str]] = {
    "unknown operation": (between(Model(lambda m, x: torch.sort(x).values)), "1", "sort is not an operation"),
    "special function": (between(Model(lambda m, x: torch.special.bessel_j0(x))), "1", "special_bessel_j0 is not"),
    "forward hook": (changed(lambda m: m[2].register_forward_hook(lambda *_: None)), "2", "has forward hooks"),
    "pre-hook": (changed(lambda m: m[1].register_forward_pre_hook(lambda *_: None)), "1", "has forward hooks"),
    "hook on the root": (changed(lambda m: m.register_forward_hook(lambda *_: None)), "(root)", "has forward hooks"),
    "pruning": (changed(lambda m: prune.l1_unstructured(m[2], "weight", 0.5)), "2", "has forward hooks"),
    "weight norm": (changed(lambda m: parametrizations.weight_norm(m[2])), "2.parametrizations.weight.0", "is not an operation"),
    "shared storage": (changed(share_storage), "0.weight", "shares memory with 2.weight"),
    "lazy": (between(nn.LazyLinear(4)), "1.weight", "run one batch"),
    "embedding with max_norm": (
        lambda: nn.Sequential(nn.Embedding(3, N, max_norm=1.0), nn.Linear(N, 2)), "0", "embedding_renorm"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_place_and_the_reason(name: str) -> None:
    factory, place, reason = REFUSED[name]
    model = build(factory)
    inputs = torch.randint(3, (5, 4)) if "embedding" in name else torch.randn(5, 4)
    spec = find_symmetries(model, inputs)
    assert place in reasons_of(spec)
    assert re.search(reason, reasons_of(spec)[place])
    layer = place.split(".")[0]
    if layer != "(root)":
        before, after = (
            {name for name in model.state_dict() if side(name.split(".")[0])} for side in (layer.__gt__, layer.__lt__)
        )
        for symmetry in spec:
            names = {leg.name for leg in symmetry.legs}
            assert not (names & before and names & after), "nothing moves across the place"
    assert all(not leg.name.startswith(f"{layer}.") for symmetry in spec for leg in symmetry.legs)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Squaring(N, N), {"0:permutation", "1:permutation", "0:scaling", "1:sign"}),
        (Residual(nn.Linear(N, N)), {"0:permutation"}),
        (nn.MultiheadAttention(N, 1), None),
    ],
)
def test_what_a_layer_computes_counts_and_not_its_type(layer: nn.Module, expected: set[str] | None) -> None:
    if isinstance(layer, nn.MultiheadAttention):
        layer = Model(lambda m, x: m.attention(x, x, x)[0], attention=layer)
    spec = certified(build(between(layer)), torch.randn(5, 4))
    found = {symmetry.id for symmetry in spec if symmetry.group.name != "linear"}
    assert expected is None or expected <= found


def test_a_replaced_forward_is_followed() -> None:
    model = mlp()
    weight = model[2].weight
    model[2].forward = lambda x: nn.functional.gelu(x @ weight)
    inputs = torch.randn(5, 4)
    spec = find_symmetries(model, inputs)
    assert {leg.name for leg in spec["0:permutation"].legs} >= {"0.weight", "2.weight"}
    outputs = model(inputs)
    model.load_state_dict(act(spec, spec.random_element(torch.Generator().manual_seed(0)), model.state_dict()))
    torch.testing.assert_close(model(inputs), outputs)


def test_a_view_of_a_parameter_that_a_closure_keeps_is_not_followed() -> None:
    model = mlp()
    rows = model[2].weight[:, :N].detach()
    model[2].forward = lambda x: nn.functional.gelu(x @ rows)
    spec = find_symmetries(model, torch.randn(5, 4))
    assert not any(leg.name == "2.weight" for symmetry in spec for leg in symmetry.legs)


def test_a_tensor_that_control_flow_reads_refuses_the_model() -> None:
    model = Model(lambda m, x: m.a(x) if m.a.weight.norm() > 1 else -m.a(x), a=nn.Linear(3, 2))
    spec = find_symmetries(model, torch.randn(2, 3))
    assert len(spec) == 0
    assert "depend on data" in reasons_of(spec)["(root)"]


def test_frozen_parameters_have_symmetries_too() -> None:
    model = mlp()
    expected = find_symmetries(model, torch.randn(3, 4))
    assert find_symmetries(model.requires_grad_(False), torch.randn(3, 4)) == expected


def test_a_shared_parameter_moves_under_all_its_names() -> None:
    model = nn.Sequential(nn.Linear(N, N), nn.ReLU(), nn.Linear(N, N), nn.ReLU(), nn.Linear(N, 2))
    model[2].weight = model[0].weight
    spec = certified(model, torch.randn(4, N))
    assert len(spec) == 0
    tied = Model(
        lambda m, x: m.b(m.a(x).relu() + m.c(2 * x).relu()), a=nn.Linear(3, N), c=nn.Linear(3, N), b=nn.Linear(N, 2)
    )
    tied.c.weight = tied.a.weight
    names = {leg.name for symmetry in certified(tied, torch.randn(4, 3)) for leg in symmetry.legs}
    assert {"a.weight", "c.weight"} <= names


def test_views_of_one_flat_buffer_are_not_shared() -> None:
    model = mlp()
    expected = find_symmetries(model, torch.randn(3, 4))
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())
    assert find_symmetries(model, torch.randn(3, 4)) == expected


def test_a_lazy_model_is_understood_after_its_first_batch() -> None:
    model = nn.Sequential(nn.LazyLinear(N), nn.ReLU(), nn.LazyLinear(2))
    inputs = torch.randn(2, 3)
    assert len(find_symmetries(model, inputs)) == 0
    model(inputs)
    assert set(legs_of(find_symmetries(model, inputs))) == {"0:permutation", "0:scaling"}


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Sequential(), nn.Sequential(nn.Linear(3, 2)), nn.ReLU()])
def test_models_without_hidden_channels_have_no_symmetries(model: nn.Module) -> None:
    assert find_symmetries(model, torch.randn(2, 3)) == SymmetrySpec()


@pytest.mark.parametrize("kind", [KeyError, TypeError, AttributeError, ZeroDivisionError])
def test_an_error_of_a_rule_is_a_mistake_of_ours_and_no_refusal(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(call: object, analysis: object) -> None:
        raise kind("a mistake")

    monkeypatch.setitem(analyse.RULES, "relu", fail)
    with pytest.raises(kind, match="a mistake"):
        find_symmetries(mlp(), torch.randn(5, 4))


def test_an_error_of_the_model_is_told_from_one_of_ours() -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        raise KeyError("of the model")

    with pytest.raises(ValueError, match=r"cannot take example_inputs in evaluation mode: KeyError: 'of the model'"):
        find_symmetries(Model(forward, a=nn.Linear(3, N)), torch.randn(2, 3))


@torch.library.custom_op("teleport_optim_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """An operation that works, but does not tell what it returns for tensors without data."""
    return 2 * x


def test_an_operation_that_cannot_be_followed_refuses_the_model_and_raises_nothing() -> None:
    model = build(lambda: Model(lambda m, x: m.b(doubled(m.a(x))), a=nn.Linear(3, N), b=nn.Linear(N, 2)))
    with torch.no_grad():
        assert model(torch.randn(2, 3)).shape == (2, 2)
    spec = find_symmetries(model, torch.randn(2, 3))
    assert len(spec) == 0
    assert "doubled does not tell what it returns" in reasons_of(spec)["(root)"]


def test_a_product_of_experts_of_any_type_lets_nothing_through_and_the_rest_is_found() -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        ends = torch.tensor([1, len(x)], dtype=torch.int32)
        output: Tensor = model.d(
            model.c(torch._grouped_mm(model.b(model.a(x).relu()), model.experts, offs=ends)).relu()
        )
        return output

    model = build(
        lambda: Model(
            forward,
            a=nn.Linear(3, N),
            b=nn.Linear(N, 4),
            experts=nn.Parameter(torch.randn(2, 4, 8)),
            c=nn.Linear(8, N),
            d=nn.Linear(N, 2),
        )
    )
    spec = find_symmetries(model, torch.randn(5, 3), groups=["permutation"])
    assert [symmetry.id for symmetry in spec] == ["a:permutation", "c:permutation"]
    assert "_grouped_mm is not an operation whose symmetries are known" in reasons_of(spec)["(root)"]
