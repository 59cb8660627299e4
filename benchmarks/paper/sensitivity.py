"""Whether the answers depend on what the paper leaves open: second-order terms in the meta-gradient, and clipping it."""

from __future__ import annotations

from typing import Any

from benchmarks.paper.families import FAMILIES, label
from benchmarks.paper.harness import Study, comparison, summary
from benchmarks.paper.tables import centre, markdown, times

__all__ = ["run", "tables"]

_SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[tuple[str, bool], ...]]] = {
    "as reported": ({}, FAMILIES, (("update+teleport", False), ("update+teleport", True))),
    "second-order terms": ({"estimator": "tbptt"}, ("ellipse_fixed", "ellipse"), (("update+teleport", False),)),
    "gradient clipped to 1": ({"clip": 1.0}, ("ellipse", "rosenbrock"), (("update+teleport", True),)),
}
"""Changes of the configuration, families, and what the LSTM emits beside the vanilla one."""


def run(study: Study) -> dict[str, Any]:
    """Vanilla, teleports on and teleports off under every setting."""
    study = study.few
    results: dict[str, Any] = {}
    for name, (changes, families, variants) in _SETTINGS.items():
        for task in families:
            vanilla = study.test(study.config(task, "update", **changes))
            for variant, theta in variants:
                config = study.config(task, variant, theta_gradient=theta, **changes)
                on, off = study.test(config), study.test(config, teleport=False)
                results.setdefault(name, {}).setdefault(task, {})[label(variant, theta)] = {
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
            variant,
            *(centre(entry[key]) for key in ("vanilla", "on", "off")),
            *(times(entry[key]) for key in ("effect_of_teleport", "effect_of_meta_training", "against_vanilla")),
        ]
        for setting, families in results.items()
        for task, variants in families.items()
        for variant, entry in variants.items()
    ]
    columns = [
        "setting",
        "family",
        "LSTM emits",
        "vanilla",
        "on",
        "same weights, off",
        "off / on",
        "vanilla / off",
        "vanilla / on",
    ]
    return {"sensitivity": markdown(columns, rows)}
