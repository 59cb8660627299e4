"""torch.compile: the model is compiled, the optimizer is given the model as it was."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from teleport_optim import LearnedTeleportOptimizer


def main(epochs: int = 5, backend: str = "inductor") -> None:
    """``backend`` is torch's default, which needs a C++ compiler; without one, "aot_eager" does."""
    torch.manual_seed(0)
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    inputs = images.float() / 8 - 1
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10))
    compiled = torch.compile(model, backend=backend)
    optimizer = LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=epochs * 24)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for rows in torch.randperm(1440).split(60):
            optimizer.zero_grad()
            loss = F.cross_entropy(compiled(inputs[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() / 24
        with torch.no_grad():
            accuracy = (model(inputs[1440:]).argmax(1) == labels[1440:]).float().mean().item()
        print(f"epoch {epoch}  loss {total:.3f}  accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
