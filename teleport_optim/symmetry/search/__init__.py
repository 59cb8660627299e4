"""The search for symmetries, in three acts.

1. Record: :mod:`~teleport_optim.symmetry.search.record` calls a copy of the model and keeps each call as a graph of plain data
   (:mod:`~teleport_optim.symmetry.search.graph`).
2. Analyse: :mod:`~teleport_optim.symmetry.search.analyse` applies the rules (:mod:`~teleport_optim.symmetry.search.operations`)
   to the graph, once for each group. An analysis (:mod:`~teleport_optim.symmetry.search.analysis`) learns which channels
   (:mod:`~teleport_optim.symmetry.search.channels`) move together, and which do not move.
3. Solve: :mod:`~teleport_optim.symmetry.search.sites` gathers the channels that are left free into symmetries.

:mod:`~teleport_optim.symmetry.search.runs` decides which runs of a model there are.
"""
