"""Alignment of two trained networks by the permutations of their hidden channels."""

from teleport_optim.symmetry.alignment import AlignmentReport, Barrier, align, interpolation_barrier

__all__ = ["AlignmentReport", "Barrier", "align", "interpolation_barrier"]
