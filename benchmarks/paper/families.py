"""Experiment 3: all variants on the Booth and Rosenbrock families, with teleports on and off."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.paper.figures import draw_curves, draw_trajectories
from benchmarks.paper.harness import (
    Study,
    Teleports,
    Trajectory,
    adam,
    comparison,
    gradient_descent,
    random_angle,
    separation,
    summary,
    teleport_facts,
)
from benchmarks.paper.tables import centre, markdown, number, percent, times
from benchmarks.paper.training import SCHEDULE
from teleport_optim.rng import generator_for

__all__ = ["FAMILIES", "VARIANTS", "run", "tables", "tested_schedule"]

FAMILIES = ("ellipse_fixed", "ellipse", "rosenbrock_fixed", "rosenbrock")
VARIANTS = ("update", "update+teleport", "lr", "lr+teleport", "lr+teleport+momentum")
"""Outputs of the LSTM."""

_THETA: dict[str, tuple[str, ...]] = {
    "update": ("ellipse", "rosenbrock"),
    "update+teleport": FAMILIES,
    "lr+teleport": ("ellipse", "rosenbrock"),
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
        baselines = _baselines(study, task)
        results[task] = _entry(study, task, tests, baselines)
        curves[task] = _curves(tests) | {
            "gradient descent, swept": baselines["gradient_descent"][1].losses,
            "Adam, 0.3": baselines["adam"][1].losses,
        }
        first = {
            variant: Trajectory(*(part[0] for part in tests[variant, False, "learned"]))
            for variant in ("update", "update+teleport", "lr+teleport")
        }
        first["gradient descent + exact teleport"] = baselines["exact"][1]
        paths[f"{task}, test function 0, meta-seed {study.seeds[0]}"] = (problem, 0, first)
    draw_curves(study.out / "families_curves.png", curves)
    draw_trajectories(study.out / "families_paths.png", paths)
    return results


def _curves(tests: dict[tuple[str, bool, Teleports], Trajectory]) -> dict[str, Tensor]:
    """The losses of the variants without the theta gradient, teleports on and off."""
    curves = {}
    for (variant, theta, mode), path in tests.items():
        if not theta and mode != "random":
            curves[variant if mode == "learned" else f"{variant}, off"] = path.losses
    return curves


def _tests(study: Study, task: str) -> dict[tuple[str, bool, Teleports], Trajectory]:
    """By variant, theta gradient, and what was done with teleports."""
    tests: dict[tuple[str, bool, Teleports], Trajectory] = {}
    for variant, theta in _variants(task):
        config, chosen = study.config(task, variant, theta_gradient=theta), _study(study, variant)
        modes: tuple[Teleports, ...] = ("learned", "off", "random") if "teleport" in variant else ("learned",)
        for mode in modes:
            tests[variant, theta, mode] = chosen.test(config, mode)
    return tests


def _baselines(study: Study, task: str) -> dict[str, tuple[float, Trajectory]]:
    """By name, with the rate."""
    problem, schedule = study.problem(task), tested_schedule(study)
    plain, exact = study.best_rate(task), study.best_rate(task, schedule)
    random = study.best_rate(task, schedule, random_angle(generator_for("paper", "angles", "sweep", task)))
    teleport = random_angle(generator_for("paper", "angles", "baseline", task))
    return {
        "gradient_descent": (plain, gradient_descent(problem, plain, study.num_steps)),
        "exact": (exact, gradient_descent(problem, exact, study.num_steps, schedule)),
        "random": (random, gradient_descent(problem, random, study.num_steps, schedule, teleport)),
        "adam": (_ADAM_RATE, adam(problem, _ADAM_RATE, study.num_steps)),
    }


def _entry(
    study: Study,
    task: str,
    tests: dict[tuple[str, bool, Teleports], Trajectory],
    baselines: dict[str, tuple[float, Trajectory]],
) -> dict[str, Any]:
    problem, schedule = study.problem(task), tested_schedule(study)
    variants = {}
    for variant, theta in _variants(task):
        on = tests[variant, theta, "learned"]
        vanilla = tests["update" if variant.startswith("update") else "lr", False, "learned"]
        entry: dict[str, Any] = {
            "on": summary(on.final),
            "against_vanilla": comparison(on.final, vanilla.final, is_paired=False),
        }
        if "teleport" in variant:
            entry |= separation(on, tests[variant, theta, "off"], vanilla)
            entry["random"] = summary(tests[variant, theta, "random"].final)
            entry["teleports"] = teleport_facts(problem, on, schedule)
        entry["against_update"] = comparison(on.final, tests["update", False, "learned"].final, is_paired=False)
        variants[label(variant, theta)] = entry
    start = tests["update", False, "learned"].losses[0, :, 0]
    of_baselines = {name: {"rate": rate, **summary(path.final)} for name, (rate, path) in baselines.items()}
    return {"start": float(start.median()), "baselines": of_baselines, "variants": variants}


def _with_rate(entry: dict[str, Any]) -> str:
    return f"{number(entry['median'])} ({number(entry['rate'])})"


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the report."""
    with_teleports = [
        (task, name, variant)
        for task, entry in results.items()
        for name, variant in entry["variants"].items()
        if "off" in variant
    ]
    with_theta = {task: entry for task, entry in results.items() if "update, θ gradient" in entry["variants"]}
    rows = {
        "baselines": [_baseline_row(task, entry) for task, entry in results.items()],
        "families": [_effect_row(*each) for each in with_teleports],
        "teleports": [_teleport_row(*each) for each in with_teleports],
        "theta": [_theta_row(task, entry["variants"]) for task, entry in with_theta.items()],
    }
    return {name: markdown([*table[0]], [[*row.values()] for row in table]) for name, table in rows.items()}


