"""Does training depend on where on its orbit a network starts? The final loss by the size of a rescaling of hidden units.

python -m benchmarks.orbit_start [--seeds 3] [--checkpoint default] [--optimizer NAME]

Every hidden unit that can be scaled is multiplied by exp(sigma N(0, 1)) and what reads it divided by it: the same function.
Prints a Markdown table: the final loss from sigma = 0, then ratios to it, geometric means over seeds. AdamW's learning
rate is tuned again for every sigma.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from benchmarks.comparison.baselines import REFERENCE, tune_lr
from benchmarks.comparison.comparison import TUNING_SEED
from benchmarks.comparison.suite import SUITE
from benchmarks.comparison.task import EvaluationTask
from benchmarks.comparison.training import run_training
from teleport_optim.cli.training import Recipe, adamw, learned
from teleport_optim.controller.network import MetaOptimizer
from teleport_optim.meta_training.tasks.networks import rescale

__all__ = ["main", "rescaled"]

SIGMAS = (0.0, 1.0, 2.0, 3.0)
TASKS = ("deep_mlp", "cnn", "resnet")


def rescaled(task: EvaluationTask, sigma: float) -> EvaluationTask:
    """Start a task from another point of the orbit."""

    def make_model(seed: int) -> nn.Module:
        model = task.make_model(seed)
        rescale(model, torch.zeros_like(task.make_data().inputs[:2]), sigma, seed)
        return model

    return replace(task, make_model=make_model) if sigma else task


def _tuned_adamw(task: EvaluationTask) -> Recipe:
    def score(lr: float) -> float:
        return run_training(task, adamw(lr), steps=task.steps, seed=TUNING_SEED).final_loss

    return adamw(tune_lr(score, 4e-3))


OPTIMIZERS: dict[str, Callable[[EvaluationTask, str], Recipe]] = {
    REFERENCE: lambda task, checkpoint: _tuned_adamw(task),
    "rule, nothing learned, no teleports": lambda task, checkpoint: learned(MetaOptimizer(), teleport=False),
    "learned": lambda task, checkpoint: learned(checkpoint),
}
"""A task and a checkpoint to a recipe, by name."""


def main(argv: list[str] | None = None) -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--checkpoint", default="default")
    parser.add_argument(
        "--optimizer", action="append", choices=tuple(OPTIMIZERS), help="only this one; may be repeated"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("| network | optimizer | " + " | ".join(f"sigma = {sigma:g}" for sigma in SIGMAS) + " |")
    print("|---|---|" + "---|" * len(SIGMAS))
    for name in TASKS:
        tasks = {sigma: rescaled(SUITE[name], sigma) for sigma in SIGMAS}
        for optimizer in arguments.optimizer or OPTIMIZERS:
            logs: dict[float, list[float]] = {}
            for sigma, task in tasks.items():
                recipe = OPTIMIZERS[optimizer](task, arguments.checkpoint)
                runs = (run_training(task, recipe, steps=task.steps, seed=seed) for seed in range(arguments.seeds))
                logs[sigma] = [math.log(run.final_loss) for run in runs]
            start = statistics.fmean(logs[0.0])
            ratios = (math.exp(statistics.fmean(own) - start) for own in logs.values())
            cells = [f"{math.exp(start):.4f}", *(f"{ratio:.2f}" for ratio in list(ratios)[1:])]
            print(f"| {name} | {optimizer} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
