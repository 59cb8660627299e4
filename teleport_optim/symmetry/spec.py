"""Symmetries as plain data: which channels, which group, which axis of which tensor.

A hidden channel can be moved without changing the function: what writes into it is multiplied, what reads from it is
divided. So a symmetry is a list of *legs*, each saying along which axis of which tensor the group acts and with what
degree. A :class:`SymmetrySpec` holds all symmetries of a model; it prints as a table and goes to JSON and back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from teleport_optim.symmetry.groups import GROUPS, Group

__all__ = ["Element", "Leg", "Refusal", "Symmetry", "SymmetrySpec"]

Element = dict[str, Tensor]
"""One group element for each symmetry of a spec, by the symmetry's id. A missing id means the identity."""

_FORMAT = 1


@dataclass(frozen=True)
class Leg:
    """Action of a group on one tensor.

    The group acts on the entries ``offset : offset + size * repeat`` of ``axis``. That range is read as ``size``
    channels of ``repeat`` neighbouring entries each (the pixels of a channel after a flatten, say). Entries that lie
    otherwise are listed in ``index``.

    Attributes:
        name: Name of the tensor, as in ``model.state_dict()``.
        axis: The axis, counted from 0.
        degree: +1 for a writer, -1 for a reader, +2 for a variance.
        repeat: Neighbouring entries of the axis that belong to one channel.
        offset: First entry of the axis that belongs to the site.
        within: ``(axis, start, length)``: act only on this slice of another axis (one group of a grouped convolution).
        index: The ``size * repeat`` entries of the axis, channel by channel, where they are no such range (after a channel
            shuffle, say); ``offset`` is 0 then.

    Example:
        >>> print(Leg("0.weight", axis=0, degree=1))
        0.weight[0]^+1
    """

    name: str
    axis: int
    degree: int
    repeat: int = 1
    offset: int = 0
    within: tuple[int, int, int] | None = None
    index: tuple[int, ...] | None = None

    @cached_property
    def index_tensor(self) -> Tensor | None:
        """``index`` as a tensor; None if there is none."""
        return None if self.index is None else torch.tensor(self.index, dtype=torch.int64)

    def __str__(self) -> str:
        block = "" if self.repeat == 1 else f"x{self.repeat}"
        offset = "" if self.offset == 0 else f"+{self.offset}"
        if self.index is not None:
            offset = f"@{self.index[0]},{self.index[1]},.." if len(self.index) > 1 else f"@{self.index[0]}"
        within = "" if self.within is None else "|{}:{}+{}".format(*self.within)
        return f"{self.name}[{self.axis}{block}{offset}{within}]^{self.degree:+d}"


@dataclass(frozen=True)
class Symmetry:
    """One hidden site: ``size`` channels on which one group acts through ``legs``.

    ``exact`` is False where the function changes slightly, as with scaling in front of a BatchNorm, whose eps does not
    scale.

    Example:
        >>> from teleport_optim.symmetry.groups import GROUPS
        >>> legs = (Leg("0.weight", axis=0, degree=1), Leg("2.weight", axis=1, degree=-1))
        >>> site = Symmetry("0:scaling", GROUPS["scaling"], size=8, legs=legs)
        >>> [leg.name for leg in site.readers]
        ['2.weight']
    """

    id: str
    group: Group
    size: int
    legs: tuple[Leg, ...]
    exact: bool = True

    @property
    def writers(self) -> tuple[Leg, ...]:
        """The legs of degree +1."""
        return tuple(leg for leg in self.legs if leg.degree == 1)

    @property
    def readers(self) -> tuple[Leg, ...]:
        """The legs of degree -1."""
        return tuple(leg for leg in self.legs if leg.degree == -1)


