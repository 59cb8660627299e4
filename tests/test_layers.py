"""The layers of the package: imports point down only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "teleport_optim"

LAYERS = (
    ("_native", "guard", "rng", "sharding"),
    ("groups",),
    ("symmetry",),
    ("action",),
    ("layout", "alignment", "testing"),
    ("features",),
    ("meta_optimizer",),
    ("update",),
    ("checkpoints", "first_call", "native"),
    ("averaging",),
    ("optimizer_state",),
    ("optimizer",),
    ("integrations", "meta_training"),
    ("cli",),
    ("__main__",),
)
"""From the lowest layer to the highest. A module imports from lower layers, and a folder from within itself."""

NO_IMPORTS_BETWEEN = ({"optimizer", "meta_training"},)
"""Parts that do not know each other although one lies above the other."""

NOT_SHIPPED = ("benchmarks", "examples", "tests")
"""Folders beside the package."""

MODULES = sorted({*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")} - {PACKAGE / "__init__.py"})


def part_of(path: Path) -> str:
    """The module or folder that a file belongs to; every ``__main__`` starts a command and belongs to the highest part."""
    if path.stem == "__main__":
        return path.stem
    return path.relative_to(PACKAGE).parts[0].removesuffix(path.suffix)


def imported_modules(source: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.append(node.module or "")
    return names


def imported_parts(source: str) -> set[str]:
    """The parts of the package that a module imports; an import of the package itself counts as ``"(package)"``."""
    parts = [name.split(".") for name in imported_modules(source) if name.split(".")[0] == PACKAGE.name]
    return {name[1] if len(name) > 1 else "(package)" for name in parts}


def unshipped(source: str) -> list[str]:
    """The imports of what is in a checkout only."""
    return [name for name in imported_modules(source) if name.split(".")[0] in NOT_SHIPPED]


def misdirected(part: str, source: str) -> set[str]:
    """The imports of a module of ``part`` that do not point down."""
    ranks = {name: rank for rank, names in enumerate(LAYERS) for name in names}
    parts = imported_parts(source) - {part}
    upward = {name for name in parts if name not in ranks or ranks[name] >= ranks[part]}
    return upward | {name for name in parts if {name, part} in NO_IMPORTS_BETWEEN}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    assert misdirected(part_of(path), path.read_text()) == set()


def test_the_table_lists_every_part() -> None:
    assert {part_of(path) for path in MODULES} == {name for names in LAYERS for name in names}


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("groups", "from teleport_optim.symmetry.action import act"),
        ("update", "import teleport_optim.optim.optimizer"),
        ("meta_training", "def f():\n    from teleport_optim.optim.optimizer import LearnedTeleportOptimizer"),
        ("action", "from teleport_optim import find_symmetries"),
        ("meta_training", "from teleport_optim.cli.training import train"),
    ],
)
def test_a_wrong_import_is_caught(part: str, source: str) -> None:
    assert misdirected(part, source)


@pytest.mark.parametrize("path", [PACKAGE / "__init__.py", *MODULES], ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_what_is_not_shipped(path: Path) -> None:
    assert unshipped(path.read_text()) == []


def test_an_import_of_what_is_not_shipped_is_caught() -> None:
    assert unshipped("import benchmarks.comparison.suite")
    assert unshipped("def f():\n    from benchmarks.comparison import suite")
    assert not unshipped("from teleport_optim.meta_training.tasks import Task")


def test_commands_are_started_from_above_everything() -> None:
    assert part_of(PACKAGE / "meta_training" / "__main__.py") == "__main__"
    assert misdirected("meta_training", "from teleport_optim.cli.meta_train import main")
    assert misdirected("cli", "from teleport_optim.__main__ import main")
