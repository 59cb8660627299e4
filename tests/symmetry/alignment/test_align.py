"""Alignment: planted permutations are found, and functions stay."""

import builtins
import copy
from typing import Any

import pytest
import torch
from torch import nn

from teleport_optim.alignment import AlignmentReport, align
from teleport_optim.symmetry import Inputs, SymmetrySpec, find_symmetries
from teleport_optim.symmetry.action import act
from teleport_optim.symmetry.alignment.activations import _Moments
from teleport_optim.symmetry.alignment.matching import Matching, assignment_solver
from tests.helpers.alignment_models import MODELS, Tied, build, distance, every_model, numbers, permuted, small, state

both_ways = pytest.mark.parametrize("by_activations", [False, True], ids=["weights", "activations"])


@both_ways
@every_model
def test_a_planted_permutation_is_found_exactly(name: str, by_activations: bool) -> None:
    inputs = MODELS[name][1]
    for seed in (0,) if name in ("language", "attention") else (0, 1, 2):
        reference = build(name, seed)
        model = permuted(reference, inputs, seed)
        assert distance(model, reference) > 1.0
        report = align(model, reference, inputs, data=inputs if by_activations else None)
        assert all(torch.equal(tensor, reference.state_dict()[key]) for key, tensor in model.state_dict().items())
        assert report.distance_after == 0.0
        assert report.is_converged
        if by_activations and name in ("perceptron", "residual", "grouped", "recurrent", "tied"):
            assert set(report.methods.values()) == {"activations"}


@both_ways
@every_model
def test_the_function_stays_and_networks_come_closer(name: str, by_activations: bool) -> None:
    inputs = MODELS[name][1]
    model, reference = build(name, 0), build(name, 1)
    before, outputs = distance(model, reference), model(inputs)
    old, pointers = state(model), [parameter.data_ptr() for parameter in model.parameters()]
    report = align(model, reference, inputs, data=[inputs, inputs] if by_activations else None)
    torch.testing.assert_close(model(inputs), outputs, rtol=1e-10, atol=1e-10)
    assert distance(model, reference) == pytest.approx(report.distance_after)
    assert before == pytest.approx(report.distance_before)
    if not by_activations:
        assert report.distance_after < before
    for first, second in zip(report.objectives, report.objectives[1:]):
        assert second >= first
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    moved = act(report.spec, report.element, old)
    assert all(torch.equal(tensor, moved[key]) for key, tensor in model.state_dict().items())


