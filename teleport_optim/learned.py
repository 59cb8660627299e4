"""The learned optimizer: the update rule with a controller that comes from a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from teleport_optim.controller.checkpoints import load_checkpoint
from teleport_optim.controller.network import MetaOptimizer
from teleport_optim.optim.optimizer import TeleportOptimizer
from teleport_optim.symmetry.inputs import ExampleInputs
from teleport_optim.symmetry.spec import SymmetrySpec

__all__ = ["LearnedTeleportOptimizer"]


class LearnedTeleportOptimizer(TeleportOptimizer):
    r"""A learned optimizer that needs no tuning and moves along the model's symmetries.

    Every step, with :math:`c = 1` for matrices and :math:`\sqrt{\text{entries}}/6` for vectors:

    .. math::
        \begin{aligned}
        &\text{at steps 0, 80, 160, 320, ...: } (\rho, \beta, \omega, \tau), h \leftarrow \mathrm{LSTM}(\text{features}, h) \\
        &\text{and } \theta \leftarrow s \cdot \theta, \quad (g, m) \leftarrow s^{-1} \cdot (g, m),
            \quad \log s = \tau \tfrac14 \log(\text{read} / \text{written}) \\
        &m \leftarrow \beta m + (1 - \beta) g \\
        &d = \text{rows of } m \text{, their columns rescaled, orthogonalised 64 at a time, of unit norm, for matrices, }
            m / \lVert m \rVert \text{ for vectors} \\
        &\theta \leftarrow (1 - \gamma a \rho \omega \lambda)\, \theta - \gamma a \rho\, c\, d \\
        &\bar\theta \leftarrow \bar\theta + \tfrac{7}{t + 7} (\theta - \bar\theta)
        \end{aligned}

    where :math:`\gamma` is ``lr``, :math:`a` a rate that falls with the root of time and :math:`\lambda` a decay that goes with
    it. The loss is never needed. See :mod:`teleport_optim.optim.rule` for the rule.

    The parameters are :math:`\theta`, for everybody who looks: training, evaluation, saving, other optimizers. In the last 30 % of
    a run of known length the rate falls to zero, and the parameters end where the average of the iterates :math:`\bar\theta` is.
    In an open-ended run the average is the result: :meth:`eval` puts it in the place of the parameters and :meth:`train` takes it
    out again, ``with optimizer.averaged():`` does both, and :meth:`averaged_parameters` gives it as tensors.

    Args:
        params: Parameters, named parameters or groups, as for every torch optimizer.
        lr: Factor on the learned rate, at least 0. Leave it at 1, or let a scheduler move it.
        weight_decay: Decoupled weight decay per unit of rate, at least 0; None for the learned decay.
        model: The module that owns ``params``. Its symmetries are found when it is first called, and the optimizer teleports
            along those positive scalings whose tensors it manages. Without it the optimizer works and does not teleport.
        total_steps: Number of steps of the run, in the last 30 % of which the rate falls to zero. Without it the run is
            open-ended, and its average as good. Past it the optimizer goes on at the last rate and warns once. It can be changed
            while the run goes on: :meth:`set_total_steps`, :meth:`finish_in`.
        checkpoint: Name of a shipped checkpoint, a path, or a :class:`~teleport_optim.MetaOptimizer`.
        teleport: Whether to teleport.
        maximize: Climb instead of descending.
        foreach: Taken for the sake of loops that pass it; tensors of one shape always go together.
        average: Keep an average of the iterates. Without it, state is 2 bytes per parameter less, and a run should have
            ``total_steps``.
        example_inputs: Inputs of ``model`` as :func:`~teleport_optim.find_symmetries` takes them, to find its symmetries at
            once; needed only where a training loop never calls ``model`` itself.
        symmetries: The symmetries of ``model`` where they were found beforehand, as before ``fully_shard``.

    Raises:
        ValueError: for an empty parameter list, a negative or non-finite hyper-parameter, options of other optimizers that
            would have no effect, or parameters that are not in ``model``, have no data, are shards that cannot be put together or
            are of a dtype of which no average can be kept.
        TypeError: if ``model`` is not a module.
        CheckpointError: if the checkpoint cannot be used.

    State: ``exp_avg`` (a covector) and ``average_offset`` (a vector: the average of the iterates minus the parameter) per
    parameter, both in bfloat16, and about 40 numbers per tensor. In evaluation mode the parameters, too.

    Who writes into parameters between steps (masks, clipping, loading) is noticed, and the average of such a tensor begins again at
    what was written.

    A step whose gradients are not all finite is skipped, counted in :meth:`stats` and warned about once.

    References: Zamir et al., 2025, arXiv 2504.15399 (learned teleportation); Jordan et al., 2024 (Muon).

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
        >>> optimizer = LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=100)
        >>> x = torch.randn(32, 4)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        >>> bool(loss < 0.1)
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        weight_decay: float | None = None,
        *,
        model: nn.Module | None = None,
        total_steps: int | None = None,
        checkpoint: str | Path | MetaOptimizer = "default",
        teleport: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        average: bool = True,
        example_inputs: ExampleInputs | None = None,
        symmetries: SymmetrySpec | None = None,
    ) -> None:
        controller = copy.deepcopy(checkpoint) if isinstance(checkpoint, MetaOptimizer) else load_checkpoint(checkpoint)
        super().__init__(
            params,
            lr,
            weight_decay,
            controller=controller,
            model=model,
            total_steps=total_steps,
            teleport=teleport,
            maximize=maximize,
            foreach=foreach,
            average=average,
            example_inputs=example_inputs,
            symmetries=symmetries,
        )

    @classmethod
    def for_model(cls, model: nn.Module, **options: Any) -> Self:
        """The optimizer of all parameters of ``model``; ``options`` are those of the class.

        Example:
            >>> optimizer = LearnedTeleportOptimizer.for_model(nn.Linear(2, 1), total_steps=10)
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        return cls(model.parameters(), model=model, **options)
