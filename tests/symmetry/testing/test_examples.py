"""The examples of the page on testing, and what is said without hypothesis."""

import re
import sys

import pytest
import torch

from tests.helpers.paths import ROOT

DOCS = ROOT / "docs" / "testing.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_without_hypothesis_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    for name in [
        name for name in sys.modules if name.startswith(("teleport_optim.testing", "teleport_optim.symmetry.testing"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="pip install hypothesis"):
        import teleport_optim.testing  # noqa: F401


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_of_the_docs_runs(block: str) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "docs"}
    exec(compile(block, str(DOCS), "exec"), names)
    tests = [function for name, function in names.items() if name.startswith("test_") and callable(function)]
    for function in tests:
        function()
