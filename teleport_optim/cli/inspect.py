"""Sub-command ``inspect``: find the symmetries of a model, list, draw and verify them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from teleport_optim.cli.arguments import check_picture_name, load_model, positive, shape
from teleport_optim.cli.errors import mistakes, require
from teleport_optim.symmetry import (
    SymmetrySpec,
    VerificationReport,
    draw_symmetries,
    find_symmetries,
    verify_symmetries,
)
from teleport_optim.symmetry.groups import GROUPS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["DESCRIPTION", "add_arguments"]

DESCRIPTION = (
    "Import a model and print along which of its hidden channels it can be moved without changing its function, what was "
    "refused and why, and how much of the model is reached; draw which layers the channels connect; and check numerically "
    "that all of it holds."
)

_MAX_ROWS, _MAX_LEGS = 60, 6
"""Sites of a table and tensors of a site that are shown unless all are asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the sub-command."""
    parser.add_argument("model", metavar="MODULE:NAME", help="a torch module, or what returns one when called")
    parser.add_argument(
        "--input",
        type=shape,
        action="append",
        required=True,
        metavar="N,N,...",
        help="shape of an input, batch axis of at least two included: 2,3,224,224; once for each input",
    )
    parser.add_argument("--tokens", type=positive, metavar="N", help="the inputs hold integers below N (a vocabulary)")
    parser.add_argument("--all", action="store_true", help="list every site and every tensor")
    parser.add_argument(
        "--picture", type=Path, default=Path("channels.svg"), help="picture to write (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found as JSON")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="move a copy in float64 and compare what it computes (default: yes; it takes several copies of the model)",
    )
    parser.set_defaults(command=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    require("rich", "matplotlib")
    from rich.console import Console
    from rich.text import Text

    check_picture_name(arguments.picture)
    model = load_model(arguments.model)
    examples = _examples(arguments.input, arguments.tokens)
    console = Console()
    with mistakes(TypeError, ValueError):
        spec = find_symmetries(model, examples)
        report = verify_symmetries(model, spec, examples) if arguments.verify and len(spec) else None
    _print_sites(spec, console, show_all=arguments.all)
    if spec.refusals:
        console.print(_refusal_table(spec))
    for group in GROUPS:
        part = spec.of_group(group)
        console.print(f"{group}: {len(part)} sites, {part.share_of(model):.1%} of the parameters", highlight=False)
    with mistakes(OSError):
        if len(spec):
            draw_symmetries(spec, arguments.picture, model=model, title=arguments.model)
            console.print(Text(f"picture: {arguments.picture}"), soft_wrap=True)
        if arguments.json:
            arguments.json.write_text(spec.to_json())
    return 0 if report is None else _print_errors(report, console)


def _examples(shapes: Sequence[tuple[int, ...]], num_tokens: int | None) -> tuple[Tensor, ...]:
    """Random inputs of these shapes, integers below ``num_tokens`` if it is given."""
    return tuple(torch.randn(size) if num_tokens is None else torch.randint(num_tokens, size) for size in shapes)


def _print_sites(spec: SymmetrySpec, console: Console, *, show_all: bool) -> None:
    """Print one row for each site, and how many are left out."""
    from rich.table import Table
    from rich.text import Text

    table = Table("site", "size", "group", r"tensors\[axis]^degree")
    for symmetry in spec if show_all else spec.symmetries[:_MAX_ROWS]:
        legs = list(map(str, symmetry.legs))
        if not show_all and len(legs) > _MAX_LEGS + 1:
            legs = [*legs[:_MAX_LEGS], f"and {len(legs) - _MAX_LEGS} more"]
        table.add_row(Text(symmetry.id), str(symmetry.size), symmetry.group.name, Text(" ".join(legs)))
    if table.row_count:
        console.print(table)
    else:
        console.print("No symmetries found.")
    if table.row_count < len(spec):
        console.print(f"and {len(spec) - table.row_count} more sites: --all lists everything", highlight=False)


def _refusal_table(spec: SymmetrySpec) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("refused at", "reason")
    for refusal in spec.refusals:
        table.add_row(Text(refusal.name), Text(refusal.reason))
    return table


def _print_errors(report: VerificationReport, console: Console) -> int:
    """Print the largest error and the sites that do not hold.

    Returns:
        The exit code: 1 if some site does not hold.
    """
    from rich.text import Text

    failed = f"; these do not hold: {', '.join(report.failed) or 'all together'}" if not report.ok else ""
    console.print(Text(f"largest relative error of the function: {report.worst:.1e} (float64){failed}"), soft_wrap=True)
    return 0 if report.ok else 1
