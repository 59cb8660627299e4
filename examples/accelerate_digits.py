"""Hugging Face accelerate, with gradient accumulation and clipping."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from teleport_optim import LearnedTeleportOptimizer


def main(epochs: int = 5, accumulation: int = 2) -> None:
    set_seed(0)
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    inputs = images.float() / 8 - 1
    loader = DataLoader(TensorDataset(inputs[:1440], labels[:1440]), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10))

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model, loader = accelerator.prepare(model, loader)
    # The optimizer is made after the model and the data are prepared: the length of the loader is that of one process.
    num_steps = epochs * -(-len(loader) // accumulation)
    optimizer = accelerator.prepare(LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=num_steps))
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch_inputs, batch_labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(batch_inputs), batch_labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.item()
        with torch.no_grad():
            accuracy = (model(inputs[1440:]).argmax(1) == labels[1440:]).float().mean().item()
        print(f"epoch {epoch}  loss {total / len(loader):.3f}  accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
