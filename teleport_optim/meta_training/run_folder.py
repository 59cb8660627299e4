"""The folder of a run: its configuration, its log, and the state from which it goes on after an interruption."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from teleport_optim.controller.checkpoints import write_atomically
from teleport_optim.meta_training.config import Config, parse_config
from teleport_optim.meta_training.process_group import ProcessGroup

__all__ = [
    "OuterStep",
    "RunFolder",
    "Session",
    "add_session",
    "config_of_run",
    "core_minutes",
    "read_log",
    "read_sessions",
]

_CONFIG_FILE = "config.json"
_LOG_FILE = "log.jsonl"
_SESSIONS_FILE = "sessions.jsonl"
_STATE_FILE = "state.pt"


class OuterStep(NamedTuple):
    """Report of one outer step: a line of the log.

    Example:
        >>> OuterStep(0, -1.0, 0.1, 0.0, 40, validation=None, seconds=2.0).objective
        -1.0
    """

    step: int
    objective: float
    """Mean meta-loss of the training runs."""
    gradient_norm: float
    exploded: float
    """Share of training runs that have exploded; they are part of the objective."""
    longest_horizon: int
    validation: float | None
    """Geometric mean, over fixed problems, of the final loss relative to that of the untrained rule."""
    seconds: float


class Session(NamedTuple):
    """Part of a run between its start, or a resumption, and an interruption, or its end."""

    first_step: int
    """Outer steps taken before."""
    num_processes: int
    num_threads: int
    """CPU threads of every process."""
    device: str

    @property
    def cores(self) -> int:
        """CPU cores in use; on other devices, how many of them."""
        return self.num_processes * (self.num_threads if self.device == "cpu" else 1)


def config_of_run(run_dir: str | Path) -> Config:
    """The configuration with which the meta-training run in ``run_dir`` was started; the run is where it was found.

    Raises:
        ValueError: if there is no run in ``run_dir``, or its configuration cannot be read.
    """
    path = Path(run_dir) / _CONFIG_FILE
    try:
        return replace(parse_config(json.loads(path.read_text())), run_dir=str(run_dir))
    except OSError as error:
        raise ValueError(f"there is no meta-training run in {run_dir}: cannot read {path.name}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_log(run_dir: Path) -> list[OuterStep]:
    """The outer steps that the run in a folder has taken."""
    return [OuterStep(**line) for line in _read_lines(run_dir / _LOG_FILE)]


def read_sessions(run_dir: Path) -> list[Session]:
    """The sessions of the run in a folder."""
    return [Session(**line) for line in _read_lines(run_dir / _SESSIONS_FILE)]


def add_session(run_dir: Path, session: Session) -> None:
    """Write down that a session begins."""
    _append_line(run_dir / _SESSIONS_FILE, session._asdict())


def core_minutes(log: Sequence[OuterStep], sessions: Sequence[Session]) -> list[float]:
    """Time taken up to and including every outer step, times the cores that were in use.

    A step belongs to the last session that began before it: what an interruption took back was taken again.

    Example:
        >>> log = [OuterStep(step, 0.0, 0.0, 0.0, 1, None, seconds=30.0) for step in (1, 2, 3)]
        >>> core_minutes(log, [Session(0, 1, 1, "cpu"), Session(2, 2, 2, "cpu")])
        [0.5, 1.0, 3.0]
    """

    def cores(step: int) -> int:
        return next((session.cores for session in reversed(sessions) if session.first_step < step), 1)

    return list(itertools.accumulate(report.seconds / 60.0 * cores(report.step) for report in log))


class RunFolder:
    """State of a run on disk, which holds one whole outer step at every moment.

    The first process writes what all of them know; every process writes its own training runs, and all processes need the
    folder on a file system that they share.

    Args:
        path: The folder.
        group: The processes of the run.
    """

    def __init__(self, path: Path, group: ProcessGroup) -> None:
        self._path, self._group = path, group

    def create(self, config: Config) -> None:
        """Begin a run in the folder.

        Raises:
            FileExistsError: if it holds a run.
        """
        if (self._path / _CONFIG_FILE).exists():
            raise FileExistsError(f"{self._path} holds a run: resume it, or choose another folder")
        self._group.wait()  # Or the file that is written now would be a run to a process that looks later.
        if self._group.is_first:
            self._path.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path / _CONFIG_FILE, json.dumps(config.identity, indent=1).encode())
        self._group.wait()

    def resume(self, config: Config) -> tuple[dict[str, Any], list[Any]] | None:
        """Read what :meth:`save` wrote last: the state, and the local states of all processes; None before the first time.

        Raises:
            FileNotFoundError: if there is nothing to resume.
            ValueError: if the run has another configuration.
        """
        if not (self._path / _CONFIG_FILE).exists():
            raise FileNotFoundError(f"there is no run to resume in {self._path}: {_CONFIG_FILE} is missing")
        identity, saved = config.identity, json.loads((self._path / _CONFIG_FILE).read_text())
        if differing := sorted(key for key in identity | saved if saved.get(key) != identity.get(key)):
            raise ValueError(f"the run in {self._path} has another configuration; these settings differ: {differing}")
        found = None
        if (self._path / _STATE_FILE).exists():
            state = _read_tensors(self._path / _STATE_FILE)
            files = [self._local_file(state["step"], rank) for rank in range(state["num_processes"])]
            found = state, [_read_tensors(file) for file in files if file.exists()]
        if self._group.is_first:
            self._cut_log(found[0]["step"] if found else 0)
        return found

    def save(self, report: OuterStep, state: Mapping[str, Any], local_state: Mapping[int, Any]) -> None:
        """Write an outer step: log and state, and the local state of this process if anything goes on.

        Args:
            report: The outer step.
            state: The same in every process.
            local_state: Of this process; empty in all processes or in none.
        """
        if local_state:
            _write_tensors(self._local_file(report.step, self._group.rank), local_state)
            self._group.wait()  # The state names these files, so it comes after the last of them.
        if not self._group.is_first:
            return
        _append_line(self._path / _LOG_FILE, report._asdict())
        _write_tensors(self._path / _STATE_FILE, {**state, "step": report.step, "num_processes": self._group.size})
        for file in self._path.glob("runs-*.pt"):
            if not file.name.startswith(f"runs-{report.step}-"):
                file.unlink()

    def _cut_log(self, num_steps: int) -> None:
        """Drop what the log says of steps whose state was not written."""
        log = self._path / _LOG_FILE
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        write_atomically(log, "".join(lines[:num_steps]).encode())

    def _local_file(self, step: int, rank: int) -> Path:
        return self._path / f"runs-{step}-{rank}.pt"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _append_line(path: Path, values: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")


def _read_tensors(path: Path) -> dict[Any, Any]:
    content: dict[Any, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def _write_tensors(path: Path, content: Mapping[Any, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    write_atomically(path, buffer.getvalue())
