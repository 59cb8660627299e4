"""Sub-command ``meta-train``: start and resume runs, show how they go, and tell beforehand what they cost."""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch

from teleport_optim.cli.arguments import import_from_here
from teleport_optim.cli.errors import (
    INTERRUPTED,
    CommandError,
    complain,
    mistakes,
    require,
    run_command,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from teleport_optim.meta_training.config import Config
    from teleport_optim.meta_training.cost import Cost, TaskCost
    from teleport_optim.meta_training.learner import Learner
    from teleport_optim.meta_training.process_group import ProcessGroup

__all__ = ["DESCRIPTION", "add_arguments", "main"]

DESCRIPTION = (
    "Meta-train an optimizer on small training problems. The state is saved after every outer step: interrupt at any "
    "moment and go on with --resume. The folder of the run holds its configuration, log and learning curve, scalars for "
    "TensorBoard, and in the end the checkpoint and its card. To share the work between processes: "
    "torchrun --nproc-per-node N -m teleport_optim.meta_training, with the same options."
)

_DEFAULT_CONFIG = "standard"
_SECONDS_BETWEEN_PICTURES = 30.0


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0, 1 if a process of the run is lost, 2 for a mistake in the call, 130 after an interruption.
    """
    parser = argparse.ArgumentParser(prog="python -m teleport_optim.meta_training", description=DESCRIPTION)
    add_arguments(parser)
    return run_command(parser, argv)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the command."""
    parser.add_argument(
        "--config",
        metavar="NAME|FILE.toml",
        help=f"quick, standard, default, large, or a file (default: {_DEFAULT_CONFIG})",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting; may be repeated"
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="MODULE:CLASS",
        help="train on this task instead of those of the configuration: a class of your own, from the current folder or "
        "installed, or the name of a task; may be repeated",
    )
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, in any number of processes")
    parser.add_argument("--device", metavar="DEVICE", help="where networks are trained, such as cuda (default: cpu)")
    parser.add_argument("--run-dir", metavar="DIR", help="folder of the run (default: runs/NAME)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.safetensors",
        help="checkpoint to write (default: in the folder of the run)",
    )
    parser.add_argument("--dry-run", action="store_true", help="tell what the run would cost, and write nothing")
    parser.set_defaults(command=_meta_train)


def _meta_train(arguments: argparse.Namespace) -> int:
    require("matplotlib", "rich", "sklearn")
    from teleport_optim.meta_training.process_group import WorkerLostError, join

    import_from_here()
    config = _config(arguments)
    if arguments.dry_run:
        return _dry_run(config)
    output = _output(arguments.output, config)
    try:
        with join(config.device) as group, _terminable():
            return _train(config, group, output, is_resumed=bool(arguments.resume))
    except KeyboardInterrupt:
        print("Interrupted.")
        return INTERRUPTED
    except WorkerLostError as error:
        raise CommandError(f"{error}: start the run again", exit_code=1) from error


def _config(arguments: argparse.Namespace) -> Config:
    from teleport_optim.meta_training.config import read_config
    from teleport_optim.meta_training.run_folder import config_of_run

    with mistakes(OSError, TypeError, ValueError):
        if arguments.resume:
            if arguments.config or arguments.set or arguments.task or arguments.run_dir:
                raise CommandError(
                    "--resume goes on with the run as it is: leave out --config, --set, --task and --run-dir"
                )
            if arguments.dry_run:
                raise CommandError("--dry-run tells the cost of a run from its start: leave out --resume")
            config = config_of_run(arguments.resume)
        else:
            name = arguments.config or _DEFAULT_CONFIG
            config = read_config(name).with_settings(arguments.set)
            run_dir = arguments.run_dir or config.run_dir or str(Path("runs") / Path(name).stem)
            config = replace(config, run_dir=run_dir, tasks=tuple(arguments.task) or config.tasks)
    config = replace(config, device=arguments.device or config.device)
    try:
        torch.empty(0, device=config.device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"cannot use the device {config.device!r}: {reason}") from error
    return config


def _output(path: Path | None, config: Config) -> Path:
    """Path of the checkpoint; what could keep it from being written in the end is found now."""
    if path is None:
        return Path(config.run_dir) / "checkpoint.safetensors"
    if path.suffix != ".safetensors":
        raise CommandError(f"a checkpoint's name ends in .safetensors, got {str(path)!r}")
    with mistakes(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _learner(config: Config, group: ProcessGroup | None = None, *, is_resumed: bool = False) -> Learner:
    """The learner; what the package itself refuses is a mistake in the call, errors in a task keep their traceback."""
    from teleport_optim.meta_training.learner import Learner

    with mistakes(OSError):
        try:
            return Learner(config, group, resume=is_resumed)
        except ValueError as error:
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            if not frame.f_globals["__name__"].startswith("teleport_optim."):
                raise
            raise CommandError(str(error)) from error


# Training


def _train(config: Config, group: ProcessGroup, output: Path, *, is_resumed: bool) -> int:
    """Take the outer steps of a run and export its checkpoint; only the first process shows and writes anything."""
    from rich.console import Console

    from teleport_optim.meta_training.report import CURVE_FILE, draw_learning_curve
    from teleport_optim.meta_training.run_folder import Session, add_session

    console = Console(quiet=not group.is_first, highlight=False, soft_wrap=True)
    learner = _learner(config, group, is_resumed=is_resumed)
    run_dir = Path(config.run_dir)
    if group.is_first:
        add_session(run_dir, Session(learner.step, group.size, torch.get_num_threads(), config.device))
    ending = _take_steps(learner, console)
    if ending:
        exit_code = _say_how_to_go_on(ending, learner, console)
        if group.is_first:
            draw_learning_curve(run_dir)
        return exit_code
    if group.is_first:
        draw_learning_curve(run_dir)
        console.print(f"Learning curve: {run_dir / CURVE_FILE}")
        _export(learner, output, console)
    return 0


def _take_steps(learner: Learner, console: Console) -> BaseException | None:
    """Take the remaining outer steps and show how they go.

    Returns:
        What ended the run too early: an interruption, or the loss of another process.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from teleport_optim.meta_training.cost import mean_window
    from teleport_optim.meta_training.process_group import WorkerLostError
    from teleport_optim.meta_training.report import Scalars, draw_learning_curve

    config, run_dir = learner.config, Path(learner.config.run_dir)
    scalars = Scalars(run_dir) if learner.group.is_first else None
    if scalars and not scalars.is_on:
        console.print("TensorBoard is not installed: no scalars for it are written.")
    steps = range(config.num_outer_steps)
    work = list(itertools.accumulate((mean_window(config, step) for step in steps), initial=0.0))
    progress = Progress(
        BarColumn(20),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not (learner.group.is_first and console.is_terminal),
        speed_estimate_period=3600.0,
    )
    validation, ending, drawn = "", None, time.monotonic()
    with progress:
        bar = progress.add_task(f"step {learner.step}/{len(steps)}", total=work[-1])
        progress.update(bar, completed=work[learner.step])
        try:
            for report in learner.run():
                status = f"objective {report.objective:.3f}"
                if report.validation is not None:
                    validation = f", validation {report.validation:.3f}"
                    exploded = f", {report.exploded:.1%} of the runs exploded" if report.exploded else ""
                    console.print(f"step {report.step}: {status}{validation} of the untrained rule's loss{exploded}")
                progress.update(
                    bar,
                    completed=work[report.step],
                    description=f"step {report.step}/{len(steps)}, {status}{validation}",
                )
                if scalars:
                    scalars.add(report)
                    if report.validation is not None and time.monotonic() - drawn > _SECONDS_BETWEEN_PICTURES:
                        draw_learning_curve(run_dir)
                        drawn = time.monotonic()
        except (KeyboardInterrupt, WorkerLostError) as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            ending = error
    if scalars:
        scalars.close()
    return ending


def _say_how_to_go_on(ending: BaseException, learner: Learner, console: Console) -> int:
    """Say how far an unfinished run has come and how to resume it.

    Returns:
        The exit code.
    """
    config, size = learner.config, learner.group.size
    program = "teleport-optim meta-train"
    if size > 1:
        local = os.environ.get("LOCAL_WORLD_SIZE", str(size))
        program = f"torchrun --nproc-per-node {local} -m teleport_optim.meta_training"
    device = f" --device {config.device}" if config.device != "cpu" else ""
    go_on = f"To go on{', in any number of processes' if size > 1 else ''}: {program} --resume "
    go_on += f"{shlex.quote(config.run_dir)}{device}"
    reached = f"after {learner.step} of {config.num_outer_steps} steps"
    if not isinstance(ending, KeyboardInterrupt):
        return complain(CommandError(f"{ending}; the run ends {reached}. {go_on}", exit_code=1))
    why = " by SIGTERM, which torchrun also sends when another process has ended," if size > 1 else ""
    is_terminated = isinstance(ending, _Terminated)
    console.print(f"Interrupted{why if is_terminated else ''} {reached}. {go_on}")
    return INTERRUPTED


def _export(learner: Learner, output: Path, console: Console) -> None:
    with mistakes(OSError):
        validation = learner.export(output)
    console.print(f"Checkpoint: {output} (validation {validation:.3f} of the untrained rule's loss)")


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM interrupt as Ctrl-C does, once: what says how to go on is not cut off by the next one."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# The cost beforehand


def _dry_run(config: Config) -> int:
    from rich.console import Console
    from rich.progress import track

    from teleport_optim.meta_training.cost import measure_task, total_cost

    console = Console(highlight=False)
    learner = _learner(replace(config, run_dir=""))
    tasks = [measure_task(learner, task) for task in track(config.tasks, "measuring", console=console, transient=True)]
    console.print(_task_table(config, tasks))
    console.print(_total_table(config, total_cost(config, tasks, len(learner.theta))))
    return 0


def _task_table(config: Config, tasks: Sequence[TaskCost]) -> Table:
    from rich.table import Table

    from teleport_optim.meta_training.cost import num_runs

    runs = num_runs(config)
    table = Table(title=f"One step of all {runs} runs of a problem batch, in one process", title_justify="left")
    table.add_column("task", overflow="fold")
    for heading in ("share of batches", "ms per step", "inner steps/s"):
        table.add_column(heading, justify="right")
    for task in tasks:
        milliseconds, speed = 1e3 * task.seconds_per_step, runs / task.seconds_per_step
        table.add_row(task.task, f"{task.share:.1%}", f"{milliseconds:.1f}", f"{speed:,.0f}")
    return table


def _total_table(config: Config, cost: Cost) -> Table:
    from rich.table import Table

    table = Table(title="The whole run", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = {
        "inner steps": f"{cost.inner_steps:,.0f}",
        "training": _duration(cost.training_seconds),
        "validations": _duration(cost.validation_seconds),
        "time in all, one process": _duration(cost.seconds),
    }
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        rows[f"time in all, {size} processes, at best"] = _duration(cost.seconds / size)
    rows |= {
        "parameters and state of the runs": f"{cost.num_bytes / 2**20:,.1f} MiB",
        "meta-parameters": f"{cost.num_parameters:,}",
        "sent by each process per outer step": f"{cost.bytes_between_processes:,} bytes",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _duration(seconds: float) -> str:
    """A time in words.

    Example:
        >>> _duration(12345.0), _duration(75.0), _duration(3.21)
        ('3 h 25 min', '1 min 15 s', '3.2 s')
    """
    if seconds < 60.0:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
