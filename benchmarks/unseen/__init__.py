"""Models on which the search is tried: listed before it saw them, and not to be changed after.

60 of ``transformers``, 25 of ``timm``, 15 of ``diffusers`` and ``segmentation_models_pytorch``, 10 graph networks of
``torch_geometric``, and 40 that are built by hand from the kinds in which a symmetry is easily misread.
"""

from benchmarks.unseen import graph_models, hand_built, transformers_models, vision_models
from benchmarks.unseen.case import Case, Sizes

__all__ = ["CASES", "Case", "Sizes"]

CASES: dict[str, Case] = hand_built.CASES | graph_models.CASES | transformers_models.CASES | vision_models.CASES
"""Every model by name."""
