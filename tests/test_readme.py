"""The Python blocks of the README and of the pages that no other test runs work as they stand, and their links lead somewhere."""

import os
import re
from pathlib import Path

import pytest
import torch

from benchmarks.comparison import comparison
from benchmarks.comparison.comparison import Comparison
from benchmarks.comparison.report import score_table
from benchmarks.comparison.suite import SUITE
from tests.helpers.paths import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


BLOCKS = [
    *blocks_of(README),
    *blocks_of(ROOT / "docs" / "symmetries.md"),
    "\n".join(blocks_of(ROOT / "docs" / "training.md")),
]


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text) + re.findall(r'src="([^":]+)"', text)
    assert [link for link in links if not os.path.exists(page.parent / link)] == []


def test_the_table_is_that_of_the_shipped_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made from the runs that are kept, all of which are of the checkpoints that are shipped."""
    for name in ("run_training", "milliseconds_per_step", "peak_megabytes"):
        monkeypatch.setattr(comparison, name, lambda *args, **options: pytest.fail("a run is missing"))
    report = (ROOT / "docs" / "comparison.md").read_text()
    tasks = {name: task for name, task in SUITE.items() if f"\n## {name}: " in report}
    results = Comparison(ROOT / "benchmarks" / "results", tasks, num_seeds=3).results()
    table = score_table(results)
    assert len(results) > 12
    assert table in report
    assert table in (ROOT / "README.md").read_text()
