"""The shipped checkpoint, untuned, against AdamW and the unlearned prior on networks and data that meta-training never saw.

python -m benchmarks.held_out [--steps 400] [--seeds 5] [--checkpoint default]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from teleport_optim.demo import Contender, Data, compare, make_network, steps_to_target

__all__ = ["TASKS", "main"]


def _seeded(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    def make(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return make


def _digits_convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def _breast_cancer() -> nn.Module:
    return nn.Sequential(
        nn.Linear(30, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 2)
    )


def _diabetes() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 80), nn.Tanh(), nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 1))


def _tabular(name: str, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Data:
    from sklearn import datasets

    inputs, targets = getattr(datasets, f"load_{name}")(return_X_y=True)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(inputs, dtype=torch.float32)[order], torch.tensor(targets)[order]
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    if loss is F.mse_loss:
        y = ((y - y.mean()) / y.std()).float()[:, None]
    split = int(0.8 * len(x))
    return Data(x[:split], y[:split], x[split:], y[split:], loss)


TASKS: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Data]]] = {
    "digits perceptron": (make_network, Data.demo),
    "digits convolution + BatchNorm": (_seeded(_digits_convolutional), Data.demo),
    "breast cancer perceptron": (_seeded(_breast_cancer), lambda: _tabular("breast_cancer", F.cross_entropy)),
    "diabetes regression": (_seeded(_diabetes), lambda: _tabular("diabetes", F.mse_loss)),
    "digits perceptron, rescaled": (lambda seed: make_network(seed, 2.0), Data.demo),
}
"""Networks by seed, and data, by name. The last has its hidden units multiplied at random: the same function."""


def _row(task: str, contender: Contender, target: float) -> str:
    steps = contender.median(lambda run: steps_to_target(run, target))
    cells = [
        task,
        contender.name,
        f"{contender.final_loss:.4f}",
        f"{contender.median(lambda run: run.accuracy):.3f}",
        "never" if math.isinf(steps) else f"{steps:.0f}",
        f"{contender.median(lambda run: run.milliseconds):.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> None:
    """Run the comparison and print a Markdown table; medians over seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--checkpoint", default="default")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("| task | optimizer | final training loss | test accuracy | steps to AdamW tuned's loss | ms per step |")
    print("|---|---|---|---|---|---|")
    for task, (make, load) in TASKS.items():
        networks = [make(seed) for seed in range(arguments.seeds)]
        contenders = compare(networks, load(), steps=arguments.steps, checkpoint=arguments.checkpoint)
        target = next(contender for contender in contenders if contender.is_reference).final_loss
        for contender in contenders:
            print(_row(task, contender, target), flush=True)


if __name__ == "__main__":
    main()
