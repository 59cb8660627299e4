"""Models that are easily misread: each is invariant under all that is found in it, or refused."""

from tests.helpers.odd_models import branches, calls, normalisation, order, sequences, sharing, sizes, writes
from tests.helpers.small_models import Entry

__all__ = ["MODELS"]

MODELS: dict[str, Entry] = {
    name: entry
    for part in (sharing, branches, order, writes, calls, sizes, sequences, normalisation)
    for name, entry in part.MODELS.items()
}
"""By name: what makes the model, what makes its inputs, and the ids that must be found: all of them, or ``"refused"``. None where
only invariance is asked for."""
