"""The command that meta-trains: runs, interrupts, mistakes, several processes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from teleport_optim import load_checkpoint
from teleport_optim.cli import meta_train as command
from teleport_optim.cli.main import main as teleport_optim
from teleport_optim.meta_training.learner import Learner
from teleport_optim.meta_training.report import Scalars
from teleport_optim.meta_training.run_folder import OuterStep, read_log
from tests.helpers.mistakes import assert_mistake
from tests.helpers.paths import ROOT

OWN_TASK = (ROOT / "docs" / "own_task.md").read_text()
(OWN_CLASS,) = re.findall(r"^```python\n(.*?)^```", OWN_TASK, flags=re.MULTILINE | re.DOTALL)
DOCUMENTED_MESSAGES = re.findall(r"^\| `(.*?)` \|", OWN_TASK, flags=re.MULTILINE)
TINY = {
    "num_outer_steps": "3",
    "num_tasks": "2",
    "num_problems": "2",
    "num_pairs": "2",
    "min_horizon": "3",
    "max_horizon": "5",
    "validate_every": "2",
    "num_validation": "1",
    "hidden_size": "3",
}
ELLIPSE = "benchmarks.paper.functions:Ellipse"
FUNCTIONS = TINY | {"tasks": ELLIPSE}
NETWORKS = TINY | {"tasks": "teacher_regression"}
TASKS = """
import os, signal, time
from benchmarks.paper.functions import Ellipse

class Mine(Ellipse):
    name = "mine"

class Broken(Ellipse):
    name = "broken"

    def sample(self, num_problems, horizons, split, generator):
        first, second = range(3)

class Mortal(Ellipse):
    name = "mortal"

    def sample(self, num_problems, horizons, split, generator):
        if os.environ.get("RANK") == "1" and os.path.exists("run/log.jsonl"):
            with open("run/log.jsonl") as log:
                if len(log.readlines()) >= 2:
                    os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(num_problems, horizons, split, generator)

class Slow(Ellipse):
    name = "slow"

    def sample(self, num_problems, horizons, split, generator):
        time.sleep(0.05)
        return super().sample(num_problems, horizons, split, generator)
"""


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test runs in a folder of its own, which holds the modules ``my_tasks`` and ``waves``."""
    (tmp_path / "my_tasks.py").write_text(TASKS)
    (tmp_path / "waves.py").write_text(OWN_CLASS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "160")
    yield
    for name in ("my_tasks", "waves"):
        sys.modules.pop(name, None)


def options(settings: dict[str, str], **changes: str) -> list[str]:
    return [word for key, value in (settings | changes).items() for word in ("--set", f"{key}={value}")]


def meta_train(arguments: list[str]) -> int:
    return teleport_optim(["meta-train", *arguments])


def scalars_of(run_dir: str) -> dict[str, list[tuple[int, float]]]:
    """The steps and values that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run_dir).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_run_leaves_a_checkpoint_and_shows_how_it_went(capsys: pytest.CaptureFixture[str]) -> None:
    assert meta_train([*options(NETWORKS), "--run-dir", "run", "--output", "out/mine.safetensors"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^step 2: objective -?\d\.\d+, validation \d\.\d+ of the untrained rule's loss$", output, re.M)
    assert "Checkpoint: out/mine.safetensors (validation " in output
    assert load_checkpoint("out/mine.safetensors").hidden_size == 3
    assert json.loads(Path("out/mine.json").read_text())["meta_training"]["num_outer_steps_taken"] == 3
    assert {"config.json", "log.jsonl", "state.pt", "learning_curve.png"} <= {
        path.name for path in Path("run").iterdir()
    }
    assert Path("run/learning_curve.png").stat().st_size > 10_000
    scalars, log = scalars_of("run"), read_log(Path("run"))
    assert set(scalars) == {"objective", "gradient_norm", "exploded", "longest_horizon", "validation", "seconds"}
    assert [step for step, _ in scalars["validation"]] == [2, 3]
    assert scalars["objective"] == [(line.step, pytest.approx(line.objective, rel=1e-6)) for line in log]


def test_the_folder_of_a_run_is_named_after_its_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    settings = FUNCTIONS | {"num_outer_steps": "1"}
    Path("small.toml").write_text(
        "\n".join(
            f"{key} = {value if value.isdecimal() else repr(value)}"
            for key, value in settings.items()
            if key != "tasks"
        )
    )
    arguments = ["--config", "small.toml", "--set", f"tasks={ELLIPSE}"]
    assert meta_train(arguments) == 0
    assert "Checkpoint: runs/small/checkpoint.safetensors" in capsys.readouterr().out
    assert Path("runs/small/state.pt").exists()
    assert_mistake(meta_train, arguments, "runs/small holds a run", capsys)


def next_second() -> None:
    """TensorBoard reads files in the order of their names: seconds, then a count in the process, in which 10 comes before 9."""
    time.sleep(1.0)


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """SIGINT interrupts, here and in processes that are started, also where pytest was started in the background.

    A shell has what it starts with ``&`` ignore SIGINT, Python leaves that as it is, and processes inherit it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_where_it_was(
    number: int, hears_ctrl_c: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert meta_train([*options(FUNCTIONS), "--run-dir", "full_tensor"]) == 0
    run = Learner.run

    def interrupted(learner: Learner) -> Iterator[OuterStep]:
        for step in run(learner):
            yield step
            os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Learner, "run", interrupted)
    capsys.readouterr()
    assert meta_train([*options(FUNCTIONS), "--run-dir", "parts"]) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert (
        capsys.readouterr().out
        == "Interrupted after 1 of 3 steps. To go on: teleport-optim meta-train --resume parts\n"
    )
    assert Path("parts/learning_curve.png").exists()
    next_second()
    assert command.main(["--resume", "parts"]) == 130
    monkeypatch.setattr(Learner, "run", run)
    next_second()
    assert meta_train(["--resume", "parts", "--device", "cpu"]) == 0
    whole, parts = (torch.load(f"{name}/state.pt", weights_only=True) for name in ("full_tensor", "parts"))
    assert torch.equal(whole["best"], parts["best"])
    assert [step for step, _ in scalars_of("parts")["objective"]] == [1, 2, 3]


