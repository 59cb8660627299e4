"""A learned optimizer for PyTorch that needs no tuning and uses the symmetries of the model."""

import warnings

import torch

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


def _check_torch(version: str) -> None:
    """Warn where torch is newer than anything that this version was tried with: the search uses private parts of it."""
    if int(version.split(".")[0]) > 2:
        warnings.warn(
            f"teleport_optim is made for torch 2, and this is torch {version}: symmetries may not be found, or the search may "
            "fail. Update teleport_optim, or pass teleport=False",
            stacklevel=3,
        )


_check_torch(torch.__version__)
