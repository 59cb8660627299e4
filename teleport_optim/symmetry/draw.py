"""A picture of the channels of a model: which layers each site connects."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from teleport_optim.symmetry.spec import Symmetry, SymmetrySpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_symmetries"]

_COLOURS = {"permutation": "#4c78a8", "scaling": "#f58518", "sign": "#54a24b", "linear": "#b279a2"}
_MAX_LABELS = 70
"""Most names that are written along an axis of the picture."""


def draw_symmetries(spec: SymmetrySpec, path: str | Path, *, model: nn.Module | None = None, title: str = "") -> None:
    """Draw which layers the sites of a spec connect, and write the picture.

    A row is a layer (a module with its tensors), from the input at the top to the output at the bottom. A column is a site, or
    all blocks of one site: a filled mark where a layer writes its channels, an open one where it reads them. Rows of marks in
    one column are the channels that must move together.

    Args:
        spec: What to draw.
        path: Where to write; the ending says the format, ``.svg``, ``.png`` or ``.pdf``.
        model: The model, whose layers are then drawn in its own order; without it in the order of the sites.
        title: Written above.

    Raises:
        ImportError: if matplotlib is not installed: ``pip install matplotlib``.
        ValueError: for an ending that is none of these.

    Example:
        >>> import tempfile, torch
        >>> from teleport_optim import find_symmetries
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_symmetries(find_symmetries(model, torch.zeros(2, 2)), Path(folder) / "channels.svg")
    """
    if Path(path).suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"the picture's name must end in .svg, .png or .pdf, got {str(path)!r}")
    from matplotlib.figure import Figure

    columns: dict[str, list[Symmetry]] = {}
    for symmetry in spec:
        columns.setdefault(symmetry.id.partition("[")[0], []).append(symmetry)
    layers = list(dict.fromkeys(_layer(leg.name) for symmetry in spec for leg in symmetry.legs))
    if model is not None:
        order = [_layer(name) for name in model.state_dict()]
        layers.sort(key=order.index)
    width, height = (min(max(2.0 + 0.16 * len(names), 4.0), 40.0) for names in (columns, layers))
    figure = Figure(figsize=(width + 2.0, height), layout="constrained")
    axes = figure.add_subplot()
    for position, sites in enumerate(columns.values()):
        _draw_column(axes, position, sites, layers)
    axes.set_ylim(max(len(layers), 1) - 0.5, -0.5)
    axes.set_xlim(-0.5, max(len(columns), 1) - 0.5)
    for axis, names in ((axes.yaxis, layers), (axes.xaxis, list(columns))):
        step = -(-len(names) // _MAX_LABELS) or 1
        axis.set_ticks(range(0, len(names), step), names[::step], fontsize=6)
    axes.tick_params(axis="x", rotation=90)
    axes.grid(color="#eeeeee", linewidth=0.5)
    axes.set_axisbelow(True)
    for group in dict.fromkeys(symmetry.group.name for symmetry in spec):
        axes.plot([], [], "o-", color=_COLOURS[group], markersize=3, label=group)
    axes.plot([], [], "o", color="#888888", markersize=3, label="written")
    axes.plot([], [], "o", color="#888888", markerfacecolor="white", markersize=3, label="read")
    axes.legend(fontsize=6, ncols=6, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    axes.set_title(title, fontsize=8, loc="right")
    figure.savefig(path, dpi=150)


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name


def _draw_column(axes: Axes, position: int, sites: list[Symmetry], layers: list[str]) -> None:
    colour = _COLOURS[sites[0].group.name]
    rows = {layers.index(_layer(leg.name)): leg.degree > 0 for site in sites for leg in site.legs}
    axes.plot([position, position], [min(rows), max(rows)], "-", color=colour, linewidth=0.8)
    for row, is_written in rows.items():
        axes.plot(position, row, "o", color=colour, markerfacecolor=colour if is_written else "white", markersize=3)
