"""Warnings that tests bring about on purpose, or cannot help: every other one is an error."""

import pytest

OPEN_ENDED_SAVED = pytest.mark.filterwarnings("ignore:the state of an open-ended run is saved")
OF_OURS = [
    OPEN_ENDED_SAVED,
    pytest.mark.filterwarnings("ignore:lr has changed"),
    pytest.mark.filterwarnings("ignore:an optimizer of a single matrix"),
]
RATE_OF_NO_STEP = pytest.mark.filterwarnings("ignore:lr=1e-35 is a factor")
"""That of ``NO_STEP`` in tests.helpers.classification."""
OF_LIGHTNING = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),  # of its own code
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),  # on machines with more cores
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # other callbacks than while training
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]
