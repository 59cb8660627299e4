"""Assertions whose messages name the site that is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves, tree_map_only

from teleport_optim.symmetry import (
    APPROXIMATE_TOLERANCE,
    Element,
    Symmetry,
    SymmetrySpec,
    VerificationReport,
    find_symmetries,
    verify_symmetries,
)
from teleport_optim.symmetry.action import act, act_dual
from teleport_optim.symmetry.inputs import ExampleInputs, Inputs
from teleport_optim.symmetry.named_tensors import cuda_devices, named_tensors
from teleport_optim.symmetry.verify import randomise

__all__ = ["Loss", "assert_equivariant_gradient", "assert_invariant", "assert_optimizer_equivariant"]

_SEED = 0
_MAX_REFUSALS = 5
"""Most refusals that a message lists."""

Loss = Callable[[Any], Tensor]


def assert_invariant(
    model: nn.Module,
    inputs: ExampleInputs,
    spec: SymmetrySpec | None = None,
    element: Element | None = None,
    *,
    tolerance: float = 1e-10,
    min_share: float = 0.0,
    other_sizes: bool = True,
) -> None:
    """Assert that symmetries leave the function of ``model`` unchanged.

    Each site alone, and all exact ones together, move a float64 copy with generic parameters; its outputs may not
    change, in evaluation and in training mode with dropout off, nor what the forward pass leaves in buffers; also not for
    one more example and for longer axes, where the model takes them. See
    :func:`~teleport_optim.symmetry.verify_symmetries`, which does the work.

    Args:
        model: The model. Neither it nor the random state changes.
        inputs: An input of the model, a tuple of inputs or a dictionary of named ones, with at least two examples.
        spec: The symmetries, by default those that :func:`~teleport_optim.symmetry.find_symmetries` finds. One without
            any holds, unless ``min_share`` is given.
        element: What to move by, for some or all sites; by default a random element that moves every site.
        tolerance: The largest change, relative to the largest output; ``APPROXIMATE_TOLERANCE`` for sites that are not
            exact.
        min_share: The share of the parameters, from 0 to 1, that the sites must move at least.
        other_sizes: Whether inputs of other sizes are tried, too.

    Raises:
        AssertionError: if a site changes the function; the message names the site, its group, the change and its legs. Or if
            the sites move too few parameters; the message says what was refused.
        ValueError: if the model cannot take ``inputs``, spec or element do not fit, or ``min_share`` is no share.

    Cost: two forward passes for each group, about ten more for inputs of other sizes, and more where a site is wrong.

    Example:
        >>> from teleport_optim.symmetry.groups import GROUPS
        >>> from teleport_optim.symmetry import Leg
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
        >>> assert_invariant(model, torch.randn(4, 3))
        >>> legs = (Leg("0.weight", 0, +1), Leg("0.bias", 0, +1), Leg("2.weight", 1, -1))
        >>> spec = SymmetrySpec((Symmetry("0:scaling", GROUPS["scaling"], 8, legs),))
        >>> assert_invariant(model, torch.randn(4, 3), spec)  # doctest: +ELLIPSIS, +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        AssertionError: site '0:scaling' (scaling of 8 channels) changes the function by ...
    """
    spec, element = _complete(model, inputs, spec, element)
    _check_share(model, spec, min_share)
    fixed = SymmetrySpec(tuple(_with_fixed_draw(symmetry, element[symmetry.id]) for symmetry in spec))
    report = verify_symmetries(model, fixed, inputs, tolerance=tolerance, other_sizes=other_sizes)
    _raise_if_failed(spec, report, "changes the function")


def assert_equivariant_gradient(
    model: nn.Module,
    inputs: ExampleInputs,
    spec: SymmetrySpec | None = None,
    element: Element | None = None,
    *,
    loss: Loss | None = None,
    tolerance: float = 1e-9,
    min_share: float = 0.0,
) -> None:
    """Assert that the gradient at moved parameters is :func:`~teleport_optim.symmetry.action.act_dual` of the gradient.

    As in :func:`assert_invariant`, each site alone and all exact ones together move a float64 copy with generic parameters.
    It is in training mode with dropout layers off.

    Args:
        model: The model. Neither it nor the random state changes.
        inputs: An input of the model, a tuple of inputs or a dictionary of named ones, with at least two examples.
        spec: The symmetries, by default those that are found.
        element: What to move by, for some or all sites; by default a random element that moves every site.
        loss: A loss of the model's output, by default the squared distance from fixed random targets.
        tolerance: The largest error, relative to the largest entry of the expected gradient.
        min_share: The share of the parameters, from 0 to 1, that the sites must move at least.

    Raises:
        AssertionError: if the gradient is another one; the message names the site, its group, the error and its legs. Or if
            every gradient is zero, which would show nothing, or the sites move too few parameters.
        KeyError: if the spec acts on a tensor that the model does not have.
        ValueError: if the element does not fit the spec, the model returns no floating point tensor, or ``min_share`` is no
            share.

    Cost: a forward and a backward pass for each site.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
        >>> assert_equivariant_gradient(model, torch.randn(4, 3))
    """
    spec, element = _complete(model, inputs, spec, element)
    _check_share(model, spec, min_share)
    loss = loss or _squared_distance
    with _generic_twin(model, inputs, spec) as (twin, start, values):
        reference = _gradient(twin, start, values, loss)
        if not any(bool((gradient != 0).any()) for gradient in reference.values()):
            raise AssertionError(
                "no parameter has a gradient, or all are zero, so that the test would show nothing: let the loss depend on "
                "the parameters, and let some of them require gradients"
            )

        def error(part: SymmetrySpec) -> float:
            own = {symmetry.id: element[symmetry.id] for symmetry in part}
            expected = act_dual(part, own, reference)
            actual = _gradient(twin, act(part, own, start), values, loss)
            return _distance(expected, actual) / _largest(expected.values())

        report = _report(spec, error, tolerance)
    _raise_if_failed(spec, report, "does not move the gradient by its dual: the error is", "")


def assert_optimizer_equivariant(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    model: nn.Module,
    inputs: ExampleInputs,
    spec: SymmetrySpec | None = None,
    *,
    num_steps: int = 3,
    groups: Sequence[str] = ("permutation",),
    loss: Loss | None = None,
    tolerance: float = 1e-6,
    min_share: float = 0.0,
) -> None:
    """Assert that training from moved parameters, and moving after training, give the same.

    Every optimizer that treats entries alike is equivariant to permutations. To sign flips are SGD, with momentum and weight
    decay, and AdamW; none of them is to positive scalings or to general linear maps. One that takes the sign of a gradient
    is held up by entries whose gradient is zero but for rounding, such as a bias in front of BatchNorm.

    As in :func:`assert_invariant`, each site alone and all together move a float64 copy with generic parameters. It trains in
    training mode with dropout off, on one batch.

    Args:
        make_optimizer: Makes an optimizer for a model; called for every training run, with the random state the same.
        model: The model. Neither it nor the random state changes.
        inputs: An input of the model, a tuple of inputs or a dictionary of named ones, with at least two examples.
        spec: The symmetries, by default those that are found.
        num_steps: The number of steps.
        groups: The names of the groups to test, of ``"permutation"``, ``"scaling"``, ``"sign"`` and ``"linear"``.
        loss: A loss of the model's output, by default the squared distance from fixed random targets.
        tolerance: The largest error of a trained parameter, relative to the largest change that training made.
        min_share: The share of the parameters, from 0 to 1, that the sites of these groups must move at least.

    Raises:
        AssertionError: if the results differ; the message names the site, its group, the error and its legs. Or if training
            changes no parameter, which would show nothing, or the sites move too few parameters.
        KeyError: if the spec acts on a tensor that the model does not have.
        ValueError: if a group is unknown, the model returns no floating point tensor, or ``min_share`` is no share.

    Cost: a training run of ``num_steps`` for each site.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> assert_optimizer_equivariant(lambda model: torch.optim.AdamW(model.parameters()), model, torch.randn(4, 3))
    """
    whole, element = _complete(model, inputs, spec, None)
    spec = SymmetrySpec(tuple(symmetry for name in groups for symmetry in whole.of_group(name)), whole.refusals)
    _check_share(model, spec, min_share)
    loss = loss or _squared_distance
    with _generic_twin(model, inputs, spec) as (twin, start, values):
        reference = _train(make_optimizer, twin, start, values, loss, num_steps)
        if all(torch.equal(parameter, start[name]) for name, parameter in reference.items()):
            raise AssertionError(
                f"training changed no parameter in {num_steps} steps, so that the test would show nothing: make_optimizer must "
                f"return an optimizer of the parameters of the model that it is given, with a learning rate above 0, for at "
                f"least one step, and some parameters must require gradients"
            )

        def error(part: SymmetrySpec) -> float:
            own = {symmetry.id: element[symmetry.id] for symmetry in part}
            moved = act(part, own, start)
            expected = act(part, own, start | reference)
            actual = _train(make_optimizer, twin, moved, values, loss, num_steps)
            return _distance(actual, expected) / _largest(expected[name] - moved[name] for name in actual)

        report = _report(spec, error, tolerance)
    _raise_if_failed(spec, report, "does not commute with training: the error is", "")


def _complete(
    model: nn.Module, inputs: ExampleInputs, spec: SymmetrySpec | None, element: Element | None
) -> tuple[SymmetrySpec, Element]:
    """The sites to check, by default all that are found, and what to move them by."""
    spec = find_symmetries(model, inputs) if spec is None else spec
    if element is None:
        generator = torch.Generator().manual_seed(_SEED)
        return spec, {symmetry.id: _moving_part(symmetry, generator) for symmetry in spec}
    spec.check(element)
    return SymmetrySpec(tuple(symmetry for symmetry in spec if symmetry.id in element)), element


def _check_share(model: nn.Module, spec: SymmetrySpec, min_share: float) -> None:
    """Raise AssertionError where the sites of ``spec`` move too few of the parameters."""
    if not 0 <= min_share <= 1:
        raise ValueError(f"min_share must lie between 0 and 1, got {min_share}: it is a share of all parameters")
    share = spec.share_of(model)
    if share < min_share:
        refusals = [f"{refusal.name}: {refusal.reason}" for refusal in spec.refusals[:_MAX_REFUSALS]]
        rest = len(spec.refusals) - len(refusals)
        refusals += [f"and {rest} more"] if rest else []
        raise AssertionError(
            f"the sites ({len(spec)}) move {share:.1%} of the parameters, less than the {min_share:.1%} of min_share; refused: "
            f"{'; '.join(refusals) or 'nothing'}"
        )


def _moving_part(symmetry: Symmetry, generator: torch.Generator) -> Tensor:
    """A random element that is not the identity, which would show nothing, unless the group has no other."""
    identity = symmetry.group.identity(symmetry.size)
    part = identity
    for _ in range(30):
        if not torch.equal(part, identity):
            break
        part = symmetry.group.random(symmetry.size, generator)
    return part


def _with_fixed_draw(symmetry: Symmetry, part: Tensor) -> Symmetry:
    """The same symmetry, of whose group only ``part`` is ever drawn."""
    group = copy.copy(symmetry.group)
    group.random = lambda size, generator: part  # type: ignore[method-assign]
    return replace(symmetry, group=group)


_Twin = tuple[nn.Module, dict[str, Tensor], Inputs]


@contextmanager
def _generic_twin(model: nn.Module, inputs: ExampleInputs, spec: SymmetrySpec) -> Iterator[_Twin]:
    """A float64 copy in training mode with dropout off and generic parameters, its tensors, and the inputs in float64."""
    values: Inputs = tree_map_only(
        Tensor, lambda value: value.double() if value.is_floating_point() else value, Inputs.of(inputs)
    )
    devices = cuda_devices(model)
    with torch.random.fork_rng(devices):
        twin = copy.deepcopy(model).double().train()
        for module in twin.modules():
            if isinstance(module, (_DropoutNd, nn.RReLU)):
                module.eval()
            elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
                module.dropout = 0.0
        with torch.no_grad():
            randomise(twin, torch.Generator().manual_seed(_SEED))
        yield twin, {name: tensor.detach().clone() for name, tensor in named_tensors(twin)}, values


def _load(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Write ``tensors`` into a model; its parameters, under every name that they have, which train."""
    torch.manual_seed(_SEED)
    with torch.no_grad():
        for name, tensor in named_tensors(model):
            tensor.copy_(tensors[name])
    return {name: value for name, value in model.named_parameters(remove_duplicate=False) if value.requires_grad}


