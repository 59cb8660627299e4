"""Write every table and figure of the comparison: docs/comparison.md, its picture, README's table and the model cards' scores.

python -m benchmarks.publish [--seeds 5] [--runs DIR] [--without NAME ...] [--ablation-seeds 2] [--ablation-task NAME ...]

What is not yet in the folder of runs (those that are published, or yours) is run first, as by ``python -m benchmarks.comparison``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison.baselines import LIGHT, OURS, REFERENCE
from benchmarks.comparison.comparison import Comparison, Score, TaskResult
from benchmarks.comparison.report import brief_table, plot, score_table, task_table
from benchmarks.comparison.suite import SUITE
from teleport_optim.controller.checkpoints import find_checkpoint, read_card, write_atomically

__all__ = ["main"]

_ROOT = Path(__file__).parent.parent
_NOT_TAKEN_APART = "torchvision_net"
"""A task whose matrices of up to 1,024 rows take minutes for a run in which they are orthogonalised as a whole."""
_BEGIN, _END = "<!-- comparison -->\n", "<!-- end of comparison -->\n"

_INTRODUCTION = """# A comparison with tuned optimizers

Written by

```
{command}
```

on one core of a machine that was busy with other work; the steps that are timed take turns, so that ratios hold better than
milliseconds. Every task is trained on data, widths and depths that meta-training never sees. Rates are searched by
powers of two, until the best has worse neighbours, on a seed that is not reported. The reference is AdamW along a cosine with its
rate tuned, in runs of T steps.

**Horizon speed.** How short may a run be that ends where the reference ends after T steps? An optimizer is told the length of its
run and the parameters are measured as they are. Its runs have T, T/1.5, T/2, T/2.5, T/3 and T/4 steps, until one of them ends with
a higher loss (the mean over the last 5 % of a run); between the last two the logarithm of the length is interpolated in that of the
loss. Where the run of T steps already ends higher, runs of 1.5 T and 2 T follow. A task beyond 4 counts as 4 and one below 1/2 as
1/2: a mean with such tasks is marked "≥", "≤", or, with both, "≈". Rates are those that were tuned at T. The speed is the median
over {num_horizon_seeds} seeds, then the geometric mean over the tasks; in wall-clock it is divided by the ratio of the times of a
whole training step. An optimizer with "-" is not told a length; Muon and SGD are, but were not run at other lengths.

**Open-ended speed.** How many times sooner is one run where the reference ends, for good? It is read from the losses of one run of
T steps. Who averages is measured in the average: Schedule-Free, "AdamW averaged", the rule, and what is learned upon it (which are
told the length here, too; before the last 30 % of a run that changes nothing). Optimizers with a cosine are on their way to the end
that they were told.

Final and held-out losses are of runs of T steps: of the parameters as they are for optimizers with a horizon speed, of the average
for others that average. "Ahead" and "behind" are tasks where all {num_seeds} seeds agree. Times are of runs of half the length,
whose first step is not counted, with the average kept as it is by default. Set-up is the search for symmetries and the first
balancing, which wall-clock figures leave out. Where the processor multiplies numbers of 16 bits slowly, Muon's products are made in
float32 and rounded, so that its times are those of a processor that does not. Settings of `MALLOC_`, if there are any above, have
the process keep memory that it frees: page faults of virtual machines can take most of the time. All runs are in
`benchmarks/results/runs.jsonl`, from which the command makes these tables again; with `--runs` and another folder it runs all of
them.

![Training loss on every task, and the share of tasks on which a horizon speed is reached](curves.png)
"""


_ABLATIONS = (
    "The learned optimizer is told the length of the run, and its losses are of the average of the iterates all along."
)


def _scores(results: list[TaskResult], optimizer: str, command: str) -> dict[str, Any]:
    """Scores of an optimizer for its card."""
    horizon = {result.task: round(result.horizon_speed(optimizer) or 0.0, 3) for result in results}
    open_ended = {result.task: round(result.open_ended_speed(optimizer), 3) for result in results}
    quartiles = statistics.quantiles(horizon.values(), n=4, method="inclusive") if len(results) > 1 else []
    return {
        "command": command,
        "relative_to": REFERENCE,
        "means": asdict(Score.of(optimizer, results)),
        "horizon_speed_quartiles_over_tasks": [round(quartile, 3) for quartile in quartiles],
        "horizon_speed_by_task": horizon,
        "open_ended_speed_by_task": open_ended,
        "behind_in_training_loss": [result.task for result in results if result.outcome(optimizer) < 0],
        "behind_held_out": [result.task for result in results if result.is_worse_held_out(optimizer)],
    }


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=_ROOT / "benchmarks" / "results")
    parser.add_argument("--without", action="append", choices=tuple(SUITE), default=[])
    parser.add_argument("--ablation-seeds", type=int, default=2)
    parser.add_argument("--ablation-task", action="append", choices=tuple(SUITE), default=[])
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    tasks = {name: task for name, task in SUITE.items() if name not in arguments.without}
    options = [
        f"--seeds {arguments.seeds}",
        *(f"--without {name}" for name in arguments.without),
        f"--ablation-seeds {arguments.ablation_seeds}",
        *(f"--ablation-task {name}" for name in arguments.ablation_task),
    ]
    allocator = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    command = " ".join([*allocator, "python -m benchmarks.publish", *options])
    comparison = Comparison(arguments.runs, tasks, num_seeds=arguments.seeds, report=print)
    results = comparison.results()
    table = score_table(results)
    parts = [
        _INTRODUCTION.format(
            command=command,
            num_seeds=arguments.seeds,
            num_horizon_seeds=min(arguments.seeds, comparison.num_horizon_seeds),
        ),
        f"## All {len(results)} tasks\n\n{table}",
    ]
    usual = [name for name in tasks if name != _NOT_TAKEN_APART]
    taken_apart = {name: SUITE[name] for name in arguments.ablation_task or usual}
    if taken_apart:
        ablations = replace(comparison, tasks=taken_apart, num_seeds=arguments.ablation_seeds).ablations()
        parts.append(
            f"## One part taken away at a time\n\n{arguments.ablation_seeds} seeds, on {', '.join(taken_apart)}. {_ABLATIONS}\n\n"
            f"{score_table(ablations, with_horizon=False)}"
        )
    parts += [f"## {result.task}: {SUITE[result.task].description}\n\n{task_table(result)}" for result in results]
    (_ROOT / "docs" / "comparison.md").write_text("\n".join(parts))
    plot(results, _ROOT / "docs" / "curves.png")
    readme = _ROOT / "README.md"
    before, rest = readme.read_text().split(_BEGIN)
    _, after = rest.split(_END)
    readme.write_text(f"{before}{_BEGIN}{brief_table(results)}{_END}{after}")
    for name, optimizer in (("default", OURS), ("light", LIGHT)):
        path = find_checkpoint(name)
        card = read_card(path) | {"scores": _scores(results, optimizer, command)}
        write_atomically(path.with_suffix(".json"), json.dumps(card, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
