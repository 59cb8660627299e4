"""Experiment 3: all variants on the Booth and Rosenbrock families, with teleports on and off."""

from __future__ import annotations

from typing import Any

from benchmarks.paper.figures import draw_curves, draw_trajectories
from benchmarks.paper.harness import (
    Study,
    Trajectory,
    adam,
    comparison,
    gradient_descent,
    summary,
    teleport_facts,
)
from benchmarks.paper.tables import centre, markdown, number, percent, times
from benchmarks.paper.training import SCHEDULE

__all__ = ["FAMILIES", "VARIANTS", "run", "tables", "tested_schedule"]

FAMILIES = ("ellipse_fixed", "ellipse", "rosenbrock_fixed", "rosenbrock")
VARIANTS = ("update", "update+teleport", "lr", "lr+teleport", "lr+teleport+momentum")
"""What the LSTM emits."""

_THETA: dict[str, tuple[str, ...]] = {
    "update": ("ellipse", "rosenbrock"),
    "update+teleport": FAMILIES,
    "lr+teleport": ("ellipse", "rosenbrock"),
    "lr+teleport+momentum": ("ellipse", "rosenbrock"),
}
"""The families on which a variant is also trained with the theta gradient as an input."""

_ADAM_RATE = 0.3


def tested_schedule(study: Study) -> list[int]:
    """The steps of the paper's schedule that lie in a test run."""
    return [step for step in SCHEDULE if step < study.num_steps]


def _variants(task: str) -> list[tuple[str, bool]]:
    """The variants of a family, and whether they read the theta gradient."""
    return [(name, theta) for name in VARIANTS for theta in (False, True) if not theta or task in _THETA.get(name, ())]


def _study(study: Study, variant: str) -> Study:
    """All meta-seeds for LSTM(update) and LSTM(update, tele), three for the others."""
    return study if variant.startswith("update") else study.few


def label(variant: str, theta: bool) -> str:
    """A name for a variant."""
    return f"{variant}, θ gradient" if theta else variant


def run(study: Study) -> dict[str, Any]:
    """Train and test everything, and draw the figures."""
    results, curves, paths = {}, {}, {}
    for task in FAMILIES:
        problem = study.problem(task)
        tests = _tests(study, task)
        results[task] = _entry(study, task, tests)
        baselines = _baselines(study, task)
        shown = {
            "vanilla": tests["update", False, True],
            "teleport": tests["update+teleport", False, True],
            "teleport, switched off": tests["update+teleport", False, False],
            "teleport + θ gradient": tests["update+teleport", True, True],
            "teleport + θ gradient, switched off": tests["update+teleport", True, False],
        }
        curves[task] = {name: path.losses for name, path in shown.items()} | {
            "gradient descent, swept": baselines["gradient_descent"].losses,
            "Adam, 0.3": baselines["adam"].losses,
        }
        first = {name: Trajectory(*(part[0] for part in shown[name])) for name in list(shown)[:2]}
        first["teleport + θ gradient"] = Trajectory(*(part[0] for part in shown["teleport + θ gradient"]))
        first["gradient descent + exact teleport"] = baselines["exact"]
        paths[f"{task}, test function 0, meta-seed {study.seeds[0]}"] = (problem, 0, first)
    draw_curves(study.out / "families_curves.png", curves)
    draw_trajectories(study.out / "families_paths.png", paths)
    return results


def _tests(study: Study, task: str) -> dict[tuple[str, bool, bool], Trajectory]:
    """By variant, theta gradient, and whether teleports were on."""
    tests = {}
    for variant, theta in _variants(task):
        config, chosen = study.config(task, variant, theta_gradient=theta), _study(study, variant)
        tests[variant, theta, True] = chosen.test(config)
        if "teleport" in variant:
            tests[variant, theta, False] = chosen.test(config, teleport=False)
    return tests


def _baselines(study: Study, task: str) -> dict[str, Trajectory]:
    problem, schedule = study.problem(task), tested_schedule(study)
    plain, exact = study.best_rate(task), study.best_rate(task, schedule)
    return {
        "gradient_descent": gradient_descent(problem, plain, study.num_steps),
        "exact": gradient_descent(problem, exact, study.num_steps, schedule),
        "adam": adam(problem, _ADAM_RATE, study.num_steps),
    }


