"""A check of symmetries that shares no code with the verifier.

It reads a spec as JSON and moves arrays of numpy by plain indexing and multiplication, parameters as a vector and gradients
as a covector. Outputs, gradients and buffers of the moved model are compared with those that are expected: in float64, in
evaluation and in training mode, with and without gradients, at the example's sizes and at other ones.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map, tree_map_only

from benchmarks.unseen.case import Case
from benchmarks.unseen.moves import (
    Array,
    Arrays,
    Site,
    distance,
    draw_element,
    gradient_distance,
    move_arrays,
    places_of,
    slice_of,
)
from teleport_optim.symmetry import find_symmetries

__all__ = ["OUTCOMES", "check"]

OUTCOMES = ("exact", "wrong", "raised", "refused", "none")
"""``refused``: the model as a whole; ``none``: nothing was found in it."""

_TOLERANCE = 1e-8
"""The largest relative error of an exact symmetry. Errors of right ones are near 1e-13, those of wrong ones near 0.1."""

_LONGEST_SEARCH = 300
_MOST_NAMED = 3
"""Of the wrong sites of a model, how many are written down."""

_WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
_CASTS = {"float", "half", "bfloat16", "cfloat"}


class _Wide(TorchFunctionMode):
    """Casts to a narrower floating point type become casts to float64; products of experts, too, which torch has not there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _CASTS and len(args) == 1 and isinstance(args[0], Tensor):
            return args[0].to(torch.complex128 if args[0].is_complex() else torch.float64)
        if name in ("_grouped_mm", "grouped_mm") and args[0].dtype == torch.float64:
            return _grouped_product(*args, **(kwargs or {}))
        if name != "view":  # which reads the same bits
            args, kwargs = tree_map_only(torch.dtype, lambda dtype: _WIDE.get(dtype, dtype), (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _grouped_product(rows: Tensor, experts: Tensor, offs: Tensor, **options: Any) -> Tensor:
    """The rows of a matrix times the matrix of the expert whose group they are in."""
    ends = offs.tolist()
    parts = [rows[start:end] @ expert for start, end, expert in zip([0, *ends], ends, experts)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], experts.shape[-1])])


class _Way(NamedTuple):
    """Way of running a model."""

    inputs: Any
    size: str
    is_training: bool
    has_grad: bool
    seed: int

    def __str__(self) -> str:
        mode = "training" if self.is_training else "evaluation"
        return f"{self.size}, {mode} mode{'' if self.has_grad else ' without grad'}, seed {self.seed}"


class _Run(NamedTuple):
    outputs: list[Array]
    gradients: Arrays
    buffers: Arrays


