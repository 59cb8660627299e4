"""Runs whose average is looked at."""

from __future__ import annotations

from torch import nn

from teleport_optim import LearnedTeleportOptimizer
from tests.helpers.classification import network, train
from tests.helpers.comparing import Weights, weights_of


def trained(num_steps: int = 12, **options: object) -> tuple[nn.Sequential, LearnedTeleportOptimizer]:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, **options)
    train(model, optimizer, num_steps)
    return model, optimizer


def seen(optimizer: LearnedTeleportOptimizer, model: nn.Module) -> Weights:
    with optimizer.averaged():
        return weights_of(model)
