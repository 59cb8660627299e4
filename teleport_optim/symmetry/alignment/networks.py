"""Tensors and batches of the two networks, checked and copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from teleport_optim.symmetry.action import act
from teleport_optim.symmetry.inputs import ExampleInputs, Inputs
from teleport_optim.symmetry.named_tensors import named_tensors
from teleport_optim.symmetry.spec import Element, SymmetrySpec

__all__ = [
    "ROUNDING",
    "as_batches",
    "call",
    "check_alike",
    "check_spec",
    "float64_parameters",
    "move_in_place",
    "recalibrate_batch_norm",
]

ROUNDING = 1e-12
"""Relative differences below it are rounding errors of float64."""


def recalibrate_batch_norm(model: nn.Module, batches: Sequence[ExampleInputs]) -> None:
    """Measure the running statistics of every BatchNorm as the average over the batches."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches if norms else ():
            call(model, batch)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        norm.eval()


def call(model: nn.Module, batch: ExampleInputs) -> None:
    args, kwargs = Inputs.of(batch).copy()
    model(*args, **kwargs)


def as_batches(data: ExampleInputs | Iterable[ExampleInputs]) -> list[ExampleInputs]:
    batches = [data] if isinstance(data, (Tensor, Mapping, Inputs)) else list(data)
    if not batches:
        raise ValueError("there are no batches: pass at least one, or None")
    return batches


def float64_parameters(model: nn.Module, role: str) -> dict[str, Tensor]:
    """Copies of the floating point parameters in float64 on the CPU."""
    parameters = {
        name: parameter.detach().to("cpu", torch.float64, copy=True)
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
    }
    for name, parameter in parameters.items():
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"{name!r} of {role} is not finite everywhere: there is nothing to match, train it anew")
    return parameters


def check_alike(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    different = sorted(set(first) ^ set(second))
    if different:
        owner = "first" if different[0] in first else "second"
        raise ValueError(f"only the {owner} network has {different[0]!r}: both must be of one architecture")
    for name, tensor in first.items():
        if tensor.shape != second[name].shape:
            shapes = f"{tuple(tensor.shape)} and {tuple(second[name].shape)}"
            raise ValueError(f"{name!r} has the shapes {shapes}: both networks must be of one architecture")


def check_spec(spec: SymmetrySpec, model: nn.Module) -> None:
    if not len(spec):
        reasons = "".join(f"; {refusal.name}: {refusal.reason}" for refusal in spec.refusals)
        raise ValueError(
            f"the model has no hidden channels that can be permuted, so there is nothing to align{reasons}"
        )
    names = {name for name, _ in named_tensors(model)}
    for symmetry in spec:
        missing = sorted({leg.name for leg in symmetry.legs} - names)
        if missing:
            raise ValueError(
                f"site {symmetry.id!r} acts on {missing[0]!r}, which the model does not have: "
                f"use the spec that find_symmetries gives for this model"
            )


def move_in_place(model: nn.Module, spec: SymmetrySpec, element: Element) -> None:
    tensors = dict(named_tensors(model))
    with torch.no_grad():
        moved = act(spec, element, {name: tensor.detach() for name, tensor in tensors.items()})
        for name in dict.fromkeys(leg.name for symmetry in spec for leg in symmetry.legs):
            tensors[name].copy_(moved[name])
