"""The optimizer for training loops."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils._pytree import tree_map_only

from teleport_optim.checkpoints import load_checkpoint
from teleport_optim.layout import Layout, embedding_names
from teleport_optim.meta_optimizer import MetaOptimizer
from teleport_optim.symmetry import Inputs, find_symmetries
from teleport_optim.symmetry.inputs import ExampleInputs
from teleport_optim.symmetry.spec import SymmetrySpec
from teleport_optim.update import Hyper, UpdateState, update

__all__ = ["LearnedTeleportOptimizer"]

_SHARED = "meta_optimizer"
"""Key of ``state`` under which lies what is kept for all tensors together. Values under a string key are not cast to
the dtype of a parameter when a state dict is loaded."""


class LearnedTeleportOptimizer(Optimizer):
    r"""A learned optimizer that needs no tuning and moves along the model's symmetries.

    Every step, with :math:`c = 1/\sqrt{\text{columns}}` for matrices and :math:`1/4` for vectors:

    .. math::
        \begin{aligned}
        &\text{every 5 steps: } (\rho, \beta, w, \omega, \tau), h \leftarrow \mathrm{LSTM}(\text{features}, h) \\
        &\text{every 10 steps: } \theta \leftarrow s \cdot \theta, \quad (g, m) \leftarrow s^{-1} \cdot (g, m),
            \quad \log s = \tau \tfrac14 \log(\text{read} / \text{written}) \\
        &m \leftarrow \beta m + (1 - \beta) g, \quad u = \beta m + (1 - \beta) g \\
        &d = \mathrm{unit}(\mathrm{rows}(\mathrm{orthogonalise}(u)) + w\, \mathrm{rows}(u))
            \text{ for matrices, } \mathrm{unit}(u) \text{ for vectors} \\
        &\theta \leftarrow (1 - \gamma a \rho \omega \lambda)\, \theta - \gamma a \rho\, c\, d
        \end{aligned}

    where :math:`\gamma` is ``lr``, :math:`a` a rate that falls linearly over ``total_steps`` and :math:`\lambda` a decay that
    goes with it. The loss is never needed. See ``teleport_optim.update`` for the rule.

    Args:
        params: Parameters, named parameters or groups, as for every torch optimizer.
        lr: Factor on the learned rate, at least 0. Leave it at 1, or let a scheduler move it.
        weight_decay: Decoupled weight decay per unit of rate, at least 0; None for the learned decay.
        model: The module that owns ``params``. Its symmetries are found when it is first called, and the optimizer teleports
            along those positive scalings whose tensors it manages. Without it the optimizer works and does not teleport.
        total_steps: Number of steps of the run, over which the rate anneals by itself. Without it the run is open-ended.
            Past it the optimizer goes on at the last rate and warns once.
        checkpoint: Name of a shipped checkpoint, a path, or a :class:`~teleport_optim.MetaOptimizer`.
        teleport: Whether to teleport.
        maximize: Climb instead of descending.
        example_inputs: Inputs of ``model`` as :func:`~teleport_optim.find_symmetries` takes them, to find its symmetries at
            once; needed only where a training loop never calls ``model`` itself.

    Raises:
        ValueError: for an empty parameter list, a negative or non-finite hyper-parameter, or parameters that are not in
            ``model``.
        TypeError: if ``model`` is not a module.
        CheckpointError: if the checkpoint cannot be used.

    State: ``exp_avg`` (a covector) and ``step`` per parameter, and about 60 numbers per tensor.

    References: Zamir et al., 2025, arXiv 2504.15399 (learned teleportation); Jordan et al., 2024 (Muon).

    Example:
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
        example_inputs: ExampleInputs | None = None,
    ) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(checkpoint, MetaOptimizer):
            self._meta_optimizer = copy.deepcopy(checkpoint)
        else:
            self._meta_optimizer = load_checkpoint(checkpoint)
        self._tensor_names: dict[Tensor, str] = (
            {} if model is None else {p: name for name, p in model.named_parameters()}
        )
        self._model_name = type(model).__name__
        self._names: list[str] = []
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._has_warned = False
        self._spec = SymmetrySpec()
        self._first_call: _FirstCall | None = None
        self._embeddings: frozenset[str] = frozenset()
        defaults = {"lr": lr, "weight_decay": weight_decay, "total_steps": total_steps, "maximize": maximize}
        super().__init__(params, defaults)
        if model is not None:
            self._embeddings = embedding_names(model)
            if teleport and example_inputs is not None:
                self._spec = self._managed(
                    find_symmetries(model, example_inputs, groups=["scaling"]), model, stacklevel=3
                )
            elif teleport:
                self._first_call = _FirstCall(model)

    @classmethod
    def for_model(cls, model: nn.Module, **options: Any) -> Self:
        """The optimizer of all parameters of ``model``; ``options`` are those of the class.

        Example:
            >>> optimizer = LearnedTeleportOptimizer.for_model(nn.Linear(2, 1), total_steps=10)
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        return cls(model.parameters(), model=model, **options)

    @property
    def spec(self) -> SymmetrySpec:
        """The positive scalings along which the optimizer may teleport; none before the first step, unless inputs were given."""
        return self._spec

    @property
    def teleport_size(self) -> float:
        """RMS over channels of the log-scale by which the last step teleported; 0 if it did not."""
        shared = self.state.get(_SHARED)  # type: ignore[call-overload]
        return float(shared["teleport_size"]) if shared else 0.0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have its own ``lr``, ``weight_decay`` and ``maximize``.

        Raises:
            ValueError: for bad hyper-parameters, or parameters that are not in the model.
        """
        checked = {**self.defaults, **param_group}
        _check_hyper_parameters(checked)
        if self.param_groups and checked["total_steps"] != self.param_groups[0]["total_steps"]:
            raise ValueError(
                f"total_steps is one number for the whole run: got {checked['total_steps']} beside "
                f"{self.param_groups[0]['total_steps']}"
            )
        previous = len(self.param_groups)
        super().add_param_group(param_group)
        names: list[str] = []
        for param in self.param_groups[-1]["params"]:
            if self._tensor_names and param not in self._tensor_names:
                del self.param_groups[previous:]
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} is not in the model ({self._model_name}): pass the model "
                    "that owns all parameters, or no model"
                )
            names.append(self._tensor_names.get(param, str(len(self._names) + len(names))))
        self._names += names

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: Evaluates the model again and returns the loss; not needed.

        Raises:
            RuntimeError: for sparse or complex gradients; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [
            (row, param, group)
            for row, (param, group) in enumerate((p, group) for group in self.param_groups for p in group["params"])
            if param.grad is not None
        ]
        for row, param, _ in active:
            _check_gradient(self._names[row], param)
        if active:
            self._learn_symmetries()
            self._step(active)
        return loss

    def _learn_symmetries(self) -> None:
        """Find the symmetries of the model with the inputs of its first call, once it has been called."""
        call = self._first_call
        if call is None:
            return
        if call.inputs is None:
            if not call.has_warned:
                call.has_warned = True
                warnings.warn(
                    f"no teleports yet: the model ({self._model_name}) has not been called since the optimizer was made, so "
                    "that the shapes of its inputs are not known. Pass example_inputs, or teleport=False",
                    stacklevel=5,
                )
            return
        self._first_call = None
        try:
            self._spec = self._managed(
                find_symmetries(call.model, call.inputs, groups=["scaling"]), call.model, stacklevel=6
            )
        except ValueError as error:
            warnings.warn(f"no teleports: {error}", stacklevel=5)
        self._layouts = {}

    def _step(self, active: list[tuple[int, nn.Parameter, dict[str, Any]]]) -> None:
        rows = [row for row, _, _ in active]
        names = [self._names[row] for row in rows]
        params: dict[str, Tensor] = {name: param.detach() for name, (_, param, _) in zip(names, active)}
        grads = {name: _gradient(param, group["maximize"]) for name, (_, param, group) in zip(names, active)}
        shared = self._shared_state(active[0][1].device)
        for _, param, _ in active:
            if not self.state[param]:
                self.state[param]["step"] = torch.zeros(())
                self.state[param]["exp_avg"] = torch.zeros_like(param)
        momenta = {name: self.state[param]["exp_avg"] for name, (_, param, _) in zip(names, active)}
        own_rows = {key: shared[key][rows] for key in _ROW_KEYS}
        state = UpdateState(momenta=momenta, teleport_size=shared["teleport_size"], **own_rows)
        step = int(shared["step"])
        new_params, new_state = update(
            self._meta_optimizer,
            params,
            grads,
            state,
            step=step,
            hyper=self._hyper([group for _, _, group in active], step),
            layout=self._layout(params),
        )
        torch._foreach_copy_(list(params.values()), [new_params[name] for name in names])
        torch._foreach_copy_(list(momenta.values()), [new_state.momenta[name] for name in names])
        torch._foreach_add_([self.state[param]["step"] for _, param, _ in active], 1.0)
        for key in _ROW_KEYS:
            shared[key][rows] = getattr(new_state, key)
        shared["teleport_size"].copy_(new_state.teleport_size)
        shared["step"].add_(1.0)

    def _shared_state(self, device: torch.device) -> dict[str, Tensor]:
        """What is kept for all tensors together, with a row for every parameter of every group."""
        shared = self.state[_SHARED]  # type: ignore[index]
        if self._meta_optimizer.bias.device != device:
            self._meta_optimizer.to(device)
        if shared and len(shared["hidden"]) == len(self._names) and shared["hidden"].device == device:
            return shared  # type: ignore[no-any-return]
        hidden = self._meta_optimizer.initial_hidden(len(self._names))
        initial = UpdateState.initial({name: torch.zeros(()) for name in self._names}, hidden)
        if not shared:
            shared.update({key: getattr(initial, key) for key in (*_ROW_KEYS, "teleport_size")}, step=torch.zeros(()))
        for key in _ROW_KEYS:
            known = len(shared[key])
            shared[key] = torch.cat([shared[key].to(device), getattr(initial, key)[known:]])
        shared["teleport_size"] = shared["teleport_size"].to(device)
        return shared  # type: ignore[no-any-return]

    def _hyper(self, groups: list[dict[str, Any]], step: int) -> Hyper:
        total_steps = self.param_groups[0]["total_steps"]
        if total_steps is not None and step >= total_steps and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"step {step + 1} lies past total_steps={total_steps}: going on at the last rate. Give the length of the "
                "whole run, or leave total_steps out.",
                stacklevel=5,
            )
        decays = [math.nan if group["weight_decay"] is None else float(group["weight_decay"]) for group in groups]
        return Hyper(torch.tensor([float(group["lr"]) for group in groups]), torch.tensor(decays), total_steps)

    def _layout(self, params: dict[str, Tensor]) -> Layout:
        key = tuple(params)
        if key not in self._layouts:
            self._layouts = {key: Layout.of(params, self._spec, self._embeddings)}
        return self._layouts[key]

    def _managed(self, spec: SymmetrySpec, model: nn.Module, *, stacklevel: int) -> SymmetrySpec:
        """The exact scalings of ``spec`` whose tensors are all parameters of this optimizer, under its names for them."""
        managed = set(self._names)
        names = {name: self._tensor_names[p] for name, p in model.named_parameters(remove_duplicate=False)}
        scalings = []
        for symmetry in spec:
            legs = dict.fromkeys(replace(leg, name=names.get(leg.name, leg.name)) for leg in symmetry.legs)
            scalings.append(replace(symmetry, legs=tuple(legs)))
        outside = sorted({leg.name for s in scalings for leg in s.legs} - managed)
        if outside:
            warnings.warn(
                f"no teleports where {', '.join(outside)} take part: these tensors are not among the parameters of the "
                "optimizer",
                stacklevel=stacklevel,
            )
        return SymmetrySpec(tuple(s for s in scalings if all(leg.name in managed for leg in s.legs)), spec.refusals)

    def __getstate__(self) -> dict[str, Any]:
        own = {key: value for key, value in self.__dict__.items() if key in _OWN_ATTRIBUTES}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        for owner, slots in list(self.state.items()):  # what is loaded may be in use elsewhere
            self.state[owner] = {key: value.clone() for key, value in slots.items()}


