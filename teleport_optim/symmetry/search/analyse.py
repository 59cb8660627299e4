"""Analyse graphs: apply the rule of each call in each analysis."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from teleport_optim.symmetry.groups import GROUPS
from teleport_optim.symmetry.search.analysis import ChannelAnalysis
from teleport_optim.symmetry.search.channels import Channels
from teleport_optim.symmetry.search.graph import Call, Graph, Parameter, Pin, Value, Write
from teleport_optim.symmetry.search.limits import Limits
from teleport_optim.symmetry.search.operations import CREATIONS, RULES
from teleport_optim.symmetry.search.permutations import PermutationAnalysis
from teleport_optim.symmetry.search.reading import Readings
from teleport_optim.symmetry.search.scalings import ScalingAnalysis
from teleport_optim.symmetry.spec import Refusal

__all__ = ["Analyser"]

_CHECK_INTERVAL = 32
"""Number of steps after which the limits are checked again."""

Output = tuple[Channels, ...]


class Analyser:
    """Applies rules to graphs, one after the other, and gathers what follows from them.

    An exception of a rule is a mistake in the rule, not a property of the model: nothing here catches it.

    Args:
        groups: Names of the groups.
        limits: Limits of the search; None for no limits.

    Attributes:
        analyses: The groups, followed through the graphs.
        refusals: Places through which nothing passes.
        readings: Parts of parameters that the graphs read.

    Example:
        >>> graph = Graph()
        >>> x, first, second = graph.input(2, 3), graph.parameter("0.weight", 8, 3), graph.parameter("2.weight", 1, 8)
        >>> (hidden,) = graph.call("linear", {"input": x, "weight": first, "bias": None}, (2, 8))
        >>> (hidden,) = graph.call("relu", {"self": hidden}, (2, 8))
        >>> graph.outputs += graph.call("linear", {"input": hidden, "weight": second, "bias": None}, (2, 1))
        >>> analyser = Analyser(["scaling"])
        >>> analyser.follow(graph)
        >>> from teleport_optim.symmetry.search.sites import symmetries_of
        >>> names = {name: [name] for name in graph.parameters}
        >>> for site in symmetries_of(analyser.analyses[0], names, include_approximate=False):
        ...     print(site.id, *site.legs)
        0:scaling 0.weight[0]^+1 2.weight[1]^-1
    """

    def __init__(self, groups: Iterable[str] = tuple(GROUPS), limits: Limits | None = None) -> None:
        wanted = set(groups)
        self.analyses = [analysis for group in GROUPS if group in wanted for analysis in _analyses_of(group)]
        self.refusals: list[Refusal] = []
        self.readings = Readings(self.analyses)
        self._limits = limits
        self._node = 0
        self._parameters: set[str] = set()
        self._used: set[str] = set()
        self._at_rest: list[set[Value]] = [set() for _ in self.analyses]

    @property
    def is_exhausted(self) -> bool:
        """Whether no parameter can move any more, so that another graph would tell nothing."""
        return all(analysis.is_exhausted for analysis in self.analyses)

    def follow(self, graph: Graph) -> None:
        """Follow the channels through a graph.

        Raises:
            SearchStopped: at a limit.
        """
        for name, parameter in graph.parameters.items():
            if name not in self._parameters:
                self._parameters.add(name)
                self._introduce(name, parameter)
        self._used |= graph.used
        for number, step in enumerate(graph.steps):
            if self._limits is not None and number % _CHECK_INTERVAL == 0:
                self._limits.check()
            if isinstance(step, Call):
                self._follow_call(step)
            elif isinstance(step, Pin):
                self._pin(step)
            else:
                self._refuse(step.name, step.reason)
        for value in graph.outputs:
            self._freeze(value)

    def finish(self, parameters: Iterable[str] = ()) -> None:
        """Pin what no graph reads, after the last one, and refuse those ``parameters`` that no graph uses."""
        self.readings.pin_unread()
        for name in parameters:
            if name not in self._used:
                self._refuse(name, "the model never uses it")

    def _introduce(self, name: str, parameter: Parameter) -> None:
        for analysis in self.analyses:
            analysis.add_parameter(name, len(parameter.value.shape), is_data=parameter.is_data)
        if parameter.refusal:
            self._refuse(name, parameter.refusal)
            for analysis in self.analyses:
                analysis.close(parameter.value)

    def _refuse(self, name: str, reason: str) -> None:
        refusal = Refusal(name or "(root)", reason)
        if refusal not in self.refusals:
            self.refusals.append(refusal)

    def _pin(self, pin: Pin) -> None:
        values = [value for value in pin.values if not (pin.spares_parameters and value.source is not None)]
        have_moved = [self._freeze(value) for value in values]
        if pin.reason and any(have_moved):
            self._refuse(pin.module, pin.reason)

    def _freeze(self, value: Value) -> bool:
        """Let nothing about a tensor move; returns whether anything could have."""
        if all(analysis.is_still(value) for analysis in self.analyses):
            return False
        for analysis in self.analyses:
            analysis.freeze(value)
        self.readings.note_use(value)
        return True

    # ------------------------------------------------------------------------------------------------------ calls

    def _follow_call(self, call: Call) -> None:
        self._node += 1
        if not (call.results or call.writes):  # an assertion, say
            return
        if not call.writes and call.results[0].source is not None:  # a view of a parameter, which its source tells of
            return
        writes = {write.output: write for write in call.writes}
        for analysis, outputs in zip(self.analyses, self._outputs(call)):
            for number, (value, channels) in enumerate(zip(call.results, outputs, strict=True)):
                if value.is_discrete and analysis.changes_numbers:  # no factor passes into integers and truth values
                    analysis.pin(channels)
                    channels = ()
                if number in writes:
                    _overwrite(analysis, writes[number], channels)
                else:
                    analysis.keep(value, channels)
            for write in call.writes:
                if write.output is None:
                    _overwrite(analysis, write, ())
        self.readings.note(call)

    def _outputs(self, call: Call) -> list[list[Output]]:
        """Channels of each output, in each analysis."""
        nothing: list[Output] = [()] * len(call.results)
        if call.name in CREATIONS:
            return [nothing for _ in self.analyses]
        are_at_rest = [all(self._is_at_rest(value, k) for value in call.values) for k in range(len(self.analyses))]
        is_known = call.name in RULES
        if not is_known and not all(are_at_rest):
            name = call.name.rpartition("::")[2]
            self._refuse(call.module, f"{name} is not an operation whose symmetries are known")
        outputs = []
        for analysis, is_at_rest in zip(self.analyses, are_at_rest):
            own = nothing
            if not is_at_rest:
                analysis.node = self._node
                if is_known:
                    own = [analysis.note_passage(k, one) for k, one in enumerate(RULES[call.name](call, analysis), 1)]
                else:
                    for value in call.values:
                        analysis.freeze(value)
                for value in call.values:
                    analysis.close(value)
            outputs.append(own)
        return outputs

    def _is_at_rest(self, value: Value, number: int) -> bool:
        """Whether nothing about a tensor moves in an analysis, or ever will. What is so once stays so."""
        known = self._at_rest[number]
        if value in known:
            return True
        if not self.analyses[number].is_at_rest(value):
            return False
        known.add(value)
        return True


def _analyses_of(group: str) -> list[ChannelAnalysis]:
    if group == "permutation":
        return [PermutationAnalysis("permutation"), PermutationAnalysis("heads")]
    return [PermutationAnalysis("linear") if group == "linear" else ScalingAnalysis(group)]


def _overwrite(analysis: ChannelAnalysis, write: Write, new: Output) -> None:
    """Let a tensor that is written in place have new channels. None moves if others, which share its memory, had older ones."""
    before = analysis.known(write.before)
    is_same = len(before) == len(new) and all(map(_are_equal, before, new))
    if not is_same and (write.shared or write.before.source is not None):
        analysis.pin(new)
        new = ()
        for value in (write.before, *(old for old, _ in write.shared)):
            analysis.freeze(value)
    if write.before.source is None:
        analysis.keep(write.after, new)
    for old, after in write.shared:
        if old is not after and old.source is None:
            analysis.keep(after, analysis.known(old))


def _are_equal(one: Channels, other: Channels) -> bool:
    return one.ids is other.ids or (
        one.ids.shape == other.ids.shape
        and np.array_equal(one.ids, other.ids)
        and np.array_equal(one.positions, other.positions)
        and one.sign == other.sign
    )
