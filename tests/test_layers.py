"""The layers of the package: imports point down only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "teleport_optim"

LAYERS = (
    ("_native", "commands", "guard", "sharding", "streams"),
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
    ("optimizer", "meta_training"),
    ("evaluation",),
    ("demo", "integrations"),
    ("cli",),
    ("__main__",),
)
"""From the lowest layer to the highest. A module imports from lower layers, and a folder from within itself."""

NO_IMPORTS_BETWEEN = ({"optimizer", "meta_training"},)
"""Parts that do not know each other although one lies above the other."""

MODULES = sorted({*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")} - {PACKAGE / "__init__.py"})


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(path.suffix)


def imported_parts(source: str) -> set[str]:
    """The parts of the package that a module imports; an import of the package itself counts as ``"(package)"``."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.append(node.module or "")
    parts = [name.split(".") for name in names if name.split(".")[0] == PACKAGE.name]
    return {name[1] if len(name) > 1 else "(package)" for name in parts}


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
        ("groups", "from teleport_optim.action import act"),
        ("update", "import teleport_optim.optimizer"),
        ("meta_training", "def f():\n    from teleport_optim.optimizer import LearnedTeleportOptimizer"),
        ("action", "from teleport_optim import find_symmetries"),
    ],
)
def test_a_wrong_import_is_caught(part: str, source: str) -> None:
    assert misdirected(part, source)
