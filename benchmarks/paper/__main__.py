"""The two-dimensional experiments of arXiv 2504.15399: all of them, or those that are named.

python -m benchmarks.paper [1 2 3 4 7 8 sensitivity] [--quick]

1: teleport directions on ellipses. 2: Newton's step, convex and not. 3: all variants on four families. 4: frequency of
teleports. 7: other groups. 8: distance to the optimum in the meta-loss. sensitivity: what the paper leaves open.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.paper import distance, ellipse_directions, families, frequency, groups, newton, sensitivity
from benchmarks.paper.harness import Study
from benchmarks.paper.tables import insert
from teleport_optim.controller.checkpoints import write_atomically

__all__ = ["EXPERIMENTS", "main"]

EXPERIMENTS: dict[str, ModuleType] = {
    "1": ellipse_directions,
    "2": newton,
    "3": families,
    "4": frequency,
    "7": groups,
    "8": distance,
    "sensitivity": sensitivity,
}
"""By the numbers that they have in the report."""

_PAGE = Path("docs/paper.md")
_RESULTS = "results.json"


def main(argv: list[str] | None = None) -> None:
    """Run experiments, print their tables, write figures and results, and bring the tables of the report up to date."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", metavar="experiment", help=f"any of {', '.join(EXPERIMENTS)}; all")
    parser.add_argument(
        "--quick", action="store_true", help="far too small to mean anything; the report stays as it is"
    )
    parser.add_argument("--out", type=Path, help="folder of figures and results; docs/paper, or runs/paper-quick/out")
    parser.add_argument("--cache", type=Path, help="folder of trained weights; runs/paper, or runs/paper-quick")
    arguments = parser.parse_args(argv)
    chosen = arguments.experiments or list(EXPERIMENTS)
    if unknown := [name for name in chosen if name not in EXPERIMENTS]:
        parser.error(f"there is no experiment {unknown[0]!r}: choose from {', '.join(EXPERIMENTS)}")
    torch.set_num_threads(1)
    if arguments.quick:
        quick = Path("runs/paper-quick")
        study = Study.quick(arguments.cache or quick, arguments.out or quick / "out")
    else:
        study = Study(cache=arguments.cache or Study.cache, out=arguments.out or Study.out)
    for name in chosen:
        _run(name, study, _PAGE if study.out == Study.out else None)


def _run(name: str, study: Study, page: Path | None) -> None:
    start = time.perf_counter()
    experiment = EXPERIMENTS[name]
    results = experiment.run(study)
    study.out.mkdir(parents=True, exist_ok=True)
    file = study.out / _RESULTS
    known = json.loads(file.read_text()) if file.exists() else {}
    known["settings"] = {"seeds": study.seeds, "functions": study.num_functions, "steps": study.num_steps}
    known["settings"]["base"] = study.base.identity
    known[name] = results
    write_atomically(file, (json.dumps(_rounded(known), indent=1) + "\n").encode())
    for title, table in experiment.tables(results).items():
        print(f"\n## {name}: {title}\n\n{table}", flush=True)
        if page is not None:
            write_atomically(page, insert(page.read_text(), title, table).encode())
    print(f"\n{name} took {time.perf_counter() - start:.0f} s", flush=True)


def _rounded(value: object) -> object:
    """Plain data with six significant digits, so that the file is the same on machines that round differently."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
