"""The ``teleport-optim`` command: the demo, a model's symmetries, meta-training, comparisons, and the checkpoints there are."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.comparison import __main__ as evaluation
from teleport_optim.checkpoints import CheckpointError, find_checkpoint, list_checkpoints, load_checkpoint, read_card
from teleport_optim.cli import meta_train
from teleport_optim.cli.errors import CommandError, load_object, mistakes, one_line, positive, require, run_command
from teleport_optim.groups import GROUPS
from teleport_optim.symmetry import draw_symmetries, find_symmetries, verify_symmetries

if TYPE_CHECKING:
    from rich.progress import TaskID
    from rich.table import Table

    from teleport_optim.cli.demo_runs import Contender

__all__ = ["load_model", "main"]

_PICTURES = (".pdf", ".png", ".svg")
_MAX_ROWS, _MAX_LEGS = 60, 6
"""Sites of a table and tensors of a site that are shown unless all are asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0, 1 if a symmetry does not hold, a checkpoint does not verify or a process of a run is lost, 2 for
        a mistake in the call, 130 after an interruption.
    """
    return run_command(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="teleport-optim", description="A learned optimizer for PyTorch that uses the symmetries of the model."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="compare the learned optimizer with a tuned AdamW on handwritten digits",
        description="Train one perceptron on scikit-learn's digits with AdamW as it comes, AdamW with the best of six "
        "learning rates, the update rule without anything learned, and the learned optimizer untuned; from the usual "
        "initial values, and from the same function with its hidden units rescaled. Prints tables, draws a picture.",
    )
    demo.add_argument("--steps", type=positive, default=600, help="length of every training run (default: %(default)s)")
    demo.add_argument(
        "--seeds", type=positive, default=1, help="seeds, of which medians are shown (default: %(default)s)"
    )
    demo.add_argument(
        "--rescaling",
        type=_not_negative,
        default=2.0,
        metavar="SIGMA",
        help="standard deviation of the log-factors of the rescaled start (default: %(default)s)",
    )
    demo.add_argument(
        "--checkpoint",
        default="default",
        help="shipped name, path, or hf://owner/name@revision (default: %(default)s)",
    )
    demo.add_argument("--output", type=Path, default=Path("demo.png"), help="picture to write (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="30 steps, only to see that it works")
    demo.add_argument("--threads", type=positive, default=1, help="CPU threads for torch (default: %(default)s)")
    demo.set_defaults(command=_demo)

    inspect = commands.add_parser(
        "inspect",
        help="list the symmetries of a model",
        description="Import a model and print along which of its hidden channels it can be moved without changing its "
        "function, what was refused and why, and how much of the model is reached; draw which layers the channels connect; "
        "and check numerically that all of it holds.",
    )
    inspect.add_argument("model", metavar="MODULE:NAME", help="a torch module, or what returns one when called")
    inspect.add_argument(
        "--input",
        type=_shape,
        action="append",
        required=True,
        metavar="N,N,...",
        help="shape of an input, batch axis of at least two included: 2,3,224,224; once for each input",
    )
    inspect.add_argument("--tokens", type=positive, metavar="N", help="the inputs hold integers below N (a vocabulary)")
    inspect.add_argument("--all", action="store_true", help="list every site and every tensor")
    inspect.add_argument(
        "--picture", type=Path, default=Path("channels.svg"), help="picture to write (default: %(default)s)"
    )
    inspect.add_argument("--json", type=Path, metavar="FILE", help="write what was found as JSON")
    inspect.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="move a copy in float64 and compare what it computes (default: yes; it takes several copies of the model)",
    )
    inspect.set_defaults(command=_inspect)

    bench = commands.add_parser(
        "bench", help="compare optimizers on tasks that meta-training never sees", description=evaluation.DESCRIPTION
    )
    evaluation.add_arguments(bench)

    train = commands.add_parser(
        "meta-train", help="train a meta-optimizer of your own", description=meta_train.DESCRIPTION
    )
    meta_train.add_arguments(train)

    checkpoints = commands.add_parser(
        "checkpoints",
        help="list and verify checkpoints",
        description="Load every checkpoint with all checks, and print what its card says about it, or what is wrong with it.",
    )
    checkpoints.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="shipped name, path, or hf://owner/name@revision (default: all that are shipped)",
    )
    checkpoints.set_defaults(command=_checkpoints)
    return parser


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def _shape(text: str) -> tuple[int, ...]:
    return tuple(positive(size) for size in text.split(","))


def _demo(arguments: argparse.Namespace) -> int:
    require("matplotlib", "rich", "sklearn")
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from teleport_optim.cli.demo_runs import NUM_RUNS, WIDTHS, compare, demo_data, make_network, plot

    if arguments.output.suffix not in _PICTURES:
        raise CommandError(f"the picture's name must end in {' or '.join(_PICTURES)}, got {str(arguments.output)!r}")
    with mistakes(OSError, CheckpointError):
        load_checkpoint(arguments.checkpoint)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    steps = 30 if arguments.quick else arguments.steps
    console = Console()
    network = "-".join(map(str, WIDTHS))
    console.print(f"Digits, ReLU perceptron {network}, {steps} steps, {arguments.seeds} seed(s)", highlight=False)
    comparisons: list[tuple[str, tuple[Contender, ...]]] = []
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
    for title, contenders in comparisons:
        console.print(_demo_table(title, contenders))
    with mistakes(OSError):
        plot(comparisons, arguments.output)
    console.print(f"Picture: {arguments.output}", highlight=False, soft_wrap=True)
    return 0


def _demo_table(title: str, contenders: Sequence[Contender]) -> Table:
    from rich.table import Table

    from teleport_optim.cli.demo_runs import steps_to_target

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


def load_model(path: str) -> nn.Module:
    """The model at ``module:name``: a module, or what is called without arguments and returns one.

    Raises:
        CommandError: saying which part of the path is wrong.

    Example:
        >>> load_model("torch.nn:Identity")
        Identity()
    """
    found = load_object(path)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise CommandError(f"{path} is neither a torch module nor callable, but {type(found).__name__}")
    try:
        model = found()
    except Exception as error:
        raise CommandError(f"calling {path} without arguments fails: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"{path} returns no torch module, but {type(model).__name__}")
    return model


def _inspect(arguments: argparse.Namespace) -> int:
    require("rich", "matplotlib")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if arguments.picture.suffix not in _PICTURES:
        raise CommandError(f"the picture's name must end in {' or '.join(_PICTURES)}, got {str(arguments.picture)!r}")
    model = load_model(arguments.model)
    examples = tuple(
        torch.randn(shape) if arguments.tokens is None else torch.randint(arguments.tokens, shape)
        for shape in arguments.input
    )
    console = Console()
    with mistakes(TypeError, ValueError):
        spec = find_symmetries(model, examples)
        report = verify_symmetries(model, spec, examples) if arguments.verify and len(spec) else None
    table = Table("site", "size", "group", r"tensors\[axis]^degree")
    for symmetry in spec if arguments.all else spec.symmetries[:_MAX_ROWS]:
        legs = list(map(str, symmetry.legs))
        shown = (
            legs
            if arguments.all or len(legs) <= _MAX_LEGS + 1
            else [*legs[:_MAX_LEGS], f"and {len(legs) - _MAX_LEGS} more"]
        )
        table.add_row(Text(symmetry.id), str(symmetry.size), symmetry.group.name, Text(" ".join(shown)))
    if table.row_count:
        console.print(table)
    else:
        console.print("No symmetries found.")
    if table.row_count < len(spec):
        console.print(f"and {len(spec) - table.row_count} more sites: --all lists everything", highlight=False)
    if spec.refusals:
        refusals = Table("refused at", "reason")
        for refusal in spec.refusals:
            refusals.add_row(Text(refusal.name), Text(refusal.reason))
        console.print(refusals)
    for group in GROUPS:
        part = spec.of_group(group)
        console.print(f"{group}: {len(part)} sites, {part.share_of(model):.1%} of the parameters", highlight=False)
    with mistakes(OSError):
        if len(spec):
            draw_symmetries(spec, arguments.picture, model=model, title=arguments.model)
            console.print(Text(f"picture: {arguments.picture}"), soft_wrap=True)
        if arguments.json:
            arguments.json.write_text(spec.to_json())
    if report is None:
        return 0
    failed = f"; these do not hold: {', '.join(report.failed) or 'all together'}" if not report.ok else ""
    console.print(Text(f"largest relative error of the function: {report.worst:.1e} (float64){failed}"), soft_wrap=True)
    return 0 if report.ok else 1


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