def check(case: Case) -> dict[str, Any]:
    """Search a model and check what is found.

    Returns:
        The outcome, seconds of the search, the share of parameters that it reaches, and the cause of an outcome that is not
        ``exact``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _check(case)


def _check(case: Case) -> dict[str, Any]:
    example = _inputs(case, 0)
    expected = _plain_run(case, example)
    model = _built(case)
    start = time.process_time()
    try:
        with _time_limit(_LONGEST_SEARCH):
            spec = find_symmetries(model, example)
    except Exception as error:
        return {"outcome": "raised", "seconds": _since(start), "share": 0.0, "cause": f"search: {_described(error)}"}
    sites: list[Site] = json.loads(spec.to_json())["symmetries"]
    result: dict[str, Any] = {
        "outcome": "exact",
        "seconds": _since(start),
        "share": round(_share(model, sites), 4),
        "sites": len(sites),
        "refusals": len(spec.refusals),
    }
    try:
        again = _plain_run(case, example)
        model(*_arguments(example)[0], **_arguments(example)[1])
    except Exception as error:
        return result | {"outcome": "raised", "cause": f"the model after the search: {_described(error)}"}
    if distance(expected, again) != 0:
        return result | {"outcome": "raised", "cause": "a model built after the search computes something else"}
    if not sites:
        whole = [refusal.reason for refusal in spec.refusals if refusal.name == "(root)"]
        reasons = whole or [f"{refusal.name}: {refusal.reason}" for refusal in spec.refusals]
        return result | {"outcome": "refused" if whole else "none", "cause": "; ".join(reasons[:2])[:300]}
    try:
        return result | _compared(case, sites)
    except Exception as error:
        return result | {"outcome": "raised", "cause": f"check: {_described(error)}"}


def _compared(case: Case, sites: list[Site]) -> dict[str, Any]:
    twin = _built(case).double()
    _leave_out_dropout(twin)
    generator = np.random.default_rng(0)
    arrays = _generic(twin, generator)
    ways = _ways(case, twin, arrays)
    references = [_run(twin, arrays, way) for way in ways]

    def fault(part: list[Site]) -> tuple[float, str]:
        """The largest error of the sites moved at once, and where it is; of outputs, where those are wrong."""
        elements = {site["id"]: draw_element(site, generator) for site in part}
        moved = {name: array.copy() for name, array in arrays.items()}
        move_arrays(part, elements, moved, 1)
        _check_ties(twin, moved)
        worst = {"outputs": (0.0, ""), "gradients": (0.0, ""), "buffers": (0.0, "")}
        for way, reference in zip(ways, references):
            run = _run(twin, moved, way)
            gradients = {name: array.copy() for name, array in reference.gradients.items()}
            buffers = {name: array.copy() for name, array in reference.buffers.items()}
            move_arrays(part, elements, gradients, -1)
            move_arrays(part, elements, buffers, 1)
            errors = {
                "outputs": distance(reference.outputs, run.outputs),
                "gradients": gradient_distance(gradients, run.gradients),
                "buffers": distance(list(buffers.values()), list(run.buffers.values())),
            }
            worst = {what: max(worst[what], (error, f"{what} at {way}")) for what, error in errors.items()}
        # Gradients and buffers of a model whose outputs change are wrong as well, and say nothing of the cause.
        return next((found for found in worst.values() if found[0] > _TOLERANCE), max(worst.values()))

    def wrong_among(part: list[Site]) -> Iterator[tuple[Site, float, str]]:
        error, place = fault(part)
        if error <= _TOLERANCE:
            return
        if len(part) == 1:
            yield part[0], error, place
        else:
            yield from wrong_among(part[: len(part) // 2])
            yield from wrong_among(part[len(part) // 2 :])

    largest, place = fault(sites)
    wrong = []
    groups = dict.fromkeys(site["group"] for site in sites)
    for group in groups:
        part = [site for site in sites if site["group"] == group]
        error, own_place = fault(part)
        largest, place = max((largest, place), (error, own_place))
        if error > _TOLERANCE:
            wrong += list(wrong_among(part))
    result: dict[str, Any] = {"error": float(f"{largest:.1e}"), "sizes": len({way.size for way in ways})}
    if largest > _TOLERANCE:
        legs = [f"{site['id']} ({_legs(site)}) {error:.0e} in {where}" for site, error, where in wrong[:_MOST_NAMED]]
        result |= {"outcome": "wrong", "wrong_sites": len(wrong), "cause": "; ".join(legs) or f"together: {place}"}
    return result


# Models and inputs


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def _built(case: Case) -> nn.Module:
    _seed(0)
    return case.build()


def _inputs(case: Case, number: int) -> Any:
    _seed(number)
    return case.inputs(*case.sizes[number])


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as arguments, of their own memory."""
    own = tree_map_only(Tensor, lambda tensor: tensor.clone(), inputs)
    if isinstance(own, dict):
        return (), own
    return (own if isinstance(own, tuple) else (own,)), {}


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors of an output. What a decoder keeps for its next call is not the function's value, and stays out."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors_in(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors_in(value)
    elif is_dataclass(output):
        yield from _tensors_in(vars(output))


def _plain_run(case: Case, inputs: Any) -> list[Array]:
    """The outputs of the model as it is built, in its own type."""
    model = _built(case).eval()
    args, kwargs = _arguments(inputs)
    with torch.no_grad():
        return [tensor.numpy() for tensor in _tensors_in(model(*args, **kwargs))]


def _leave_out_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_rate = isinstance(value, float) and (
                "drop" in name or (name == "p" and "Dropout" in type(module).__name__)
            )
            if is_rate:
                setattr(module, name, 0.0)


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, under every name that they have."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _generic(model: nn.Module, generator: np.random.Generator) -> Arrays:
    """The tensors of a model, moved away from zeros, ones and other special values."""
    drawn: dict[int, Array] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in _named(model).items():
        array = tensor.detach().numpy().copy()
        if array.dtype == np.float64 and array.size:
            noise = generator.standard_normal(array.shape)
            if name in parameters:
                array += 0.3 * max(0.1, float(np.sqrt(np.mean(array**2)))) * noise
            elif name.endswith("running_mean"):
                array += 0.3 * noise
            elif name.endswith("running_var"):
                array *= np.exp(0.3 * noise)
        drawn.setdefault(id(tensor), array)
    return {name: drawn[id(tensor)] for name, tensor in _named(model).items()}