def _output(model: nn.Module, inputs: Inputs) -> Any:
    own = inputs.copy()
    return model(*own.args, **own.kwargs)


def _gradient(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs, loss: Loss) -> dict[str, Tensor]:
    parameters = _load(model, tensors)
    value = loss(_output(model, inputs))
    if not parameters or not value.requires_grad:
        return {}
    grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, grads) if grad is not None}


def _train(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    inputs: Inputs,
    loss: Loss,
    num_steps: int,
) -> dict[str, Tensor]:
    model = copy.deepcopy(model)  # an optimizer may leave hooks behind
    parameters = _load(model, tensors)
    optimizer = make_optimizer(model)

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(_output(model, inputs))
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    for _ in range(num_steps):
        optimizer.step(closure)
    return {name: parameter.detach() for name, parameter in parameters.items()}


def _squared_distance(output: Any) -> Tensor:
    """The squared distance of outputs from fixed random targets: generic, so that no gradient vanishes."""
    generator = torch.Generator().manual_seed(_SEED)
    terms = [
        (tensor - torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)).square().mean()
        for tensor in tree_leaves(output)
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    ]
    if not terms:
        raise ValueError("the model returns no floating point tensor: pass a loss of its output")
    return torch.stack(terms).sum()


def _largest(tensors: Any) -> float:
    """The largest entry, against which errors are measured; 1 where all are zero."""
    return max((tensor.abs().max().item() for tensor in tensors if tensor.numel() > 0), default=0.0) or 1.0