@every_model
def test_every_step_improves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Site by site, not only sweep by sweep; and an element that was taken is the better one of both."""
    values: list[tuple[float, bool, float]] = []
    improve = Matching.improve

    def watched(self: Matching, site: Any) -> bool:
        before = self.objective()
        is_better = improve(self, site)
        values.append((before, is_better, self.objective()))
        return is_better

    monkeypatch.setattr(Matching, "improve", watched)
    align(build(name, 0), build(name, 1), MODELS[name][1])
    assert any(is_better for _, is_better, _ in values)
    assert all(after > before if is_better else after == before for before, is_better, after in values)


def test_one_site_gets_the_best_of_all_permutations() -> None:
    from itertools import permutations

    torch.manual_seed(0)
    model, reference = (nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in range(2))
    spec = find_symmetries(model, torch.randn(3, 2)).of_group("permutation")
    start = state(model)
    distances = []
    for order in permutations(range(5)):
        model.load_state_dict(act(spec, {"0:permutation": torch.tensor(order)}, start))
        distances.append(distance(model, reference))
    assert align(model, reference, torch.randn(3, 2)).distance_after == pytest.approx(min(distances))


@pytest.mark.parametrize("seed", range(4))
def test_heads_are_matched_whatever_the_order_inside_of_them(seed: int) -> None:
    """One step finds the heads and what is inside all of them."""
    inputs = MODELS["attention"][1]
    reference = build("attention", seed)
    spec = find_symmetries(reference, inputs).of_group("permutation")
    element = {site.id: torch.arange(site.size).roll(1) for site in spec if site.id != "linear1:permutation"}
    element["self_attn:heads"] = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    old = {name: parameter.detach() for name, parameter in reference.named_parameters()}
    matching = Matching(spec, act(spec, element, old), old, assignment_solver())
    assert {site.id for site in matching.single_sites()} == {"linear1:permutation"}
    assert matching.distance() > 1.0
    assert matching.improve(spec["self_attn:heads"])
    assert matching.distance() == 0.0
    assert not any(matching.improve(site) for site in spec)


def test_correlation_is_that_of_numpy_over_batches() -> None:
    import numpy

    moments = _Moments()
    first, second = numbers(2, 3, 50)
    first, second = first + 4.0, 3.0 * second - 1.0
    second[1] = 7.0
    for start in (0, 20):
        part = slice(start, start + 20 if start == 0 else None)
        moments.add(first[:, None, part], second[:, None, part])
    expected = numpy.corrcoef(first, second + 1e-9 * numbers(50))[:3, 3:]
    expected[:, 1] = 0.0
    torch.testing.assert_close(moments.correlation(), torch.tensor(expected), rtol=0, atol=1e-6)


def test_activations_see_through_what_weights_do_not() -> None:
    """Rescaled channels: the same activations up to a factor, while the largest weights hide the right partner."""
    inputs = numbers(200, 4)
    reference = build("perceptron", 0)
    model = permuted(reference, inputs, 1)
    planted = align(copy.deepcopy(model), reference, inputs).element
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        factors = (2.0 * torch.randn(24, generator=generator, dtype=torch.float64)).exp()
        model[2].weight.mul_(factors[:, None])
        model[2].bias.mul_(factors)
        model[4].weight.div_(factors)
    by_weights = align(copy.deepcopy(model), reference, inputs).element["2:permutation"]
    by_activations = align(model, reference, inputs, data=inputs).element["2:permutation"]
    assert torch.equal(by_activations, planted["2:permutation"])
    assert not torch.equal(by_weights, planted["2:permutation"])


def test_it_is_deterministic_and_the_generator_decides_the_order() -> None:
    def run(generator: torch.Generator | None) -> AlignmentReport:
        return align(build("perceptron", 0), build("perceptron", 1), MODELS["perceptron"][1], generator=generator)

    first, again = run(None), run(None)
    assert all(torch.equal(part, again.element[site]) for site, part in first.element.items())
    seeded = [run(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4, 5)]
    assert seeded[0].objectives == seeded[1].objectives
    assert len({report.objectives for report in seeded}) > 1


@both_ways
def test_nothing_else_changes(by_activations: bool) -> None:
    inputs = MODELS["residual"][1].clone()
    model, reference = build("residual", 0), build("residual", 1)
    model.train()
    model.norm.eval()
    model(inputs).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    modes, hooks = [module.training for module in model.modules()], len(model.stem._forward_hooks)
    old, random_state = state(reference), torch.get_rng_state()
    align(model, reference, inputs, data=inputs if by_activations else None)
    assert all(torch.equal(tensor, old[name]) for name, tensor in reference.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module.training for module in reference.modules())
    assert len(model.stem._forward_hooks) == hooks
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(inputs, MODELS["residual"][1])
    assert all(torch.equal(p.grad, old_gradient) for p, old_gradient in zip(model.parameters(), gradients))


def test_inputs_by_name_and_a_known_spec() -> None:
    inputs = MODELS["perceptron"][1]
    reference = build("perceptron", 0)
    spec = find_symmetries(reference, inputs)
    for data in ({"input": inputs}, [(inputs,)], [{"input": inputs}], (inputs, inputs), Inputs((inputs,), {})):
        report = align(permuted(reference, inputs, 1), reference, inputs, data=data, spec=spec)
        assert report.distance_after == 0.0
    assert report.spec == spec.of_group("permutation")


def test_the_report_prints_as_a_table() -> None:
    reference = build("perceptron", 0)
    report = align(permuted(reference, MODELS["perceptron"][1], 1), reference, MODELS["perceptron"][1])
    lines = str(report).splitlines()
    assert len(lines) == 5
    assert "weights" in lines[1]
    assert lines[-1].endswith("-> 0, 3 sweeps")
    limited = align(build("perceptron", 0), build("perceptron", 1), MODELS["perceptron"][1], max_iterations=1)
    assert not limited.is_converged
    assert str(limited).endswith("1 sweeps; not converged")


def with_nan() -> nn.Module:
    model = small()
    nn.init.constant_(model[0].bias, float("nan"))
    return model


FOUR = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("model", "reference", "options", "message"),
    [
        (small(), small(7), {}, "'0.weight' has the shapes.*one architecture"),
        (small(), nn.Linear(4, 2), {}, "only the first network has '0.bias'"),
        (nn.Linear(4, 2), small(), {}, "only the second network has '0.bias'"),
        (nn.Linear(4, 2), nn.Linear(4, 2), {}, "no hidden channels that can be permuted"),
        (small(), with_nan(), {}, "'0.bias' of the reference is not finite"),
        (small(), small(), {"max_iterations": 0}, "max_iterations is 0"),
        (small(), small(), {"data": []}, "there are no batches"),
        (small(), small(), {"data": torch.zeros(3, 5)}, "cannot take a batch of data"),
        (small(), small(), {"spec": find_symmetries(Tied(), torch.zeros(3, 4))}, "which the model does not have"),
        (small(), small(), {"spec": SymmetrySpec()}, "nothing to align"),
    ],
)
def test_mistakes_are_named(model: nn.Module, reference: nn.Module, options: dict[str, Any], message: str) -> None:
    old = state(model)
    with pytest.raises(ValueError, match=message):
        align(model, reference, FOUR, **options)
    assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())


def test_a_missing_scipy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(ImportError, match="pip install scipy"):
        align(small(), small(), FOUR)
