"""Mixed precision: autocast and a gradient scaler. The parameters, and with them the optimizer, stay in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from teleport_optim import LearnedTeleportOptimizer


def main(epochs: int = 5, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> None:
    torch.manual_seed(0)
    images, labels = (torch.tensor(values, device=device) for values in load_digits(return_X_y=True))
    inputs = images.float() / 8 - 1
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    optimizer = LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=epochs * 24)
    scaler = torch.amp.GradScaler(device)  # float16 needs it; bfloat16 does without
    for epoch in range(1, epochs + 1):
        total = 0.0
        for rows in torch.randperm(1440, device=device).split(60):
            optimizer.zero_grad()
            with torch.autocast(device, dtype):
                loss = F.cross_entropy(model(inputs[rows]), labels[rows])
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            total += loss.item() / 24
        with torch.no_grad():
            accuracy = (model(inputs[1440:]).argmax(1) == labels[1440:]).float().mean().item()
        print(f"epoch {epoch}  loss {total:.3f}  accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
