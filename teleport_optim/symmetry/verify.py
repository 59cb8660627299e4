"""A numeric certificate that symmetries leave a model's function unchanged."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from teleport_optim.symmetry.double_precision import DoublePrecision
from teleport_optim.symmetry.inputs import ExampleInputs, Inputs
from teleport_optim.symmetry.moves import move
from teleport_optim.symmetry.named_tensors import cuda_devices, named_tensors
from teleport_optim.symmetry.search.recording.tensors import leaves
from teleport_optim.symmetry.sizes import Growth, grown, growths
from teleport_optim.symmetry.spec import Element, Refusal, SymmetrySpec

__all__ = ["APPROXIMATE_TOLERANCE", "VerificationReport", "randomise", "verify_symmetries"]

APPROXIMATE_TOLERANCE = 0.05
"""Largest error of a symmetry with ``exact=False``. A wrong symmetry changes the function by about 0.3 and more."""

_SEED = 0
_NUM_SEEDS = 4
"""Number of seeds with which a model is run that draws from Python's or numpy's random numbers."""
_AS_GIVEN = "as given"


@dataclass(frozen=True)
class VerificationReport:
    """Error and verdict of each symmetry; printing it gives a table.

    Attributes:
        errors: For each site id, the largest relative change of an output or a buffer, in evaluation and in training
            mode, when it was moved alone or with others of its group.
        together: The same with all exact symmetries applied at once.
        approximate: The ids of the sites with ``exact=False``.
        refusals: The places that the spec leaves out.
        tolerance: What an exact symmetry may change. Others may change :data:`APPROXIMATE_TOLERANCE`.
        tried: The inputs that were tried, with whether the model took them: those given, and such of other sizes.
        where: For each site id that failed, the first inputs of those tried with which it did.
    """

    errors: Mapping[str, float]
    together: float
    approximate: frozenset[str]
    refusals: tuple[Refusal, ...]
    tolerance: float
    tried: Mapping[str, bool] = field(default_factory=dict)
    where: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> tuple[str, ...]:
        """The ids of the sites that changed the function by more than they may."""
        limits = {True: max(self.tolerance, APPROXIMATE_TOLERANCE), False: self.tolerance}
        return tuple(name for name, error in self.errors.items() if not error <= limits[name in self.approximate])

    @property
    def ok(self) -> bool:
        """Whether every symmetry holds, alone and together."""
        return not self.failed and self.together <= self.tolerance

    @property
    def worst(self) -> float:
        """The largest error of an exact symmetry, alone or together."""
        return max([self.together, *(error for name, error in self.errors.items() if name not in self.approximate)])

    def __str__(self) -> str:
        width = max(map(len, ("all together", *self.errors)))
        lines = [f"{'site'.ljust(width)}  error    verdict"]
        for name, error in self.errors.items():
            verdict = "FAILED" if name in self.failed else "approximate" if name in self.approximate else "holds"
            verdict += "" if self.where.get(name, _AS_GIVEN) == _AS_GIVEN else f" with {self.where[name]}"
            lines.append(f"{name.ljust(width)}  {error:7.1e}  {verdict}")
        verdict = "holds" if self.together <= self.tolerance else "FAILED"
        lines.append(f"{'all together'.ljust(width)}  {self.together:7.1e}  {verdict}")
        lines += [f"inputs   {name}: {'' if taken else 'not '}taken" for name, taken in self.tried.items()]
        lines += [f"refused  {refusal.name}: {refusal.reason}" for refusal in self.refusals]
        return "\n".join(lines)


def verify_symmetries(
    model: nn.Module,
    spec: SymmetrySpec,
    example_inputs: ExampleInputs,
    *,
    tolerance: float = 1e-10,
    generator: torch.Generator | None = None,
    other_sizes: bool = True,
) -> VerificationReport:
    r"""Check numerically that the symmetries of ``spec`` leave the function of ``model`` unchanged.

    A float64 copy of the model gets generic parameters and running statistics. Then the exact symmetries of each group, and
    all of them together, move it by a random element ``g``; where that changes the function, they are halved until those are
    found that are wrong. The error is the largest
    :math:`\max|f(x; g\theta) - f(x; \theta)| / \max|f(x; \theta)|` over the outputs. It is taken in evaluation and in
    training mode (dropout and RReLU stay off), and there also over the buffers that the forward pass updates, which
    must move along. A symmetry that holds has an error of about 1e-15: what the model casts to a narrower floating point
    type is float64, too.

    A symmetry must hold for inputs of every size. So one more example is appended to the batch, and the other axes of the
    first input are made longer, one after the other, as far as the model takes it: more tokens, larger images.

    Args:
        model: The model. Neither it nor the random state (of torch, Python and numpy) changes.
        spec: The symmetries to check, found or written by hand.
        example_inputs: The inputs, as :func:`find_symmetries` takes them; floating point ones become float64.
        tolerance: The error up to which an exact symmetry holds.
        generator: A CPU generator for parameters and elements; by default one with a fixed seed.
        other_sizes: Whether inputs of other sizes are tried, too.

    Returns:
        The errors and the verdict. The cost is two forward passes for each group, three for each size that is tried, and four
        more; where a symmetry is wrong, four times the logarithm of their number for each that is.

    Raises:
        TypeError: if ``example_inputs`` is nothing of that kind.
        ValueError: if the model cannot take ``example_inputs``, or the spec does not fit the model.

    Example:
        >>> from teleport_optim.symmetry import find_symmetries
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> x = torch.randn(5, 3)
        >>> report = verify_symmetries(model, find_symmetries(model, x), x)
        >>> report.ok, sorted(report.errors)
        (True, ['0:permutation', '0:sign'])
        >>> report.tried
        {'as given': True, '6 examples': True, '4 instead of 3': False}
    """
    inputs: Inputs = tree_map_only(
        Tensor, lambda value: value.double() if value.is_floating_point() else value, Inputs.of(example_inputs)
    )
    generator = generator or torch.Generator().manual_seed(_SEED)
    _check_fit(model, spec)
    with _kept_random_state(cuda_devices(model)), torch.no_grad():
        subject = _Subject(model, generator)
        subject.add(_AS_GIVEN, inputs)
        if other_sizes:
            subject.add_other_sizes(inputs)

        exact = SymmetrySpec(tuple(symmetry for symmetry in spec if symmetry.exact))
        together = subject.error(exact, exact.random_element(generator), tolerance) if len(exact) else _NO_ERROR
        # Where all sites together hold at other sizes, each of them does, and a look at the inputs as given is enough.
        only_given = together.size <= tolerance

        def error(part: SymmetrySpec) -> _Error:
            return subject.error(part, part.random_element(generator), tolerance, only_given=only_given)

        def errors_of(part: SymmetrySpec) -> dict[str, _Error]:
            """The error of the symmetries moved at once; one by one only where that is too large."""
            at_once = error(part) if len(part) else _NO_ERROR
            if len(part) <= 1 or at_once.size <= tolerance:
                return dict.fromkeys((symmetry.id for symmetry in part), at_once)
            middle = len(part) // 2
            return errors_of(SymmetrySpec(part.symmetries[:middle])) | errors_of(SymmetrySpec(part.symmetries[middle:]))

        errors: dict[str, _Error] = {}
        for group in dict.fromkeys(symmetry.group.name for symmetry in exact):
            errors |= errors_of(exact.of_group(group))
        for symmetry in spec:
            if not symmetry.exact:
                part = SymmetrySpec((symmetry,))
                limit = max(tolerance, APPROXIMATE_TOLERANCE)
                errors[symmetry.id] = subject.error(part, part.random_element(generator), limit)
        sizes = {symmetry.id: errors[symmetry.id].size for symmetry in spec}
    approximate = frozenset(symmetry.id for symmetry in spec if not symmetry.exact)
    report = VerificationReport(sizes, together.size, approximate, spec.refusals, tolerance, subject.tried)
    return replace(report, where={name: errors[name].where for name in report.failed})


class _Error(NamedTuple):
    """A relative error, and the first inputs with which it was too large."""

    size: float
    where: str


_NO_ERROR = _Error(0.0, _AS_GIVEN)


class _Run(NamedTuple):
    """Outputs, buffers after the forward pass, and whether numbers were drawn from Python or numpy."""

    outputs: list[Tensor]
    buffers: dict[str, Tensor]
    has_choices: bool


class _Way(NamedTuple):
    """One way in which the model is run, and its results before it is moved."""

    name: str
    inputs: Inputs
    is_training: bool
    seed: int
    before: _Run


class _Subject:
    """A float64 copy of a model with generic tensors, and all ways in which it is run.

    Args:
        model: The model, which does not change.
        generator: Draws the generic tensors.
    """

    def __init__(self, model: nn.Module, generator: torch.Generator) -> None:
        self._model = model
        self._twin = copy.deepcopy(model).double()
        randomise(self._twin, generator)
        self._start = {name: tensor.clone() for name, tensor in named_tensors(self._twin)}
        self._ways: list[_Way] = []
        self.tried: dict[str, bool] = {}

    def add(self, name: str, inputs: Inputs) -> None:
        """Run the model with ``inputs`` in both modes, now and for every error.

        Raises:
            ValueError: if the model cannot take them.
        """
        ways = []
        for is_training in (False, True):
            before = _run(self._twin, self._start, inputs, is_training=is_training)
            ways.append(_Way(name, inputs, is_training, _SEED, before))
            # Choices made by Python's random numbers lead along other paths with other seeds.
            for seed in range(_SEED + 1, _SEED + _NUM_SEEDS) if before.has_choices else ():
                before = _run(self._twin, self._start, inputs, is_training=is_training, seed=seed)
                ways.append(_Way(name, inputs, is_training, seed, before))
        self._ways += ways
        self.tried[name] = True

    def add_other_sizes(self, inputs: Inputs) -> None:
        """Add inputs like those given with one more example and longer axes, as far as the model takes them."""
        taken: list[Growth] = []
        for alternatives in growths(inputs):
            for growth in alternatives:
                self.tried[str(growth)] = self._takes(grown(inputs, [*taken, growth]))
                if self.tried[str(growth)]:
                    taken.append(growth)
                    break
        if taken:
            tried = dict(self.tried)
            self.add(", ".join(map(str, taken)), grown(inputs, taken))
            self.tried = tried

    def error(self, part: SymmetrySpec, element: Element, limit: float, *, only_given: bool = False) -> _Error:
        """The largest error of the runs when the model is moved by ``element``, and the first inputs above ``limit``."""
        moved = move(part, element, self._start, 1)
        errors = []
        for way in self._ways:
            if only_given and way.name != _AS_GIVEN:
                continue
            after = _run(self._twin, moved, way.inputs, is_training=way.is_training, seed=way.seed)
            errors.append(_Error(_change(part, element, way.before, after), way.name))
        first = next((error for error in errors if not error.size <= limit), _NO_ERROR)
        return _Error(max(error.size for error in errors), first.where)

    def _takes(self, inputs: Inputs) -> bool:
        """Whether the model takes ``inputs`` in both modes and then computes the same as ever from those given."""
        given = self._ways[0]
        try:
            if cuda_devices(self._model):  # where an index out of range is an error from which no process recovers
                self._try(copy.deepcopy(self._twin).cpu(), tree_map_only(Tensor, Tensor.cpu, inputs))
            self._try(self._twin, inputs)
            again = _run(self._twin, self._start, given.inputs, is_training=given.is_training)
            if all(map(torch.equal, given.before.outputs, again.outputs)):
                return True
        except Exception:  # whatever a model does with inputs that it is not made for
            pass
        self._twin = copy.deepcopy(self._model).double()  # a cache may have grown, say
        return False

    def _try(self, model: nn.Module, inputs: Inputs) -> None:
        for is_training in (False, True):
            _run(model, self._start, inputs, is_training=is_training)


def _check_fit(model: nn.Module, spec: SymmetrySpec) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    for symmetry in spec:
        for leg in symmetry.legs:
            if leg.name not in shapes:
                raise ValueError(
                    f"site {symmetry.id!r} acts on {leg.name!r}, which the model does not have: "
                    f"use the spec that find_symmetries gives for this model"
                )
            shape = shapes[leg.name]
            axis, start, length = leg.within or (0, 0, 0)
            count = symmetry.size * leg.repeat
            entries = range(leg.offset, leg.offset + count) if leg.index is None else leg.index
            is_inside = leg.axis < len(shape) and all(0 <= entry < shape[leg.axis] for entry in entries)
            is_inside = is_inside and len(entries) == count
            if not is_inside or (leg.within and (axis >= len(shape) or start + length > shape[axis])):
                raise ValueError(
                    f"site {symmetry.id!r} has {symmetry.size} channels and acts by {leg}, which does not fit the "
                    f"shape {shape}: use the spec that find_symmetries gives for this model"
                )


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Leave no tensor at a special value: zero biases, unit weights and variances would hide a wrong symmetry."""

    def noise(tensor: Tensor) -> Tensor:
        return 0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)

    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() > 0:
            scale = parameter.square().mean().sqrt()
            parameter.add_(noise(parameter) * torch.where(scale > 0, scale, 1.0))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(noise(buffer))
        elif name.endswith("running_var"):
            buffer.mul_(noise(buffer).exp())


