"""Milliseconds of an optimizer step, and bytes of state, beside AdamW; the optimizers take turns step by step.

python -m benchmarks.step_cost [--network NAME] [--without OPTIMIZER] [--threads 1] [--plot FILE.png]

The mean over twenty steps (four for large networks, where none of them asks the meta-optimizer) after a first one that is
not counted. Parameters are given without their model, so that nothing teleports. "rows only" is a step that does not
orthogonalise: what ours costs outside the orthogonalisation. The limit is the time
of copying as many bytes as must be read (parameters, gradients, state) and written (parameters, state).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon

from benchmarks.comparison.baselines import fast_products
from teleport_optim import LearnedTeleportOptimizer, MetaOptimizer
from teleport_optim.cli.demo_runs import make_network
from teleport_optim.optim.shapes import matrix_shape

__all__ = ["main", "state_bytes"]

_LARGE = 1_000_000
"""Number of parameters from which on few steps are taken."""


def _torchvision(name: str) -> nn.Module:
    from torchvision import models

    model: nn.Module = getattr(models, name)()
    return model


def perceptron(width: int, depth: int) -> nn.Module:
    """A perceptron with ``depth`` matrices of ``width x width``."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "perceptron 64-128-96-128-10": lambda: make_network(0),
    "resnet18": lambda: _torchvision("resnet18"),
    "resnet50": lambda: _torchvision("resnet50"),
    "vit_b_16": lambda: _torchvision("vit_b_16"),
}


class Stateful(Protocol):
    """An optimizer, as far as it is measured."""

    @property
    def state(self) -> Mapping[Any, Any]:
        """Values that it keeps for every parameter."""
        ...

    def step(self) -> object:
        """Take one step."""
        ...


class _MuonAndAdamW:
    """Muon for matrices, and for kernels as matrices; fused AdamW for the rest."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        shapes = [matrix_shape(param.shape) for param in params]
        self._kernels = [param for param, shape in zip(params, shapes) if shape is not None]
        self._flat = [nn.Parameter(p.detach().reshape(matrix_shape(p.shape) or ())) for p in self._kernels]
        self._muon = Muon(self._flat)
        self._adamw = AdamW([param for param, shape in zip(params, shapes) if shape is None], fused=True)

    @property
    def state(self) -> Mapping[Any, Any]:
        return {**self._muon.state, **self._adamw.state}

    def step(self) -> None:
        for flat, param in zip(self._flat, self._kernels):
            assert param.grad is not None
            flat.grad = param.grad.reshape(flat.shape)
        with fast_products():
            self._muon.step()  # type: ignore[no-untyped-call]
        self._adamw.step()


class _Copy:
    """Copies ten bytes out of ten for every twenty that a step must move: five numbers for each parameter."""

    state: Mapping[Any, Any] = {}

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        num_entries = 5 * sum(param.numel() for param in params) // 2
        self._from, self._to = torch.zeros(num_entries), torch.zeros(num_entries)

    def step(self) -> None:
        self._to.copy_(self._from)


_REFERENCE = "AdamW fused"
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Stateful]] = {
    "memory limit": _Copy,
    _REFERENCE: lambda params: AdamW(params, fused=True),
    "AdamW default": AdamW,
    "Muon + AdamW": _MuonAndAdamW,
    "ours, rows only": lambda params: LearnedTeleportOptimizer(params, checkpoint=MetaOptimizer(block_rows=1)),
    "ours, light": lambda params: LearnedTeleportOptimizer(params, checkpoint="light"),
    "ours": lambda params: LearnedTeleportOptimizer(params, checkpoint=MetaOptimizer()),
}


def state_bytes(optimizer: Stateful) -> int:
    """Bytes of all tensors in the optimizer's state."""
    values = [value for slots in optimizer.state.values() for value in slots.values()]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def measure(model: nn.Module, names: Iterable[str] = OPTIMIZERS) -> dict[str, tuple[float, float]]:
    """Mean milliseconds per step and bytes of state per parameter of every optimizer on the parameters of ``model``."""
    num_parameters = sum(param.numel() for param in model.parameters())
    num_steps = 4 if num_parameters >= _LARGE else 20
    params = {name: [nn.Parameter(p.detach().clone()) for p in model.parameters()] for name in names}
    optimizers = {name: OPTIMIZERS[name](own) for name, own in params.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    grads = [torch.randn_like(param) for param in model.parameters()]
    for step in range(num_steps + 1):
        for name, optimizer in optimizers.items():
            for param, grad in zip(params[name], grads):
                param.grad = grad
            start = time.perf_counter()
            optimizer.step()
            if step:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: (1e3 * statistics.fmean(times), state_bytes(optimizers[name]) / num_parameters)
        for name, times in seconds.items()
    }


def plot_growth(path: Path) -> None:
    """Draw how the cost of ours and of fused AdamW grows with the number of parameters, and with depth at a fixed width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    sizes, depths = figure.subplots(1, 2)
    names = (_REFERENCE, "ours, rows only", "ours")
    for axes, label, models in (
        (sizes, "parameters, four layers", {4 * (w * w + w): perceptron(w, 4) for w in (16, 32, 64, 128, 256, 512)}),
        (depths, "layers of 64 x 64", {depth: perceptron(64, depth) for depth in (1, 2, 4, 8, 16, 32, 64)}),
    ):
        measured = {size: measure(model, names) for size, model in models.items()}
        for name in names:
            axes.loglog(list(measured), [costs[name][0] for costs in measured.values()], marker=".", label=name)
        axes.set(xlabel=label, ylabel="ms per step")
    sizes.legend()
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """Time the steps and print a Markdown table; ratios are to fused AdamW in the same run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", action="append", choices=tuple(NETWORKS), help="only this one; may be repeated")
    parser.add_argument("--without", action="append", choices=sorted(OPTIMIZERS.keys() - {_REFERENCE}), default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="draw how the cost grows instead")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.plot:
        plot_growth(arguments.plot)
        return
    print("| parameters of | optimizer | ms per step | ratio to AdamW fused | bytes of state per parameter |")
    print("|---|---|---|---|---|")
    for network in arguments.network or NETWORKS:
        costs = measure(NETWORKS[network](), [name for name in OPTIMIZERS if name not in arguments.without])
        for name, (milliseconds, size) in costs.items():
            ratio = milliseconds / costs[_REFERENCE][0]
            print(f"| {network} | {name} | {milliseconds:.2f} | {ratio:.1f} | {size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
