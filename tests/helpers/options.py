"""Options of other optimizers, which ours refuses."""

from __future__ import annotations

from typing import Any

UNSUPPORTED: dict[str, Any] = {
    "betas": (0.9, 0.999),
    "momentum": 0.9,
    "dampening": 0.1,
    "nesterov": True,
    "eps": 1e-8,
    "amsgrad": True,
    "fused": True,
    "capturable": True,
    "differentiable": True,
}
