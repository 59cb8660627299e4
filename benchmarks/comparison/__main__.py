"""The command ``bench``: compares optimizers and writes a report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from teleport_optim.checkpoints import CheckpointError
from teleport_optim.cli.errors import CommandError, load_object, mistakes, positive, require

__all__ = ["DESCRIPTION", "add_arguments"]

DESCRIPTION = (
    "Train the networks of the suite with AdamW (as it comes, constant, cosine), SGD, Muon and Schedule-Free, each with its "
    "rate tuned on a seed of its own, with the update rule without anything learned, and with the learned optimizer untuned: how "
    "short may a run be that ends where tuned AdamW ends? "
    "Every run is kept in the output folder: interrupt at any moment and start again. Writes report.md, results.json and "
    "curves.png there."
)
_QUICK_TASKS = ("deep_mlp", "cnn", "autoencoder", "tabular_classification")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the command."""
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
        "--output", type=Path, default=Path("runs/bench"), metavar="DIR", help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads for torch (default: %(default)s)")
    parser.set_defaults(command=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    require("matplotlib", "rich", "schedulefree", "sklearn", "torchvision", extra="bench")
    from rich.console import Console

    from benchmarks.comparison.comparison import Comparison, Score
    from benchmarks.comparison.development import DEVELOPMENT, DEVELOPMENT_WIDE
    from benchmarks.comparison.images import image_tasks
    from benchmarks.comparison.report import plot, score_table, task_table
    from benchmarks.comparison.suite import FAR, SUITE

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
    torch.set_num_threads(arguments.threads)
    console = Console()
    with mistakes(OSError, CheckpointError):
        comparison = Comparison(
            folder=arguments.output,
            tasks={name: suite[name] for name in names},
            checkpoint=arguments.checkpoint,
            num_seeds=1 if arguments.quick else arguments.seeds,
            share=0.3 if arguments.quick else 1.0,
            others={path: _function(path) for path in arguments.optimizer},
            report=lambda message: console.print(message, highlight=False),
        )
        results = comparison.results()
        tables = {"All tasks": results}
        if arguments.ablations:
            tables["One part of the learned optimizer taken away"] = comparison.ablations()
        parts = [f"# {title}\n\n{score_table(group, with_horizon=group is results)}" for title, group in tables.items()]
        parts += [f"# {result.task}: {suite[result.task].description}\n\n{task_table(result)}" for result in results]
        scores = {
            title: {name: asdict(Score.of(name, group)) for name in group[0].runs} for title, group in tables.items()
        }
        (arguments.output / "report.md").write_text("\n".join(parts))
        (arguments.output / "results.json").write_text(json.dumps(scores, indent=1))
        plot(results, arguments.output / "curves.png")
    console.print("\n".join(parts), highlight=False, soft_wrap=True)
    return 0


def _function(path: str) -> Callable[..., Any]:
    found = load_object(path)
    if not callable(found):
        raise CommandError(f"{path} is not callable, but {type(found).__name__}")
    return found
