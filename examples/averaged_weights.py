"""Averaged weights: an exponential moving average of the parameters, which is what is used in the end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from teleport_optim import LearnedTeleportOptimizer


def main(epochs: int = 5, teleport: bool = False) -> None:
    torch.manual_seed(0)
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    inputs = images.float() / 8 - 1
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    # A teleport moves the parameters to others of the same function; an average of the two need not be that function.
    optimizer = LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=epochs * 24, teleport=teleport)
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(1440).split(60):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
            averaged.update_parameters(model)
        with torch.no_grad():
            outputs = averaged(inputs)
        loss = F.cross_entropy(outputs[:1440], labels[:1440])
        accuracy = (outputs[1440:].argmax(1) == labels[1440:]).float().mean().item()
        print(f"epoch {epoch}  loss {loss:.4f}  accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
