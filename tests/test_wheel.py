"""The built wheel works alone: it holds the checkpoints and the demo, and needs nothing of the source tree."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PROGRAM = """
import pathlib, sys
for name in ("schedulefree", "torchvision", "hypothesis", "huggingface_hub"):
    sys.modules[name] = None  # of other extras than cli
import torch, teleport_optim
from teleport_optim.controller.checkpoints import list_checkpoints

assert pathlib.Path(teleport_optim.__file__).is_relative_to(sys.argv[1]), teleport_optim.__file__
assert list_checkpoints()["default"].is_relative_to(sys.argv[1])
model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
before = [param.clone() for param in model.parameters()]
optimizer = teleport_optim.LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=10)
model(torch.ones(3, 2)).square().sum().backward()
optimizer.step()
assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))

assert not [name for name in sys.modules if name.startswith("teleport_optim.meta_training")]
from teleport_optim.meta_training import TASKS, Config, Learner

assert Config().tasks == tuple(TASKS)

from teleport_optim.cli.main import main

assert main(["demo", "--quick"]) == 0
assert pathlib.Path("demo.png").stat().st_size > 10_000
assert "benchmarks" not in sys.modules
"""


def run(*command: str, cwd: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_wheel_loads_the_default_checkpoint_and_takes_a_step(tmp_path: Path) -> None:
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT))
    run(sys.executable, *build, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "teleport_optim/pretrained/default.safetensors" in names
    assert "teleport_optim/pretrained/default.json" in names
    assert "teleport_optim/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"teleport_optim"}
    assert not [name for name in names if "evaluation" in name or "comparison" in name or "paper" in name]
    target = tmp_path / "installed"
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    run(sys.executable, *install, cwd=tmp_path)
    start = f"import sys; sys.path.insert(0, {str(target)!r})\n"
    run(sys.executable, "-W", "error", "-c", start + PROGRAM, str(target), cwd=tmp_path)
