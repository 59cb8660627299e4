"""Runs of a model: as many as the answers to its questions could change its way, each recorded and analysed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from teleport_optim.symmetry.inputs import Inputs
from teleport_optim.symmetry.search.analyse import Analyser
from teleport_optim.symmetry.search.graph import Graph
from teleport_optim.symmetry.search.limits import Limits, SearchStopped, Untraceable
from teleport_optim.symmetry.search.reading import Path
from teleport_optim.symmetry.search.record import Session, leaving_nothing
from teleport_optim.symmetry.search.recording.fakes import DATA_DEPENDENT, Fakes
from teleport_optim.symmetry.search.recording.watch import Watch, between, other_sizes

__all__ = ["follow"]

_LONG = 3000
"""Operations from which on a model is followed with smaller inputs only."""


def follow(
    model: nn.Module, inputs: Inputs, groups: Iterable[str], *, pinned: Mapping[str, str], limits: Limits
) -> Analyser:
    """Record a model in evaluation and in training mode and analyse what it computes.

    Args:
        model: The model; it is not changed and not run.
        inputs: Its inputs; only their shapes matter.
        groups: Names of the groups to follow.
        pinned: Parameters and buffers that may not move, with the reason.
        limits: Most operations and seconds.

    Returns:
        The analyses, and the places through which nothing passes.

    Raises:
        Untraceable: if the model cannot be followed; :class:`SearchStopped` at a limit.
        ValueError: if it cannot take the inputs.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise Untraceable("it is scripted: pass the module from which torch.jit made it")
    analyser = Analyser(groups, limits)

    def run(fakes: Fakes) -> None:
        with Session(model, inputs, fakes, limits, pinned) as session:
            analyser.follow(session.graph)
            runs = _Runs(session, inputs, analyser)
            for is_training in (False, True):
                runs.follow(is_training)
                analyser.follow(session.kept())
        analyser.follow(session.graph)  # with what was taken from where the model had put it

    leaving_nothing(run)
    analyser.finish(name for name, _ in model.named_parameters())
    return analyser


class _Runs:
    """Runs of the copy of a model in both modes.

    Args:
        session: Has the copy.
        inputs: The inputs of the model.
        analyser: Follows the graphs.
    """

    def __init__(self, session: Session, inputs: Inputs, analyser: Analyser) -> None:
        self._session = session
        self._inputs = inputs
        self._analyser = analyser

    def follow(self, is_training: bool) -> None:
        """Follow the copy in one mode, on each way that it may take.

        Raises:
            Untraceable: if it cannot be followed.
            ValueError: if it cannot take the inputs.
        """
        with self._session.in_mode(is_training) as watch:
            graph = self._first("training" if is_training else "evaluation")
            self._analyser.follow(graph)
            if watch.asks_for_gradients:
                self._analyser.follow(self._with_gradients(watch))
            # where nothing moves, other sizes cannot tell more
            if watch.asks_for_sizes and not self._analyser.is_exhausted:
                self._with_other_sizes(Path(graph), in_both=watch.compares_sizes)

    def _first(self, mode: str) -> Graph:
        """Record the copy with the given inputs.

        Some layers take no batch of one in training mode: then there are two examples, in all runs from now on.
        """
        try:
            return self._session.run(self._inputs)
        except Untraceable:
            raise
        except DATA_DEPENDENT as error:
            raise Untraceable(f"its control flow or shapes depend on data in {mode} mode ({error.func})") from error
        except Exception as error:
            self._analyser.follow(self._session.graph)  # the model may have kept what it computed until then
            doubled = _doubled(self._inputs)
            if doubled is not None:
                with suppress(Exception):
                    graph = self._session.run(doubled)
                    self._inputs = doubled
                    return graph
            raise ValueError(
                f"the model cannot take example_inputs in {mode} mode: {type(error).__name__}: {error}. Pass them as you "
                "would pass them to the model: a tensor, the tuple of its inputs, or the dictionary of those that have names."
            ) from error

    def _with_gradients(self, watch: Watch) -> Graph:
        """Record a copy that asks whether gradients are taken, and is told that they are."""
        watch.with_gradients = True
        try:
            return self._session.run(self._inputs)
        except SearchStopped:
            raise
        except Exception as error:
            raise Untraceable(
                "it asks whether gradients are taken, and its way where they are cannot be followed: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            watch.with_gradients = False

    def _with_other_sizes(self, first: Path, *, in_both: bool) -> None:
        """Follow a copy whose path may depend on the sizes of its inputs with others that it takes.

        Only a graph that takes another path is analysed: the rules cost more than a recording.

        Args:
            first: Its path with the inputs that are given.
            in_both: Whether to call it with smaller inputs and with larger ones although the first change nothing.

        Raises:
            Untraceable: if the parameters that it reads depend on the sizes.
        """
        for candidates in other_sizes(self._inputs):
            other, graph = self._taken(candidates)
            if other is None:
                continue
            second = Path(graph)
            if second.parameters != first.parameters:
                # a branch has two ways; where there are more, as in a loop over layers, not all of them are seen
                ways = (first.parameters, second.parameters)
                middle, third = self._taken([between(self._inputs, other)])
                if middle is None or Path(third).parameters not in ways:
                    raise Untraceable("which of its parameters it reads depends on the sizes of its inputs")
            self._analyser.readings.pin_choices(first.choices ^ second.choices)
            if second.differs(first):
                self._analyser.follow(graph)
            if not in_both or first.num_operations > _LONG:
                break

    def _taken(self, candidates: Iterable[Inputs]) -> tuple[Inputs | None, Graph]:
        """The first of some inputs that the copy takes, and its graph."""
        refused: set[tuple[tuple[int, ...], ...]] = set()
        for inputs in candidates:
            shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves(tuple(inputs)) if isinstance(leaf, Tensor))
            if shapes in refused:
                continue
            refused.add(shapes)
            try:
                return inputs, self._session.run(inputs)
            except SearchStopped:
                raise
            except Exception:  # it does not take such inputs
                continue
        return None, Graph()


def _doubled(inputs: Inputs) -> Inputs | None:
    """The inputs with a second example where there is only one, which some layers do not take in training mode."""

    def is_single(leaf: Tensor) -> bool:
        return leaf.dim() > 0 and len(leaf) == 1

    def double(leaf: Tensor) -> Tensor:
        return torch.empty((2, *leaf.shape[1:]), dtype=leaf.dtype, device="meta") if is_single(leaf) else leaf

    if not any(isinstance(leaf, Tensor) and is_single(leaf) for leaf in tree_leaves(inputs)):
        return None
    doubled: Inputs = tree_map_only(Tensor, double, inputs)
    return doubled
