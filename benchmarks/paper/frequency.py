"""Experiment 4: how often to teleport, on a family of convex functions and on one of others."""

from __future__ import annotations

from typing import Any

from benchmarks.paper.figures import draw_curves
from benchmarks.paper.harness import Study, separation, summary, teleport_facts
from benchmarks.paper.tables import centre, markdown, number, percent, times
from benchmarks.paper.training import SCHEDULE

__all__ = ["INTERVALS", "run", "tables"]

INTERVALS: dict[str, tuple[int, ...]] = {
    "every step": (),
    "every 3": SCHEDULE,
    "every 5": (4, 9, 14, 19),
    "every 10": (9, 19),
}
"""The steps after which a teleport follows; every 3 is the paper's schedule."""

_FAMILIES = ("ellipse", "rosenbrock")


def run(study: Study) -> dict[str, Any]:
    """LSTM(lr, tele), whose teleports have the largest effect, for every interval."""
    study = study.few
    results: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for task in _FAMILIES:
        vanilla = study.test(study.config(task, "lr"))
        results[task] = {"vanilla": summary(vanilla.final)}
        curves[task] = {"vanilla": vanilla.losses}
        for interval, steps in INTERVALS.items():
            config = study.config(task, "lr+teleport", teleport_steps=steps)
            on, off = study.test(config), study.test(config, "off")
            taken = [step for step in steps or range(study.num_steps) if step < study.num_steps]
            results[task][interval] = {
                **separation(on, off, vanilla),
                "random": summary(study.test(config, "random").final),
                "teleports": teleport_facts(study.problem(task), on, taken),
            }
            curves[task][interval] = on.losses
    draw_curves(study.out / "frequency_curves.png", curves)
    return results


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The table of the report."""
    rows = [
        [
            family,
            interval,
            centre(entry["on"]),
            centre(entry["off"]),
            centre(entry["random"]),
            times(entry["effect_of_teleport"]),
            times(entry["effect_of_meta_training"]),
            times(entry["against_vanilla"]),
            number(entry["teleports"]["length"]),
            percent(entry["teleports"]["away"]),
        ]
        for family, entries in results.items()
        for interval, entry in entries.items()
        if interval != "vanilla"
    ]
    columns = [
        "family",
        "teleport",
        "on",
        "same weights, off",
        "same weights, random angles",
        "off / on",
        "vanilla / off",
        "vanilla / on",
    ]
    columns += ["length", "away from the optimum"]
    return {"frequency": markdown(columns, rows)}
