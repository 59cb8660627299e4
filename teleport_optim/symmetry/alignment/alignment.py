"""Bring a network onto another one by the permutations of its hidden channels, and measure the barrier between them.

Two networks trained from different seeds are far apart partly because their channels are numbered differently. Without this
difference the straight line between wide networks is often free of a barrier, so that they can be averaged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from teleport_optim.symmetry.action import act
from teleport_optim.symmetry.find import find_symmetries
from teleport_optim.symmetry.inputs import ExampleInputs, Inputs
from teleport_optim.symmetry.moves import channels_of, move
from teleport_optim.symmetry.spec import Element, Leg, Symmetry, SymmetrySpec

__all__ = ["AlignmentReport", "Barrier", "align", "interpolation_barrier"]

_SEED = 0
_ROUNDING = 1e-12
_OUTPUT_AXES: dict[type[nn.Module], int] = {nn.Linear: -1, nn.Conv1d: -2, nn.Conv2d: -3, nn.Conv3d: -4}
"""On which axis of its output a layer puts the channels of axis 0 of its weight."""


@dataclass(frozen=True)
class AlignmentReport:
    """What :func:`align` did to a model; printing it gives a short table.

    Attributes:
        spec: The permutation sites.
        element: The permutations by site: channel ``i`` is now what was channel ``element[site][i]``.
        methods: For each site what decided: ``"weights"`` or ``"activations"``.
        objectives: The sum of products of the parameters of both networks, before the first sweep and after each one. It
            never decreases. Channels matched by their activations are matched before the first sweep.
        is_converged: Whether the last sweep improved no site, so that more of them would change nothing.
        distance_before: Euclidean distance of the parameters before the alignment.
        distance_after: The same after it.
    """

    spec: SymmetrySpec
    element: Element
    methods: Mapping[str, str]
    objectives: tuple[float, ...]
    is_converged: bool
    distance_before: float
    distance_after: float

    def __str__(self) -> str:
        width = max(map(len, ("site", *self.methods)))
        lines = [f"{'site'.ljust(width)}  size  moved  decided by"]
        for symmetry in self.spec:
            part = self.element[symmetry.id]
            moved = int((part != torch.arange(symmetry.size)).sum())
            lines.append(f"{symmetry.id.ljust(width)}  {symmetry.size:4d}  {moved:5d}  {self.methods[symmetry.id]}")
        end = "" if self.is_converged else "; not converged"
        lines.append(
            f"distance {self.distance_before:.4g} -> {self.distance_after:.4g}, {len(self.objectives) - 1} sweeps{end}"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class Barrier:
    """The loss along the straight line between two networks.

    Attributes:
        alphas: Places on the line, from 0 (the first network) to 1 (the second).
        losses: The loss at each of them.
    """

    alphas: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def excesses(self) -> tuple[float, ...]:
        r"""How far each loss lies above the chord, :math:`L(\alpha) - (1 - \alpha) L(0) - \alpha L(1)`."""
        first, last = self.losses[0], self.losses[-1]
        inner = zip(self.alphas[1:-1], self.losses[1:-1])
        return (0.0, *((loss - first) - alpha * (last - first) for alpha, loss in inner), 0.0)

    @property
    def barrier(self) -> float:
        """The largest excess, at least 0."""
        return max(self.excesses)


def align(
    model: nn.Module,
    reference: nn.Module,
    example_inputs: ExampleInputs,
    *,
    data: ExampleInputs | Iterable[ExampleInputs] | None = None,
    max_iterations: int = 100,
    generator: torch.Generator | None = None,
    spec: SymmetrySpec | None = None,
) -> AlignmentReport:
    r"""Renumber the hidden channels of ``model``, in place, so that it comes close to ``reference``.

    The function of ``model`` does not change, whatever the reference is; only the order of its hidden channels does. It is
    the permutations :math:`g` of all sites that are chosen, to make the parameters alike in the Euclidean norm:

    .. math:: \max_g \langle \theta_{ref},\, g \cdot \theta \rangle \iff \min_g \|\theta_{ref} - g \cdot \theta\|.

    Weight matching takes site by site in random order. With the other sites fixed, the best permutation of a site of ``n``
    channels is a linear assignment with the gains :math:`G_{ij} = \sum_{legs} \langle \theta_{ref}[i], \theta[j] \rangle`,
    an ``[n, n]`` matrix. Where a site lies on two axes of one weight (recurrent layers) this is a linearisation, which is
    taken only if it improves. Whole attention heads are matched up to the order inside of them. Sweeps end when no site
    improves: a local optimum, and the distance never grows.

    Activation matching, with ``data``, takes for ``G`` the correlation of the outputs that both networks give in evaluation
    mode at the layers that write the site (Linear and Conv), summed over these layers. It decides all sites independently,
    but may increase the distance. Sites without such a layer, and those of attention heads, are left to weight matching.

    Buffers such as running statistics move along but do not count in the matching. An optimizer's state does not move by
    itself: pass ``report.spec`` and ``report.element`` to :func:`~teleport_optim.symmetry.action.transport`.

    Args:
        model: The network that is renumbered. Its parameters keep their identity, its modes and gradients are untouched
            (zero the gradients: they belong to the old order).
        reference: A network of the same architecture; it is not changed.
        example_inputs: What both networks take, in any form that :func:`~teleport_optim.symmetry.find_symmetries` takes.
        data: An iterable of batches, each in the form of ``example_inputs`` and on the device of both networks; a single
            tensor is one batch. A tuple counts as several batches: ``[(x, mask)]`` is one. None means weight matching.
        max_iterations: Sweeps over all sites after which weight matching gives up.
        generator: A CPU generator for the order of the sites; by default one with a fixed seed.
        spec: The symmetries, if they are known already; only its permutations are used.

    Returns:
        The permutations and how far they brought the networks together.

    Raises:
        ImportError: if scipy is not installed.
        ValueError: if the networks differ in their parameters, have values that are not finite, or no permutation is found.

    Cost:
        A sweep multiplies every weight of ``n`` channels with as many of the reference, ``n`` times its size, and solves one
        assignment of ``O(n^3)`` for each site; a few sweeps are usual. Parameters of both networks are copied to the CPU in
        float64.

    Source:
        Written after the description in Ainsworth, Hayase, Srinivasa 2022, *Git Re-Basin*, arXiv 2209.04836.

    Example:
        >>> def network(seed):
        ...     _ = torch.manual_seed(seed)
        ...     return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> first, second, x = network(0), network(1), torch.ones(4, 3)
        >>> y = second(x)
        >>> report = align(second, first, x)
        >>> report.distance_after < report.distance_before, bool(torch.allclose(second(x), y))
        (True, True)
    """
    assign = _assignment_solver()
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}, but at least one sweep is needed")
    parameters, targets = _parameters(model, "the model"), _parameters(reference, "the reference")
    _check_alike(parameters, targets)
    spec = (find_symmetries(model, example_inputs, groups=["permutation"]) if spec is None else spec).of_group(
        "permutation"
    )
    _check_spec(spec, model)
    generator = generator or torch.Generator().manual_seed(_SEED)
    matching = _Matching(spec, parameters, targets, assign)
    distance_before = matching.distance()
    by_activations: Element = {}
    if data is not None:
        correlations = _correlations(matching.single_sites(), model, reference, _batches(data))
        by_activations = {site: assign(gains) for site, gains in correlations.items()}
        matching.element |= by_activations
    left = [symmetry for symmetry in spec if symmetry.id not in by_activations]
    objectives, is_converged = [matching.objective()], not left
    while not is_converged and len(objectives) <= max_iterations:
        order = torch.randperm(len(left), generator=generator).tolist()
        improved = [matching.improve(left[position]) for position in order]
        objectives.append(matching.objective())
        is_converged = not any(improved)
    _move_in_place(model, spec, matching.element)
    methods = {symmetry.id: "activations" if symmetry.id in by_activations else "weights" for symmetry in spec}
    return AlignmentReport(
        spec, matching.element, methods, tuple(objectives), is_converged, distance_before, matching.distance()
    )


def interpolation_barrier(
    first: nn.Module,
    second: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    num_points: int = 11,
    recalibrate: ExampleInputs | Iterable[ExampleInputs] | None = None,
) -> Barrier:
    r"""The loss along the straight line between two networks, and how far it rises above the chord.

    .. math:: \max_{0 \le \alpha \le 1} L((1 - \alpha) \theta_1 + \alpha \theta_2) - (1 - \alpha) L(\theta_1) - \alpha L(\theta_2)

    All of this happens on a copy: neither network changes, nor does the random state. Every point starts from the same random
    state.

    The hidden activations of an averaged network vary less than those of either network, which running statistics that were
    averaged too do not know. With ``recalibrate`` they are measured anew at every point, also at both ends: this is the
    resetting of BatchNorm in REPAIR. Models without BatchNorm are not changed by it.

    Args:
        first: The network at ``alpha = 0``. Tensors that are not floating point are taken from it.
        second: The network at ``alpha = 1``, with tensors of the same names and shapes.
        evaluate: Gives the loss of the model that it gets, a copy of ``first`` in evaluation mode.
        num_points: Points on the line, evenly spaced, both ends included.
        recalibrate: Batches, as ``data`` in :func:`align`; the running statistics become the average over them.

    Raises:
        ValueError: if the networks differ in their tensors, there are less than three points, or a loss is not a number or
            is infinite at an end.

    Cost: ``num_points`` calls of ``evaluate``, and as many passes over ``recalibrate``.

    Source:
        The barrier as in Frankle et al. 2020, arXiv 1912.05671, and Entezari et al. 2022, arXiv 2110.06296; recalibration
        after Jordan et al. 2022, *REPAIR*, arXiv 2211.08403.

    Example:
        >>> x = torch.ones(4, 3)
        >>> first, second = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
        >>> _ = nn.init.constant_(first.weight, 1.0), nn.init.constant_(second.weight, -1.0)
        >>> line = interpolation_barrier(first, second, lambda model: 1 - model(x).square().mean().item(), num_points=3)
        >>> line.losses, line.barrier
        ((-8.0, 1.0, -8.0), 9.0)
    """
    if num_points < 3:
        raise ValueError(f"num_points is {num_points}, but a barrier needs a point between both ends: take at least 3")
    start, end = dict(_tensors(first)), dict(_tensors(second))
    _check_alike(start, end)
    batches = None if recalibrate is None else _batches(recalibrate)
    twin = copy.deepcopy(first).eval()
    devices = _cuda_devices(first)
    alphas = [position / (num_points - 1) for position in range(num_points)]
    losses = []
    for alpha in alphas:
        with torch.no_grad():
            for name, tensor in _tensors(twin):
                if tensor.is_floating_point() or tensor.is_complex():
                    tensor.copy_(torch.lerp(start[name], end[name].to(tensor), alpha))
        with torch.random.fork_rng(devices):
            if batches is not None:
                _recalibrate(twin, batches)
            losses.append(float(evaluate(twin)))
        if math.isnan(losses[-1]) or (alpha in (0.0, 1.0) and math.isinf(losses[-1])):
            raise ValueError(f"evaluate gives {losses[-1]} at alpha = {alpha:g}: look at the data and at both networks")
    return Barrier(tuple(alphas), tuple(losses))


_Assign = Callable[[Tensor], Tensor]


class _Matching:
    """Coordinate ascent over the sites of one model, on copies of its parameters.

    Permutations are orthogonal, so a site ``k`` between earlier sites ``E`` and later ones ``L`` sees the objective as
    ``<L^-1 reference, k E model>``: the element stays in the order in which the spec acts, also where sites are nested.
    """

    def __init__(
        self, spec: SymmetrySpec, model: dict[str, Tensor], reference: dict[str, Tensor], assign: _Assign
    ) -> None:
        self.spec, self.model, self.reference, self.assign = spec, model, reference, assign
        self.element = spec.identity()
        self._legs = {symmetry.id: tuple(leg for leg in symmetry.legs if leg.name in model) for symmetry in spec}
        self._order = {symmetry.id: position for position, symmetry in enumerate(spec)}
        by_name: dict[str, list[Symmetry]] = {}
        for symmetry in spec:
            for name in dict.fromkeys(leg.name for leg in self._legs[symmetry.id]):
                by_name.setdefault(name, []).append(symmetry)
        self._neighbours = {
            symmetry.id: sorted(
                {other.id for leg in self._legs[symmetry.id] for other in by_name[leg.name]},
                key=self._order.__getitem__,
            )
            for symmetry in spec
        }
        self._inside = {symmetry.id: self._sites_inside(symmetry) for symmetry in spec}

    def distance(self) -> float:
        moved = move(self.spec, self.element, self.model, 1, partial=True)
        return math.sqrt(sum((moved[name] - tensor).square().sum().item() for name, tensor in self.reference.items()))

    def objective(self) -> float:
        moved = move(self.spec, self.element, self.model, 1, partial=True)
        return sum((moved[name] * tensor).sum().item() for name, tensor in self.reference.items())

    def single_sites(self) -> list[Symmetry]:
        """The sites whose channels have no other site inside and lie in no channel of another one."""
        nested = {inner.id for inside in self._inside.values() for inner, _ in inside}
        return [symmetry for symmetry in self.spec if symmetry.id not in nested and not self._inside[symmetry.id]]

    def improve(self, site: Symmetry) -> bool:
        """Take the best permutation of one site, and with it those of the sites inside its channels."""
        current, inside = self.element[site.id], self._inside[site.id]
        gains = self._gains(site, self.element)
        columns = {channel: position for position, channel in enumerate(current.tolist())}
        for shift in range(site.size) if inside else ():
            rolled = torch.arange(site.size).roll(-shift)
            trial = self.element | {site.id: site.group.compose(rolled, current)}
            for inner, channel in inside:
                column = columns[channel]
                inner_gains = self._gains(inner, trial)
                gains[(column - shift) % site.size, column] += (
                    _total(inner_gains, self.assign(inner_gains)) - inner_gains.trace()
                )
        trial = self.element | {site.id: site.group.compose(self.assign(gains), current)}
        for inner, _ in inside:
            trial[inner.id] = inner.group.compose(self.assign(self._gains(inner, trial)), trial[inner.id])
        before, scale = self._value(site, self.element)
        after, _ = self._value(site, trial)
        if not after > before + _ROUNDING * scale:
            return False
        self.element = trial
        return True

    def _views(self, site: Symmetry, element: Element) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors of one site: the model's moved up to the site, the reference's moved back to it."""
        names = dict.fromkeys(leg.name for leg in self._legs[site.id])
        neighbours = [self.spec[other] for other in self._neighbours[site.id]]
        place = self._order[site.id]
        earlier = SymmetrySpec(tuple(other for other in neighbours if self._order[other.id] <= place))
        later = SymmetrySpec(tuple(other for other in reversed(neighbours) if self._order[other.id] > place))
        back = {other.id: other.group.inverse(element[other.id]) for other in later}
        moved = move(earlier, element, {name: self.model[name] for name in names}, 1, partial=True)
        return moved, move(later, back, {name: self.reference[name] for name in names}, 1, partial=True)

    def _gains(self, site: Symmetry, element: Element) -> Tensor:
        """``G[i, j]``: what channel ``i`` of the reference has in common with channel ``j`` of the moved model."""
        moved, target = self._views(site, element)
        gains = torch.zeros(site.size, site.size, dtype=torch.float64)
        for leg in self._legs[site.id]:
            first, second = (channels_of(site, leg, tensors[leg.name]).flatten(1) for tensors in (target, moved))
            gains += first @ second.T
        return gains

    def _value(self, site: Symmetry, element: Element) -> tuple[float, float]:
        """The part of the objective that a site decides on, and the largest that it could be."""
        moved, target = self._views(site, element)
        pairs = [(moved[name], target[name]) for name in moved]
        value = sum((first * second).sum().item() for first, second in pairs)
        return value, sum((first.norm() * second.norm()).item() for first, second in pairs)

    def _sites_inside(self, outer: Symmetry) -> list[tuple[Symmetry, int]]:
        """The earlier sites whose legs all lie inside one channel of ``outer``, each with this channel."""
        found = []
        for name in self._neighbours[outer.id]:
            inner = self.spec[name]
            if self._order[name] < self._order[outer.id] and self._legs[name]:
                channels = {self._channel_around(inner, leg, outer) for leg in self._legs[name]}
                if len(channels) == 1 and None not in channels:
                    found += [(inner, channel) for channel in channels if channel is not None]
        return found

    def _channel_around(self, inner: Symmetry, leg: Leg, outer: Symmetry) -> int | None:
        """The channel of ``outer`` in which all entries of a leg of ``inner`` lie, if there is one."""
        entries = set(_entries(inner, leg).flatten().tolist())
        for other in self._legs[outer.id]:
            is_along = other.name == leg.name and other.axis == leg.axis and other.within in (None, leg.within)
            if is_along and len(entries) <= other.repeat:
                for channel, own in enumerate(_entries(outer, other).tolist()):
                    if entries <= set(own):
                        return channel
        return None


