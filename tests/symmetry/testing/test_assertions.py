"""The kit for property tests: strategies shrink, assertions pass what holds and name what does not."""

import copy
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from teleport_optim.symmetry import Leg, Refusal, Symmetry, SymmetrySpec, find_symmetries
from teleport_optim.symmetry.groups import GROUPS
from teleport_optim.testing import (
    Sample,
    assert_equivariant_gradient,
    assert_invariant,
    assert_optimizer_equivariant,
    example_inputs,
    group_elements,
    modules,
    sequential_models,
)
from tests.helpers.paths import ROOT

DOCS = ROOT / "docs" / "testing.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), flags=re.MULTILINE | re.DOTALL)
INPUTS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
quick = settings(max_examples=15, deadline=None, database=None, derandomize=True)
searching = settings(max_examples=2000, deadline=None, database=None, derandomize=True)


def mlp(activation: nn.Module, width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), activation, nn.Linear(width, 2))


def spec_of(*groups: str, size: int = 6) -> SymmetrySpec:
    """Sites of an :func:`mlp`, written by hand."""
    legs = (Leg("0.weight", 0, 1), Leg("0.bias", 0, 1), Leg("2.weight", 1, -1))
    return SymmetrySpec(tuple(Symmetry(f"0:{name}", GROUPS[name], size, legs) for name in groups))


def replaced(spec: SymmetrySpec, wrong: Symmetry) -> SymmetrySpec:
    return SymmetrySpec(tuple(wrong if symmetry.id == wrong.id else symmetry for symmetry in spec))


def without(spec: SymmetrySpec, site: str, name: str) -> SymmetrySpec:
    legs = tuple(leg for leg in spec[site].legs if leg.name != name)
    assert len(legs) < len(spec[site].legs)
    return replaced(spec, replace(spec[site], legs=legs))


# Planted mistakes


def convnet(seed: int) -> tuple[nn.Sequential, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs, channels, hidden, side = (int(n) for n in torch.randint(2, 6, (4,), generator=generator))
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(inputs, channels, 1), nn.BatchNorm2d(channels), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(channels * side**2, hidden), nn.GELU(), nn.Linear(hidden, 2)),
    )
    return model.double(), torch.randn(3, inputs, side, side, dtype=torch.float64)


def planted(spec: SymmetrySpec, seed: int) -> Iterator[tuple[str, SymmetrySpec]]:
    """One wrong spec for each kind of mistake, with the site that is wrong."""
    gelu = replace(spec["4:permutation"], id="4:scaling", group=GROUPS["scaling"])
    yield gelu.id, SymmetrySpec((*spec, gelu))
    site, bias = [("4:permutation", "4.bias"), ("0:permutation", "1.bias"), ("1:scaling", "1.bias")][seed % 3]
    yield site, without(spec, site, bias)
    site, buffer = [("0:permutation", "running_mean"), ("0:permutation", "running_var"), ("0:sign", "running_mean")][
        seed % 3
    ]
    yield site, without(spec, site, f"1.{buffer}")
    site = ["0:permutation", "1:scaling"][seed % 2]
    legs = tuple(replace(leg, repeat=leg.repeat - 1) if leg.repeat > 1 else leg for leg in spec[site].legs)
    assert legs != spec[site].legs
    yield site, replaced(spec, replace(spec[site], legs=legs))


@pytest.mark.slow
def test_planted_mistakes_are_caught_in_every_one_of_100_models() -> None:
    for seed in range(100):
        model, inputs = convnet(seed)
        spec = find_symmetries(model, inputs)
        assert_invariant(model, inputs, spec, other_sizes=False)
        for site, wrong in planted(spec, seed):
            with pytest.raises(AssertionError, match=f"site '{site}' .*changes the function"):
                assert_invariant(model, inputs, wrong, other_sizes=False)


# Assertions


def test_a_message_names_site_group_error_and_legs() -> None:
    wrong = SymmetrySpec((*spec_of("permutation"), *spec_of("scaling")))
    with pytest.raises(AssertionError) as caught:
        assert_invariant(mlp(nn.GELU()), INPUTS, wrong)
    pattern = (
        r"site '0:scaling' \(scaling of 6 channels\) changes the function by \d\.\de[-+]\d\d, more than 1e-10; "
        r"its legs: 0\.weight\[0\]\^\+1 0\.bias\[0\]\^\+1 2\.weight\[1\]\^-1"
    )
    assert re.fullmatch(pattern, str(caught.value))


