"""Inner steps per second of meta-training on one core, beside the bare gradients of the same networks in the same run.

    OMP_NUM_THREADS=1 python -m benchmarks.meta_training_throughput [--runs 48] [--steps 40] [--repeats 5]

An inner step is one training step of one network under one candidate. Three ways to take the gradients of the same
perceptron 64-32-32-10 (ReLU, batches of 64) are timed beside the whole unroll, in turns, and medians are given. The peak
memory of evolution strategies is measured at two horizons, each in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from teleport_optim.controller.network import MetaOptimizer
from teleport_optim.meta_training import InnerProblem
from teleport_optim.meta_training.rules import ControllerRule
from teleport_optim.meta_training.tasks.networks import cross_entropy
from teleport_optim.meta_training.unroll import init_unroll, unroll
from teleport_optim.rng import generator_for

__all__ = ["main"]

BATCH_SIZE = 64


def perceptron() -> InnerProblem:
    """Two problems of random data on a perceptron 64-32-32-10."""
    source = generator_for("throughput")
    inputs = torch.randn(2, 512, 64, generator=source)
    targets = torch.randint(10, (2, 512), generator=source)
    problems = torch.arange(2)[:, None]

    def sample_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(512, (2, BATCH_SIZE), generator=generator)
        return inputs[problems, rows], targets[problems, rows]

    models = [
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)) for _ in range(2)
    ]
    return InnerProblem.of(models, cross_entropy, sample_batch, 40)


def bare_by_hand(params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> None:
    """Gradients with batched matrix products written out."""
    leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
    hidden = inputs
    for layer in ("0", "2", "4"):
        hidden = torch.baddbmm(leaves[f"{layer}.bias"][:, None], hidden, leaves[f"{layer}.weight"].mT)
        hidden = hidden.relu() if layer != "4" else hidden
    torch.autograd.grad(len(inputs) * cross_entropy(hidden, targets), list(leaves.values()))


def bare_vmap(problem: InnerProblem, params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> None:
    """Gradients with ``torch.func.vmap(grad)``."""

    def loss_of(run_params: dict[str, Tensor], run_inputs: Tensor, run_targets: Tensor) -> Tensor:
        return problem.loss(functional_call(problem.model, run_params, (run_inputs,)), run_targets)

    vmap(grad(loss_of))(params, inputs, targets)


def throughputs(num_runs: int, num_steps: int, repeats: int) -> dict[str, float]:
    """Inner steps per second of every contender: medians of ``repeats`` rounds, in each of which all take turns."""
    problem = perceptron()
    num_candidates = num_runs // problem.num_problems
    rule = ControllerRule(MetaOptimizer(generator=generator_for("weights")))
    flat = rule.flatten() + 0.01 * torch.randn(
        num_candidates, len(rule.flatten()), generator=generator_for("candidates")
    )
    weights = rule.unflatten(flat.repeat_interleave(problem.num_problems, dim=0))
    runs = init_unroll(rule, problem, num_candidates)
    inputs, targets = (
        x.repeat(num_candidates, *[1] * (x.dim() - 1)) for x in problem.sample_batch(generator_for("batch"))
    )

    def whole_unroll() -> None:
        with torch.no_grad():
            unroll(rule, weights, problem, runs, num_steps, partial(generator_for, "batch"))

    def repeated(step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(num_steps):
                step()

        return run

    contenders: dict[str, Callable[[], None]] = {
        "whole unroll": whole_unroll,
        "bare gradients as the unroll takes them": repeated(partial(problem.gradients, runs.params, inputs, targets)),
        "bare gradients by hand": repeated(partial(bare_by_hand, runs.params, inputs, targets)),
        "bare gradients with torch.func.vmap(grad)": repeated(
            partial(bare_vmap, problem, runs.params, inputs, targets)
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(repeats + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            if round_number:  # The first round warms up.
                seconds[name].append(time.perf_counter() - start)
    return {name: num_runs * num_steps / statistics.median(times) for name, times in seconds.items()}


def _peak_memory(num_runs: int, horizon: int, results: multiprocessing.Queue[float]) -> None:
    throughputs(num_runs, horizon, 1)
    results.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak_memory(num_runs: int, horizon: int) -> float:
    """Peak memory in MiB of a process that advances the runs over the horizon."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[float] = context.Queue()
    process = context.Process(target=_peak_memory, args=(num_runs, horizon, results))
    process.start()
    peak = results.get()
    process.join()
    return peak


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=48, help="runs at once (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="rounds, of which medians are given (default: %(default)s)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rates = throughputs(arguments.runs, arguments.steps, arguments.repeats)
    whole = rates["whole unroll"]
    print(f"perceptron 64-32-32-10, batch {BATCH_SIZE}, {arguments.runs} runs at once, one core")
    for name, rate in rates.items():
        print(f"{name:45} {rate:8.0f} inner steps/s   the unroll is at {whole / rate:.2f} of it")
    for horizon in (50, 500):
        print(f"peak memory at horizon {horizon}: {peak_memory(arguments.runs, horizon):.0f} MiB")


if __name__ == "__main__":
    main()