def _entries(symmetry: Symmetry, leg: Leg) -> Tensor:
    """The entries of its axis on which a leg acts, ``[size, repeat]``."""
    length = symmetry.size * leg.repeat
    entries = torch.arange(leg.offset, leg.offset + length) if leg.positions is None else leg.positions
    return entries.view(symmetry.size, leg.repeat)


def _total(gains: Tensor, permutation: Tensor) -> float:
    return gains.gather(1, permutation.unsqueeze(1)).sum().item()


def _assignment_solver() -> _Assign:
    """The permutation ``p`` that maximises ``sum_i gains[i, p[i]]``, as a function of the gains."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("align solves linear assignments with scipy, which is missing: pip install scipy") from error

    def assign(gains: Tensor) -> Tensor:
        return torch.from_numpy(linear_sum_assignment(gains.numpy(), maximize=True)[1]).to(torch.int64)

    return assign


class _Moments:
    """Sums over many examples from which the correlation of channels of two networks follows."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: tuple[Tensor, ...] = ()

    def add(self, first: Tensor, second: Tensor) -> None:
        """Take in activations ``[size, repeat, num_examples]`` of both networks."""
        first, second = (x.detach().cpu().double().transpose(0, 1) for x in (first, second))
        sums = (first.sum(-1), second.sum(-1), first.square().sum(-1), second.square().sum(-1), first @ second.mT)
        self._sums = tuple(old + new for old, new in zip(self._sums, sums)) if self._sums else sums
        self._count += first.shape[-1]

    def correlation(self) -> Tensor:
        """``[size, size]``, summed over the entries of a channel; 0 where a channel is constant."""
        first, second, first_squares, second_squares, products = (total / self._count for total in self._sums)
        spreads = [
            torch.where((variance := square - mean.square()) > _ROUNDING * square, variance, torch.inf).sqrt()
            for mean, square in ((first, first_squares), (second, second_squares))
        ]
        centred = products - first.unsqueeze(2) * second.unsqueeze(1)
        return (centred / spreads[0].unsqueeze(2) / spreads[1].unsqueeze(1)).sum(dim=0)