def test_each_wrong_site_has_a_line() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_invariant(mlp(nn.GELU()), INPUTS, spec_of("scaling", "permutation", "sign"))
    assert [line.split()[1] for line in str(caught.value).splitlines()] == ["'0:scaling'", "'0:sign'"]


def test_an_element_says_what_to_move_by() -> None:
    spec, swap = spec_of("permutation", "scaling"), torch.tensor([1, 0, 2, 3, 4, 5])
    assert_invariant(mlp(nn.GELU()), INPUTS, spec, {"0:permutation": swap})
    assert_invariant(mlp(nn.GELU()), INPUTS, spec, spec.identity())
    assert_invariant(mlp(nn.GELU()), INPUTS, spec, {})
    with pytest.raises(AssertionError, match="0:scaling"):
        assert_invariant(mlp(nn.GELU()), INPUTS, spec, {"0:scaling": torch.tensor([1.0, 1, 1, 1, 1, 2])})
    with pytest.raises(ValueError, match="must have shape"):
        assert_invariant(mlp(nn.GELU()), INPUTS, spec, {"0:permutation": torch.tensor([0, 1])})


def test_a_default_element_moves_even_the_smallest_site() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        for group in ("permutation", "sign"):
            wrong = without(spec_of(group, size=2), f"0:{group}", "0.bias")
            with pytest.raises(AssertionError, match="0:"):
                assert_invariant(mlp(nn.Tanh(), width=2), INPUTS, wrong)


def test_approximate_sites_have_their_own_tolerance() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    inputs = torch.randn(8, 3)
    spec = find_symmetries(model, inputs, include_approximate=True)
    assert not all(symmetry.exact for symmetry in spec)
    assert_invariant(model, inputs, spec)
    pretended = SymmetrySpec(tuple(replace(symmetry, exact=True) for symmetry in spec))
    with pytest.raises(AssertionError, match="scaling"):
        assert_invariant(model, inputs, pretended)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.GELU()])
def test_gradients_are_equivariant(activation: nn.Module) -> None:
    assert_equivariant_gradient(mlp(activation), INPUTS)
    assert_equivariant_gradient(mlp(activation), INPUTS, loss=lambda output: output.logsumexp(1).sum())


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        (mlp(nn.GELU()), spec_of("scaling")),
        (mlp(nn.ReLU()), without(spec_of("scaling"), "0:scaling", "0.bias")),
        (mlp(nn.ReLU()), without(spec_of("permutation"), "0:permutation", "2.weight")),
    ],
)
def test_a_gradient_that_moves_otherwise_is_caught(model: nn.Module, spec: SymmetrySpec) -> None:
    site = spec.symmetries[0].id
    with pytest.raises(AssertionError, match=f"site '{site}' .*gradient.*its legs: 0.weight"):
        assert_equivariant_gradient(model, INPUTS, spec)


def test_a_loss_of_the_parameters_breaks_the_gradient() -> None:
    """A penalty is not invariant to scalings, so it must be seen through the loss."""

    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.net[0].weight.square().sum()

    legs = tuple(replace(leg, name=f"net.{leg.name}") for leg in spec_of("scaling").symmetries[0].legs)
    spec = SymmetrySpec((Symmetry("site", GROUPS["scaling"], 6, legs),))
    for check in (assert_invariant, assert_equivariant_gradient):
        with pytest.raises(AssertionError, match="site 'site'"):
            check(Penalised(), INPUTS, spec)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


class RowSgd(torch.optim.SGD):
    """Not equivariant: the first entries of a parameter learn faster."""

    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                rates = 1 / torch.arange(1, len(parameter) + 1).reshape(-1, *[1] * (parameter.dim() - 1))
                parameter -= self.param_groups[0]["lr"] * rates * parameter.grad
        return loss