def _baseline_row(task: str, entry: dict[str, Any]) -> dict[str, str]:
    baselines, variants = entry["baselines"], entry["variants"]
    return {
        "family": task,
        "start": number(entry["start"]),
        "Adam, 0.3": number(baselines["adam"]["median"]),
        "gradient descent, swept (rate)": _with_rate(baselines["gradient_descent"]),
        "with random angles (rate)": _with_rate(baselines["random"]),
        "with exact teleports (rate)": _with_rate(baselines["exact"]),
        "LSTM(update)": centre(variants["update"]["on"]),
        "LSTM(lr)": centre(variants["lr"]["on"]),
    }


def _effect_row(task: str, name: str, variant: dict[str, Any]) -> dict[str, str]:
    runs, exploded = variant["on"]["runs"], variant["on"]["exploded"]
    return {
        "family": task,
        "LSTM emits": name,
        "on": centre(variant["on"]) + (f", {exploded} of {runs} exploded" if exploded else ""),
        "same weights, off": centre(variant["off"]),
        "same weights, random angles": centre(variant["random"]),
        "off / on": times(variant["effect_of_teleport"]),
        "functions better on": percent(variant["effect_of_teleport"]["functions"]),
        "vanilla / off": times(variant["effect_of_meta_training"]),
        "vanilla / on": times(variant["against_vanilla"]),
        "LSTM(update) / on": times(variant["against_update"]),
    }


def _teleport_row(task: str, name: str, variant: dict[str, Any]) -> dict[str, str]:
    facts = variant["teleports"]
    return {
        "family": task,
        "LSTM emits": name,
        "length": number(facts["length"]),
        "raised the gradient": percent(facts["raised"]),
        "gradient ratio": number(facts["gradient_ratio"]),
        "away from the optimum": percent(facts["away"]),
        "distance ratio": number(facts["distance_ratio"]),
    }


def _theta_row(task: str, variants: dict[str, Any]) -> dict[str, str]:
    reading = variants["update, θ gradient"]
    return {
        "family": task,
        "LSTM(update)": centre(variants["update"]["on"]),
        "the same reading the θ gradient": centre(reading["on"]),
        "ratio": times(reading["against_vanilla"]),
    }
