"""Milliseconds of an optimizer step, and bytes of state, beside AdamW; the optimizers take turns step by step.

python -m benchmarks.step_cost [--steps 30] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.demo import make_network

__all__ = ["main", "state_bytes"]


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    model: nn.Module = resnet18()
    return model


def _optimizers(model: nn.Module) -> dict[str, Optimizer]:
    def copies() -> list[nn.Parameter]:
        return [nn.Parameter(param.detach().clone()) for param in model.parameters()]

    return {
        "AdamW fused": AdamW(copies(), fused=True),
        "AdamW default": AdamW(copies()),
        "ours": LearnedTeleportOptimizer(copies()),
    }


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state."""
    return sum(
        value.numel() * value.element_size()
        for slots in optimizer.state.values()
        for value in slots.values()
        if isinstance(value, torch.Tensor)
    )


def main(argv: list[str] | None = None) -> None:
    """Time the steps and print a Markdown table of medians; ratios are to fused AdamW in the same run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    print("| parameters of | optimizer | ms per step | ratio to AdamW fused | bytes of state per parameter |")
    print("|---|---|---|---|---|")
    for name, model in (("perceptron 64-128-96-128-10", make_network(0)), ("ResNet-18", _resnet18())):
        optimizers = _optimizers(model)
        seconds: dict[str, list[float]] = {key: [] for key in optimizers}
        for step in range(arguments.steps + 2):
            for key, optimizer in optimizers.items():
                for group in optimizer.param_groups:
                    for param in group["params"]:
                        param.grad = torch.randn_like(param)
                start = time.perf_counter()
                optimizer.step()
                if step >= 2:
                    seconds[key].append(time.perf_counter() - start)
        fused = statistics.median(seconds["AdamW fused"])
        num_parameters = sum(param.numel() for param in model.parameters())
        for key, times in seconds.items():
            median = statistics.median(times)
            ratio, size = median / fused, state_bytes(optimizers[key]) / num_parameters
            print(f"| {name} | {key} | {1e3 * median:.2f} | {ratio:.1f} | {size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
