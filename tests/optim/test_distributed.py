"""Many processes on torch's own engine: every rank takes the step that one process would take."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from teleport_optim import LearnedTeleportOptimizer, find_symmetries
from teleport_optim.optim import schedule

pytestmark = pytest.mark.filterwarnings("ignore:.*barrier.*:UserWarning")

NUM_STEPS = 45
INTERVAL = 20
"""Steps before the second teleport, which then falls into the run."""
X = torch.randn(36, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(3, (36,), generator=torch.Generator().manual_seed(1))
Result = dict[str, Any]


def network() -> nn.Sequential:
    """Widths that neither 2 nor 3 processes divide evenly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(6, 11), nn.ReLU(), nn.Linear(11, 10), nn.ReLU(), nn.Linear(10, 3)]
        return nn.Sequential(*layers).double()


def full_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(model: nn.Module, optimizer: LearnedTeleportOptimizer, inputs: Tensor, targets: Tensor, steps: int) -> Result:
    """What comes of training, whole, as every process sees it."""
    sizes = []
    averages: dict[str, Tensor] = {}
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        sizes.append(optimizer.teleport_size)
        if step == steps - 4:  # before the average goes to the parameters
            averages = {name: full_tensor(value) for name, value in optimizer.averaged_parameters().items()}
    parameters = {name.removeprefix("module."): full_tensor(p.detach()).clone() for name, p in model.named_parameters()}
    skipped = optimizer.stats().num_skipped_steps
    return {"parameters": parameters, "averages": averages, "sizes": sizes, "skipped": skipped}


def alone(steps: int = NUM_STEPS) -> tuple[LearnedTeleportOptimizer, Result]:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=NUM_STEPS)
    return optimizer, train(model, optimizer, X, Y, steps)


def part(tensor: Tensor) -> Tensor:
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def replicated() -> Result:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(DistributedDataParallel(model), total_steps=NUM_STEPS)
    return train(DistributedDataParallel(model), optimizer, part(X), part(Y), NUM_STEPS)


def replicated_with_a_bad_gradient_on_one_rank() -> Result:
    model = DistributedDataParallel(network())
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=NUM_STEPS)
    train(model, optimizer, part(X), part(Y), 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        bad = part(X) if dist.get_rank() else torch.full_like(part(X), torch.nan)
        train(model, optimizer, bad, part(Y), 1)
    return train(model, optimizer, part(X), part(Y), NUM_STEPS - 7)


def sharded() -> Result:
    model = network()
    spec = find_symmetries(model, X, groups=["scaling"])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=NUM_STEPS, symmetries=spec)
    return train(model, optimizer, part(X), part(Y), NUM_STEPS)


def split_by_tensors() -> Result:
    model = network()
    spec = find_symmetries(model, X, groups=["scaling"])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()})
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=NUM_STEPS, symmetries=spec)
    return train(model, optimizer, X, Y, NUM_STEPS)


def sharded_and_resumed_from_one_process() -> Result:
    """The state of one process goes to shards and back, through torch.distributed.checkpoint, by name."""
    first = network()
    optimizer = LearnedTeleportOptimizer.for_model(first, total_steps=NUM_STEPS)
    train(first, optimizer, X, Y, 13)
    full = get_optimizer_state_dict(first, optimizer, options=StateDictOptions(full_state_dict=True))
    model = copy.deepcopy(first)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    resumed = LearnedTeleportOptimizer.for_model(model, total_steps=NUM_STEPS, symmetries=optimizer.spec)
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, resumed, full, options=options)
    back = get_optimizer_state_dict(model, resumed, options=options)
    for name, slots in full["state"].items():
        for key, value in slots.items():
            if key != "fingerprint":  # that of a part, which is another in every process
                assert torch.equal(full_tensor(back["state"][name][key]), value), (name, key)
    return train(model, resumed, part(X), part(Y), NUM_STEPS - 13)


def flattened() -> Result:
    model = FullyShardedDataParallel(network(), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="flattened shard of FullyShardedDataParallel"):
        LearnedTeleportOptimizer(model.parameters())
    return {}


JOBS = (
    replicated,
    replicated_with_a_bad_gradient_on_one_rank,
    sharded,
    split_by_tensors,
    sharded_and_resumed_from_one_process,
    flattened,
)


def run_rank(rank: int, world_size: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    schedule.TELEPORT_INTERVAL = INTERVAL
    dist.init_process_group("gloo", rank=rank, world_size=world_size, init_method=f"file://{folder}/rendezvous")
    try:
        results: dict[str, Result | str] = {}
        for job in JOBS:
            try:
                results[job.__name__] = job()
            except Exception:
                results[job.__name__] = traceback.format_exc()
        torch.save(results, folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def often_controlled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "TELEPORT_INTERVAL", INTERVAL)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Result]]:
    """What every process got from every job."""
    folder = tmp_path_factory.mktemp("ranks")
    # What takes seconds to import is imported once, before processes fork.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, "torch._dynamo"])
    multiprocessing.start_processes(run_rank, (request.param, folder), nprocs=request.param, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_every_rank_takes_the_step_of_one_process(job: Callable[[], Result], ranks: list[dict[str, Result]]) -> None:
    results = [results[job.__name__] for results in ranks]
    for result in results:
        assert not isinstance(result, str), result
    if job is flattened:
        return
    _, expected = alone()
    for result in results:
        assert result["sizes"] == results[0]["sizes"]
        assert result["skipped"] == ("bad_gradient" in job.__name__)
        for name, value in result["parameters"].items():
            assert torch.equal(value, results[0]["parameters"][name])
            torch.testing.assert_close(value, expected["parameters"][name], rtol=1e-4, atol=1e-5)
        assert result["averages"].keys() == expected["averages"].keys()
        for name, value in result["averages"].items():
            torch.testing.assert_close(value, expected["averages"][name], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(value, expected["parameters"][name], rtol=1e-3)
    assert any(results[0]["sizes"])
    start = dict(network().named_parameters())
    assert all(not torch.allclose(value, start[name], atol=1e-2) for name, value in expected["parameters"].items())


def test_nothing_is_drawn_at_random() -> None:
    before = torch.random.get_rng_state()
    alone()
    assert torch.equal(torch.random.get_rng_state(), before)
