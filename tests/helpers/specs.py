"""Readable views of specs."""

from __future__ import annotations

from teleport_optim.symmetry import SymmetrySpec


def legs_of(spec: SymmetrySpec) -> dict[str, str]:
    """``"size legs"`` of every site, in the notation in which a spec prints."""
    rows = [line.split() for line in str(SymmetrySpec(spec.symmetries)).splitlines()[1:]]
    return {row[0]: " ".join([row[1], *row[3:]]) for row in rows}


def reasons_of(spec: SymmetrySpec) -> dict[str, str]:
    return {refusal.name: refusal.reason for refusal in spec.refusals}
