"""Experiment 8: does the distance to the optimum in the meta-loss stop harmful teleports?"""

from __future__ import annotations

from typing import Any

from benchmarks.paper.families import tested_schedule
from benchmarks.paper.harness import Study, comparison, distance, summary, teleport_facts
from benchmarks.paper.tables import centre, markdown, number, percent, times

__all__ = ["run", "tables"]

_FAMILIES = ("ellipse", "rosenbrock")
_VARIANTS = ("update", "update+teleport", "lr+teleport")
_WEIGHTS = (0.0, 1.0)
"""Of the distance."""


def run(study: Study) -> dict[str, Any]:
    """The families on which teleports move far, with and without the distance in the meta-loss."""
    study = study.few
    results: dict[str, Any] = {}
    for task in _FAMILIES:
        problem, schedule = study.problem(task), tested_schedule(study)
        vanilla = study.test(study.config(task, "update"))
        results[task] = []
        for variant in _VARIANTS:
            for weight in _WEIGHTS:
                config = study.config(task, variant, distance_weight=weight)
                on = study.test(config)
                entry: dict[str, Any] = {
                    "variant": variant,
                    "weight": weight,
                    "on": summary(on.final),
                    "distance": summary(distance(problem, on)),
                    "against_vanilla": comparison(on.final, vanilla.final, is_paired=False),
                }
                if "teleport" in variant:
                    off = study.test(config, "off")
                    entry["off"] = summary(off.final)
                    entry["distance_off"] = summary(distance(problem, off))
                    entry["effect_of_teleport"] = comparison(on.final, off.final, is_paired=True)
                    entry["teleports"] = teleport_facts(problem, on, schedule)
                results[task].append(entry)
    return results


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The table of the report."""
    rows = []
    for task, entries in results.items():
        for entry in entries:
            row = [task, entry["variant"], number(entry["weight"]), centre(entry["on"]), centre(entry["distance"])]
            if "off" in entry:
                teleports = entry["teleports"]
                row += [
                    times(entry["effect_of_teleport"]),
                    percent(teleports["away"]),
                    number(teleports["distance_ratio"]),
                    number(teleports["length"]),
                ]
            else:
                row += ["", "", "", ""]
            rows.append(row)
    columns = [
        "family",
        "LSTM emits",
        "weight",
        "final loss",
        "final distance",
        "off / on",
        "away from the optimum",
        "distance ratio",
        "length",
    ]
    return {"distance": markdown(columns, rows)}
