"""The ``teleport-optim`` command and its sub-commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from teleport_optim.cli import checkpoints, demo, inspect, meta_train
from teleport_optim.cli.errors import run_command

__all__ = ["main"]

_COMMANDS = {
    "demo": (demo, "compare the learned optimizer with a tuned AdamW on handwritten digits"),
    "inspect": (inspect, "list the symmetries of a model"),
    "meta-train": (meta_train, "train a meta-optimizer of your own"),
    "checkpoints": (checkpoints, "list and verify checkpoints"),
}
"""Module and one line of help by the name of the sub-command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0, 1 if a symmetry does not hold, a checkpoint does not verify or a process of a run is lost, 2 for
        a mistake in the call, 130 after an interruption.
    """
    parser = argparse.ArgumentParser(
        prog="teleport-optim", description="A learned optimizer for PyTorch that uses the symmetries of the model."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, summary) in _COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=summary, description=module.DESCRIPTION))
    return run_command(parser, argv)
