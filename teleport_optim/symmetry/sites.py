"""Open sites: hidden channels whose writers are known and whose readers are still to come.

A walk through a network carries at most one open site per group. Permutation, scaling and sign are carried apart from
each other, because a layer may let one pass and end another: a depthwise convolution continues a permutation but reads
one scaling and writes the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import lcm

from teleport_optim.groups import GROUPS
from teleport_optim.symmetry.spec import Leg, Refusal, Symmetry, SymmetrySpec

__all__ = ["PASS_INPUTS", "LegPlan", "OpenSite", "Shape", "Walk"]

Shape = tuple[int | None, ...]
"""The shape of an activation; None where the size of an axis is not known."""

PASS_INPUTS = "pass example_inputs, so that the shapes are known"


@dataclass(frozen=True)
class LegPlan:
    """A leg of a site that may yet be split into blocks of channels.

    With ``num_groups > 1`` the axis holds the channels of one group only, and the channels of group ``k`` are found on
    the rows ``k * num_rows : (k + 1) * num_rows`` of axis 0. This is how a grouped convolution keeps its weight.
    """

    name: str
    axis: int
    degree: int
    repeat: int = 1
    num_groups: int = 1
    num_rows: int = 0

    def leg(self, block: int, num_blocks: int, block_size: int) -> Leg:
        """The leg of one block of channels."""
        blocks_per_group = num_blocks // self.num_groups
        offset = block % blocks_per_group * block_size * self.repeat
        within = (0, block // blocks_per_group * self.num_rows, self.num_rows) if self.num_groups > 1 else None
        return Leg(self.name, self.axis, self.degree, self.repeat, offset, within)


@dataclass
class OpenSite:
    """Hidden channels on their way through the network.

    Attributes:
        writer: Name of the layer that opened the site.
        position: How many sites were opened before this one.
        group: Name of the group that acts.
        size: Number of channels.
        axis: Axis of the activation that holds the channels, counted from the right (negative).
        repeat: Neighbouring entries of that axis that belong to one channel; None after a flatten of unknown size.
        num_blocks: Blocks of channels that must not be mixed.
        legs: The legs so far.
        is_exact: Whether the function is kept up to rounding.
    """

    writer: str
    position: int
    group: str
    size: int
    axis: int
    repeat: int | None = 1
    num_blocks: int = 1
    legs: list[LegPlan] = field(default_factory=list)
    is_exact: bool = True

    @property
    def entries(self) -> int:
        """``repeat``, once it is known."""
        if self.repeat is None:
            raise RuntimeError(f"the site of {self.writer!r} was used before its layout was settled")
        return self.repeat

    def plan(
        self, name: str, axis: int, degree: int, *, repeat: int = 1, num_groups: int = 1, num_rows: int = 0
    ) -> None:
        """Add a leg; ``repeat`` multiplies the entries that each channel has on the activation."""
        self.split(num_groups)
        self.legs.append(LegPlan(name, axis, degree, self.entries * repeat, num_groups, num_rows))

    def split(self, num_groups: int) -> None:
        """Keep the channels of ``num_groups`` equal groups apart."""
        self.num_blocks = lcm(self.num_blocks, num_groups)

    def merge(self, factor: int) -> None:
        """Take ``factor`` neighbouring channels as one."""
        self.size //= factor
        self.legs = [replace(leg, repeat=leg.repeat * factor) for leg in self.legs]

    def symmetries(self) -> list[Symmetry]:
        """The finished symmetries, one for each block; none where there is nothing to move."""
        block_size = self.size // self.num_blocks
        if block_size == 1 and self.group == "permutation":
            return []
        name = f"{self.writer}:{self.group}"
        return [
            Symmetry(
                name if self.num_blocks == 1 else f"{name}[{block}]",
                GROUPS[self.group],
                block_size,
                tuple(plan.leg(block, self.num_blocks, block_size) for plan in self.legs),
                self.is_exact,
            )
            for block in range(self.num_blocks)
        ]


class Walk:
    """What is known at one point of a walk through a network, from its input to its output.

    Attributes:
        shape: Shape of the activation, or None if not even its number of axes is known.
        sites: The open sites, by the name of their group.
        include_approximate: Whether symmetries are wanted that hold only up to the eps of a normalisation.
    """

    def __init__(self, *, include_approximate: bool) -> None:
        self.shape: Shape | None = None
        self.sites: dict[str, OpenSite] = {}
        self.include_approximate = include_approximate
        self._is_lost = False
        self._num_opened = 0
        self._closed: list[OpenSite] = []
        self._refusals: list[Refusal] = []

    def open(
        self, name: str, axis: int, size: int, legs: Iterable[LegPlan], *, group: str, num_blocks: int = 1
    ) -> None:
        """Let the layer ``name`` write ``size`` channels on ``axis``, in place of what was open there."""
        self.sites.pop(group, None)
        if size == 0:
            return
        plans = list(legs)
        blocks = lcm(num_blocks, *(plan.num_groups for plan in plans))
        self.sites[group] = OpenSite(name, self._num_opened, group, size, axis, num_blocks=blocks, legs=plans)
        self._num_opened += 1

    def close(self, group: str) -> None:
        """Finish a site: all that reads from it is known."""
        self._closed.append(self.sites.pop(group))

    def keep(self, groups: Iterable[str]) -> None:
        """Drop the open sites of all other groups."""
        self.sites = {group: site for group, site in self.sites.items() if group in set(groups)}

    def refuse(self, name: str, reason: str, groups: Iterable[str] = tuple(GROUPS)) -> None:
        """Drop the open sites of ``groups`` and say why."""
        self.sites = {group: site for group, site in self.sites.items() if group not in set(groups)}
        refusal = Refusal(name, reason)
        if refusal not in self._refusals:
            self._refusals.append(refusal)

    def lose(self) -> None:
        """Forget the shape: a layer has been passed that may do anything."""
        self.shape, self._is_lost = None, True

    def assume_rank(self, rank: int, *, always: bool = False) -> bool:
        """Take the activation to have ``rank`` axes if nothing is known; returns whether its rank is known now.

        After an unknown layer nothing is assumed, unless the next layer takes no other rank (``always``).
        """
        if self.shape is None and (always or not self._is_lost):
            self.shape = (None,) * rank
        return self.shape is not None

    def align(self, name: str, axis: int, extent: int, *, verb: str) -> None:
        """Keep the open sites that lie on ``axis`` and refuse all others; they must fill its ``extent`` entries."""
        for group, site in list(self.sites.items()):
            if site.axis != axis:
                reason = (
                    f"it {verb} axis {axis} of its input, but the channels of {site.writer!r} lie on axis {site.axis}"
                )
                self.refuse(name, reason, [group])
            elif site.repeat is None and extent % site.size == 0:
                site.repeat = extent // site.size
            elif site.repeat is None or site.size * site.repeat != extent:
                self.contradict(name, f"it {verb} {extent} entries, but {site.writer!r} has {site.size} channels")
                return

    def contradict(self, name: str, reason: str) -> None:
        """Drop all that was found: the layers do not fit together, so the assumed shape of the inputs is wrong."""
        self.refuse(name, f"{reason}, which cannot be if inputs are batched: {PASS_INPUTS}")
        self._closed.clear()
        self.lose()

    def refuse_unknown_rank(self, name: str) -> None:
        """Drop the open sites, since the number of axes decides what the layer ``name`` does."""
        self.refuse(name, f"what it does depends on the number of axes of its input: {PASS_INPUTS}")
        self.lose()

    def spec(self) -> SymmetrySpec:
        """What was found, in the order of the network. The sites still open are the output, which does not move."""
        closed = sorted(self._closed, key=lambda site: site.position)
        return SymmetrySpec(tuple(s for site in closed for s in site.symmetries()), tuple(self._refusals))
