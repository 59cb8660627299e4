"""Public names have docstrings with an example that runs; pytest runs them as doctests."""

from __future__ import annotations

import importlib
import inspect

import pytest

MODULES = (
    "teleport_optim",
    "teleport_optim.alignment",
    "teleport_optim.integrations.lightning",
    "teleport_optim.meta_training",
    "teleport_optim.testing",
)
NAMES = [(module, name) for module in MODULES for name in importlib.import_module(module).__all__]


def lacking(thing: object) -> list[str]:
    """Parts of a docstring that a public class or function lacks."""
    text = inspect.getdoc(thing) or ""
    if not callable(thing):
        return []
    lacks = [] if text else ["docstring"]
    is_error = inspect.isclass(thing) and issubclass(thing, Exception)
    if ">>> " not in text and not is_error:
        lacks.append("example")
    if text.startswith(("What ", "How ", "Who ")):
        lacks.append("beginning with a noun or a verb")
    if inspect.isclass(thing):
        methods = {name: value for name, value in vars(thing).items() if not name.startswith("_") and callable(value)}
        lacks += [f"docstring of {name}" for name, value in methods.items() if not inspect.getdoc(value)]
    return lacks


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_public_name_has_a_docstring_with_an_example(module: str, name: str) -> None:
    assert lacking(getattr(importlib.import_module(module), name)) == []


def test_a_bare_name_is_caught() -> None:
    class Bare:
        """What a user would see."""

        def method(self) -> None:
            pass

    assert lacking(Bare) == ["example", "beginning with a noun or a verb", "docstring of method"]
    assert lacking(lambda: None) == ["docstring", "example"]
