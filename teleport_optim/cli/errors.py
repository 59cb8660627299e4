"""What the commands have in common: how they end, how they say what is wrong, and how they read their arguments."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = [
    "INTERRUPTED",
    "CommandError",
    "complain",
    "import_from_here",
    "load_object",
    "mistakes",
    "one_line",
    "positive",
    "require",
    "run_command",
]

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""


class CommandError(Exception):
    """Why a command cannot be done; its text says in one line what to do.

    Attributes:
        exit_code: 2 for a mistake in the call, 1 for what went wrong later.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse ``argv`` (by default the arguments of the process) and do its ``command``.

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
    """Fail before any work is done if something of an extra is missing."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandError(f"this command needs {' and '.join(missing)}: pip install 'teleport-optim[{extra}]'")


def import_from_here() -> None:
    """Make the modules in the current folder importable, as they are with ``python -m``."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def load_object(path: str) -> object:
    """What is at ``module:name``; the current directory is importable, as it is with ``python -m``.

    Raises:
        CommandError: saying which part of the path is wrong.

    Example:
        >>> load_object("math:pi") > 3
        True
    """
    module_name, separator, name = path.partition(":")
    if not (module_name and separator and name):
        raise CommandError(f"write it as package.module:name, got {path!r}")
    import_from_here()
    try:
        found: object = importlib.import_module(module_name)
    except Exception as error:
        raise CommandError(f"cannot import {module_name!r}: {one_line(error)}") from error
    for attribute in name.split("."):
        if not hasattr(found, attribute):
            raise CommandError(f"{module_name!r} has no {name!r}")
        found = getattr(found, attribute)
    return found


def one_line(error: Exception) -> str:
    """An error with its kind."""
    return f"{type(error).__name__}: {error}"


def positive(text: str) -> int:
    """A whole number of at least 1, from an argument."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value
