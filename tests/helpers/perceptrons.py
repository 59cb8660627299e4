"""Perceptrons in double precision, their gradients, and meta-optimizers of random weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import stack_module_state

from teleport_optim import find_symmetries
from teleport_optim.optim.orthogonalise import Mixing, Step, column_scales, row_mixers
from teleport_optim.optim.parameters import ParameterTable


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perceptron(*widths: int, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for num_inputs, num_outputs in pairwise(widths):
            layers += [nn.Linear(num_inputs, num_outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1]).double()


def perceptron_of(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    return perceptron(*widths, seed=seed)


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def loss_and_grads(
    model: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor
) -> tuple[float, dict[str, Tensor]]:
    leaves = {name: param.clone().requires_grad_() for name, param in params.items()}
    loss = F.mse_loss(torch.func.functional_call(model, leaves, (x,)), y)
    return loss.item(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))


def mixed(blocks: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Steps of blocks of rows ``[..., blocks, k, columns]``; lengths are 1 by default."""
    lengths = torch.ones(blocks.shape[:-2]) if lengths is None else lengths
    scales = column_scales(blocks)
    gram = (scales * blocks) @ (scales * blocks).mT
    return Step(blocks, lengths, Mixing(scales, row_mixers(gram))).product()


def stacked_runs(
    make: Callable[[int], nn.Module], inputs: Tensor, num_runs: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], ParameterTable]:
    """Parameters and made-up gradients of several networks of one architecture, and its table."""
    models = [make(seed + run) for run in range(num_runs)]
    params = {name: value.detach() for name, value in stack_module_state(models)[0].items()}
    grads = {name: torch.randn(v.shape, generator=generator(seed), dtype=v.dtype) for name, v in params.items()}
    return params, grads, ParameterTable.of(named(models[0]), find_symmetries(models[0], inputs))
