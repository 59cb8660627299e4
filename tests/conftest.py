"""What holds for all tests."""

import pytest

from teleport_optim.optim import rule as update

pytest.register_assert_rewrite("tests.helpers")


@pytest.fixture
def often_controlled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teleports in every quarter of a short run."""
    monkeypatch.setattr(update, "TELEPORT_INTERVAL", 5)
