"""Sub-command ``demo``: four optimizers on one network, as tables and a picture."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from teleport_optim.cli.arguments import check_picture_name, not_negative, positive
from teleport_optim.cli.demo_runs import NUM_RUNS, WIDTHS, Contender, compare, demo_data, make_network, steps_to_target
from teleport_optim.cli.errors import mistakes, require
from teleport_optim.controller.checkpoints import CheckpointError, load_checkpoint

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table

__all__ = ["DESCRIPTION", "add_arguments", "plot"]

DESCRIPTION = (
    "Train one perceptron on scikit-learn's digits with default AdamW, AdamW with the best of six learning rates, the update "
    "rule without anything learned, and the learned optimizer untuned; from the usual initial values, and from the same "
    "function with its hidden units rescaled. Prints tables, draws a picture."
)

_COLOURS = ("#9aa0a6", "#1f5fbf", "#e08a1e", "#c2185b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the sub-command."""
    parser.add_argument(
        "--steps", type=positive, default=600, help="length of every training run (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=positive, default=1, help="seeds, of which medians are shown (default: %(default)s)"
    )
    parser.add_argument(
        "--rescaling",
        type=not_negative,
        default=2.0,
        metavar="SIGMA",
        help="standard deviation of the log-factors of the rescaled start (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoint",
        default="default",
        help="shipped name, path, or hf://owner/name@revision (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="picture to write (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="30 steps, only to see that it works")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads for torch (default: %(default)s)")
    parser.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    require("matplotlib", "rich", "sklearn")
    from rich.console import Console

    check_picture_name(arguments.output)
    with mistakes(OSError, CheckpointError):
        load_checkpoint(arguments.checkpoint)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    steps = 30 if arguments.quick else arguments.steps
    console = Console()
    network = "-".join(map(str, WIDTHS))
    console.print(f"Digits, ReLU perceptron {network}, {steps} steps, {arguments.seeds} seed(s)", highlight=False)
    comparisons = _compare_from_both_starts(arguments, steps, console)
    for title, contenders in comparisons:
        console.print(_table(title, contenders))
    with mistakes(OSError):
        plot(comparisons, arguments.output)
    console.print(f"Picture: {arguments.output}", highlight=False, soft_wrap=True)
    return 0


def _compare_from_both_starts(
    arguments: argparse.Namespace, steps: int, console: Console
) -> list[tuple[str, tuple[Contender, ...]]]:
    """Train from the usual and from the rescaled initial values, with a bar of progress for each."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    comparisons = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    starts = {"usual start": 0.0, "same function, hidden units rescaled": arguments.rescaling}
    with Progress(*columns, console=console) as progress:
        for title, rescaling in starts.items():
            bar = progress.add_task(title, total=NUM_RUNS * arguments.seeds * steps)

            def report(name: str, loss: float, bar: TaskID = bar) -> None:
                progress.update(bar, advance=1, description=f"{name:21} loss {loss:7.3f}")

            networks = [make_network(seed, rescaling) for seed in range(arguments.seeds)]
            contenders = compare(networks, demo_data(), steps=steps, checkpoint=arguments.checkpoint, report=report)
            progress.update(bar, description=title)
            comparisons.append((title, contenders))
    return comparisons


def _table(title: str, contenders: Sequence[Contender]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("optimizer", no_wrap=True)
    for heading in ("final loss", "test accuracy", "steps to AdamW's loss", "ms per step"):
        table.add_column(heading, justify="right")
    tuned = next(contender for contender in contenders if contender.is_reference)
    for contender in contenders:
        steps = statistics.median(
            steps_to_target(run, reference.losses[-1]) for run, reference in zip(contender.runs, tuned.runs)
        )
        table.add_row(
            contender.name,
            f"{contender.final_loss:.4f}",
            f"{contender.median(lambda run: run.accuracy):.1%}",
            f"{steps:.0f}" if math.isfinite(steps) else "not reached",
            f"{contender.median(lambda run: run.milliseconds):.2f}",
        )
    return table


def plot(comparisons: Sequence[tuple[str, Sequence[Contender]]], path: str | Path) -> None:
    """Draw the loss curves of comparisons, each under its title, and below them the learned optimizer's teleports.

    Args:
        comparisons: Titles, each with what :func:`compare` gave.
        path: The picture to write; its suffix decides the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(comparisons), 5.0), layout="constrained")
    axes = figure.subplots(2, len(comparisons), squeeze=False, sharex=True, sharey="row", height_ratios=(4, 1))
    for (title, contenders), (upper, lower) in zip(comparisons, axes.T):
        for contender, colour in zip(contenders, _COLOURS):
            width = 2.4 if contender is contenders[-1] else 1.6
            upper.plot(contender.runs[0].steps, contender.curve, color=colour, linewidth=width, label=contender.name)
            if contender.is_reference:
                upper.axhline(contender.final_loss, color=colour, linewidth=0.9, linestyle=":")
        upper.set(yscale="log", title=title)
        upper.legend(frameon=False)
        sizes = [statistics.median(sizes) for sizes in zip(*(run.teleport_sizes for run in contenders[-1].runs))]
        moments = [step for step, size in enumerate(sizes) if size > 0]
        lower.vlines(moments, 0, [sizes[step] for step in moments], color=_COLOURS[-1], linewidth=1.4)
        lower.set_xlabel("step")
        for panel in (upper, lower):
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.25, linewidth=0.6)
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylim(bottom=0.0)
    axes[1, 0].set_ylabel("teleport:\nRMS of log s")
    figure.savefig(path, dpi=150)
