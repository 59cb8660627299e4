"""Kills a meta-training run at 20 random moments and resumes it each time; it must end as an undisturbed one does.

python kill_at_random.py FOLDER
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

from teleport_optim.meta_training.config import Config
from teleport_optim.meta_training.learner import Learner

NUM_KILLS = 20
CONFIG = Config(
    estimator="pes+tbptt",
    variant="lr+teleport+momentum",
    tasks=("ellipse", "rosenbrock"),
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


def run(config: Config) -> None:
    for _ in Learner(config, resume=(Path(config.run_dir) / "config.json").exists()).run():
        pass


def run_in_child(config: Config) -> int:
    """The process number of a child that runs, or goes on with, the meta-training."""
    child = os.fork()
    if child == 0:
        run(config)
        os._exit(0)
    return child


def outcome(config: Config) -> tuple[list[dict[str, object]], list[torch.Tensor]]:
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
        child = run_in_child(disturbed)
        time.sleep(source.uniform(0.0, duration / 12))
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