def _correlations(
    sites: Sequence[Symmetry], model: nn.Module, reference: nn.Module, batches: Sequence[ExampleInputs]
) -> dict[str, Tensor]:
    """For each site with layers whose outputs hold its channels, the correlation ``[reference, model]`` of these."""
    writers = {site.id: list(_writing_layers(site, model)) for site in sites}
    layers = dict.fromkeys(name for own in writers.values() for name, _ in own)
    twins = [copy.deepcopy(network).eval() for network in (reference, model)]
    moments: dict[tuple[str, str], _Moments] = {}
    with torch.no_grad(), torch.random.fork_rng(_cuda_devices(model)):
        for batch in batches:
            first, second = (_outputs(twin, layers, batch) for twin in twins)
            for site in sites:
                for name, leg in writers[site.id]:
                    for pair in zip(first[name], second[name]):
                        channels = (
                            channels_of(site, replace(leg, axis=x.dim() + leg.axis), x).flatten(2) for x in pair
                        )
                        moments.setdefault((site.id, name), _Moments()).add(*channels)
    correlations: dict[str, Tensor] = {}
    for (site_id, _), own in moments.items():
        correlations[site_id] = correlations.get(site_id, torch.zeros(())) + own.correlation()
    return correlations


def _writing_layers(site: Symmetry, model: nn.Module) -> Iterator[tuple[str, Leg]]:
    """The layers that write the channels of a site, each with the leg on its output (its axis counted from the right)."""
    modules = dict(model.named_modules())
    for leg in site.writers:
        name, _, tensor = leg.name.rpartition(".")
        axis = next((axis for kind, axis in _OUTPUT_AXES.items() if isinstance(modules[name], kind)), None)
        if axis is not None and tensor == "weight" and leg.axis == 0 and leg.within is None:
            yield name, replace(leg, axis=axis)


