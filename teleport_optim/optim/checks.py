"""Checks of what a user passes: options of groups, parameters, gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from teleport_optim.optim.averaging import (
    can_be_averaged,
)

__all__ = ["check_gradients", "check_group", "check_parameter"]


_UNSUPPORTED = {
    "betas": "momentum is learned",
    "momentum": "momentum is learned",
    "dampening": "momentum is learned",
    "nesterov": "momentum is learned",
    "eps": "directions are normalised",
    "amsgrad": "there is no second moment",
    "fused": "there is no fused kernel; torch.compile(optimizer.step) is supported",
    "capturable": "a step cannot be captured in a CUDA graph",
    "differentiable": "use teleport_optim.update, which is pure and differentiable",
}
"""Options of torch's optimizers that would have no effect here, and why."""


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` or ``TypeError`` for options of a group that are bad or would be ignored."""
    for key, reason in _UNSUPPORTED.items():
        if group.get(key):
            raise ValueError(f"LearnedTeleportOptimizer has no {key} (got {group[key]!r}): {reason}")
    lr, weight_decay, total_steps = group["lr"], group["weight_decay"], group["total_steps"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Invalid learning rate: a tensor lr must have one element, got shape {tuple(lr.shape)}")
    for key in ("lr", "weight_decay"):
        if isinstance(group[key], bool) or not isinstance(group[key], int | float | Tensor | None):
            raise TypeError(f"{key} must be a number, got {group[key]!r}")
    if not (float(lr) >= 0.0 and math.isfinite(float(lr))):
        raise ValueError(
            f"Invalid learning rate: {lr}: it multiplies the learned rate and must be finite and at least 0"
        )
    if weight_decay is not None and not (float(weight_decay) >= 0.0 and math.isfinite(float(weight_decay))):
        raise ValueError(f"Invalid weight_decay value: {weight_decay}: it must be finite and at least 0, or None")
    if total_steps is not None and (
        isinstance(total_steps, bool) or not isinstance(total_steps, int) or not 1 <= total_steps <= 2**53
    ):
        raise ValueError(f"Invalid total_steps value: {total_steps}: it must be an integer from 1 to 2**53, or None")
    if not isinstance(group["maximize"], bool):
        raise TypeError(f"maximize must be True or False, got {group['maximize']!r}")


def check_parameter(param: Tensor, average: bool) -> None:
    """Raise ``ValueError`` for a tensor that can never be optimized here, or of which no average can be kept."""
    if isinstance(param, UninitializedParameter):
        return
    reason = ""
    if param.is_meta:
        reason = "is on the meta device: give it data first (module.to_empty(device=...), then initialise or load it)"
    elif param.is_quantized:
        reason = "is quantised: optimize the float weights, then quantise"
    elif getattr(param, "_fsdp_flattened", False):
        reason = (
            "is a flattened shard of FullyShardedDataParallel, whose layers cannot be seen: use "
            "torch.distributed.fsdp.fully_shard"
        )
    elif average and not can_be_averaged(param):
        reason = (
            f"is {param.layout}, {param.dtype}: no average of such iterates can be kept. Use average=False, or dense parameters of "
            "16, 32 or 64 bits"
        )
    if reason:
        raise ValueError(f"a parameter of shape {tuple(param.shape)} {reason}")


def check_gradients(names: list[str], params: list[Tensor], grads: list[Tensor]) -> None:
    """Raise ``RuntimeError`` for gradients that cannot be used."""
    for name, grad in zip(names, grads):
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of parameter {name} is sparse, which LearnedTeleportOptimizer does not support: make it "
                "dense (nn.Embedding(..., sparse=False)) or give that parameter to torch.optim.SparseAdam"
            )
    devices = {param.device for param in params}
    if len(devices) > 1:
        raise RuntimeError(
            f"parameters lie on several devices ({', '.join(sorted(map(str, devices)))}): make one optimizer for each device"
        )
