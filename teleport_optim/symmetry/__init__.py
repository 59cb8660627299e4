"""The symmetries of a model: as data, found, and verified."""

from teleport_optim.symmetry.draw import draw_symmetries
from teleport_optim.symmetry.find import find_symmetries
from teleport_optim.symmetry.inputs import Inputs
from teleport_optim.symmetry.spec import Element, Leg, Refusal, Symmetry, SymmetrySpec
from teleport_optim.symmetry.verify import APPROXIMATE_TOLERANCE, VerificationReport, verify_symmetries

__all__ = [
    "APPROXIMATE_TOLERANCE",
    "Element",
    "Inputs",
    "Leg",
    "Refusal",
    "Symmetry",
    "SymmetrySpec",
    "VerificationReport",
    "draw_symmetries",
    "find_symmetries",
    "verify_symmetries",
]