def _entry(study: Study, task: str, tests: dict[tuple[str, bool, bool], Trajectory]) -> dict[str, Any]:
    problem, schedule = study.problem(task), tested_schedule(study)
    baselines = {name: summary(path.final) for name, path in _baselines(study, task).items()}
    baselines["gradient_descent"]["rate"] = study.best_rate(task)
    baselines["exact"]["rate"] = study.best_rate(task, schedule)
    variants = {}
    for variant, theta in _variants(task):
        on = tests[variant, theta, True]
        vanilla = tests["update" if variant.startswith("update") else "lr", False, True]
        entry: dict[str, Any] = {"on": summary(on.final)}
        if "teleport" in variant:
            off = tests[variant, theta, False]
            entry["off"] = summary(off.final)
            entry["effect_of_teleport"] = comparison(on.final, off.final, is_paired=True)
            entry["effect_of_meta_training"] = comparison(off.final, vanilla.final, is_paired=False)
            entry["teleports"] = teleport_facts(problem, on, schedule)
        entry["against_vanilla"] = comparison(on.final, vanilla.final, is_paired=False)
        variants[label(variant, theta)] = entry
    start = tests["update", False, True].losses[0, :, 0]
    return {"start": float(start.median()), "baselines": baselines, "variants": variants}


def _with_rate(entry: dict[str, Any]) -> str:
    return f"{number(entry['median'])} ({number(entry['rate'])})"


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the report."""
    baselines = [
        [
            task,
            number(entry["start"]),
            number(entry["baselines"]["adam"]["median"]),
            _with_rate(entry["baselines"]["gradient_descent"]),
            _with_rate(entry["baselines"]["exact"]),
            centre(entry["variants"]["update"]["on"]),
            centre(entry["variants"]["lr"]["on"]),
        ]
        for task, entry in results.items()
    ]
    effects, facts = [], []
    for task, entry in results.items():
        for name, variant in entry["variants"].items():
            if "off" not in variant:
                continue
            runs, exploded = variant["on"]["runs"], variant["on"]["exploded"]
            effects.append(
                [
                    task,
                    name,
                    centre(variant["on"]) + (f", {exploded} of {runs} exploded" if exploded else ""),
                    centre(variant["off"]),
                    times(variant["effect_of_teleport"]),
                    percent(variant["effect_of_teleport"]["functions"]),
                    times(variant["effect_of_meta_training"]),
                    times(variant["against_vanilla"]),
                ]
            )
            did = variant["teleports"]
            facts.append(
                [
                    task,
                    name,
                    number(did["length"]),
                    percent(did["raised"]),
                    number(did["gradient_ratio"]),
                    percent(did["away"]),
                    number(did["distance_ratio"]),
                ]
            )
    theta = [
        [
            task,
            centre(entry["variants"]["update"]["on"]),
            centre(entry["variants"]["update, θ gradient"]["on"]),
            times(entry["variants"]["update, θ gradient"]["against_vanilla"]),
        ]
        for task, entry in results.items()
        if "update, θ gradient" in entry["variants"]
    ]
    return {
        "baselines": markdown(
            [
                "family",
                "start",
                "Adam, 0.3",
                "gradient descent, swept (rate)",
                "the same + exact teleport (rate)",
                "LSTM(update)",
                "LSTM(lr)",
            ],
            baselines,
        ),
        "families": markdown(
            [
                "family",
                "LSTM emits",
                "on",
                "same weights, off",
                "off / on",
                "functions better on",
                "vanilla / off",
                "vanilla / on",
            ],
            effects,
        ),
        "teleports": markdown(
            [
                "family",
                "LSTM emits",
                "length",
                "raised the gradient",
                "gradient ratio",
                "away from the optimum",
                "distance ratio",
            ],
            facts,
        ),
        "theta": markdown(["family", "LSTM(update)", "the same reading the θ gradient", "ratio"], theta),
    }
