"""The contract of torch.optim, held by torch's own AdamW and SGD as controls and by ours."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from teleport_optim import LearnedTeleportOptimizer, MetaOptimizer
from teleport_optim.optim.schedule import TELEPORT_INTERVAL
from tests.helpers.classification import X, Y, network, train
from tests.helpers.comparing import through_file
from tests.helpers.expected_warnings import OF_OURS

pytestmark = OF_OURS

OPTIMIZERS: dict[str, Callable[[Iterable[Any]], Optimizer]] = {
    "ours": lambda params: LearnedTeleportOptimizer(params, total_steps=130),
    "ours open-ended": LearnedTeleportOptimizer,
    "AdamW": lambda params: AdamW(params, lr=1e-2),
    "SGD": lambda params: SGD(params, lr=1e-2, momentum=0.9),
}
everyone = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@everyone
def test_learns(make: Callable[..., Optimizer]) -> None:
    model = network()
    before = F.cross_entropy(model(X), Y).item()
    assert train(model, make(model.parameters()), 30) < before


@everyone
def test_closure_runs_with_gradients_and_gives_the_loss(make: Callable[..., Optimizer]) -> None:
    model = network()
    optimizer = make(model.parameters())

    def closure() -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(F.cross_entropy(network()(X), Y).item())
    assert optimizer.step() is None  # type: ignore[func-returns-value]


@everyone
def test_parameters_and_gradients_stay_the_same_objects(make: Callable[..., Optimizer]) -> None:
    model = network()
    params = list(model.parameters())
    optimizer = make(params)
    F.cross_entropy(model(X), Y).backward()
    grads = [(param.grad, param.grad.clone()) for param in params if param.grad is not None]
    values = [param.detach().clone() for param in params]
    optimizer.step()
    for param, new, (grad, copied), old in zip(params, model.parameters(), grads, values):
        assert new is param
        assert param.grad is grad
        assert torch.equal(grad, copied)
        assert not torch.equal(param, old)


@everyone
def test_missing_gradients_are_passed_over(make: Callable[..., Optimizer]) -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = make([used, unused])
    optimizer.step()
    used.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(unused, torch.ones(3))
    assert not torch.equal(used, torch.ones(3))
    assert unused not in optimizer.state or not optimizer.state[unused]
    unused.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(unused, torch.ones(3))


@everyone
def test_zero_first_gradients_make_no_nan(make: Callable[..., Optimizer]) -> None:
    params = [nn.Parameter(torch.ones(shape)) for shape in ((), (3,), (2, 3), (0, 3), (1, 4, 2), (2, 3, 2, 2))]
    optimizer = make(params)
    for value in (0.0, 0.0, 1.0, 0.0):
        for param in params:
            param.grad = torch.full_like(param, value)
        optimizer.step()
    assert all(torch.isfinite(param).all() for param in params)


@everyone
@pytest.mark.parametrize("kind", ["tensors", "named", "groups", "named groups"])
def test_every_kind_of_parameter_list(make: Callable[..., Optimizer], kind: str) -> None:
    model = network()
    named = list(model.named_parameters())
    params = {
        "tensors": [param for _, param in named],
        "named": named,
        "groups": [{"params": [p for _, p in named[:2]], "lr": 0.0}, {"params": [p for _, p in named[2:]]}],
        "named groups": [{"params": named[:2], "lr": 0.0}, {"params": named[2:]}],
    }[kind]
    optimizer = make(params)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 3)
    for index, (name, value) in enumerate(model.state_dict().items()):
        assert torch.equal(value, before[name]) == ("groups" in kind and index < 2)


@everyone
def test_groups_can_be_added_later(make: Callable[..., Optimizer]) -> None:
    model = network()
    first, *rest = model.children()
    optimizer = make(first.parameters())
    train(model, optimizer, 7)
    optimizer.add_param_group({"params": [p for module in rest for p in module.parameters()]})
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 7)
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


@everyone
@pytest.mark.parametrize("step", [1, 79, 80, 83])
def test_a_state_dict_continues_bit_for_bit(make: Callable[..., Optimizer], step: int) -> None:
    model = network()
    optimizer = make(model.parameters())
    train(model, optimizer, step)
    weights, state = through_file((model.state_dict(), optimizer.state_dict()))
    other = network(seed=9)
    other.load_state_dict(weights)
    resumed = make(other.parameters())
    resumed.load_state_dict(state)
    assert train(model, optimizer, 42) == train(other, resumed, 42)
    for first, second in zip(model.parameters(), other.parameters()):
        assert torch.equal(first, second)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize(
    "checkpoint",
    ["default", MetaOptimizer(4, block_rows=1), MetaOptimizer(4, block_rows=4)],
    ids=["default", "rows normalised", "blocks of four rows"],
)
def test_copies_continue_bit_for_bit(clone: Callable[[Any], Any], checkpoint: str | MetaOptimizer) -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=60, checkpoint=checkpoint)
    train(model, optimizer, 12)
    other, copied = clone((model, optimizer))
    assert len(copied.spec) == len(optimizer.spec) == 2
    assert train(model, optimizer, 40) == train(other, copied, 40)


@everyone
def test_state_holds_tensors_and_a_step(make: Callable[..., Optimizer]) -> None:
    model = network()
    optimizer = make(model.parameters())
    train(model, optimizer, 3)
    for param in model.parameters():
        assert optimizer.state[param]
        assert all(isinstance(value, Tensor) or value is None for value in optimizer.state[param].values())
        if isinstance(optimizer, LearnedTeleportOptimizer):
            assert optimizer.state[param]["step"].item() == 3.0
            assert optimizer.state[param]["exp_avg"].shape == param.shape


@everyone
def test_schedulers_move_the_rate(make: Callable[..., Optimizer]) -> None:
    model = network()
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step >= 2 else 1.0)
    for step in range(4):
        before = model[0].weight.detach().clone()
        train(model, optimizer, 1)
        scheduler.step()
        assert torch.equal(model[0].weight, before) == (step >= 2)


def test_the_gradient_scaler_steps_bare() -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=20)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(5):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(X), Y)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert F.cross_entropy(model(X), Y) < F.cross_entropy(network()(X), Y)


def test_maximize_is_descent_on_the_negative() -> None:
    first, second = network(), network()
    up = LearnedTeleportOptimizer(first.parameters(), total_steps=20, maximize=True)
    down = LearnedTeleportOptimizer(second.parameters(), total_steps=20)
    for _ in range(7):
        for model, optimizer, sign in ((first, up, -1.0), (second, down, 1.0)):
            optimizer.zero_grad()
            (sign * F.cross_entropy(model(X), Y)).backward()
            optimizer.step()
    for one, other in zip(first.parameters(), second.parameters()):
        assert torch.equal(one, other)


def test_weight_decay_replaces_the_learned_decay() -> None:
    ends = []
    for weight_decay in (0.0, 0.5):
        params = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))]
        optimizer = LearnedTeleportOptimizer(params, weight_decay=weight_decay, total_steps=10)
        for param in params:
            param.grad = torch.full_like(param, 0.1)
        optimizer.step()
        ends.append([param.detach() for param in params])
    assert all((decayed < kept).all() for kept, decayed in zip(*ends))


def test_past_total_steps_it_goes_on_and_warns_once() -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=3)
    train(model, optimizer, 3)
    before = model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="step 4 lies past total_steps=3"):
        train(model, optimizer, 1)
    assert not torch.equal(model[0].weight, before)
    train(model, optimizer, 2)


def test_it_teleports_only_with_a_model_and_when_allowed() -> None:
    def teleports(num_steps: int = 1, **options: Any) -> bool:
        model = network()
        if options.pop("with_model", True):
            options["model"] = model
        optimizer = LearnedTeleportOptimizer(model.parameters(), total_steps=100, **options)
        train(model, optimizer, num_steps)
        return optimizer.teleport_size > 0

    assert teleports()
    assert not teleports(teleport=False)
    assert teleports(example_inputs=X)
    assert not teleports(teleport=False, example_inputs=X)
    assert not teleports(with_model=False)
    assert teleports(checkpoint=MetaOptimizer())  # to the balanced point where every run begins
    assert teleports(TELEPORT_INTERVAL + 1)
    assert not teleports(TELEPORT_INTERVAL)
    assert not teleports(TELEPORT_INTERVAL + 1, checkpoint=MetaOptimizer())


def test_sites_outside_the_parameters_are_dropped_with_a_warning() -> None:
    model = network()
    params = [param for name, param in model.named_parameters() if not name.startswith("0.")]
    optimizer = LearnedTeleportOptimizer(params, model=model)
    with pytest.warns(UserWarning, match="0.bias, 0.weight"):
        train(model, optimizer, 1)
    assert [symmetry.id for symmetry in optimizer.spec] == ["2:scaling"]
    train(model, optimizer, TELEPORT_INTERVAL + 1)
    with pytest.warns(UserWarning, match="0.bias, 0.weight"):
        optimizer = LearnedTeleportOptimizer(params, model=model, example_inputs=X)
    assert [symmetry.id for symmetry in optimizer.spec] == ["2:scaling"]


def test_warnings_point_at_the_line_that_makes_or_steps_the_optimizer() -> None:
    model = network()
    params = [param for name, param in model.named_parameters() if not name.startswith("0.")]
    optimizer = LearnedTeleportOptimizer(params, model=model)
    for action in (
        lambda: optimizer.step(),
        lambda: LearnedTeleportOptimizer(params, model=model, example_inputs=X),
    ):
        F.cross_entropy(model(X), Y).backward()
        with pytest.warns(UserWarning, match="no teleports where") as record:
            action()
        assert [warning.filename for warning in record] == [__file__]
