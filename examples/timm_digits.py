"""timm: the optimizer under a name in its registry, with its rules for which parameters have weight decay."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry

from teleport_optim import LearnedTeleportOptimizer

default_registry.register(OptimInfo("teleport", LearnedTeleportOptimizer, has_eps=False))


def main(epochs: int = 4, batch_size: int = 60) -> None:
    torch.manual_seed(0)
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    inputs = F.interpolate(images.float().view(-1, 1, 8, 8) / 8 - 1, scale_factor=2)
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    num_steps = epochs * 1440 // batch_size
    # timm gives biases and norms no decay and the matrices the one named here, or 0, instead of the learned one. To keep
    # that, hand over model.parameters() and weight_decay=None.
    optimizer = create_optimizer_v2(model, "teleport", weight_decay=1.0, model=model, total_steps=num_steps)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for rows in torch.randperm(1440).split(batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows) / 1440
        model.eval()
        with torch.no_grad():
            accuracy = (model(inputs[1440:]).argmax(1) == labels[1440:]).float().mean().item()
        model.train()
        print(f"epoch {epoch}  loss {total:.3f}  accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
