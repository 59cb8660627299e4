"""Errors of commands: how a command ends, and how it says what is wrong."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = ["INTERRUPTED", "CommandError", "complain", "mistakes", "one_line", "require", "run_command"]

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""


class CommandError(Exception):
    """Reason why a command cannot be done; its text says in one line what to do.

    Attributes:
        exit_code: 2 for a mistake in the call, 1 for what went wrong later.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse ``argv`` (by default the arguments of the process) and call its ``command``.

    Returns:
        The exit code.
    """
    arguments = parser.parse_args(argv)
    try:
        return arguments.command(arguments)  # type: ignore[no-any-return]
    except CommandError as error:
        return complain(error)


def complain(error: CommandError) -> int:
    """Print the error as one line; under torchrun, with the number of the process.

    Returns:
        The exit code.
    """
    rank = os.environ.get("RANK", "0")
    process = "" if rank == "0" else f"process {rank}: "
    print(f"teleport-optim: error: {process}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return error.exit_code


@contextmanager
def mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """Report errors of these kinds as mistakes in the call."""
    try:
        yield
    except kinds as error:
        raise CommandError(str(error)) from error


def require(*modules: str, extra: str = "cli") -> None:
    """Fail before any work is done if a module that an extra installs is missing."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandError(f"this command needs {' and '.join(missing)}: pip install 'teleport-optim[{extra}]'")


def one_line(error: Exception) -> str:
    """Kind and text of an error."""
    return f"{type(error).__name__}: {error}"