@dataclass(frozen=True)
class Refusal:
    """A place through which no symmetry passes, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class SymmetrySpec:
    """Symmetries of a model, and the places where none was found.

    Iterating yields the symmetries, in the order in which they act.

    Example:
        >>> legs = (Leg("0.weight", axis=0, degree=1), Leg("2.weight", axis=1, degree=-1))
        >>> spec = SymmetrySpec((Symmetry("0:sign", GROUPS["sign"], 2, legs),))
        >>> print(spec)
        site    size  group  legs
        0:sign  2     sign   0.weight[0]^+1 2.weight[1]^-1
        >>> SymmetrySpec.from_json(spec.to_json()) == spec
        True
    """

    symmetries: tuple[Symmetry, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    def __post_init__(self) -> None:
        ids = [symmetry.id for symmetry in self.symmetries]
        if len(set(ids)) < len(ids):
            twice = sorted({name for name in ids if ids.count(name) > 1})
            raise ValueError(f"symmetry ids must be unique, these occur twice: {twice}")

    def __iter__(self) -> Iterator[Symmetry]:
        return iter(self.symmetries)

    def __len__(self) -> int:
        return len(self.symmetries)

    def __getitem__(self, symmetry_id: str) -> Symmetry:
        for symmetry in self.symmetries:
            if symmetry.id == symmetry_id:
                return symmetry
        raise KeyError(f"no symmetry {symmetry_id!r}; there are {[symmetry.id for symmetry in self.symmetries]}")

    def of_group(self, name: str) -> SymmetrySpec:
        """The part of the spec that belongs to a group: ``"permutation"``, ``"scaling"``, ``"sign"`` or ``"linear"``."""
        if name not in GROUPS:
            raise ValueError(f"no group {name!r}; there are {sorted(GROUPS)}")
        return SymmetrySpec(tuple(s for s in self.symmetries if s.group.name == name), self.refusals)

    def share_of(self, model: nn.Module) -> float:
        """The share of the parameters of ``model`` that some symmetry moves, from 0 to 1.

        Example:
            >>> legs = (Leg("0.weight", axis=0, degree=1), Leg("2.weight", axis=1, degree=-1))
            >>> spec = SymmetrySpec((Symmetry("0:sign", GROUPS["sign"], 2, legs),))
            >>> spec.share_of(nn.Sequential(nn.Linear(1, 2, bias=False), nn.Tanh(), nn.Linear(2, 1)))
            0.8
        """
        reached = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
        for symmetry in self.symmetries:
            for leg in symmetry.legs:
                if leg.name in reached:
                    inner = reached[leg.name] if leg.within is None else reached[leg.name].narrow(*leg.within)
                    positions = leg.index_tensor
                    if positions is None:
                        positions = torch.arange(leg.offset, leg.offset + symmetry.size * leg.repeat)
                    inner.index_fill_(leg.axis, positions, True)
        total = sum(entries.numel() for entries in reached.values())
        return sum(int(entries.sum()) for entries in reached.values()) / max(1, total)

    def identity(self) -> Element:
        """The element that moves nothing."""
        return {symmetry.id: symmetry.group.identity(symmetry.size) for symmetry in self.symmetries}

    def random_element(self, generator: torch.Generator) -> Element:
        """One random element for every symmetry, drawn with ``generator`` (a CPU generator)."""
        return {symmetry.id: symmetry.group.random(symmetry.size, generator) for symmetry in self.symmetries}

    def compose(self, first: Element, second: Element) -> Element:
        """Site by site, the element that acts like ``second`` followed by ``first``.

        Elements of one site compose exactly. Where several sites move the same channels (a permutation and a scaling, whole
        heads and the channels inside of them) they do not commute, and a chain of actions is applied one by one.
        """
        self.check(first)
        self.check(second)
        everywhere_first, everywhere_second = self.identity() | first, self.identity() | second
        return {s.id: s.group.compose(everywhere_first[s.id], everywhere_second[s.id]) for s in self.symmetries}

    def inverse(self, element: Element) -> Element:
        """Site by site, the inverse of ``element`` (see :meth:`compose` where several sites move the same channels)."""
        self.check(element)
        return {s.id: s.group.inverse(element[s.id]) for s in self.symmetries if s.id in element}

    def check(self, element: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless every part of ``element`` fits its site and lies in its group."""
        known = {symmetry.id: symmetry for symmetry in self.symmetries}
        for symmetry_id, part in element.items():
            if symmetry_id not in known:
                raise ValueError(f"the element names the site {symmetry_id!r}, but the spec has only {list(known)}")
            symmetry = known[symmetry_id]
            shape = symmetry.group.shape(symmetry.size)
            if part.shape != shape:
                raise ValueError(
                    f"site {symmetry_id!r} has {symmetry.size} channels, so its element must have shape {shape}; "
                    f"got {tuple(part.shape)}"
                )
            problem = symmetry.group.problem(part)
            if problem:
                raise ValueError(f"the element of site {symmetry_id!r} is not a {symmetry.group.name}: {problem}")

    def to_json(self) -> str:
        """The spec as JSON text."""
        return json.dumps(
            {
                "format": _FORMAT,
                "symmetries": [asdict(s) | {"group": s.group.name} for s in self.symmetries],
                "refusals": [asdict(refusal) for refusal in self.refusals],
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> SymmetrySpec:
        """The spec that :meth:`to_json` wrote.

        Raises:
            ValueError: if the text is not such JSON, is of a newer format, or names an unknown group.
        """
        try:
            data = json.loads(text)
            if data["format"] > _FORMAT:
                raise ValueError(f"the spec has format {data['format']}, this version reads up to {_FORMAT}: update it")
            return cls(
                tuple(_symmetry_from_dict(entry) for entry in data["symmetries"]),
                tuple(Refusal(**entry) for entry in data["refusals"]),
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"not the JSON of a SymmetrySpec: {error!r}") from error

    def __str__(self) -> str:
        rows = [("site", "size", "group", "legs")]
        for symmetry in self.symmetries:
            legs = " ".join(map(str, symmetry.legs))
            rows.append((symmetry.id, str(symmetry.size), symmetry.group.name + ("" if symmetry.exact else " ~"), legs))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]) for row in rows]
        lines += [f"refused  {refusal.name}: {refusal.reason}" for refusal in self.refusals]
        return "\n".join(lines)


def _symmetry_from_dict(entry: dict[str, object]) -> Symmetry:
    group = str(entry["group"])
    if group not in GROUPS:
        raise ValueError(f"the spec names the group {group!r}; known are {sorted(GROUPS)}")
    legs = []
    for leg in entry["legs"]:  # type: ignore[attr-defined]
        lists = {key: None if leg.get(key) is None else tuple(leg[key]) for key in ("within", "index")}
        legs.append(Leg(**{**leg, **lists}))
    return Symmetry(str(entry["id"]), GROUPS[group], int(entry["size"]), tuple(legs), bool(entry["exact"]))  # type: ignore[call-overload]
