"""Weight matching: the best permutation of one site after the other."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from teleport_optim.symmetry.alignment.networks import ROUNDING
from teleport_optim.symmetry.moves import leg_channels, move
from teleport_optim.symmetry.spec import Element, Leg, Symmetry, SymmetrySpec

__all__ = ["Matching", "assignment_solver"]


_Assign = Callable[[Tensor], Tensor]


class Matching:
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
        if not after > before + ROUNDING * scale:
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
            first, second = (leg_channels(site, leg, tensors[leg.name]).flatten(1) for tensors in (target, moved))
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
    entries = torch.arange(leg.offset, leg.offset + length) if leg.index_tensor is None else leg.index_tensor
    return entries.view(symmetry.size, leg.repeat)


def _total(gains: Tensor, permutation: Tensor) -> float:
    return gains.gather(1, permutation.unsqueeze(1)).sum().item()


def assignment_solver() -> _Assign:
    """The permutation ``p`` that maximises ``sum_i gains[i, p[i]]``, as a function of the gains."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("align solves linear assignments with scipy, which is missing: pip install scipy") from error

    def assign(gains: Tensor) -> Tensor:
        return torch.from_numpy(linear_sum_assignment(gains.numpy(), maximize=True)[1]).to(torch.int64)

    return assign
