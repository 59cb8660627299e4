"""Experiment 7: other groups than SO(2): permutations of variables, and scalings of pairs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.paper.families import tested_schedule
from benchmarks.paper.figures import draw_curves
from benchmarks.paper.functions import FunctionProblem
from benchmarks.paper.harness import Study, Trajectory, gradient_descent, gradients, separation, summary, teleport_facts
from benchmarks.paper.tables import centre, markdown, number, percent, times

__all__ = ["balance", "permutation_spread", "run", "tables"]

_ALL = ("update", "update+teleport", "lr", "lr+teleport")
_PERMUTATION = ("update", "update+teleport")
_EVOLUTION: dict[str, Any] = {
    "estimator": "pes",
    "num_pairs": 16,
    "sigma": 0.02,
    "learning_rate": 3e-3,
    "clip": 1.0,
    "hidden_size": 20,
}
"""Permutations have no derivative, so both variants are trained by persistent evolution strategies, with a smaller LSTM."""


def balance(problem: FunctionProblem, x: Tensor) -> Tensor:
    """The point of the scaling orbit through ``x = (u, v)`` with ``|u_i| = |v_i|``."""
    u, v = x.chunk(2, dim=-1)
    size = (u * v).abs().sqrt()
    return torch.cat([size * u.sign(), size * v.sign()], dim=-1)


def permutation_spread(problem: FunctionProblem, x: Tensor) -> Tensor:
    """Largest over smallest gradient norm among all orders of the variables of ``x``, minus 1: ``[functions]``."""
    orders = torch.tensor(list(itertools.permutations(range(x.shape[-1]))))
    norms = gradients(problem, x[:, orders]).norm(dim=-1)
    spread: Tensor = norms.amax(dim=1) / norms.amin(dim=1) - 1.0
    return spread


def run(study: Study) -> dict[str, Any]:
    """The gain of teleports per group."""
    study = study.few
    schedule = tested_schedule(study)
    results: dict[str, Any] = {"SO(2)": _variants(study, "ellipse", _ALL, {})}
    results["SO(2)"] |= {"baselines": {}}
    results["scaling"] = _variants(study, "scaled_products", _ALL, {})
    evolution = dict(_EVOLUTION, hidden_size=min(_EVOLUTION["hidden_size"], study.base.hidden_size))
    results["permutation"] = _variants(study, "power_sums", _PERMUTATION, evolution)
    for group, task in (("scaling", "scaled_products"), ("permutation", "power_sums")):
        rate = study.best_rate(task)
        descent = gradient_descent(study.problem(task), rate, study.num_steps)
        results[group]["baselines"] = {"gradient descent, swept": {"rate": rate, **summary(descent.final)}}
    rate = study.best_rate("scaled_products", schedule, balance)
    start = study.problem("scaled_products")
    descent = gradient_descent(start, rate, study.num_steps, schedule, balance)
    results["scaling"]["baselines"]["the same + exact balance"] = {"rate": rate, **summary(descent.final)}
    problem = study.problem("power_sums")
    results["permutation"]["largest_spread"] = float(permutation_spread(problem, problem.params["x"]).max())
    return results


def _variants(study: Study, task: str, variants: tuple[str, ...], changes: dict[str, Any]) -> dict[str, Any]:
    problem, schedule = study.problem(task), tested_schedule(study)
    vanilla: dict[str, Trajectory] = {}
    entries: dict[str, Any] = {}
    curves = {}
    for variant in variants:
        config = study.config(task, variant, **changes)
        on = study.test(config)
        kind = variant.partition("+")[0]
        vanilla.setdefault(kind, on)
        entry: dict[str, Any] = {"on": summary(on.final)}
        curves[variant] = on.losses
        if "teleport" in variant:
            off = study.test(config, "off")
            entry |= separation(on, off, vanilla[kind])
            entry["teleports"] = teleport_facts(replace(problem, optimum=None), on, schedule)
            curves[f"{variant}, off"] = off.losses
        entries[variant] = entry
    draw_curves(study.out / f"groups_{task}.png", {task: curves})
    return {"start": float(problem.losses(problem.params, *problem.sample_batch(torch.Generator())).median())} | {
        "variants": entries
    }


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The table of the report."""
    rows = []
    for group, result in results.items():
        for name, entry in result["baselines"].items():
            rows.append([group, f"{name} (rate {number(entry['rate'])})", number(entry["median"]), *[""] * 6])
        for name, entry in result["variants"].items():
            row = [group, name, centre(entry["on"])]
            if "off" in entry:
                row += [
                    centre(entry["off"]),
                    times(entry["effect_of_teleport"]),
                    times(entry["effect_of_meta_training"]),
                    times(entry["against_vanilla"]),
                    number(entry["teleports"]["length"]),
                    percent(entry["teleports"]["raised"]),
                ]
            else:
                row += [""] * 6
            rows.append(row)
    columns = [
        "group",
        "rule",
        "final loss",
        "same weights, off",
        "off / on",
        "vanilla / off",
        "vanilla / on",
        "length",
        "raised the gradient",
    ]
    return {"groups": markdown(columns, rows)}
