"""Kills a meta-training run at 20 random moments and resumes it each time; it must end as an undisturbed one does.

PYTHONPATH=. python tests/scripts/kill_at_random.py FOLDER
"""

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo  # for seconds, by every process that makes an optimizer: once, before they fork

from benchmarks.paper.functions import task_path
from benchmarks.paper.training import PaperConfig, learner_of

NUM_KILLS = 20
LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT
"""Whether a child has ended, without taking note of it."""
CONFIG = PaperConfig(
    estimator="pes+tbptt",
    variant="lr+teleport+momentum",
    tasks=(task_path("ellipse"), task_path("rosenbrock")),
    num_outer_steps=100,
    num_tasks=2,
    num_pairs=2,
    min_horizon=10,
    max_horizon=20,
    truncation=4,
    validate_every=10,
    num_validation=1,
    hidden_size=3,
)


def run(config: PaperConfig) -> None:
    for _ in learner_of(config, resume=(Path(config.run_dir) / "config.json").exists()).run():
        pass


def run_in_child(config: PaperConfig) -> int:
    """The process number of a child that runs, or goes on with, the meta-training."""
    child = os.fork()
    if child == 0:
        run(config)
        os._exit(0)
    return child


def num_logged(config: PaperConfig) -> int:
    """Outer steps in the log of a run, at least; the last line may be written just now."""
    log = Path(config.run_dir) / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def outcome(config: PaperConfig) -> tuple[list[dict[str, object]], list[torch.Tensor]]:
    log = [json.loads(line) for line in (Path(config.run_dir) / "log.jsonl").read_text().splitlines()]
    state = torch.load(Path(config.run_dir) / "state.pt", weights_only=True)
    return [line | {"seconds": 0} for line in log], [state["theta"], state["average"], state["best"]]


def main(folder: str) -> None:
    torch.set_num_threads(1)
    source = random.Random(0)
    undisturbed, disturbed = (replace(CONFIG, run_dir=f"{folder}/{name}") for name in ("undisturbed", "disturbed"))
    start = time.perf_counter()
    os.waitpid(run_in_child(undisturbed), 0)
    duration = time.perf_counter() - start
    num_interrupted = 0
    for _ in range(NUM_KILLS):
        num_steps = num_logged(disturbed) + source.randint(0, 7)
        child = run_in_child(disturbed)
        while num_logged(disturbed) < num_steps and os.waitid(os.P_PID, child, LOOK) is None:
            time.sleep(0.001)
        time.sleep(source.uniform(0.0, 2.0 * duration / CONFIG.num_outer_steps))  # Somewhere in a step or between two.
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        num_interrupted += os.WIFSIGNALED(status)
    os.waitpid(run_in_child(disturbed), 0)
    (log, weights), (expected_log, expected_weights) = outcome(disturbed), outcome(undisturbed)
    assert num_interrupted >= NUM_KILLS / 2, f"the run was over after {num_interrupted} kills: they came too late"
    assert log == expected_log
    assert len(log) == CONFIG.num_outer_steps
    assert all(torch.equal(one, other) for one, other in zip(weights, expected_weights))
    print(f"killed {num_interrupted} times, nothing lost")


if __name__ == "__main__":
    main(sys.argv[1])
