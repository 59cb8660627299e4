"""Solve for sites: gather the channels that an analysis has left free into the symmetries of a spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from teleport_optim.symmetry.groups import GROUPS
from teleport_optim.symmetry.search.analysis import ChannelAnalysis, MovingAxis
from teleport_optim.symmetry.search.channels import PINNED, Array, mix
from teleport_optim.symmetry.spec import Leg, Symmetry

__all__ = ["symmetries_of"]


@dataclass
class _Entries:
    """Entries of a moving axis.

    Attributes:
        moving_axis: The moving axis.
        roots: Class of each entry.
        positions: Hash that tells the entries of one class apart: of the position in it and of the calls that the channel of the
            entry passes through by itself.
        degrees: Degree of each entry.
    """

    moving_axis: MovingAxis
    roots: Array
    positions: Array
    degrees: Array


def symmetries_of(
    analysis: ChannelAnalysis, names: Mapping[str, Sequence[str]], *, include_approximate: bool
) -> list[Symmetry]:
    """Make symmetries of the channels that an analysis has left free.

    Args:
        analysis: The analysis, after the last graph.
        names: For each parameter, all names under which the model has it.
        include_approximate: Whether to return also those that hold only up to the eps of a normalisation.
    """
    if not analysis.moving_axes:
        return []
    moving_axes, signatures = _signatures(analysis)
    roots = _in_order(np.concatenate([moving_axis.roots for moving_axis in moving_axes]))
    can_move = (roots != PINNED) & ~analysis.classes.is_pinned(roots)
    if not include_approximate:
        can_move &= ~analysis.classes.is_approximate(roots)
    if analysis.moves_heads:
        tied = np.concatenate([np.zeros(0, np.int64), *analysis.tied])
        can_move &= np.isin(roots, analysis.classes.find(tied)[0])
    roots = roots[can_move]
    site_of, channel_of, sizes = _sites(roots, signatures, len(analysis.classes))
    legs: list[list[Leg]] = [[] for _ in sizes]
    for moving_axis in moving_axes:
        own = site_of[moving_axis.roots]
        for site in [own.item(0)] if _is_constant(own) else _in_order(own).tolist():
            if site >= 0:
                legs[site] += _legs(moving_axis, np.flatnonzero(own == site), channel_of, sizes[site], names)
    is_exact = ~np.isin(np.arange(len(sizes)), site_of[roots[analysis.classes.is_approximate(roots)]])
    least = analysis.smallest_site
    found = [(tuple(own), size, exact) for own, size, exact in zip(legs, sizes, is_exact.tolist()) if size >= least]
    return _named(analysis, found)


def _is_constant(values: Array) -> bool:
    return len(values) > 0 and bool((values == values[0]).all())


def _in_order(values: Array) -> Array:
    """Different values in the order in which they first appear."""
    unique, first = np.unique(values, return_index=True)
    return unique[np.argsort(first)]


def _sites(roots: Array, signatures: Array, num_channels: int) -> tuple[Array, Array, list[int]]:
    """Number of the site of each class and its own number there, -1 if it has none; and the sizes of the sites."""
    order = _in_order(signatures[roots])
    _, first, inverse = np.unique(signatures[roots], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    site = rank[inverse]
    site_of, channel_of = np.full(num_channels, -1), np.full(num_channels, -1)
    site_of[roots] = site
    sizes = np.bincount(site, minlength=len(order))
    by_site = np.argsort(site, kind="stable")
    channel_of[roots[by_site]] = np.arange(len(roots)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return site_of, channel_of, sizes.tolist()


def _signatures(analysis: ChannelAnalysis) -> tuple[list[_Entries], Array]:
    """Entries of all moving axes; and a hash for each class of the places where it occurs, equal for classes of one site.

    Channels that are exchanged must pass through the same calls in the same positions. The calls that a channel passes through by
    itself tell the members of its class apart (queries from keys in a packed projection).
    """
    moving_axes = analysis.moving_axes
    sizes = [moving_axis.ids.size for moving_axis in moving_axes]
    parts: list[tuple[Array, ...]] = [
        (
            np.repeat(np.arange(len(moving_axes)), sizes),
            np.concatenate([moving_axis.ids for moving_axis in moving_axes]),
            np.concatenate([moving_axis.positions for moving_axis in moving_axes]),
            np.zeros(sum(sizes), np.uint64),
        )
    ]
    for passage in analysis.passages:
        place = (np.asarray(1 << 50 | passage[0]), *passage[1:])
        shape = np.broadcast_shapes(*(array.shape for array in place[1:]))
        parts.append(tuple(np.broadcast_to(array, shape).ravel() for array in place))
    node, ids, positions, where = (np.concatenate(column) for column in zip(*parts))
    del parts  # as large as all the rest
    roots, positions_in_class, signs = analysis.classes.find(ids, positions)
    degrees = signs.astype(np.int64)
    ends = np.cumsum(sizes)
    degrees[: sum(sizes)] *= np.repeat([moving_axis.degree for moving_axis in moving_axes], sizes)
    signatures = np.zeros(len(analysis.classes), dtype=np.uint64)
    own = np.zeros_like(positions)
    if analysis.moves_entries:
        np.add.at(signatures, ids, mix(node, positions, where))
        own = mix(positions_in_class, signatures[ids])
        _pin_copies(analysis, roots, mix(node, roots, own), where == 0)
        signatures = np.zeros_like(signatures)
    np.add.at(signatures, roots, mix(node, own, where, degrees))
    spans = [slice(end - size, end) for size, end in zip(sizes, ends.tolist())]
    return [
        _Entries(moving_axis, roots[k], own[k], degrees[k]) for moving_axis, k in zip(moving_axes, spans)
    ], signatures


def _pin_copies(analysis: ChannelAnalysis, roots: Array, keys: Array, is_counted: Array) -> None:
    """Pin classes that have two entries with one position in a tensor: nothing tells which is which."""
    order = np.flatnonzero(is_counted)[np.argsort(keys[is_counted])]
    is_copy = keys[order][1:] == keys[order][:-1]
    if is_copy.any():
        analysis.classes.pin(roots[order[1:][is_copy]])


def _legs(
    entries: _Entries, members: Array, channel_of: Array, size: int, names: Mapping[str, Sequence[str]]
) -> list[Leg]:
    """The legs of a site on one moving_axis: entries that move alike, in the order of their positions for every channel."""
    moving_axis = entries.moving_axis
    numbers, positions = channel_of[entries.roots[members]], entries.positions[members]
    if len(members) == size:
        index = members[np.argsort(numbers)].reshape(size, 1)
    else:
        first = _in_order(positions[numbers == 0])
        ranks = np.argsort(first)[np.searchsorted(np.sort(first), positions)]
        index = members[np.lexsort((members, ranks, numbers))].reshape(size, -1)
    columns = index[0]
    legs = []
    for run in _runs(columns, entries.degrees[columns]):
        flat = index[:, run].ravel()
        is_range = bool((flat[1:] == flat[:-1] + 1).all())
        shape: dict[str, Any] = {"offset": int(flat[0])} if is_range else {"index": tuple(flat.tolist())}
        degree = int(entries.degrees[columns[run[0]]])
        legs += [
            Leg(name, moving_axis.axis, degree, len(run), within=moving_axis.within, **shape)
            for name in names[moving_axis.name]
        ]
    return legs


def _runs(columns: Array, degrees: Array) -> list[list[int]]:
    """Split the entries of a channel into runs, one for each leg: neighbours of one degree."""
    runs: list[list[int]] = []
    for column in range(len(columns)):
        if runs and degrees[runs[-1][-1]] == degrees[column] and columns[column] == columns[runs[-1][-1]] + 1:
            runs[-1].append(column)
        else:
            runs.append([column])
    return runs


def _owner(name: str) -> str:
    """Layer to which a tensor belongs, or its own name if it is a parameter by itself."""
    layer, _, last = name.rpartition(".")
    return layer if layer and last.startswith(("weight", "bias", "in_proj", "running")) else name


def _named(analysis: ChannelAnalysis, sites: list[tuple[tuple[Leg, ...], int, bool]]) -> list[Symmetry]:
    """Give sites their ids: the module of the first writer, the analysis, and a number where that is not enough."""
    group = GROUPS[analysis.group]
    oriented = []
    for legs, size, is_exact in sites:
        if legs[0].degree < 0:
            legs = tuple(replace(leg, degree=-leg.degree) for leg in legs)
        writer = next((leg for leg in legs if leg.degree == 1), legs[0])
        oriented.append((_owner(writer.name), legs, size, is_exact))
    counts: dict[str, int] = {}
    for module, *_ in oriented:
        counts[module] = counts.get(module, 0) + 1
    numbers: dict[str, int] = {}
    result = []
    for module, legs, size, is_exact in oriented:
        number = numbers.get(module, 0)
        numbers[module] = number + 1
        name = f"{module}:{analysis.name}" + (f"[{number}]" if counts[module] > 1 else "")
        result.append(Symmetry(name, group, size, legs, is_exact))
    return result
