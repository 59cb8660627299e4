"""What holds for all tests."""

import pytest

from teleport_optim.optim import schedule

pytest.register_assert_rewrite("tests.helpers")


@pytest.fixture
def often_controlled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teleports in every quarter of a short run."""
    monkeypatch.setattr(schedule, "TELEPORT_INTERVAL", 5)
