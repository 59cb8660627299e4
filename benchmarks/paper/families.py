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
"""What the LSTM emits."""

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
    baselines = [
        [
            task,
            number(entry["start"]),
            number(entry["baselines"]["adam"]["median"]),
            _with_rate(entry["baselines"]["gradient_descent"]),
            _with_rate(entry["baselines"]["random"]),
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
                    centre(variant["random"]),
                    times(variant["effect_of_teleport"]),
                    percent(variant["effect_of_teleport"]["functions"]),
                    times(variant["effect_of_meta_training"]),
                    times(variant["against_vanilla"]),
                    times(variant["against_update"]),
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
                "with random angles (rate)",
                "with exact teleports (rate)",
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
                "same weights, random angles",
                "off / on",
                "functions better on",
                "vanilla / off",
                "vanilla / on",
                "LSTM(update) / on",
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