def _run(
    model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs, *, is_training: bool, seed: int = _SEED
) -> _Run:
    """The outputs of ``model`` with ``tensors``, and its buffers after the forward pass."""
    for name, tensor in named_tensors(model):
        tensor.copy_(tensors[name])
    model.train(is_training)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    states = _python_states()
    mode = "training" if is_training else "evaluation"
    try:
        with torch.inference_mode(), DoublePrecision():  # type: ignore[no-untyped-call]
            own = inputs.copy()
            output = model(*own.args, **own.kwargs)
    except Exception as error:
        raise ValueError(
            f"the model cannot take example_inputs in {mode} mode: {error}. Pass them as you would pass them to the "
            f"model, with at least two examples in the batch."
        ) from error
    outputs = [tensor.clone() for tensor in leaves(output)]
    if not outputs:
        raise ValueError(f"the model returns no tensor in {mode} mode, but {type(output).__name__}")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers(remove_duplicate=False)}
    return _Run(outputs, buffers, _python_states() != states)


def _python_states() -> tuple[Any, ...]:
    """The random states of Python and numpy, as values that can be compared."""
    state = np.random.get_state(legacy=False)  # noqa: NPY002
    return random.getstate(), state["state"]["pos"], state["state"]["key"].tobytes(), state["gauss"]


@contextmanager
def _kept_random_state(cuda_devices: list[int]) -> Iterator[None]:
    """Leave the random states of torch, Python and numpy as they were."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(cuda_devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def _change(part: SymmetrySpec, element: Element, before: _Run, after: _Run) -> float:
    expected = move(part, element, before.buffers, 1, partial=True)
    pairs = [
        *zip(before.outputs, after.outputs, strict=True),
        *((expected[name], after.buffers[name]) for name in expected),
    ]
    return max(_relative_error(first, second) for first, second in pairs)


def _relative_error(expected: Tensor, actual: Tensor) -> float:
    """``max|actual - expected| / max|expected|`` over finite entries; infinite where anything is not a number.

    Equal infinities (the scores of what a mask leaves out) differ by nothing.
    """
    if expected.numel() == 0:
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    expected, actual = expected.to(wide), actual.to(wide)
    same = torch.isinf(expected) & (expected == actual)
    expected, actual = expected.masked_fill(same, 0.0), actual.masked_fill(same, 0.0)
    difference, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    relative = difference / scale if scale > 0 else difference
    return relative if relative == relative else float("inf")
