"""Brings a network onto another one by the permutations of its hidden channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from teleport_optim.symmetry.alignment.activations import activation_correlations
from teleport_optim.symmetry.alignment.matching import Matching, assignment_solver
from teleport_optim.symmetry.alignment.networks import (
    as_batches,
    check_alike,
    check_spec,
    float64_parameters,
    move_in_place,
)
from teleport_optim.symmetry.find import find_symmetries
from teleport_optim.symmetry.inputs import ExampleInputs
from teleport_optim.symmetry.spec import Element, SymmetrySpec

__all__ = ["AlignmentReport", "align"]

_SEED = 0


@dataclass(frozen=True)
class AlignmentReport:
    """Result of :func:`align`; printing it gives a short table.

    Attributes:
        spec: The permutation sites.
        element: The permutations by site: channel ``i`` is now what was channel ``element[site][i]``.
        methods: For each site what decided: ``"weights"`` or ``"activations"``.
        objectives: The sum of products of the parameters of both networks, before the first sweep and after each one. It
            never decreases. Channels matched by their activations are matched before the first sweep.
        is_converged: Whether the last sweep improved no site, so that more of them would change nothing.
        distance_before: Euclidean distance of the parameters before the alignment.
        distance_after: The same after it.

    Example:
        >>> model, reference = (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
        >>> report = align(model, reference, torch.ones(4, 3))
        >>> report.methods
        {'0:permutation': 'weights'}
    """

    spec: SymmetrySpec
    element: Element
    methods: Mapping[str, str]
    objectives: tuple[float, ...]
    is_converged: bool
    distance_before: float
    distance_after: float

    def __str__(self) -> str:
        width = max(map(len, ("site", *self.methods)))
        lines = [f"{'site'.ljust(width)}  size  moved  decided by"]
        for symmetry in self.spec:
            part = self.element[symmetry.id]
            moved = int((part != torch.arange(symmetry.size)).sum())
            lines.append(f"{symmetry.id.ljust(width)}  {symmetry.size:4d}  {moved:5d}  {self.methods[symmetry.id]}")
        end = "" if self.is_converged else "; not converged"
        lines.append(
            f"distance {self.distance_before:.4g} -> {self.distance_after:.4g}, {len(self.objectives) - 1} sweeps{end}"
        )
        return "\n".join(lines)


def align(
    model: nn.Module,
    reference: nn.Module,
    example_inputs: ExampleInputs,
    *,
    data: ExampleInputs | Iterable[ExampleInputs] | None = None,
    max_iterations: int = 100,
    generator: torch.Generator | None = None,
    spec: SymmetrySpec | None = None,
) -> AlignmentReport:
    r"""Renumber the hidden channels of ``model``, in place, so that it comes close to ``reference``.

    The function of ``model`` does not change, whatever the reference is; only the order of its hidden channels does. It is
    the permutations :math:`g` of all sites that are chosen, to make the parameters alike in the Euclidean norm:

    .. math:: \max_g \langle \theta_{ref},\, g \cdot \theta \rangle \iff \min_g \|\theta_{ref} - g \cdot \theta\|.

    Weight matching takes site by site in random order. With the other sites fixed, the best permutation of a site of ``n``
    channels is a linear assignment with the gains :math:`G_{ij} = \sum_{legs} \langle \theta_{ref}[i], \theta[j] \rangle`,
    an ``[n, n]`` matrix. Where a site lies on two axes of one weight (recurrent layers) this is a linearisation, which is
    taken only if it improves. Whole attention heads are matched up to the order inside of them. Sweeps end when no site
    improves: a local optimum, and the distance never grows.

    Activation matching, with ``data``, takes for ``G`` the correlation of the outputs that both networks give in evaluation
    mode at the layers that write the site (Linear and Conv), summed over these layers. It decides all sites independently,
    but may increase the distance. Sites without such a layer, and those of attention heads, are left to weight matching.

    Buffers such as running statistics move along but do not count in the matching. An optimizer's state does not move by
    itself: pass ``report.spec`` and ``report.element`` to :func:`~teleport_optim.symmetry.action.transport`.

    Args:
        model: The network that is renumbered. Its parameters keep their identity, its modes and gradients are untouched
            (zero the gradients: they belong to the old order).
        reference: A network of the same architecture; it is not changed.
        example_inputs: What both networks take, in any form that :func:`~teleport_optim.symmetry.find_symmetries` takes.
        data: An iterable of batches, each in the form of ``example_inputs`` and on the device of both networks; a single
            tensor is one batch. A tuple counts as several batches: ``[(x, mask)]`` is one. None means weight matching.
        max_iterations: Sweeps over all sites after which weight matching gives up.
        generator: A CPU generator for the order of the sites; by default one with a fixed seed.
        spec: The symmetries, if they are known already; only its permutations are used.

    Returns:
        The permutations and how far they brought the networks together.

    Raises:
        ImportError: if scipy is not installed.
        ValueError: if the networks differ in their parameters, have values that are not finite, or no permutation is found.

    Cost:
        A sweep multiplies every weight of ``n`` channels with as many of the reference, ``n`` times its size, and solves one
        assignment of ``O(n^3)`` for each site; a few sweeps are usual. Parameters of both networks are copied to the CPU in
        float64.

    Source:
        Written after the description in Ainsworth, Hayase, Srinivasa 2022, *Git Re-Basin*, arXiv 2209.04836.

    Example:
        >>> def network(seed):
        ...     _ = torch.manual_seed(seed)
        ...     return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> first, second, x = network(0), network(1), torch.ones(4, 3)
        >>> y = second(x)
        >>> report = align(second, first, x)
        >>> report.distance_after < report.distance_before, bool(torch.allclose(second(x), y))
        (True, True)
    """
    assign = assignment_solver()
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}, but at least one sweep is needed")
    parameters, targets = float64_parameters(model, "the model"), float64_parameters(reference, "the reference")
    check_alike(parameters, targets)
    spec = (find_symmetries(model, example_inputs, groups=["permutation"]) if spec is None else spec).of_group(
        "permutation"
    )
    check_spec(spec, model)
    generator = generator or torch.Generator().manual_seed(_SEED)
    matching = Matching(spec, parameters, targets, assign)
    distance_before = matching.distance()
    by_activations: Element = {}
    if data is not None:
        correlations = activation_correlations(matching.single_sites(), model, reference, as_batches(data))
        by_activations = {site: assign(gains) for site, gains in correlations.items()}
        matching.element |= by_activations
    left = [symmetry for symmetry in spec if symmetry.id not in by_activations]
    objectives, is_converged = [matching.objective()], not left
    while not is_converged and len(objectives) <= max_iterations:
        order = torch.randperm(len(left), generator=generator).tolist()
        improved = [matching.improve(left[position]) for position in order]
        objectives.append(matching.objective())
        is_converged = not any(improved)
    move_in_place(model, spec, matching.element)
    methods = {symmetry.id: "activations" if symmetry.id in by_activations else "weights" for symmetry in spec}
    return AlignmentReport(
        spec, matching.element, methods, tuple(objectives), is_converged, distance_before, matching.distance()
    )
