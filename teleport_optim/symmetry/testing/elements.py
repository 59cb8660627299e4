"""Strategies for group elements and for inputs, which shrink towards the identity and small batches."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from teleport_optim.symmetry import Element, Symmetry, SymmetrySpec
from teleport_optim.symmetry.inputs import ExampleInputs, Inputs
from teleport_optim.symmetry.testing.sequential import seeds

__all__ = ["PrintedElement", "example_inputs", "group_elements"]

_MAX_MOVED = 16
"""Most channels of a group element (entries of a matrix) that are drawn."""
_MAX_PRINTED = 32
"""Up to how many entries a tensor prints whole; of larger ones those print that are not the identity's."""


class PrintedElement(dict[str, Tensor]):
    """An element that prints as Python code, to the last digit; the code needs ``import torch``.

    Example:
        >>> PrintedElement({"0:sign": torch.tensor([1.0, -1.0], dtype=torch.float64)})
        {'0:sign': torch.tensor([1.0, -1.0], dtype=torch.float64)}
    """

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{name!r}: {_code_of(part)}" for name, part in self.items()) + "}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print the code in hypothesis' reports, too, which would show the functions that made the element."""
        printer.text(repr(self))


def _code_of(part: Tensor) -> str:
    dtype = "" if part.dtype == torch.int64 else f", dtype={part.dtype}"
    if part.numel() <= _MAX_PRINTED:
        return f"torch.tensor({part.tolist()}{dtype})"
    size = len(part)
    kind = "eye" if part.dim() == 2 else "arange" if part.dtype == torch.int64 else "ones"
    identity: Tensor = getattr(torch, kind)(size, dtype=part.dtype)
    places = (part != identity).nonzero(as_tuple=True)
    code = f"torch.{kind}({size}{dtype})"
    if len(places[0]) == 0:
        return code
    indices = ", ".join(f"torch.tensor({axis.tolist()})" for axis in places)
    return f"{code}.index_put(({indices},), torch.tensor({part[places].tolist()}{dtype}))"


def group_elements(spec: SymmetrySpec) -> st.SearchStrategy[Element]:
    r"""Elements for the sites of ``spec``, which shrink to the identity ``{}``.

    An element has an entry for each site that it moves, and moves few channels of it: permutations are products of
    transpositions, log-scales lie in [-2, 2], general linear maps are :math:`\exp(A)` for a sparse ``A`` with entries in
    [-0.5, 0.5], and so have a condition number below ``e ** 4``. All shrink site by site and channel by channel, and print as
    code that makes them again after ``import torch``.

    Args:
        spec: The symmetries.

    Returns:
        A strategy for elements as :func:`~teleport_optim.symmetry.action.act` takes them: tensors of the shape ``[size]`` or,
        for the linear group, ``[size, size]``; int64 for permutations, float64 for the others.

    Raises:
        ValueError: if a symmetry has a group other than those of ``teleport_optim.symmetry.groups.GROUPS``.

    Example:
        >>> from hypothesis import find
        >>> from torch import nn
        >>> from teleport_optim import find_symmetries
        >>> spec = find_symmetries(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3))
        >>> find(group_elements(spec), lambda element: True)
        {}
        >>> find(group_elements(spec), lambda element: "0:permutation" in element and (
        ...     element["0:permutation"][0] != 0))
        {'0:permutation': torch.tensor([1, 0, 2, 3])}
    """
    return st.fixed_dictionaries({}, optional={symmetry.id: _parts_of(symmetry) for symmetry in spec}).map(
        PrintedElement
    )


def _parts_of(symmetry: Symmetry) -> st.SearchStrategy[Tensor]:
    """The elements of one site."""
    size, channels = symmetry.size, st.integers(0, symmetry.size - 1)
    limit = min(size, _MAX_MOVED)

    def sparse(shape: tuple[int, ...], entries: Mapping[Any, float]) -> Tensor:
        tensor = torch.zeros(shape, dtype=torch.float64)
        for place, entry in entries.items():
            tensor[place] = entry
        return tensor

    match symmetry.group.name:
        case "permutation":

            def permutation(swaps: Sequence[tuple[int, int]]) -> Tensor:
                element = torch.arange(size)
                for one, other in swaps:
                    element[[one, other]] = element[[other, one]]
                return element

            return st.lists(st.tuples(channels, channels), max_size=limit).map(permutation)
        case "scaling":
            log_scales = st.dictionaries(channels, _numbers(2.0), max_size=limit)
            return log_scales.map(lambda entries: symmetry.group.exp(sparse((size,), entries)))
        case "sign":
            flipped = st.sets(channels, max_size=limit)
            return flipped.map(lambda flips: 1.0 - 2.0 * sparse((size,), dict.fromkeys(flips, 1.0)))
        case "linear":
            entries = st.dictionaries(st.tuples(channels, channels), _numbers(0.5), max_size=min(size**2, _MAX_MOVED))
            return entries.map(lambda entries: symmetry.group.exp(sparse((size, size), entries)))
        case name:
            raise ValueError(f"no elements are known for the group {name!r} of site {symmetry.id!r}")


def _numbers(bound: float) -> st.SearchStrategy[float]:
    return st.floats(-bound, bound, allow_subnormal=False)


def example_inputs(template: ExampleInputs, *, max_batch: int = 5, batch_axis: int = 0) -> st.SearchStrategy[Any]:
    """Inputs like ``template``, with another batch size and other numbers; they shrink to batches of two.

    Floating point tensors are normal, integers lie between 0 and the largest of the template (token ids stay token ids),
    and boolean tensors (masks) repeat the examples of the template, since a mask of random entries could hide everything.
    What is no tensor stays as it is.

    Args:
        template: An input of the model, a tuple of inputs or a dictionary of named ones. Tensors whose ``batch_axis`` is
            as long as that of the first tensor get the new batch size there, the others keep their shape.
        max_batch: The largest batch; the smallest is two, below which BatchNorm cannot train.
        batch_axis: The axis of examples.

    Returns:
        A strategy for what ``template`` is: a tensor, a tuple or a dictionary. The global random state is not used.

    Raises:
        TypeError: if ``template`` is nothing of that kind.
        ValueError: if no tensor in it has a batch axis, or ``max_batch`` is below two.

    Example:
        >>> from hypothesis import find
        >>> tokens = torch.tensor([[4, 0, 2]])
        >>> find(example_inputs(tokens), lambda inputs: True).shape
        torch.Size([2, 3])
    """
    leaves = tree_leaves(Inputs.of(template))
    sizes = [v.shape[batch_axis] for v in leaves if isinstance(v, Tensor) and v.dim() > batch_axis]
    if not sizes:
        raise ValueError(f"no input is a tensor with an axis {batch_axis}, so none has a batch of examples")
    if max_batch < 2:
        raise ValueError(f"max_batch must be at least 2, got {max_batch}")

    def draw_one(value: Any, batch: int, generator: torch.Generator) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        if value.dim() > batch_axis and value.shape[batch_axis] == sizes[0] > 0:
            value = value.index_select(batch_axis, torch.arange(batch, device=value.device) % sizes[0])
        if value.is_floating_point() or value.is_complex():
            drawn = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        elif value.dtype != torch.bool and value.numel() > 0:
            low, high = min(0, int(value.min())), int(value.max()) + 1
            drawn = torch.randint(low, max(high, 1), value.shape, generator=generator, dtype=value.dtype)
        else:
            drawn = value.clone()
        return drawn.to(value.device)

    def build(batch: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return tree_map(lambda value: draw_one(value, batch, generator), template)

    return st.builds(build, st.integers(2, max_batch), seeds())