@pytest.mark.parametrize("make", [sgd, adamw, lambda model: torch.optim.LBFGS(model.parameters())])
def test_optimizers_are_equivariant(make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    model, inputs = convnet(0)
    assert_optimizer_equivariant(make, model, inputs)
    assert_optimizer_equivariant(make, mlp(nn.Tanh()), INPUTS, groups=("permutation", "sign"))


@pytest.mark.parametrize("make", [sgd, adamw])
def test_optimizers_are_not_equivariant_to_scalings(make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    assert_optimizer_equivariant(make, mlp(nn.ReLU()), INPUTS)
    with pytest.raises(AssertionError, match=r"site '0:scaling'.*does not commute with training"):
        assert_optimizer_equivariant(make, mlp(nn.ReLU()), INPUTS, groups=("scaling",))


@pytest.mark.parametrize("lr", [0.1, 1e-6])
def test_an_optimizer_that_tells_entries_apart_is_caught(lr: float) -> None:
    with pytest.raises(
        AssertionError, match=r"site '0:permutation' \(permutation of 6 channels\) does not commute.*, more than"
    ):
        assert_optimizer_equivariant(lambda model: RowSgd(model.parameters(), lr=lr), mlp(nn.Tanh()), INPUTS)


def test_unknown_groups_and_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match="no group 'rotation'"):
        assert_optimizer_equivariant(sgd, mlp(nn.Tanh()), INPUTS, groups=("rotation",))

    class Labels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    with pytest.raises(ValueError, match="pass a loss"):
        assert_equivariant_gradient(Labels(), INPUTS)


def test_everything_is_left_as_it_was() -> None:
    model, inputs = convnet(1)
    model[1].eval()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    before, random_state = inputs.clone(), torch.get_rng_state()
    assert_invariant(model, inputs)
    assert_equivariant_gradient(model, inputs)
    assert_optimizer_equivariant(adamw, model, inputs)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(inputs, before)
    assert GROUPS["sign"].random(3, torch.Generator().manual_seed(0)).shape == (3,)


@given(st.one_of(sequential_models(max_layers=3), modules(max_blocks=2)))
@quick
def test_assertions_hold_for_random_models(sample: Sample) -> None:
    spec = find_symmetries(sample.model, sample.inputs)
    assert_invariant(sample.model, sample.inputs, spec)
    assert_equivariant_gradient(sample.model, sample.inputs, spec)


# Assertions that would show nothing


def frozen(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0)


def of_another_model(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("make", "num_steps"),
    [(frozen, 3), (of_another_model, 3), (lambda model: torch.optim.AdamW(model.parameters()), 0)],
)
def test_training_that_changes_nothing_fails(
    make: Callable[[nn.Module], torch.optim.Optimizer], num_steps: int
) -> None:
    with pytest.raises(AssertionError, match=f"changed no parameter in {num_steps} steps.*make_optimizer must return"):
        assert_optimizer_equivariant(make, mlp(nn.Tanh()), INPUTS, num_steps=num_steps)


def test_a_model_without_gradients_fails() -> None:
    frozen_model = mlp(nn.Tanh()).requires_grad_(False)
    with pytest.raises(AssertionError, match="no parameter has a gradient"):
        assert_equivariant_gradient(frozen_model, INPUTS, spec_of("permutation"))
    with pytest.raises(AssertionError, match="changed no parameter"):
        assert_optimizer_equivariant(adamw, frozen_model, INPUTS, spec_of("permutation"))
    for loss in (lambda output: 0.0 * output.sum(), lambda output: torch.ones(())):
        with pytest.raises(AssertionError, match="no parameter has a gradient"):
            assert_equivariant_gradient(mlp(nn.Tanh()), INPUTS, loss=loss)


def test_one_parameter_that_trains_is_enough() -> None:
    model = mlp(nn.Tanh())
    model[0].requires_grad_(False)
    assert_optimizer_equivariant(adamw, model, INPUTS)
    assert_equivariant_gradient(model, INPUTS)


CHECKS: dict[str, Callable[..., None]] = {
    "invariant": assert_invariant,
    "gradient": assert_equivariant_gradient,
    "optimizer": lambda *arguments, **options: assert_optimizer_equivariant(adamw, *arguments, **options),
}


@pytest.mark.parametrize("name", CHECKS)
def test_min_share_fails_a_model_without_symmetries(name: str) -> None:
    check = CHECKS[name]
    model, inputs = nn.Linear(3, 2), INPUTS
    check(model, inputs)
    with pytest.raises(
        AssertionError, match=r"^the sites \(0\) move 0\.0% of the parameters, less than the 10\.0% of min_share"
    ):
        check(model, inputs, min_share=0.1)
    share = spec_of("permutation").share_of(mlp(nn.Tanh()))
    check(mlp(nn.Tanh()), inputs, spec_of("permutation"), min_share=share)
    with pytest.raises(AssertionError, match=r"the sites \(1\) move 94.\d% of the parameters.*refused: nothing"):
        check(mlp(nn.Tanh()), inputs, spec_of("permutation"), min_share=share + 0.01)
    refusals = tuple(Refusal(f"layer{number}", "it is odd") for number in range(7))
    with pytest.raises(AssertionError, match=r"refused: layer0: it is odd; .*layer4: it is odd; and 2 more$"):
        check(model, inputs, SymmetrySpec(refusals=refusals), min_share=0.5)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="min_share must lie between 0 and 1"):
            check(model, inputs, min_share=wrong)


