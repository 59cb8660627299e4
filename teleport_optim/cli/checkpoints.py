"""Sub-command ``checkpoints``: load checkpoints with all checks and print what their cards say."""

from __future__ import annotations

import argparse

from teleport_optim.cli.errors import require
from teleport_optim.controller.checkpoints import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_card,
)

__all__ = ["DESCRIPTION", "add_arguments"]

DESCRIPTION = "Load every checkpoint with all checks, and print what its card says about it, or what is wrong with it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the sub-command."""
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="shipped name, path, or hf://owner/name@revision (default: all that are shipped)",
    )
    parser.set_defaults(command=_checkpoints)


def _checkpoints(arguments: argparse.Namespace) -> int:
    require("rich")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("checkpoint", "parameters", "estimator", "minutes", "sha256")
    failures: dict[str, CheckpointError] = {}
    for name in arguments.checkpoints or list_checkpoints():
        try:
            path = find_checkpoint(name)
            num_parameters = sum(parameter.numel() for parameter in load_checkpoint(path).parameters())
            card = read_card(path)
        except CheckpointError as error:
            failures[name] = error
            continue
        training, minutes = card.get("meta_training"), card.get("meta_training_minutes")
        estimator = training.get("estimator") if isinstance(training, dict) else None
        table.add_row(
            Text(name),
            str(num_parameters),
            Text(estimator if isinstance(estimator, str) and estimator.isprintable() else "-"),
            f"{minutes:.1f}" if isinstance(minutes, (int, float)) and 0 <= minutes < 1e9 else "-",
            card["sha256"][:12],
        )
    if table.row_count:
        console.print(table)
    for name, failure in failures.items():
        console.print(Text(f"{name} does not verify: {failure}"), soft_wrap=True)
    return 1 if failures else 0
