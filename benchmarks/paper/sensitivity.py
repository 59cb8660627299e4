"""Whether the answers depend on what the paper leaves open: second-order terms in the meta-gradient, and clipping it."""

from __future__ import annotations

from typing import Any

from benchmarks.paper.harness import Study, comparison, summary
from benchmarks.paper.tables import centre, markdown, times

__all__ = ["run", "tables"]

_SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "as reported": ({}, ("ellipse_fixed", "ellipse", "rosenbrock")),
    "second-order terms": ({"estimator": "tbptt"}, ("ellipse_fixed",)),
    "gradient clipped to 1": ({"clip": 1.0}, ("ellipse", "rosenbrock")),
}
"""Changes of the configuration, and families."""


def run(study: Study) -> dict[str, Any]:
    """LSTM(update), and LSTM(update, tele) with teleports on and off, under every setting."""
    study = study.few
    results: dict[str, Any] = {}
    for name, (changes, families) in _SETTINGS.items():
        results[name] = {}
        for task in families:
            vanilla = study.test(study.config(task, "update", **changes))
            config = study.config(task, "update+teleport", **changes)
            on, off = study.test(config), study.test(config, "off")
            results[name][task] = {
                "vanilla": summary(vanilla.final),
                "on": summary(on.final),
                "off": summary(off.final),
                "effect_of_teleport": comparison(on.final, off.final, is_paired=True),
                "effect_of_meta_training": comparison(off.final, vanilla.final, is_paired=False),
                "against_vanilla": comparison(on.final, vanilla.final, is_paired=False),
            }
    return results


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The table of the report."""
    rows = [
        [
            setting,
            task,
            *(centre(entry[key]) for key in ("vanilla", "on", "off")),
            *(times(entry[key]) for key in ("effect_of_teleport", "effect_of_meta_training", "against_vanilla")),
        ]
        for setting, families in results.items()
        for task, entry in families.items()
    ]
    columns = [
        "setting",
        "family",
        "vanilla",
        "on",
        "same weights, off",
        "off / on",
        "vanilla / off",
        "vanilla / on",
    ]
    return {"sensitivity": markdown(columns, rows)}