class _FirstCall:
    """Waits for the first call of a model and keeps the shapes of its inputs; it leaves no trace in the model.

    Attributes:
        model: The model.
        inputs: Its inputs, without data; None before the call.
        has_warned: Whether the user has been told that it has not been called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inputs: Inputs | None = None
        self.has_warned = False
        self._wait()

    def _wait(self) -> None:
        waiting = weakref.ref(self)  # an optimizer that is dropped must not be kept alive by torch

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            first_call = waiting()
            if first_call is None or module is first_call.model:
                handle.remove()
            if first_call is not None and module is first_call.model:
                inputs = Inputs(args, kwargs)
                first_call.inputs = tree_map_only(
                    Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), inputs
                )

        hook = torch.compiler.disable(keep)  # type: ignore[no-untyped-call]
        handle = register_module_forward_hook(hook, with_kwargs=True)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "inputs": self.inputs, "has_warned": self.has_warned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.inputs is None:
            self._wait()


_ROW_KEYS = ("hidden", "outputs", "log_grad_rms")
"""The fields of UpdateState that hold one row per tensor, in their order there."""
_OWN_ATTRIBUTES = frozenset(
    (
        "_meta_optimizer",
        "_tensor_names",
        "_model_name",
        "_names",
        "_layouts",
        "_has_warned",
        "_spec",
        "_embeddings",
        "_first_call",
    )
)


def _check_hyper_parameters(group: dict[str, Any]) -> None:
    lr, weight_decay, total_steps = group["lr"], group["weight_decay"], group["total_steps"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Invalid learning rate: a tensor lr must have one element, got shape {tuple(lr.shape)}")
    if not (float(lr) >= 0.0 and math.isfinite(float(lr))):
        raise ValueError(
            f"Invalid learning rate: {lr}: it multiplies the learned rate and must be finite and at least 0"
        )
    if weight_decay is not None and not (weight_decay >= 0.0 and math.isfinite(weight_decay)):
        raise ValueError(f"Invalid weight_decay value: {weight_decay}: it must be finite and at least 0, or None")
    if total_steps is not None and (
        isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1
    ):
        raise ValueError(f"Invalid total_steps value: {total_steps}: it must be an integer of at least 1, or None")


def _gradient(param: nn.Parameter, maximize: bool) -> Tensor:
    assert param.grad is not None
    return -param.grad if maximize else param.grad


def _check_gradient(name: str, param: nn.Parameter) -> None:
    assert param.grad is not None
    if param.grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of parameter {name} is sparse, which LearnedTeleportOptimizer does not support: make it dense "
            "(nn.Embedding(..., sparse=False)) or give that parameter to torch.optim.SparseAdam"
        )
    if param.grad.is_complex():
        raise RuntimeError(
            f"the gradient of parameter {name} is complex, which LearnedTeleportOptimizer does not support: keep real and "
            "imaginary parts as two real parameters"
        )
