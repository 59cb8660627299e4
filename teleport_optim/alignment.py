"""Alignment of two trained networks by the permutations of their hidden channels, and the barrier between them.

Two networks that are trained from different seeds are far apart partly because their channels are numbered differently. Without
this difference the straight line between wide networks is often free of a barrier, so that they can be averaged.
"""

from teleport_optim.symmetry.alignment.alignment import AlignmentReport, align
from teleport_optim.symmetry.alignment.barrier import Barrier, interpolation_barrier

__all__ = ["AlignmentReport", "Barrier", "align", "interpolation_barrier"]
