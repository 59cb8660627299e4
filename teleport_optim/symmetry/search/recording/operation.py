"""Facts about an operation, from its schema."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from teleport_optim.symmetry.search.operations import CREATIONS, RULES

__all__ = ["Operation"]

_NAMED_IN_PLACE = frozenset({"normal_", "uniform_", "bernoulli_", "random_", "zero_", "fill_"})
"""Operations that are known by their names in place."""


class Operation(NamedTuple):
    """Facts about an operation.

    Attributes:
        name: Its name, as graphs have it: without the overload, and with the namespace if that is not ATen.
        namespace: Its namespace.
        names: Names of its arguments.
        defaults: Default values of its arguments, by name.
        written: Names of the arguments that it writes in place.
        is_known: Whether there is a rule for it.
        is_composite: Whether torch makes it of other operations.
    """

    name: str
    namespace: str
    names: tuple[str, ...]
    defaults: dict[str, Any]
    written: frozenset[str]
    is_known: bool
    is_composite: bool

    @classmethod
    def of(cls, func: Any) -> Operation:
        """Read the schema of an operation of torch."""
        schema = func._schema
        name = schema.name.split("::")[-1]
        if name not in _NAMED_IN_PLACE:
            name = name if name.startswith("_") and not name.endswith("_") else name.rstrip("_") or name
        twin = name.removeprefix("unsafe_").removesuffix("_copy")
        if twin in RULES:  # the same operation, but for whether the result shares memory
            name = twin
        written = (a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
        is_known = func.namespace == "aten" and (name in RULES or name in CREATIONS)
        return cls(
            name if func.namespace == "aten" else f"{func.namespace}::{name}",
            func.namespace,
            tuple(argument.name for argument in schema.arguments),
            {a.name: a.default_value for a in schema.arguments if a.has_default_value()},
            frozenset(written if schema.is_mutable else ()),
            is_known,
            func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd),
        )

    def arguments(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """Arguments by name, in the order of the schema, with the default values of those that are not given."""
        given = self.defaults | dict(zip(self.names, args)) | kwargs
        return {name: given[name] for name in self.names if name in given}

    def targets(self, args: Any, kwargs: Any) -> list[Tensor]:
        """Tensors that the operation writes in place."""
        if not self.written:
            return []
        pairs = [*zip(self.names, args), *kwargs.items()]
        written = [value for name, value in pairs if name in self.written]
        return [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]
