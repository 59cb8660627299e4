"""Options, tensors and gradients that are refused, and steps that are skipped."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_optim import LearnedTeleportOptimizer
from tests.helpers.classification import X, Y, network, seeded, train
from tests.helpers.expected_warnings import OF_OURS

pytestmark = OF_OURS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "-1.0"),
        ({"lr": float("nan")}, "nan"),
        ({"lr": torch.ones(2)}, r"\(2,\)"),
        ({"weight_decay": -0.5}, "-0.5"),
        ({"weight_decay": float("inf")}, "inf"),
        ({"total_steps": 0}, "total_steps value: 0"),
        ({"total_steps": -3}, "-3"),
        ({"total_steps": 1.5}, "1.5"),
        ({"checkpoint": "no such file"}, "no such file"),
    ],
)
def test_bad_hyper_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        LearnedTeleportOptimizer(model.parameters(), **options)


def test_other_bad_input_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="empty parameter list"):
        LearnedTeleportOptimizer([])
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
        LearnedTeleportOptimizer(model.parameters(), model=[])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got str"):
        LearnedTeleportOptimizer.for_model("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(2, 2\) is not in the model \(Sequential\)"):
        LearnedTeleportOptimizer([nn.Parameter(torch.ones(2, 2))], model=model)
    with pytest.raises(ValueError, match="total_steps is one number"):
        LearnedTeleportOptimizer(
            [{"params": [model[0].weight], "total_steps": 5}, {"params": [model[0].bias], "total_steps": 6}]
        )


def test_bad_gradients_are_refused_and_change_nothing() -> None:
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = LearnedTeleportOptimizer([good, bad])
    good.grad, bad.grad = torch.ones(3), torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="parameter 1 is sparse"):
        optimizer.step()
    assert torch.equal(good, torch.ones(3))
    assert not optimizer.state


pytestmark = [
    pytest.mark.filterwarnings("ignore:the state of an open-ended run is saved"),
    pytest.mark.filterwarnings("ignore:lr has changed"),
    pytest.mark.filterwarnings("ignore:an optimizer of a single matrix"),
    pytest.mark.filterwarnings("ignore:lr=1e-35 is a factor"),
]


def snapshot(model: nn.Module, optimizer: LearnedTeleportOptimizer) -> list[Tensor]:
    """Parameters and all state but the counts of skipped steps."""
    slots = [value for own in optimizer.state.values() for key, value in own.items() if key != "skipped"]
    return [value.clone() for value in [*model.parameters(), *slots]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [0, 3, 20, 40])
def test_a_bad_gradient_skips_the_step_and_is_counted(value: float, step: int) -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=80)
    train(model, optimizer, step)
    before = snapshot(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        model[2].weight.grad[1, 2] = value  # type: ignore[index]
        if optimizer.stats().num_skipped_steps == 0:
            with pytest.warns(UserWarning, match=r"gradient of 2\.weight is not finite.*stats") as record:
                optimizer.step()
            assert [warning.filename for warning in record] == [__file__]
        else:
            optimizer.step()
    after = snapshot(model, optimizer)
    if step:
        assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))
    assert all(bool(torch.isfinite(entry).all()) or entry.shape == (2,) for entry in after)
    stats = optimizer.stats()
    assert (stats.num_steps, stats.num_skipped_steps) == (step, 3)
    assert {name for name, own in stats.tensors.items() if own.num_skipped_steps == 3} == {"2.weight"}
    shadow = network()
    unharmed = LearnedTeleportOptimizer.for_model(shadow, total_steps=80)
    train(shadow, unharmed, step)
    assert train(model, optimizer, 20) == train(shadow, unharmed, 20)


def losses_with_bad_gradients(seed: int) -> tuple[float, float, int]:
    """First and last loss of a random small network on a random task, one gradient in ten of which is spoilt."""
    source = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    width, depth = source.choice([4, 8, 16, 32]), source.choice([1, 2, 3])
    activation = source.choice([nn.ReLU, nn.Tanh, nn.GELU, nn.LeakyReLU])
    is_classifier = source.random() < 0.5

    def make() -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(5, width)]
        for _ in range(depth):
            layers += [activation(), nn.Linear(width, width)]
        if source.random() < 0.3:
            layers.append(nn.BatchNorm1d(width))
        return nn.Sequential(*layers, activation(), nn.Linear(width, 3))

    model = seeded(make, seed)
    x = torch.randn(64, 5, generator=generator)
    y = torch.randint(3, (64,), generator=generator) if is_classifier else torch.randn(64, 3, generator=generator)
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=source.choice([None, 60]))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        output = model(x)
        loss = F.cross_entropy(output, y) if is_classifier else F.mse_loss(output, y)
        loss.backward()
        losses.append(loss.item())
        if source.random() < 0.1:
            param = source.choice(list(model.parameters()))
            param.grad.view(-1)[source.randrange(param.numel())] = source.choice([math.nan, math.inf, -math.inf])  # type: ignore[union-attr]
        optimizer.step()
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    return losses[0], losses[-1], optimizer.stats().num_skipped_steps


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a step is skipped")
def test_none_of_a_hundred_networks_diverges_under_bad_gradients() -> None:
    results = [losses_with_bad_gradients(seed) for seed in range(100)]
    assert sum(skipped for *_, skipped in results) > 300
    assert [seed for seed, (first, last, _) in enumerate(results) if not last < first] == []


UNUSABLE: dict[str, Callable[[], Tensor]] = {
    "meta device": lambda: nn.Parameter(torch.empty(3, 2, device="meta")),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:.*quantize.*")
@pytest.mark.parametrize("reason", UNUSABLE)
def test_tensors_that_cannot_be_optimized_are_refused_at_once(reason: str) -> None:
    param = UNUSABLE[reason]()
    with pytest.raises(ValueError, match=reason):
        LearnedTeleportOptimizer([param])
    optimizer = LearnedTeleportOptimizer([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=reason):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def test_parameters_on_several_devices_are_refused() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = LearnedTeleportOptimizer([first, second])
    first.grad = torch.ones(2)
    elsewhere = nn.Parameter(torch.ones(2, device="meta"))
    elsewhere.grad = torch.ones(2, device="meta")
    torch.utils.swap_tensors(second, elsewhere)
    with pytest.raises(RuntimeError, match=r"several devices \(cpu, meta\): make one optimizer for each"):
        optimizer.step()
    assert torch.equal(first, torch.ones(2))
    assert not optimizer.state
