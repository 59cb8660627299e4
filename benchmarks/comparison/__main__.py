"""Compare optimizers and write a report: ``python -m benchmarks.comparison``, from a checkout."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.comparison.comparison import Comparison, Score, TaskResult
from benchmarks.comparison.development import DEVELOPMENT, DEVELOPMENT_WIDE
from benchmarks.comparison.images import image_tasks
from benchmarks.comparison.report import plot, score_table, task_table
from benchmarks.comparison.suite import FAR, SUITE
from benchmarks.comparison.task import EvaluationTask
from teleport_optim.cli.arguments import load_object, positive
from teleport_optim.cli.errors import CommandError, mistakes, require, run_command
from teleport_optim.cli.training import Recipe
from teleport_optim.controller.checkpoints import CheckpointError

__all__ = ["main"]

_DESCRIPTION = (
    "Train the networks of the suite with AdamW (default, constant, cosine), SGD, Muon and Schedule-Free, each with its "
    "learning rate tuned on a seed of its own, with the update rule without anything learned, and with the learned optimizer "
    "untuned: how short may a run be that ends where tuned AdamW ends? "
    "Every run is kept in the output folder: interrupt at any moment and start again. Writes report.md, results.json and "
    "curves.png there."
)
_QUICK_TASKS = ("deep_mlp", "cnn", "autoencoder", "tabular_classification")
_QUICK_SHARE = 0.3
"""Length of the runs as a share of the usual."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0, or 2 for a mistake in the call.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison", description=_DESCRIPTION)
    parser.add_argument(
        "--suite",
        choices=("held-out", "far", "images", "development", "development-wide"),
        default="held-out",
        help="the tasks that are reported, some that are eight times as long or as wide as anything in meta-training, MNIST, "
        "Fashion-MNIST and CIFAR-10, or those on which the rule is developed, small or wide networks (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where torchvision's data sets lie, for --suite images (default: %(default)s)",
    )
    parser.add_argument("--download", action="store_true", help="fetch them if they are not there")
    parser.add_argument("--task", action="append", metavar="NAME", help="only this task; may be repeated")
    parser.add_argument("--seeds", type=positive, default=5, help="runs of every optimizer (default: %(default)s)")
    parser.add_argument("--checkpoint", default="default", help="shipped name, path or hf:// (default: %(default)s)")
    parser.add_argument(
        "--optimizer",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="compare this one too: a function of a model and the number of steps that returns an optimizer; may be repeated",
    )
    parser.add_argument(
        "--ablations", action="store_true", help="also take away one part of the learned optimizer at a time"
    )
    parser.add_argument("--quick", action="store_true", help="four tasks, one seed, short runs: under five minutes")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/comparison"),
        metavar="DIR",
        help="folder to write (default: %(default)s)",
    )
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads for torch (default: %(default)s)")
    parser.set_defaults(command=_compare)
    return run_command(parser, argv)


def _compare(arguments: argparse.Namespace) -> int:
    require("matplotlib", "rich", "schedulefree", "sklearn", "torchvision", extra="bench")
    from rich.console import Console

    console = Console()
    tasks = _tasks(arguments)
    torch.set_num_threads(arguments.threads)
    with mistakes(OSError, CheckpointError):
        comparison = Comparison(
            folder=arguments.output,
            tasks=tasks,
            checkpoint=arguments.checkpoint,
            num_seeds=1 if arguments.quick else arguments.seeds,
            share=_QUICK_SHARE if arguments.quick else 1.0,
            others={path: _recipe(path) for path in arguments.optimizer},
            report=lambda message: console.print(message, highlight=False),
        )
        results = comparison.results()
        tables = {"All tasks": results}
        if arguments.ablations:
            tables["One part of the learned optimizer taken away"] = comparison.ablations()
        report = _write(arguments.output, tasks, tables)
    console.print(report, highlight=False, soft_wrap=True)
    return 0


def _tasks(arguments: argparse.Namespace) -> dict[str, EvaluationTask]:
    """Tasks that were asked for, by name."""
    suite = {
        "held-out": SUITE,
        "far": FAR,
        "images": image_tasks(arguments.data, download=arguments.download),
        "development": DEVELOPMENT,
        "development-wide": DEVELOPMENT_WIDE,
    }[arguments.suite]
    names = arguments.task or (_QUICK_TASKS if arguments.quick and suite is SUITE else list(suite))
    for name in names:
        if name not in suite:
            raise CommandError(f"no task {name!r}: there are {', '.join(suite)}")
    return {name: suite[name] for name in names}


def _recipe(path: str) -> Recipe:
    found = load_object(path)
    if not callable(found):
        raise CommandError(f"{path} is not callable, but {type(found).__name__}")
    return found


def _write(folder: Path, tasks: Mapping[str, EvaluationTask], tables: Mapping[str, list[TaskResult]]) -> str:
    """Write the report, the scores and the picture.

    Args:
        folder: Where they are written.
        tasks: Tasks by name.
        tables: Results by title; the first are those of all optimizers.

    Returns:
        The report.
    """
    results, *_ = tables.values()
    parts = [f"# {title}\n\n{score_table(group, with_horizon=group is results)}" for title, group in tables.items()]
    parts += [f"# {result.task}: {tasks[result.task].description}\n\n{task_table(result)}" for result in results]
    scores = {title: {name: asdict(Score.of(name, group)) for name in group[0].runs} for title, group in tables.items()}
    report = "\n".join(parts)
    (folder / "report.md").write_text(report)
    (folder / "results.json").write_text(json.dumps(scores, indent=1))
    plot(results, folder / "curves.png")
    return report


if __name__ == "__main__":
    sys.exit(main())
