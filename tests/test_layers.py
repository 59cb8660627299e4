"""The layers of the package: imports point down only, and nothing imports in a circle."""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "teleport_optim"

LAYERS = (
    ("rng",),
    ("symmetry",),
    ("alignment", "optim", "testing"),
    ("controller",),
    ("learned",),
    ("integrations", "meta_training"),
    ("cli",),
    ("__main__",),
)
"""From the lowest layer to the highest. A module imports from lower layers, and a folder from within itself."""

CLASSES = {
    "meta_training": ("teleport_optim.learned", "teleport_optim.optim.optimizer", "teleport_optim.optim.averaged")
}
"""What a part must not know although it lies below: meta-training runs the rule, not the class."""

OUTSIDE = {
    "symmetry": {"torch", "numpy"},
    "optim": {"torch"},
    "controller": {"torch", "safetensors", "huggingface_hub"},
}
"""The other packages that a part may import. The testing kit and the alignment need one each, and say so."""
OPTIONAL = {"symmetry/testing": {"hypothesis"}, "symmetry/alignment": {"scipy"}, "symmetry/draw.py": {"matplotlib"}}

NOT_SHIPPED = ("benchmarks", "examples", "tests")
"""Folders beside the package."""

MODULES = sorted({*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")} - {PACKAGE / "__init__.py"})
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))


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


def misdirected(part: str, source: str) -> set[str]:
    """The imports of a module of ``part`` that do not point down."""
    ranks = {name: rank for rank, names in enumerate(LAYERS) for name in names}
    upward = {name for name in imported_parts(source) - {part} if name not in ranks or ranks[name] >= ranks[part]}
    return upward | {
        name for name in imported_modules(source) if name.startswith(CLASSES.get(part, ("no such module",)))
    }


def foreign(path: Path, source: str) -> set[str]:
    """The other packages that a module imports and may not."""
    if part_of(path) not in OUTSIDE:
        return set()
    known = {PACKAGE.name, *sys.stdlib_module_names, *OUTSIDE[part_of(path)]}
    place = str(path.relative_to(PACKAGE))
    known |= {name for prefix, names in OPTIONAL.items() if place.startswith(prefix) for name in names}
    return {name.split(".")[0] for name in imported_modules(source)} - known


def unshipped(source: str) -> list[str]:
    """The imports of what is in a checkout only."""
    return [name for name in imported_modules(source) if name.split(".")[0] in NOT_SHIPPED]


@every_module
def test_imports_point_down(path: Path) -> None:
    assert misdirected(part_of(path), path.read_text()) == set()


@every_module
def test_a_part_needs_no_other_packages_than_it_says(path: Path) -> None:
    assert foreign(path, path.read_text()) == set()


def test_the_table_lists_every_part() -> None:
    assert {part_of(path) for path in MODULES} == {name for names in LAYERS for name in names}


def circle(imports: dict[str, set[str]]) -> list[str]:
    """A circle of modules, each of which imports the next one; empty if there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in MODULES}
    modules = {name: path for name, path in names.items() if path.stem != "__init__" and path.suffix == ".py"}
    imports = {name: set(imported_modules(path.read_text())) & modules.keys() for name, path in modules.items()}
    assert circle(imports) == []
    assert circle(
        imports | {"teleport_optim.rng": {"teleport_optim.learned"}, "teleport_optim.learned": {"teleport_optim.rng"}}
    )


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("symmetry", "from teleport_optim.optim.rule import update"),
        ("optim", "import teleport_optim.controller.network"),
        ("optim", "def f():\n    from teleport_optim.learned import LearnedTeleportOptimizer"),
        ("meta_training", "def f():\n    from teleport_optim.optim.optimizer import TeleportOptimizer"),
        ("symmetry", "from teleport_optim import find_symmetries"),
        ("meta_training", "from teleport_optim.cli.training import train"),
    ],
)
def test_a_wrong_import_is_caught(part: str, source: str) -> None:
    assert misdirected(part, source)


def test_a_foreign_package_is_caught() -> None:
    assert foreign(PACKAGE / "symmetry" / "find.py", "import scipy.optimize") == {"scipy"}
    assert foreign(PACKAGE / "symmetry" / "alignment" / "matching.py", "import scipy.optimize") == set()
    assert foreign(PACKAGE / "optim" / "rule.py", "def f():\n    import numpy") == {"numpy"}


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