def _ways(case: Case, twin: nn.Module, arrays: Arrays) -> list[_Way]:
    """All ways in which a model is run; several seeds only where its output depends on the seed."""
    names = [f"batch {batch}, length {length}" for batch, length in case.sizes]
    sizes = [(_wide(_inputs(case, number)), name) for number, name in enumerate(names) if names.index(name) == number]
    modes = [(False, False), (True, True)]  # in training and with gradients
    first = [
        [_run(twin, arrays, _Way(*sizes[0], mode, False, seed)).outputs for seed in range(4)] for mode in (False, True)
    ]
    is_random = any(distance(runs[0], other) > 0 for runs in first for other in runs[1:])
    seeds = range(4) if is_random else range(1)
    return [_Way(*size, *mode, seed) for size in sizes for mode in modes for seed in seeds]


def _wide(inputs: Any) -> Any:
    return tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, inputs
    )


def _run(model: nn.Module, arrays: Arrays, way: _Way) -> _Run:
    for name, tensor in _named(model).items():
        tensor.data.copy_(torch.from_numpy(arrays[name]))
    model.train(way.is_training)
    _seed(way.seed)
    args, kwargs = _arguments(way.inputs)
    parameters = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    gradients: list[Tensor | None] = []
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide(), torch.set_grad_enabled(way.has_grad):
            outputs = list(_tensors_in(model(*args, **kwargs)))
            terms = [_term(output, place) for place, output in enumerate(outputs) if output.requires_grad]
            if terms:
                gradients = list(
                    torch.autograd.grad(torch.stack(terms).sum(), list(parameters.values()), allow_unused=True)
                )
    finally:
        torch.set_default_dtype(default)
    return _Run(
        [output.detach().numpy().copy() for output in outputs],
        {
            name: np.zeros(tuple(parameter.shape)) if gradient is None else gradient.numpy().copy()
            for (name, parameter), gradient in zip(parameters.items(), gradients)
        },
        {name: buffer.detach().numpy().copy() for name, buffer in model.named_buffers(remove_duplicate=False)},
    )


def _term(output: Tensor, place: int) -> Tensor:
    """A loss of one output, without symmetries of its own."""
    weights = torch.from_numpy(np.random.default_rng(place).standard_normal(tuple(output.shape)))
    real = output.abs() if output.is_complex() else output
    finite = real[torch.isfinite(real)]  # logits of what a mask leaves out
    return (finite * weights[torch.isfinite(real)]).mean() + (finite**2).mean() / 2


# Symmetries as plain data


def _check_ties(model: nn.Module, arrays: Arrays) -> None:
    seen: dict[int, str] = {}
    for name, tensor in _named(model).items():
        other = seen.setdefault(id(tensor), name)
        if not np.array_equal(arrays[other], arrays[name], equal_nan=arrays[name].dtype.kind == "f"):
            raise AssertionError(f"{other} and {name} are one tensor, but move apart")


def _share(model: nn.Module, sites: list[Site]) -> float:
    """The share of the parameters that some site moves."""
    reached = {name: np.zeros(tuple(parameter.shape), bool) for name, parameter in model.named_parameters()}
    for site in sites:
        for leg in site["legs"]:
            if leg["name"] in reached:
                slice_of(leg, reached[leg["name"]])[places_of(site, leg)] = True
    total = sum(array.size for array in reached.values())
    return sum(int(array.sum()) for array in reached.values()) / max(1, total)


def _legs(site: Site) -> str:
    legs = [f"{leg['name']}[{leg['axis']}]^{leg['degree']:+d}" for leg in site["legs"][:4]]
    return " ".join([*legs, "..."] if len(site["legs"]) > 4 else legs)


# Distances


# Time and errors


def _since(start: float) -> float:
    return round(time.process_time() - start, 2)


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the search took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _described(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]} ({last.filename.rpartition('site-packages/')[2]}:{last.lineno})"