def test_min_share_counts_the_groups_that_are_tested() -> None:
    """Scalings alone do not pass a test of permutations."""
    with pytest.raises(AssertionError, match=r"the sites \(0\) move"):
        assert_optimizer_equivariant(sgd, mlp(nn.ReLU()), INPUTS, spec_of("scaling"), min_share=0.5)


def test_a_message_names_the_sizes_at_which_a_site_fails() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.read = nn.Parameter(torch.randn(20, 3)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(x + self.places[: x.shape[1]])

    unread = SymmetrySpec((Symmetry("rows", GROUPS["permutation"], 16, (Leg("places", 0, 1, offset=4),)),))
    inputs = torch.randn(2, 4, 3)
    with pytest.raises(AssertionError, match="more than 1e-10 with 3 examples, 6 instead of 4; its legs: places"):
        assert_invariant(Positions(), inputs, unread)
    assert_invariant(Positions(), inputs, unread, other_sizes=False)


# Strategies


def everything() -> SymmetrySpec:
    return spec_of("permutation", "scaling", "sign", "linear")


@given(group_elements(everything()))
@settings(quick, max_examples=200)
def test_elements_lie_in_their_groups(element: dict[str, Tensor]) -> None:
    everything().check(element)
    if "0:linear" in element:
        assert torch.linalg.cond(element["0:linear"]) <= 55.0


def test_elements_shrink_to_the_identity_and_to_one_channel() -> None:
    spec = everything()
    assert find(group_elements(spec), lambda element: True, settings=searching) == {}
    for name, distance in (("permutation", 2), ("scaling", 1), ("sign", 1), ("linear", 1)):
        site, identity = f"0:{name}", GROUPS[name].identity(6)

        def moves(element: dict[str, Tensor], site: str = site, identity: Tensor = identity) -> bool:
            return site in element and not torch.equal(element[site], identity)

        element = find(group_elements(spec), moves, settings=searching)
        assert list(element) == [site]
        assert int((element[site] != identity).sum()) == distance


def test_elements_find_a_forgotten_bias_in_one_channel() -> None:
    """What fails shrinks to a message that can be read."""
    model = mlp(nn.ReLU())
    wrong = without(spec_of("scaling"), "0:scaling", "0.bias")

    def fails(element: dict[str, Tensor]) -> bool:
        try:
            assert_invariant(model, INPUTS, wrong, element)
        except AssertionError:
            return True
        return False

    element = find(group_elements(wrong), fails, settings=settings(searching, max_examples=100))
    assert int((element["0:scaling"] != 1).sum()) == 1


@given(group_elements(everything()))
@settings(quick, max_examples=100)
def test_an_element_prints_as_code_that_makes_it(element: dict[str, Tensor]) -> None:
    assert_same_element(evaluated(repr(element)), element)


@given(group_elements(spec_of("permutation", "scaling", "sign", "linear", size=50)))
@settings(quick, max_examples=50)
def test_large_elements_print_what_they_move(element: dict[str, Tensor]) -> None:
    code = repr(element)
    assert_same_element(evaluated(code), element)
    assert len(code) < 20_000


def evaluated(code: str) -> dict[str, Tensor]:
    names: dict[str, dict[str, Tensor]] = {}
    exec(f"import torch\nelement = {code}", names)
    return names["element"]


def assert_same_element(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, part in expected.items():
        assert actual[name].dtype == part.dtype
        assert torch.equal(actual[name], part)


def test_a_falsifying_example_is_code() -> None:
    """What hypothesis reports can be pasted, and fails as it did."""
    model, wrong = mlp(nn.ReLU()), without(spec_of("scaling"), "0:scaling", "0.bias")

    @given(group_elements(wrong))
    @settings(searching, max_examples=100)
    def check(element: dict[str, Tensor]) -> None:
        assert_invariant(model, INPUTS, wrong, element)

    with pytest.raises(AssertionError) as caught:
        check()
    (report,) = [note for note in caught.value.__notes__ if "element=" in note]
    code = report[report.index("element=") + len("element=") : report.rindex("}") + 1]
    with pytest.raises(AssertionError, match="0:scaling"):
        assert_invariant(model, INPUTS, wrong, evaluated(code))


def test_unknown_groups_have_no_elements() -> None:
    class Rotation(type(GROUPS["linear"])):  # type: ignore[misc]
        name = "rotation"

    spec = SymmetrySpec((replace(spec_of("linear").symmetries[0], group=Rotation()),))
    with pytest.raises(ValueError, match="no elements are known for the group 'rotation'"):
        group_elements(spec)


@given(st.data())
@quick
def test_inputs_are_like_their_template(data: st.DataObject) -> None:
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    template = {
        "x": torch.randn(3, 2),
        "tokens": torch.tensor([[0], [7], [2]]),
        "mask": mask,
        "size": torch.ones(1),
        "n": 5,
    }
    random_state = torch.get_rng_state()
    inputs = data.draw(example_inputs(template))
    assert torch.equal(torch.get_rng_state(), random_state)
    batch = len(inputs["x"])
    assert 2 <= batch <= 5
    assert inputs["x"].shape == (batch, 2)
    assert inputs["tokens"].shape == (batch, 1)
    assert 0 <= inputs["tokens"].min() <= inputs["tokens"].max() <= 7
    assert torch.equal(inputs["mask"], mask.repeat(2, 1)[:batch])
    assert inputs["size"].shape == (1,)
    assert inputs["n"] == 5


def test_inputs_shrink_and_take_tuples_and_other_axes() -> None:
    first, second = find(example_inputs((torch.randn(5, 4), 3), batch_axis=1), lambda inputs: True, settings=searching)
    assert (first.shape, second) == ((5, 2), 3)
    wide = find(example_inputs(torch.randn(4, 3)), lambda inputs: len(inputs) > 3, settings=searching)
    assert len(wide) == 4
    for template, message in (((1, 2), "no input is a tensor"), (torch.tensor(1.0), "no input is a tensor")):
        with pytest.raises(ValueError, match=message):
            example_inputs(template)
    with pytest.raises(ValueError, match="at least 2"):
        example_inputs(INPUTS, max_batch=1)
    with pytest.raises(TypeError, match="got list"):
        example_inputs([INPUTS])  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", [sequential_models(), modules()])
def test_models_shrink(strategy: st.SearchStrategy[Sample]) -> None:
    smallest = find(strategy, lambda sample: True, settings=searching)
    assert len(smallest.model) <= 4
    hidden = find(
        strategy,
        lambda sample: any(isinstance(module, nn.GELU) for module in sample.model.modules()),
        settings=searching,
    )
    assert len(hidden.model) <= 4
    assert sum(parameter.numel() for parameter in hidden.model.parameters()) <= 30


@pytest.mark.parametrize(
    "kind",
    [
        *(nn.LSTM, nn.GRU, nn.TransformerEncoderLayer, nn.MultiheadAttention, nn.Embedding),
        *("Residual", "Concatenation", "Split", "Gated", "Excitation", "Recurrent"),
        *("DerivedKernel", "TransposedKernel", "Positions", "Prompt", "Cast", "MaskedLinear", "Replaced"),
        *("OwnBackward", "Branch"),
    ],
)
def test_modules_have_every_ingredient(kind: type | str) -> None:
    def has(sample: Sample) -> bool:
        parts = list(sample.model.modules())
        return any(type(part).__name__ == kind if isinstance(kind, str) else isinstance(part, kind) for part in parts)

    sample = find(modules(), has, settings=searching)
    is_tied = sample.model[0].weight is sample.model[-1].weight if kind is nn.Embedding else True
    assert is_tied
    assert len(sample.model) <= 4


@given(st.one_of(sequential_models(), modules()))
@settings(quick, max_examples=40)
def test_models_are_float64_and_take_their_inputs(sample: Sample) -> None:
    assert all(parameter.dtype == torch.float64 for parameter in sample.model.parameters())
    assert len(sample.model(sample.inputs)) == 3
    assert "inputs of shape (3" in repr(sample)


@pytest.mark.parametrize("strategy", [sequential_models(), modules()])
def test_what_is_drawn_depends_on_the_draws_alone(strategy: st.SearchStrategy[Sample]) -> None:
    """Neither on the global random state, which stays as it is."""
    runs: list[list[Sample]] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random_state = torch.get_rng_state()
        runs.append([])

        @settings(quick)
        @given(strategy)
        def collect(sample: Sample) -> None:
            runs[-1].append(sample)

        collect()
        assert torch.equal(torch.get_rng_state(), random_state)
    first, second = runs
    assert len(first) == len(second) > 0
    for one, other in zip(first, second):
        assert repr(one) == repr(other)
        assert torch.equal(one.inputs, other.inputs)
        state = other.model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.model.state_dict().items())


# The rest


def test_without_hypothesis_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "teleport_optim.testing")
    with pytest.raises(ImportError, match="pip install hypothesis"):
        import teleport_optim.testing  # noqa: F401


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_of_the_docs_runs(block: str) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "docs"}
    exec(compile(block, str(DOCS), "exec"), names)
    tests = [function for name, function in names.items() if name.startswith("test_") and callable(function)]
    for function in tests:
        function()