def _outputs(model: nn.Module, layers: Iterable[str], batch: ExampleInputs) -> dict[str, list[Tensor]]:
    """What each layer puts out, call by call, while the model runs on one batch."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, output: outputs[name].append(output.clone())

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in outputs]
    try:
        _call(model, batch)
    except Exception as error:
        raise ValueError(
            f"the networks cannot take a batch of data: {error}. Pass it as you would pass it to them"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _recalibrate(model: nn.Module, batches: Sequence[ExampleInputs]) -> None:
    """Measure the running statistics of every BatchNorm as the average over the batches."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches if norms else ():
            _call(model, batch)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        norm.eval()


def _call(model: nn.Module, batch: ExampleInputs) -> None:
    args, kwargs = Inputs.of(batch).copy()
    model(*args, **kwargs)


def _batches(data: ExampleInputs | Iterable[ExampleInputs]) -> list[ExampleInputs]:
    batches = [data] if isinstance(data, (Tensor, Mapping, Inputs)) else list(data)
    if not batches:
        raise ValueError("there are no batches: pass at least one, or None")
    return batches


def _cuda_devices(model: nn.Module) -> list[int]:
    """The CUDA devices whose random state a run of ``model`` may change."""
    return sorted({tensor.get_device() for _, tensor in _tensors(model) if tensor.is_cuda})


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _parameters(model: nn.Module, role: str) -> dict[str, Tensor]:
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


