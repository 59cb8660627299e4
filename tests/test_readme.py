"""The Python blocks of the README and of the pages work as they stand, their links lead somewhere, and the README is short."""

import os
import re
from pathlib import Path

import pytest
import torch

from benchmarks.comparison import comparison
from benchmarks.comparison.comparison import Comparison
from benchmarks.comparison.report import brief_table, score_table
from benchmarks.comparison.suite import SUITE
from tests.helpers.paths import ROOT

README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
MOST_WORDS = 900


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


BLOCKS = [(page, "\n".join(blocks_of(page))) for page in PAGES if blocks_of(page)]


def test_the_readme_is_short() -> None:
    assert len(README.read_text().split()) <= MOST_WORDS


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 6


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[page.name for page, _ in BLOCKS])
def test_block_runs(page: Path, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(block, str(page), "exec"), {"__name__": page.stem})


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
    assert brief_table(results) in README.read_text()
