"""An optimizer's view of a model: names, depth, first call, and the symmetries along which it may teleport."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from teleport_optim.optim.checks import check_parameter
from teleport_optim.optim.diagnostics import Notices
from teleport_optim.optim.shapes import Depth, as_real, embedding_names, matrix_shape
from teleport_optim.symmetry import find_symmetries
from teleport_optim.symmetry.inputs import ExampleInputs, Inputs, InputWatch
from teleport_optim.symmetry.spec import SymmetrySpec

__all__ = ["Binding", "FirstCall", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel``.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> unwrapped(torch.compile(model)) is model
        True
    """
    inner: object = model
    while isinstance(inner, nn.Module):
        model = inner
        is_replicated = isinstance(model, DistributedDataParallel | DataParallel)
        inner = model.module if is_replicated else getattr(model, "_orig_mod", None)
    return model


class FirstCall:
    """A hook that keeps the shapes of the inputs of a model's first call, and is taken away afterwards.

    Attributes:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._watch = InputWatch()
        self._handle = model.register_forward_pre_hook(self._watch, with_kwargs=True)

    def take(self) -> Inputs | None:
        """The inputs, without data, upon which the waiting ends; None if the model has not been called.

        Raises:
            TypeError: if it was called with a tensor whose shape does not tell what it is.
        """
        inputs = self._watch.inputs
        if inputs is not None:
            self.cancel()
        return inputs

    def cancel(self) -> None:
        """Wait no more."""
        if not self._watch.is_compiled:
            self._handle.remove()


class Binding:
    """Names, depth and symmetries of the model that owns the parameters of an optimizer, or of no model.

    Args:
        model: The model, if the user gave one.
        notices: Where warnings go.

    Attributes:
        names: The first name in the model of every parameter.
        embeddings: Names of the parameters that are embedding tables.
        found: All positive scalings of the model.
        spec: Those of which the optimizer manages all tensors.
    """

    def __init__(self, model: nn.Module | None, notices: Notices) -> None:
        self._notices = notices
        self._model_name = type(model).__name__
        self.names: dict[Tensor, str] = {}
        self._aliases: dict[str, list[str]] = {}
        self.embeddings: frozenset[str] = frozenset()
        self.found = self.spec = SymmetrySpec()
        self._first_call: FirstCall | None = None
        if model is not None:
            self.embeddings = embedding_names(model)
            self.names = {param: name for name, param in model.named_parameters()}
            for name, param in model.named_parameters(remove_duplicate=False):
                self._aliases.setdefault(self.names[param], []).append(name)

    def aliases(self, name: str) -> list[str]:
        """All names of a tensor that is used in several places."""
        return self._aliases.get(name, [name])

    def checked_entry(self, entry: Any, *, average: bool) -> Any:
        """One entry of the parameters of a group, with its name in the model if there is a model.

        Raises:
            ValueError: if the parameter cannot be optimized, or is not in the model.
        """
        param = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
        if not isinstance(param, Tensor):
            return entry
        check_parameter(param, average)
        if not self.names:
            return entry
        if param not in self.names:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is not in the model ({self._model_name}): pass the model "
                "that owns all parameters, or no model"
            )
        return self.names[param], param

    def depth(self, managed: Mapping[str, Tensor]) -> Depth:
        """The depth of the model, or of all managed parameters, whichever of them have a gradient in this step."""
        params = {name: param for param, name in self.names.items()} or managed
        shapes = {name: as_real(p).shape for name, p in params.items() if not isinstance(p, UninitializedParameter)}
        if not self.names and sum(matrix_shape(shape) is not None for shape in shapes.values()) == 1:
            self._notices.warn(
                "an optimizer of a single matrix does not know the depth of the network, with which steps get shorter: it takes "
                "those of a network of one layer. Pass model=, the module that owns the parameters",
                once="depth",
            )
        return Depth.of(shapes, self.embeddings, is_whole=bool(self.names))

    def search(
        self,
        model: nn.Module,
        managed: Iterable[str],
        *,
        example_inputs: ExampleInputs | None,
        symmetries: SymmetrySpec | None,
    ) -> None:
        """Take the symmetries that the user gave, find them with the inputs that the user gave, or wait for a call."""
        if symmetries is not None:
            self._use(symmetries, model, managed)
        elif example_inputs is not None:
            self._use(find_symmetries(model, example_inputs, groups=["scaling"]), model, managed)
        else:
            self._first_call = FirstCall(model)

    def search_after_call(self, managed: Callable[[], list[str]]) -> bool:
        """Find the symmetries with the inputs of the model's first call, once it has been called.

        Whatever goes wrong costs the teleports and a warning, never a step.

        Returns:
            Whether ``spec`` has changed.
        """
        call = self._first_call
        if call is None:
            return False
        names = managed()
        if len(names) < 2:  # A scaling moves two tensors at least.
            self._first_call = None
            call.cancel()
            return False
        try:
            inputs = call.take()
            if inputs is not None:
                self._first_call = None
                self._use(find_symmetries(call.model, inputs, groups=["scaling"]), call.model, names)
                return True
        except Exception as error:  # The search runs code of the model's, which may fail in any way.
            self._first_call = None
            call.cancel()
            self._notices.warn(
                f"no teleports: the search for symmetries failed ({type(error).__name__}: {error}). Training goes on without "
                "them; pass symmetries= that were found beforehand, or teleport=False"
            )
            return True
        self._notices.warn(
            f"no teleports yet: the model ({self._model_name}) has not been called since the optimizer was made, so "
            "that the shapes of its inputs are not known. Pass example_inputs, or teleport=False",
            once="not called",
        )
        return False

    def _use(self, spec: SymmetrySpec, model: nn.Module, managed: Iterable[str]) -> None:
        """Teleport along the scalings of ``spec``, under the first name of every tensor."""
        names = {name: self.names[param] for name, param in model.named_parameters(remove_duplicate=False)}
        scalings = []
        for symmetry in spec.of_group("scaling"):
            legs = dict.fromkeys(replace(leg, name=names.get(leg.name, leg.name)) for leg in symmetry.legs)
            scalings.append(replace(symmetry, legs=tuple(legs)))
        self.found = SymmetrySpec(tuple(scalings), spec.refusals)
        self.select(managed)

    def select(self, managed: Iterable[str]) -> None:
        """Keep the scalings of which the optimizer manages all tensors; warn of the others."""
        managed = set(managed)
        outside = sorted({leg.name for symmetry in self.found for leg in symmetry.legs} - managed)
        if outside:
            self._notices.warn(
                f"no teleports where {', '.join(outside)} take part: these tensors are not among the parameters of the "
                "optimizer"
            )
        usable = (symmetry for symmetry in self.found if all(leg.name in managed for leg in symmetry.legs))
        self.spec = SymmetrySpec(tuple(usable), self.found.refusals)
