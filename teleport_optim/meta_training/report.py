"""Pictures of a meta-training run: its learning curve, and its scalars for TensorBoard."""

from __future__ import annotations

import importlib.util
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from teleport_optim.controller.checkpoints import write_atomically
from teleport_optim.meta_training.run_folder import OuterStep, core_minutes, read_log, read_sessions

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["CURVE_FILE", "Scalars", "draw_learning_curve"]

CURVE_FILE = "learning_curve.png"
_COLOUR, _PALE = "#c2185b", "#9aa0a6"


def draw_learning_curve(run_dir: Path) -> Path:
    """Draw objective and validation of the run in a folder against outer steps and against core-minutes.

    Returns:
        The picture.
    """
    from matplotlib.figure import Figure

    log, sessions = read_log(run_dir), read_sessions(run_dir)
    is_on_cpu = all(session.device == "cpu" for session in sessions)
    places = {
        "outer step": [float(report.step) for report in log],
        "core-minutes" if is_on_cpu else "device-minutes": core_minutes(log, sessions),
    }
    figure = Figure(figsize=(9.0, 5.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row", squeeze=False)
    for column, (label, where) in enumerate(places.items()):
        above, below = axes[0, column], axes[1, column]
        above.plot(where, [report.objective for report in log], color=_COLOUR, linewidth=1.2)
        validations = [(place, report.validation) for place, report in zip(where, log) if report.validation is not None]
        below.plot(*zip(*validations or [(math.nan, math.nan)]), color=_COLOUR, marker="o", markersize=3, linewidth=1.6)
        below.axhline(1.0, color=_PALE, linewidth=0.9, linestyle=":")
        below.set_xlabel(label)
        for panel in (above, below):
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.25, linewidth=0.6)
    axes[0, 0].set_ylabel("objective")
    axes[1, 0].set_ylabel("validation: final loss\nrelative to untrained")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    path = run_dir / CURVE_FILE
    write_atomically(path, picture.getvalue())
    return path


class Scalars:
    """Scalars of a run for TensorBoard, in the run's folder, if TensorBoard is installed.

    Args:
        run_dir: Folder of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._writer: SummaryWriter | None = None
        if importlib.util.find_spec("tensorboard") is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        log = read_log(run_dir)
        last = log[-1].step if log else 1
        self._writer = SummaryWriter(run_dir, purge_step=last)
        if log:
            self.add(log[-1])  # A process that was killed may not have come to it.

    @property
    def is_on(self) -> bool:
        """True if anything is written."""
        return self._writer is not None

    def add(self, report: OuterStep) -> None:
        """Write the scalars of an outer step."""
        if self._writer is None:
            return
        for name, value in report._asdict().items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, report.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
