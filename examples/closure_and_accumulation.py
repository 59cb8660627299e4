"""A plain loop with a closure that accumulates the gradients of small batches and clips the sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from teleport_optim import LearnedTeleportOptimizer


def main(epochs: int = 5, accumulation: int = 3) -> None:
    torch.manual_seed(0)
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    inputs = images.float() / 8 - 1
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=epochs * 24)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch in torch.randperm(1440).split(60):

            def closure(batch: torch.Tensor = batch) -> float:
                optimizer.zero_grad()
                loss = 0.0
                for rows in batch.chunk(accumulation):
                    part = F.cross_entropy(model(inputs[rows]), labels[rows]) / accumulation
                    part.backward()
                    loss += part.item()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                return loss

            total += optimizer.step(closure) / 24
        with torch.no_grad():
            accuracy = (model(inputs[1440:]).argmax(1) == labels[1440:]).float().mean().item()
        print(f"epoch {epoch}  loss {total:.3f}  accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
