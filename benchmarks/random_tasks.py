"""Random small problems of the "test" split: does the shipped checkpoint ever diverge, and how does it end beside the rule alone?

python -m benchmarks.random_tasks [--count 100] [--checkpoint default]

Every problem is one network of a family that meta-training draws from, with other data, widths and depths; in a third of them
hidden units are rescaled, in a sixth the horizon is unknown to the optimizer.
"""

from __future__ import annotations

import argparse
import math
import statistics
from functools import partial

import torch

from teleport_optim.controller.checkpoints import load_checkpoint
from teleport_optim.controller.network import MetaOptimizer
from teleport_optim.meta_training.rules import ControllerRule
from teleport_optim.meta_training.tasks import TASKS
from teleport_optim.meta_training.tasks.problem import InnerProblem
from teleport_optim.meta_training.unroll import init_unroll, unroll
from teleport_optim.rng import generator_for

__all__ = ["final_loss", "main"]

_TAIL = 0.1
_FLOOR = 1e-4
"""Added to losses that are compared, so that perfect fits do not dominate."""


def final_loss(meta_optimizer: MetaOptimizer, problem: InnerProblem, number: int) -> float:
    """Mean loss over the last tenth of a run, relative to the first loss; infinite if it diverged."""
    rule = ControllerRule(meta_optimizer)
    weights = {name: param.detach().unsqueeze(0) for name, param in meta_optimizer.named_parameters()}
    with torch.no_grad():
        runs = init_unroll(rule, problem, 1)
        result = unroll(rule, weights, problem, runs, problem.horizon, partial(generator_for, "random tasks", number))
    tail = result.losses[0, -max(1, int(_TAIL * problem.horizon)) :]
    return float(tail.mean() / result.runs.initial[0])


def main(argv: list[str] | None = None) -> None:
    """Run all problems and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--checkpoint", default="default")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    trained = load_checkpoint(arguments.checkpoint)
    untrained = MetaOptimizer(block_rows=trained.block_rows)
    ratios, worse, diverged = [], [], 0
    for number in range(arguments.count):
        task = list(TASKS.values())[number % len(TASKS)]
        problem = task.sample(1, (50, 400), "test", generator_for("random tasks", number))
        learned, alone = (final_loss(each, problem, number) for each in (trained, untrained))
        if not learned < 1.0:
            worse.append(problem.description)
        diverged += not math.isfinite(learned)
        if math.isfinite(learned) and math.isfinite(alone):
            ratios.append(math.log((learned + _FLOOR) / (alone + _FLOOR)))
    quartiles = [math.exp(quartile) for quartile in statistics.quantiles(ratios, n=4)]
    print(f"{arguments.count} problems, {diverged} diverged, {len(worse)} ended above their first loss")
    print(f"final loss beside the rule alone: {math.exp(statistics.fmean(ratios)):.3f} in the geometric mean,")
    print("quartiles " + ", ".join(f"{quartile:.3f}" for quartile in quartiles))
    print("\n".join(worse))


if __name__ == "__main__":
    main()
