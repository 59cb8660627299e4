"""Every file of examples/ runs as a user would run it, without warnings of ours or about us, and learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

ARGUMENTS = {"compiled_model": "backend='aot_eager'"}
"""Of main, where the defaults take too long for a test: the first compilation by inductor on a machine takes 20 seconds."""
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_learns(example: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [str(example)]
    if example.stem in ARGUMENTS:
        environment["PYTHONPATH"] += os.pathsep + str(example.parent)
        command = ["-c", f"import {example.stem}; {example.stem}.main({ARGUMENTS[example.stem]})"]
    run = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert "UserWarning" not in run.stderr
    assert list(tmp_path.iterdir()) == []
    lines = re.findall(r"^epoch (\d+)  loss (\S+)  accuracy (\S+)$", run.stdout, flags=re.MULTILINE)
    assert [int(epoch) for epoch, _, _ in lines] == list(range(1, len(lines) + 1))
    losses, accuracies = [float(loss) for _, loss, _ in lines], [float(accuracy) for _, _, accuracy in lines]
    assert len(losses) >= 4
    assert losses[-1] < losses[0]
    assert accuracies[-1] > 0.85
