"""Whether the answers depend on what the paper leaves open: second-order terms in the meta-gradient, and clipping it."""

from __future__ import annotations

from typing import Any

from benchmarks.paper.harness import Study, separation, summary
from benchmarks.paper.tables import centre, markdown, times

__all__ = ["run", "tables"]

_ALL = ("update+teleport", "lr+teleport", "lr+teleport+momentum")
_SETTINGS: tuple[tuple[str, dict[str, Any], tuple[str, ...], tuple[str, ...]], ...] = (
    ("as reported", {}, ("ellipse_fixed",), ("update+teleport",)),
    ("second-order terms", {"estimator": "tbptt"}, ("ellipse_fixed",), ("update+teleport",)),
    ("as reported", {}, ("ellipse", "rosenbrock"), _ALL),
    ("meta-gradient clipped to 1", {"clip": 1.0}, ("ellipse", "rosenbrock"), _ALL),
)
"""Name, changes of the configuration, families, and what the LSTM emits."""


def run(study: Study) -> list[dict[str, Any]]:
    """Without teleports, and with teleports on, off and random, under every setting."""
    study = study.few
    results: list[dict[str, Any]] = []
    for name, changes, families, variants in _SETTINGS:
        for task in families:
            for variant in variants:
                vanilla = study.test(study.config(task, variant.partition("+")[0], **changes))
                config = study.config(task, variant, **changes)
                on, off = study.test(config), study.test(config, "off")
                results.append(
                    {
                        "setting": name,
                        "family": task,
                        "variant": variant,
                        "vanilla": summary(vanilla.final),
                        **separation(on, off, vanilla),
                        "random": summary(study.test(config, "random").final),
                    }
                )
    return results


def tables(results: list[dict[str, Any]]) -> dict[str, str]:
    """The table of the report."""
    rows = [
        [
            *(entry[key] for key in ("setting", "family", "variant")),
            *(centre(entry[key]) for key in ("vanilla", "on", "off", "random")),
            *(times(entry[key]) for key in ("effect_of_teleport", "effect_of_meta_training", "against_vanilla")),
        ]
        for entry in results
    ]
    columns = [
        "setting",
        "family",
        "LSTM emits",
        "vanilla",
        "on",
        "same weights, off",
        "same weights, random angles",
        "off / on",
        "vanilla / off",
        "vanilla / on",
    ]
    return {"sensitivity": markdown(columns, rows)}
