"""What libraries keep for the whole process is put back after every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState
from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry

from teleport_optim import LearnedTeleportOptimizer


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def registered() -> Iterator[None]:
    """Timm knows the optimizer by the name "teleport"."""
    default_registry.register(OptimInfo("teleport", LearnedTeleportOptimizer, has_eps=False))
    yield
    del default_registry._optimizers["teleport"]