def _check_alike(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    different = sorted(set(first) ^ set(second))
    if different:
        owner = "first" if different[0] in first else "second"
        raise ValueError(f"only the {owner} network has {different[0]!r}: both must be of one architecture")
    for name, tensor in first.items():
        if tensor.shape != second[name].shape:
            shapes = f"{tuple(tensor.shape)} and {tuple(second[name].shape)}"
            raise ValueError(f"{name!r} has the shapes {shapes}: both networks must be of one architecture")


def _check_spec(spec: SymmetrySpec, model: nn.Module) -> None:
    if not len(spec):
        reasons = "".join(f"; {refusal.name}: {refusal.reason}" for refusal in spec.refusals)
        raise ValueError(
            f"the model has no hidden channels that can be permuted, so there is nothing to align{reasons}"
        )
    names = {name for name, _ in _tensors(model)}
    for symmetry in spec:
        missing = sorted({leg.name for leg in symmetry.legs} - names)
        if missing:
            raise ValueError(
                f"site {symmetry.id!r} acts on {missing[0]!r}, which the model does not have: "
                f"use the spec that find_symmetries gives for this model"
            )


def _move_in_place(model: nn.Module, spec: SymmetrySpec, element: Element) -> None:
    tensors = dict(_tensors(model))
    with torch.no_grad():
        moved = act(spec, element, {name: tensor.detach() for name, tensor in tensors.items()})
        for name in dict.fromkeys(leg.name for symmetry in spec for leg in symmetry.legs):
            tensors[name].copy_(moved[name])
