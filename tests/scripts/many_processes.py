"""Meta-training in two and three processes must take the outer steps of one, for every estimator, and go on in any number.

PYTHONPATH=. python tests/scripts/many_processes.py FOLDER
"""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo  # for seconds, by every process that makes an optimizer: once, before they fork

from benchmarks.paper.functions import task_path
from benchmarks.paper.training import PaperConfig, learner_of
from teleport_optim.meta_training import process_group
from teleport_optim.meta_training.config import ESTIMATOR_NAMES
from teleport_optim.meta_training.process_group import ProcessGroup, WorkerLostError, join

CONFIG = PaperConfig(
    variant="lr+teleport",
    tasks=(task_path("ellipse"), task_path("convex_quadratic")),
    num_outer_steps=6,
    num_tasks=3,
    num_pairs=3,
    min_horizon=8,
    max_horizon=12,
    truncation=4,
    validate_every=3,
    num_validation=2,
    hidden_size=3,
)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def in_processes(size: int, work: Callable[[ProcessGroup], None]) -> list[int]:
    """Exit codes of ``size`` processes that do ``work`` together."""
    port, children = free_port(), []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            code = 1
            try:
                with join("cpu") as group:
                    work(group)
                code = 0
            except WorkerLostError:
                code = 3
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def train(config: PaperConfig, size: int, num_steps: int, *, resume: bool = False) -> torch.Tensor:
    """The weights after ``num_steps`` outer steps in ``size`` processes, as the first one wrote them."""

    def work(group: ProcessGroup) -> None:
        for report in learner_of(config, group, resume=resume).run():
            if report.step == num_steps:
                break

    codes = in_processes(size, work)
    assert codes == [0] * size, codes
    weights: torch.Tensor = torch.load(Path(config.run_dir) / "state.pt", weights_only=True)["theta"]
    return weights


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # So that rounding is far below what a wrong share of work would do.
    for estimator in ESTIMATOR_NAMES:
        config = replace(CONFIG, estimator=estimator)
        alone = train(replace(config, run_dir=f"{folder}/{estimator}-1"), 1, 6)
        for size in (2, 3):
            together = train(replace(config, run_dir=f"{folder}/{estimator}-{size}"), size, 6)
            torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)
        moving = replace(config, run_dir=f"{folder}/{estimator}-moving")
        train(moving, 3, 2)
        train(moving, 1, 3, resume=True)
        torch.testing.assert_close(train(moving, 2, 6, resume=True), alone, rtol=1e-9, atol=1e-11)
        fewer = train(replace(config, run_dir=f"{folder}/{estimator}-fewer", num_tasks=2), 1, 6)
        assert not torch.allclose(fewer, alone, rtol=1e-3), "the comparison would not notice a missing share"
        print(f"{estimator}: one, two and three processes agree")

    lost = replace(CONFIG, run_dir=f"{folder}/lost", num_outer_steps=10**6)

    def die(group: ProcessGroup) -> None:
        for report in learner_of(lost, group).run():
            if report.step == 3 and group.rank == 1:
                os._exit(9)

    start = time.perf_counter()
    assert in_processes(3, die) == [3, 9, 3]
    assert time.perf_counter() - start < process_group.TIMEOUT.total_seconds() / 2, (
        "the loss was not noticed, but waited out"
    )
    assert next(learner_of(lost, resume=True).run()).step == 4
    print("a lost process ends the run, which goes on in one")


if __name__ == "__main__":
    main(sys.argv[1])
