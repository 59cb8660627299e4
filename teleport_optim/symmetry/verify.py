"""A numeric certificate that symmetries leave a model's function unchanged."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from teleport_optim.symmetry.inputs import ExampleInputs, Inputs
from teleport_optim.symmetry.moves import move
from teleport_optim.symmetry.spec import Element, Refusal, SymmetrySpec
from teleport_optim.symmetry.trace import leaves

__all__ = ["APPROXIMATE_TOLERANCE", "VerificationReport", "randomise", "verify_symmetries"]

APPROXIMATE_TOLERANCE = 0.05
"""What a symmetry with ``exact=False`` may change. A wrong symmetry changes the function by about 0.3 and more."""

_SEED = 0


@dataclass(frozen=True)
class VerificationReport:
    """How much each symmetry changed the function, with its verdict; printing it gives a table.

    Attributes:
        errors: For each site id, the largest relative change of an output or a buffer, in evaluation and in training
            mode, when it was moved alone or with others of its group.
        together: The same with all exact symmetries applied at once.
        approximate: The ids of the sites with ``exact=False``.
        refusals: The places that the spec leaves out.
        tolerance: What an exact symmetry may change. Others may change :data:`APPROXIMATE_TOLERANCE`.
    """

    errors: Mapping[str, float]
    together: float
    approximate: frozenset[str]
    refusals: tuple[Refusal, ...]
    tolerance: float

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
            lines.append(f"{name.ljust(width)}  {error:7.1e}  {verdict}")
        verdict = "holds" if self.together <= self.tolerance else "FAILED"
        lines.append(f"{'all together'.ljust(width)}  {self.together:7.1e}  {verdict}")
        lines += [f"refused  {refusal.name}: {refusal.reason}" for refusal in self.refusals]
        return "\n".join(lines)


def verify_symmetries(
    model: nn.Module,
    spec: SymmetrySpec,
    example_inputs: ExampleInputs,
    *,
    tolerance: float = 1e-10,
    generator: torch.Generator | None = None,
) -> VerificationReport:
    r"""Check numerically that the symmetries of ``spec`` leave the function of ``model`` unchanged.

    A float64 copy of the model gets generic parameters and running statistics. Then the exact symmetries of each group, and
    all of them together, move it by a random element ``g``; where that changes the function, they are halved until those are
    found that are wrong. The error is the largest
    :math:`\max|f(x; g\theta) - f(x; \theta)| / \max|f(x; \theta)|` over the outputs. It is taken in evaluation and in
    training mode (dropout and RReLU stay off), and there also over the buffers that the forward pass updates, which
    must move along. A symmetry that holds has an error of about 1e-15.

    Args:
        model: The model. Neither it nor the random state changes.
        spec: The symmetries to check, found or written by hand.
        example_inputs: The inputs, as :func:`find_symmetries` takes them; floating point ones become float64.
        tolerance: The error up to which an exact symmetry holds.
        generator: A CPU generator for parameters and elements; by default one with a fixed seed.

    Returns:
        The errors and the verdict. The cost is four forward passes for each group; where a symmetry is wrong, four times the
        logarithm of their number for each that is.

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
    """
    inputs: Inputs = tree_map_only(
        Tensor, lambda value: value.double() if value.is_floating_point() else value, Inputs.of(example_inputs)
    )
    generator = generator or torch.Generator().manual_seed(_SEED)
    _check_fit(model, spec)
    with torch.random.fork_rng(_cuda_devices(model)), torch.no_grad():
        twin = copy.deepcopy(model).double()
        randomise(twin, generator)
        start = {name: tensor.clone() for name, tensor in _tensors(twin)}
        reference = [_run(twin, start, inputs, is_training=is_training) for is_training in (False, True)]

        def error(part: SymmetrySpec) -> float:
            element = part.random_element(generator)
            moved = move(part, element, start, 1)
            return max(
                _change(part, element, before, _run(twin, moved, inputs, is_training=is_training))
                for is_training, before in zip((False, True), reference)
            )

        def errors_of(part: SymmetrySpec) -> dict[str, float]:
            """The error of the symmetries moved at once; one by one only where that is too large."""
            together = error(part) if len(part) else 0.0
            if len(part) <= 1 or together <= tolerance:
                return dict.fromkeys((symmetry.id for symmetry in part), together)
            middle = len(part) // 2
            return errors_of(SymmetrySpec(part.symmetries[:middle])) | errors_of(SymmetrySpec(part.symmetries[middle:]))

        exact = tuple(symmetry for symmetry in spec if symmetry.exact)
        errors: dict[str, float] = {}
        for group in dict.fromkeys(symmetry.group.name for symmetry in exact):
            errors |= errors_of(SymmetrySpec(exact).of_group(group))
        errors |= {symmetry.id: error(SymmetrySpec((symmetry,))) for symmetry in spec if not symmetry.exact}
        errors = {symmetry.id: errors[symmetry.id] for symmetry in spec}
        together = error(SymmetrySpec(exact)) if exact else 0.0
    approximate = frozenset(symmetry.id for symmetry in spec if not symmetry.exact)
    return VerificationReport(errors, together, approximate, spec.refusals, tolerance)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _cuda_devices(model: nn.Module) -> list[int]:
    """The CUDA devices whose random state a run of ``model`` may change."""
    return sorted({tensor.get_device() for _, tensor in _tensors(model) if tensor.is_cuda})


def _check_fit(model: nn.Module, spec: SymmetrySpec) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(model)}
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


class _NoDropout(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Leave out dropout, wherever it is called: its masks are drawn position by position and do not move along."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        settings = {argument.name: position for position, argument in enumerate(func._schema.arguments)}
        off = {"dropout": 0.0, "dropout_p": 0.0} if "dropout" not in func._schema.name else {"train": False, "p": 0.0}
        off |= {"training": False} if "rrelu" in func._schema.name else {}
        arguments = list(args)
        for name, value in off.items():
            if name in settings and settings[name] < len(arguments):
                arguments[settings[name]] = value
        kwargs = {key: off.get(key, value) for key, value in (kwargs or {}).items()}
        return func(*arguments, **kwargs)


_Run = tuple[list[Tensor], dict[str, Tensor]]


def _run(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs, *, is_training: bool) -> _Run:
    """The outputs of ``model`` with ``tensors``, and its buffers after the forward pass."""
    for name, tensor in _tensors(model):
        tensor.copy_(tensors[name])
    model.train(is_training)
    torch.manual_seed(_SEED)
    mode = "training" if is_training else "evaluation"
    try:
        with torch.inference_mode(), _NoDropout():  # type: ignore[no-untyped-call]
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
    return outputs, {name: buffer.clone() for name, buffer in model.named_buffers(remove_duplicate=False)}


def _change(part: SymmetrySpec, element: Element, before: _Run, after: _Run) -> float:
    outputs, buffers = before
    expected = move(part, element, buffers, 1, partial=True)
    pairs = [*zip(outputs, after[0], strict=True), *((expected[name], after[1][name]) for name in expected)]
    return max(_relative_error(first, second) for first, second in pairs)


def _relative_error(expected: Tensor, actual: Tensor) -> float:
    """``max|actual - expected| / max|expected|``; infinite where anything is not a number."""
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    relative = difference / scale if scale > 0 else difference
    return relative if relative == relative else float("inf")
