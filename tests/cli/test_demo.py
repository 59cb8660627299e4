"""The demo's training runs, measures and picture."""

import math
from pathlib import Path

import pytest
import torch

from teleport_optim import MetaOptimizer, save_checkpoint
from teleport_optim.cli.demo import plot
from teleport_optim.cli.demo_runs import (
    LEARNING_RATES,
    NUM_RUNS,
    Contender,
    TrainingRun,
    compare,
    demo_data,
    make_network,
    run_training,
    steps_to_target,
)
from teleport_optim.cli.training import adamw, cosine, learned
from teleport_optim.optim.controls import Controls
from teleport_optim.optim.schedule import TELEPORT_INTERVAL


def run_with(losses: tuple[float, ...]) -> TrainingRun:
    return TrainingRun(tuple(range(len(losses))), losses, (0.0,) * len(losses), accuracy=0.5, milliseconds=1.0)


def test_rescaled_start_is_the_same_function_with_other_parameters() -> None:
    usual, rescaled = make_network(0).double(), make_network(0, rescaling=2.0).double()
    inputs = torch.randn(16, 64, dtype=torch.float64)
    torch.testing.assert_close(rescaled(inputs), usual(inputs), rtol=1e-4, atol=1e-5)
    log_factors = (rescaled[0].bias / usual[0].bias).detach().log()
    assert 1.5 < float(log_factors.std()) < 2.5


def test_networks_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = make_network(1), make_network(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, make_network(2)[0].weight)


def test_run_is_reproducible_and_leaves_the_model_alone() -> None:
    model = make_network(0)
    before = model[0].weight.clone()
    first, second = (run_training(model, learned(), demo_data(), steps=12, seed=0) for _ in range(2))
    assert first.losses == second.losses
    assert first.steps == (0, 5, 10, 12)
    assert first.losses[-1] < first.losses[0]
    assert torch.equal(model[0].weight, before)


def test_optimizers_start_from_the_same_loss() -> None:
    model = make_network(0)
    runs = [
        run_training(model, recipe, demo_data(), steps=2, seed=0)
        for recipe in (adamw(1e-3), learned(MetaOptimizer(), teleport=False), learned())
    ]
    assert len({run.losses[0] for run in runs}) == 1
    assert len({run.losses[-1] for run in runs}) >= 2


def test_a_run_that_diverges_ends_at_infinity() -> None:
    run = run_training(make_network(0), adamw(1e30), demo_data(), steps=20, seed=0)
    assert run.losses[-1] == math.inf


def test_teleports_are_recorded(tmp_path: Path) -> None:
    balancing = MetaOptimizer()
    balancing.readout_bias.data[Controls._fields.index("balance")] = 1.0
    path = save_checkpoint(balancing, tmp_path / "balancing.safetensors")
    run = run_training(make_network(0, rescaling=2.0), learned(path), demo_data(), steps=TELEPORT_INTERVAL + 2, seed=0)
    assert [step for step, size in enumerate(run.teleport_sizes) if size > 0] == [0, TELEPORT_INTERVAL]
    assert not any(
        run_training(
            make_network(0), learned(MetaOptimizer(), teleport=False), demo_data(), steps=TELEPORT_INTERVAL + 2, seed=0
        ).teleport_sizes
    )


def test_schedule_warms_up_and_falls_to_zero() -> None:
    rates = [cosine(100)(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.01


def test_steps_to_target_of_the_reference_itself_is_its_length() -> None:
    falling = run_with((4.0, 3.0, 2.0, 1.0))
    assert steps_to_target(falling, falling.losses[-1]) == 3
    assert steps_to_target(run_with((4.0, 1.0, 0.5, 0.2)), falling.losses[-1]) == 1
    assert steps_to_target(run_with((4.0, 3.0, 2.0, math.inf)), falling.losses[-1]) == math.inf


def test_medians_over_seeds() -> None:
    contender = Contender("any", tuple(run_with((1.0, last)) for last in (0.1, 0.3, math.inf)))
    assert contender.final_loss == 0.3
    assert contender.curve == [1.0, 0.3]


def test_comparison_and_picture(tmp_path: Path) -> None:
    reports: list[str] = []
    contenders = compare(
        [make_network(0), make_network(1)], demo_data(), steps=6, report=lambda name, loss: reports.append(name)
    )
    assert len(reports) == NUM_RUNS * 2 * 6
    assert [len(contender.runs) for contender in contenders] == [2, 2, 2, 2]
    assert [contender.is_reference for contender in contenders] == [False, True, False, False]
    swept = {f"AdamW tuned ({lr:g})" for lr in LEARNING_RATES}
    assert contenders[1].name in swept
    assert swept <= set(reports)
    plot([("one", contenders), ("two", contenders)], tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
