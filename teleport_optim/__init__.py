"""A learned optimizer for PyTorch that needs no tuning and uses the symmetries of the model."""

from teleport_optim.action import act, act_dual
from teleport_optim.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from teleport_optim.meta_optimizer import MetaOptimizer
from teleport_optim.optimizer import LearnedTeleportOptimizer
from teleport_optim.symmetry import Leg, Symmetry, SymmetrySpec, find_symmetries, verify_symmetries

__all__ = [
    "CheckpointError",
    "LearnedTeleportOptimizer",
    "Leg",
    "MetaOptimizer",
    "Symmetry",
    "SymmetrySpec",
    "act",
    "act_dual",
    "find_symmetries",
    "load_checkpoint",
    "save_checkpoint",
    "verify_symmetries",
]