def test_a_run_in_the_background_goes_on_ignoring_ctrl_c(hears_ctrl_c: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """``nohup`` and ``&`` promise that a run outlives the terminal; only SIGTERM ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = Learner.run

    def interrupted(learner: Learner) -> Iterator[OuterStep]:
        for step in run(learner):
            os.kill(os.getpid(), signal.SIGINT)
            yield step

    monkeypatch.setattr(Learner, "run", interrupted)
    assert meta_train([*options(FUNCTIONS), "--run-dir", "run"]) == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_scalars_of_steps_that_were_taken_back_are_purged() -> None:
    assert meta_train([*options(FUNCTIONS), "--run-dir", "run"]) == 0
    lines = Path("run/log.jsonl").read_text().splitlines(keepends=True)
    scalars = scalars_of("run")
    Path("run/log.jsonl").write_text("".join(lines[:2]))
    next_second()
    taken_again = Scalars(Path("run"))
    taken_again.add(OuterStep(3, 7.0, 0.0, 0.0, 5, None, 0.1))
    taken_again.close()
    assert scalars_of("run")["objective"] == [*scalars["objective"][:2], (3, 7.0)]


def test_without_tensorboard(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name))
    assert meta_train([*options(FUNCTIONS, num_outer_steps="1"), "--run-dir", "run"]) == 0
    assert capsys.readouterr().out.count("TensorBoard is not installed") == 1
    assert not list(Path("run").glob("events*"))


def test_a_task_from_the_current_folder_takes_the_place_of_the_others() -> None:
    assert meta_train([*options(FUNCTIONS), "--task", "my_tasks:Mine", "--task", ELLIPSE, "--run-dir", "run"]) == 0
    assert json.loads(Path("run/config.json").read_text())["tasks"] == ["my_tasks:Mine", ELLIPSE]


def test_an_error_in_a_task_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="too many values to unpack"):
        meta_train([*options(FUNCTIONS), "--task", "my_tasks:Broken"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "quik"], "no configuration 'quik': did you mean 'quick'"),
        (["--config", "missing.toml"], "cannot read missing.toml"),
        (["--config", "wrong.toml"], "unknown key 'sigmas': did you mean 'sigma'"),
        (["--set", "sigma=fast"], "cannot read 'fast'"),
        (["--set", "sigma=-1"], "sigma must be positive"),
        (["--set", "estimator=pse"], "unknown estimator 'pse': did you mean 'pes'"),
        (["--set", "objective=planned"], "unknown objective 'planned': did you mean 'plain'"),
        (["--task", "digits_mpl"], "did you mean 'digits_mlp'"),
        (["--task", "my_tasks:Nine"], "my_tasks has no 'Nine'; the tasks in it are"),
        (["--task", "my_tasks:os"], "not a task family"),
        (["--task", ELLIPSE, "--set", "frozen=*.balanse"], "matches no meta-parameter"),
        (["--task", ELLIPSE, "--set", "frozen=*.balanse", "--dry-run"], "matches no meta-parameter"),
        (["--resume", "missing"], "there is no meta-training run in missing"),
        (["--resume", "any", "--set", "sigma=1"], "leave out --config, --set, --task and --run-dir"),
        (["--resume", "any", "--task", ELLIPSE], "leave out --config, --set, --task and --run-dir"),
        (["--resume", "any", "--dry-run"], "leave out --resume"),
        (["--output", "weights.pt"], "ends in .safetensors"),
        (["--output", "wrong.toml/weights.safetensors"], "wrong.toml"),
        (["--run-dir", "taken"], "taken holds a run"),
        (["--run-dir", "wrong.toml"], "wrong.toml"),
        (["--device", "gpu"], "cannot use the device 'gpu': "),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong.toml").write_text("sigmas = 3\n")
    Path("taken").mkdir()
    Path("taken/config.json").write_text("{}")
    assert_mistake(meta_train, arguments, message, capsys)


def test_a_mistake_names_the_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert_mistake(command.main, ["--config", "quik"], "error: process 1: no configuration 'quik'", capsys)


# Cost


def test_a_dry_run_measures_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(tmp_path.rglob("*.*"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert meta_train([*options(NETWORKS), "--task", "teacher_regression", "--task", "digits_mlp", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert {path for path in tmp_path.rglob("*.*") if path.suffix != ".pyc"} == before
    for text in ("teacher_regression", "50.0%", "inner steps/s", "3 processes, at best", "meta-parameters", "96 bytes"):
        assert text in output


@pytest.mark.parametrize("estimator", ["pes", "pes+tbptt", "tbptt_first_order"])
def test_every_estimator_can_be_measured(estimator: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert meta_train([*options(FUNCTIONS, estimator=estimator, truncation="2"), "--dry-run"]) == 0
    assert "time in all" in capsys.readouterr().out


# The page on tasks of one's own


def test_the_documented_task_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert meta_train([*options(NETWORKS), "--task", "waves:Waves", "--run-dir", "runs/waves"]) == 0
    assert load_checkpoint("runs/waves/checkpoint.safetensors").hidden_size == 3
    assert "import math" in OWN_CLASS
    assert len(OWN_CLASS.splitlines()) <= 35


WRONG = {
    "cannot be imported": ("", "", "wawes:Waves"),
    "does not exist": ("", "", "waves:Wave"),
    "there is no task": ("", "", "digits_mpl"),
    "is not a task family": ("", "", "waves:WIDTHS"),
    "has no name": ('    name = "waves"\n', "", "waves:Waves"),
    "cannot be made without arguments": ("    def sample(", "    def __init__(", "waves:Waves"),
    "asked for 2 problems": ("initial_params(model, num_problems", "initial_params(model, 1", "waves:Waves"),
    "asked for a horizon": ("draw.horizon(*horizons)", "100", "waves:Waves"),
    "for one problem": ("F.mse_loss", 'nn.MSELoss(reduction="none")', "waves:Waves"),
    "at the initial parameters": ("torch.sin(", "torch.nan * torch.sin(", "waves:Waves"),
    "running statistics": ("nn.ReLU()", "nn.BatchNorm1d(width)", "waves:Waves"),
}


@pytest.mark.parametrize("message", DOCUMENTED_MESSAGES)
def test_the_documented_messages(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    ((right, wrong, task),) = (change for part, change in WRONG.items() if part in message)
    assert right in OWN_CLASS
    Path("waves.py").write_text(OWN_CLASS.replace(right, wrong))
    settings = options(NETWORKS, min_horizon="40", max_horizon="40")
    assert_mistake(meta_train, [*settings, "--task", task], message, capsys)


def test_every_documented_message_is_tested() -> None:
    assert len(DOCUMENTED_MESSAGES) == len(WRONG)


# Processes of their own


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


@pytest.mark.slow
def test_ctrl_c_ends_with_how_to_go_on(hears_ctrl_c: None) -> None:
    arguments = [*options(FUNCTIONS, num_outer_steps="1000"), "--task", "my_tasks:Slow", "--run-dir", "a run"]
    program = [sys.executable, "-W", "error", "-m", "teleport_optim", "meta-train", *arguments]
    process = subprocess.Popen(
        program, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not Path("a run/log.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130, errors
    assert re.search(
        r"^Interrupted after \d+ of 1000 steps\. To go on: teleport-optim meta-train --resume 'a run'$", output, re.M
    )
    assert errors == ""


@pytest.mark.slow
def test_two_processes_make_a_checkpoint() -> None:
    done = torchrun([*options(NETWORKS), "--run-dir", "run"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2: objective") == 1
    assert done.stdout.count("Checkpoint: run/checkpoint.safetensors") == 1
    assert load_checkpoint("run/checkpoint.safetensors").hidden_size == 3
    assert len(list(Path("run").glob("events*"))) == 1
    assert json.loads(Path("run/sessions.jsonl").read_text())["num_processes"] == 2


@pytest.mark.slow
def test_a_lost_process_ends_the_run_which_goes_on_in_one(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*options(FUNCTIONS, num_outer_steps="12"), "--task", "my_tasks:Mortal", "--run-dir", "run"]
    done = torchrun(arguments)
    assert done.returncode == 1
    reached = r"after (\d+) of 12 steps\. To go on, in any number of processes: torchrun .* --resume run"
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if re.search(reached, line)]
    lost = "teleport-optim: error: a process of this run has ended or cannot be reached; the run ends after"
    assert line.startswith((lost, "Interrupted by SIGTERM, which torchrun also sends when another process has ended"))
    assert len(read_log(Path("run"))) in (2, 3, 4)
    assert meta_train(["--resume", "run"]) == 0
    assert [line.step for line in read_log(Path("run"))] == list(range(1, 13))


def torchrun(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command in two processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    where = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    program = [sys.executable, "-m", "torch.distributed.run", *where, "-m", "teleport_optim.meta_training", *arguments]
    return subprocess.run(program, env=environment(), capture_output=True, text=True, check=False)
