"""A learned optimizer for PyTorch that needs no tuning and uses the symmetries of the model."""

from teleport_optim.alignment import align, interpolation_barrier
from teleport_optim.controller.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from teleport_optim.controller.network import MetaOptimizer
from teleport_optim.learned import LearnedTeleportOptimizer
from teleport_optim.optim.state import OptimizerStateError
from teleport_optim.symmetry import (
    Leg,
    Symmetry,
    SymmetrySpec,
    draw_symmetries,
    find_symmetries,
    verify_symmetries,
)
from teleport_optim.symmetry.action import act, act_dual

__all__ = [
    "CheckpointError",
    "LearnedTeleportOptimizer",
    "Leg",
    "MetaOptimizer",
    "OptimizerStateError",
    "Symmetry",
    "SymmetrySpec",
    "act",
    "act_dual",
    "align",
    "draw_symmetries",
    "find_symmetries",
    "interpolation_barrier",
    "load_checkpoint",
    "save_checkpoint",
    "verify_symmetries",
]
