"""The loss on the line between two networks from different seeds, before and after their channels are matched.

python -m benchmarks.alignment [--epochs 15] [--pairs 3] [--picture docs/alignment.png]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_optim.alignment import Barrier, align, interpolation_barrier
from teleport_optim.cli.training import train
from teleport_optim.meta_training.tasks.data import digits
from teleport_optim.meta_training.tasks.networks import perceptron, seeded

__all__ = ["NETWORKS", "Residual", "main", "plot"]

_BATCH_SIZE = 64
_COLOURS = {"as trained": "#9aa0a6", "weights matched": "#1f5fbf", "activations matched": "#c2185b"}


class Residual(nn.Module):
    """A residual convolutional network with BatchNorm, for 8 x 8 images in rows of 64.

    Args:
        width: Channels of every layer.
        num_blocks: Residual blocks of two convolutions.
    """

    def __init__(self, width: int = 128, num_blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(num_blocks)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x.view(-1, 1, 8, 8)))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "perceptron, 2 x 512": partial(perceptron, (64, 512, 512, 10), nn.ReLU),
    "residual convolution + BatchNorm, 5 x 128": Residual,
}
"""Networks by name."""


def _train(build: Callable[[], nn.Module], inputs: Tensor, labels: Tensor, *, epochs: int, seed: int) -> nn.Module:
    model = seeded(build)(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    num_steps = epochs * (len(inputs) // _BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_steps, pct_start=0.1)
    batches = _epochs(inputs, labels, epochs, torch.Generator().manual_seed(seed))
    for _ in train(model, optimizer, F.cross_entropy, batches):
        scheduler.step()
    return model.eval()


def _epochs(inputs: Tensor, labels: Tensor, epochs: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield full minibatches; every example is in at most one of an epoch."""
    num_batches = len(inputs) // _BATCH_SIZE
    for _ in range(epochs):
        order = torch.randperm(len(inputs), generator=generator)[: num_batches * _BATCH_SIZE]
        for rows in order.view(num_batches, -1):
            yield inputs[rows], labels[rows]


@dataclass(frozen=True)
class _Line:
    """The line between one pair of networks.

    Attributes:
        training: The training loss along it.
        accuracy: The test accuracy of the middle.
        seconds: What the matching took.
    """

    training: Barrier
    accuracy: float
    seconds: float


def _compare(build: Callable[[], nn.Module], *, epochs: int, seeds: tuple[int, int]) -> tuple[dict[str, _Line], float]:
    """The lines of one pair of networks by the way of matching, and the test accuracy of the worse of both."""
    inputs, labels = digits("demo")
    test_inputs, test_labels = digits("test")
    batches = torch.split(inputs, _BATCH_SIZE)

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return F.cross_entropy(model(inputs), labels).item()

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        return float((model(test_inputs).argmax(dim=1) == test_labels).double().mean())

    reference, other = (_train(build, inputs, labels, epochs=epochs, seed=seed) for seed in seeds)
    lines = {}
    for name in _COLOURS:
        moved = copy.deepcopy(other)
        start = time.perf_counter()
        if name != "as trained":
            align(moved, reference, inputs[:2], data=batches if name == "activations matched" else None)
        seconds = time.perf_counter() - start
        training = interpolation_barrier(reference, moved, loss, recalibrate=batches)
        middle = interpolation_barrier(reference, moved, accuracy, num_points=3, recalibrate=batches).losses[1]
        lines[name] = _Line(training, middle, seconds)
    return lines, min(accuracy(reference), accuracy(other))


def plot(lines: dict[str, dict[str, Barrier]], path: str) -> None:
    """Draw the loss along the lines, one panel for each network.

    Args:
        lines: By network, and then by the way of matching.
        path: The picture to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(lines), 3.4), layout="constrained")
    panels = figure.subplots(1, len(lines), squeeze=False)[0]
    for axes, (network, own) in zip(panels, lines.items()):
        for name, line in own.items():
            axes.plot(line.alphas, line.losses, color=_COLOURS[name], linewidth=2, label=name)
        axes.set(title=network, xlabel="place on the line between both networks")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    panels[0].set_ylabel("training loss")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_COLOURS), frameon=False
    )
    figure.savefig(path, dpi=110)


def _rows(network: str, pairs: Sequence[dict[str, _Line]], worse: float) -> list[str]:
    before = statistics.median(own["as trained"].training.barrier for own in pairs)
    rows = []
    for name in _COLOURS:
        own = [pair[name] for pair in pairs]
        barriers = [line.training.barrier for line in own]
        barrier = statistics.median(barriers)
        cells = [
            network,
            name,
            f"{barrier:.4f} ({min(barriers):.4f} to {max(barriers):.4f})",
            "" if name == "as trained" else f"{1.0 - barrier / before:.1%}",
            f"{statistics.median(line.accuracy for line in own):.3f} (ends {worse:.3f})",
            "" if name == "as trained" else f"{statistics.median(line.seconds for line in own):.1f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def main(argv: list[str] | None = None) -> None:
    """Train the pairs, print a Markdown table and draw the picture; medians over pairs, the picture shows the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--picture", default="docs/alignment.png")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("| networks | second network | barrier of the training loss | less by | test accuracy in the middle | s |")
    print("|---|---|---|---|---|---|")
    drawn = {}
    for network, build in NETWORKS.items():
        compared = [
            _compare(build, epochs=arguments.epochs, seeds=(2 * pair, 2 * pair + 1)) for pair in range(arguments.pairs)
        ]
        pairs = [lines for lines, _ in compared]
        for row in _rows(network, pairs, statistics.median(worse for _, worse in compared)):
            print(row, flush=True)
        drawn[network] = {name: line.training for name, line in pairs[0].items()}
    plot(drawn, arguments.picture)


if __name__ == "__main__":
    main()
