"""How a command must fail when it is called in a wrong way."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def assert_mistake(
    command: Callable[[list[str]], int], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command fails with code 2 and one line that holds ``message``, and prints no traceback."""
    assert command(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("teleport-optim: error: ")
    assert error.count("\n") == 1
    assert message in error