def _distance(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> float:
    """The largest difference of two entries; not a number where any is none."""
    differences = [(actual[name] - expected[name]).abs().max() for name in expected if actual[name].numel() > 0]
    return torch.stack(differences).max().item() if differences else 0.0


def _report(spec: SymmetrySpec, error: Callable[[SymmetrySpec], float], tolerance: float) -> VerificationReport:
    """The errors of each site alone and of all exact ones together."""
    errors = {symmetry.id: error(SymmetrySpec((symmetry,))) for symmetry in spec}
    exact = SymmetrySpec(tuple(symmetry for symmetry in spec if symmetry.exact))
    approximate = frozenset(symmetry.id for symmetry in spec if not symmetry.exact)
    return VerificationReport(errors, error(exact) if len(exact) else 0.0, approximate, spec.refusals, tolerance)


def _raise_if_failed(spec: SymmetrySpec, report: VerificationReport, fault: str, by: str = " by") -> None:
    lines = []
    for name in report.failed:
        symmetry = spec[name]
        limit = report.tolerance if symmetry.exact else max(report.tolerance, APPROXIMATE_TOLERANCE)
        legs = " ".join(map(str, symmetry.legs))
        place = f" with {report.where[name]}" if report.where.get(name, "as given") != "as given" else ""
        lines.append(
            f"site {name!r} ({symmetry.group.name} of {symmetry.size} channels) {fault}{by} {report.errors[name]:.1e}, "
            f"more than {limit:.0e}{place}; its legs: {legs}"
        )
    if not report.ok and not lines:
        lines.append(
            f"moving all sites together {fault}{by} {report.together:.1e}, more than {report.tolerance:.0e}, although "
            f"each of them alone holds; the sites: {', '.join(symmetry.id for symmetry in spec)}"
        )
    if lines:
        raise AssertionError("\n".join(lines))
