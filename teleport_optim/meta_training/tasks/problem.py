"""Inner problems: batches of small networks of one architecture, to be trained side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from teleport_optim.optim.parameters import ParameterTable
from teleport_optim.optim.shapes import Depth, embedding_names
from teleport_optim.symmetry import SymmetrySpec, find_symmetries

__all__ = ["WORST", "InnerProblem", "Loss", "SampleBatch", "Task", "bounded", "log_relative"]

WORST = 3.0
"""The meta-loss of a step at which a run has diverged; no step has a higher one."""

_FLOOR = 1e-4

Loss = Callable[[Tensor, Tensor], Tensor]
"""Output and target of one network to a scalar."""
SampleBatch = Callable[[torch.Generator], tuple[Tensor, Tensor]]
"""Draws inputs and targets of a minibatch for all problems."""


def log_relative(losses: Tensor, initial: Tensor) -> Tensor:
    """Log of the loss relative to the first one, so that the scale of the loss does not matter: the usual normaliser.

    A small floor keeps perfectly fitted problems from dominating. Losses that are not finite give ``WORST``.

    Args:
        losses: ``[..., steps]``, positive.
        initial: ``[..., 1]``, positive.

    Returns:
        Of the shape of ``losses``, from ``log(1e-4)`` to ``WORST``.
    """
    return bounded(torch.log(torch.clamp(losses / initial, 0.0, 1e6) + _FLOOR))


def bounded(meta_losses: Tensor) -> Tensor:
    """``meta_losses`` with ``WORST`` as their upper bound and in place of what is not finite."""
    return torch.where(torch.isfinite(meta_losses), meta_losses, WORST).clamp(max=WORST)


@dataclass(frozen=True)
class InnerProblem:
    """``num_problems`` optimization problems that differ in data and initial values and share an architecture.

    Attributes:
        model: The architecture; its own values are not used.
        params: Initial parameters by name, each ``[num_problems, ...]``.
        loss: Output and target of one problem's minibatch to a scalar loss.
        sample_batch: Draws inputs and targets for all problems, each ``[num_problems, batch, ...]``.
        horizon: Number of steps of the training run.
        knows_horizon: Whether the optimizer is told the horizon.
        description: What was drawn, for logs.
        architecture: Equal for equal architectures; those of different splits are disjoint.
        normalise: Losses ``[..., steps]`` and first losses ``[..., 1]`` to meta-losses per step that are comparable between
            tasks, lower being better, at most ``WORST``.
        symmetries: The positive scalings of ``model``; found when they are needed if they are not given.

    Raises:
        ValueError: if the model keeps running statistics, which batches of runs cannot update.

    Example:
        >>> models = [nn.Linear(2, 1) for _ in range(3)]
        >>> def sample_batch(generator):
        ...     inputs = torch.randn(3, 8, 2, generator=generator)
        ...     return inputs, inputs.sum(dim=-1, keepdim=True)
        >>> problem = InnerProblem.of(models, nn.functional.mse_loss, sample_batch, horizon=20)
        >>> problem.num_problems, problem.params["weight"].shape
        (3, torch.Size([3, 1, 2]))
    """

    model: nn.Module
    params: dict[str, Tensor]
    loss: Loss
    sample_batch: SampleBatch
    horizon: int
    description: str
    architecture: str
    normalise: Callable[[Tensor, Tensor], Tensor] = log_relative
    symmetries: SymmetrySpec | None = None
    knows_horizon: bool = True

    def __post_init__(self) -> None:
        for name, module in self.model.named_modules():
            if getattr(module, "track_running_stats", False):
                raise ValueError(
                    f"{name or 'the model'} is a {type(module).__name__} that keeps running statistics, which many runs "
                    f"at once cannot update: give it track_running_stats=False"
                )

    @classmethod
    def of(
        cls,
        models: Sequence[nn.Module],
        loss: Loss,
        sample_batch: SampleBatch,
        horizon: int,
        **details: Any,
    ) -> InnerProblem:
        """The problem of training ``models``, which share an architecture, from the values that they have.

        Args:
            models: One model for each problem.
            loss: As the attribute.
            sample_batch: As the attribute; ``num_problems`` is the number of models.
            horizon: As the attribute.
            details: Other attributes; ``description`` and ``architecture`` default to the text of the model.
        """
        params = {name: value.detach() for name, value in stack_module_state(list(models))[0].items()}
        text = str(models[0])
        return cls(
            models[0], params, loss, sample_batch, horizon, **{"description": text, "architecture": text, **details}
        )

    @property
    def num_problems(self) -> int:
        """Number of problems in the batch."""
        return next(iter(self.params.values())).shape[0]

    @cached_property
    def table(self) -> ParameterTable:
        """Shapes and symmetries of one problem's parameters."""
        tensors = {name: param[0] for name, param in self.params.items()}
        spec = self.symmetries
        if spec is None:
            inputs, _ = self.sample_batch(torch.Generator().manual_seed(0))
            spec = find_symmetries(self.model, inputs[0], groups=["scaling"])
        embeddings = embedding_names(self.model)
        depth = Depth.of({name: tensor.shape for name, tensor in tensors.items()}, embeddings, is_whole=True)
        return ParameterTable.of(tensors, spec, embeddings, depth=depth)

    def to(self, device: torch.device | str) -> Self:
        """The same problem on another device; minibatches are drawn on the CPU, so that they are the same everywhere."""
        if torch.device(device) == torch.device("cpu"):
            return self

        def sample_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            inputs, targets = self.sample_batch(generator)
            return inputs.to(device), targets.to(device)

        return replace(
            self,
            model=self.model.to(device),
            params={name: param.to(device) for name, param in self.params.items()},
            sample_batch=sample_batch,
        )

    def losses(self, params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """The minibatch losses ``[runs]`` of many runs at once; every argument has a first axis of runs."""

        def loss_of(run_params: dict[str, Tensor], run_inputs: Tensor, run_targets: Tensor) -> Tensor:
            return self.loss(functional_call(self.model, run_params, (run_inputs,)), run_targets)

        return vmap(loss_of)(params, inputs, targets)

    def gradients(
        self, params: dict[str, Tensor], inputs: Tensor, targets: Tensor, *, create_graph: bool = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of many runs at once, and their losses ``[runs]``.

        Args:
            params: Parameters by name, each ``[runs, ...]``.
            inputs: ``[runs, batch, ...]``.
            targets: ``[runs, batch, ...]``.
            create_graph: Keep the graph, so that the gradients can be differentiated again.
        """
        with torch.enable_grad():
            leaves = {
                name: param if create_graph and param.requires_grad else param.detach().requires_grad_()
                for name, param in params.items()
            }
            losses = self.losses(leaves, inputs, targets)
            grads = torch.autograd.grad(losses.sum(), list(leaves.values()), create_graph=create_graph)
        return dict(zip(leaves, grads)), losses if create_graph else losses.detach()


class Task(ABC):
    """Family of inner problems, with a sampler over its own variety.

    A task is a class that is made without arguments and has no state; everything that it draws comes from the generator
    it is given. docs/own_task.md writes one.

    Example:
        >>> from teleport_optim.meta_training import find_task
        >>> task = find_task("teacher_regression")
        >>> task.sample(2, (10, 10), "train", torch.Generator().manual_seed(0)).num_problems
        2
    """

    name: ClassVar[str]
    share: ClassVar[float] = 1.0
    """Relative frequency with which meta-training draws the task."""

    @abstractmethod
    def sample(
        self, num_problems: int, horizons: tuple[int, int], split: str, generator: torch.Generator
    ) -> InnerProblem:
        """Draw an architecture, ``num_problems`` data sets and initialisations, and a horizon.

        Args:
            num_problems: Problems in the batch.
            horizons: Shortest and longest horizon.
            split: ``"train"`` for meta-training, ``"validation"`` for choosing a checkpoint, ``"test"`` for reports. What
                is drawn for one must have neither data nor architectures in common with what is drawn for another.
            generator: Draws everything.
        """
