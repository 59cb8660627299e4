"""The contract of torch.optim, held by torch's own AdamW and SGD as controls and by ours."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from teleport_optim import LearnedTeleportOptimizer, MetaOptimizer, find_symmetries
from teleport_optim.optim.schedule import TELEPORT_INTERVAL

pytestmark = [
    pytest.mark.filterwarnings("ignore:the state of an open-ended run is saved"),
    pytest.mark.filterwarnings("ignore:lr has changed"),
    pytest.mark.filterwarnings("ignore:an optimizer of a single matrix"),
    pytest.mark.filterwarnings("ignore:lr=1e-35 is a factor"),
]
NO_STEP = 1e-35
"""A rate at which nothing moves but by teleports; at a rate of 0 these rest, too."""

OPTIMIZERS: dict[str, Callable[[Iterable[Any]], Optimizer]] = {
    "ours": lambda params: LearnedTeleportOptimizer(params, total_steps=130),
    "ours open-ended": LearnedTeleportOptimizer,
    "AdamW": lambda params: AdamW(params, lr=1e-2),
    "SGD": lambda params: SGD(params, lr=1e-2, momentum=0.9),
}
everyone = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 3))


X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (32,), generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> float:
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
    return loss.item()


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
    stream = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), stream)
    stream.seek(0)
    weights, state = torch.load(stream, weights_only=True)
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


class Residual(nn.Module):
    """A network that is no sequence of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        for norm in (self.stem[1], self.inner[1], self.outer[1]):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = (x + self.outer(self.inner(x))).relu()
        return self.head(self.hidden(x.mean((2, 3))).relu())  # type: ignore[no-any-return]


class Tied(nn.Module):
    """One weight and one bias under two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu() + self.second(-x).relu())  # type: ignore[no-any-return]


class Named(nn.Module):
    """Takes its inputs by name only, and one of them is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, *, x: Tensor, sign: float) -> Tensor:
        return sign * self.inner(x)  # type: ignore[no-any-return]


class Branching(nn.Module):
    """Which way the data go depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else self.inner(-x)  # type: ignore[no-any-return]


IMAGES = torch.randn(32, 2, 5, 5, generator=torch.Generator().manual_seed(2))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def step_on(optimizer: Optimizer, output: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(output, Y)
    loss.backward()
    optimizer.step()
    return loss.item()


def assert_teleports_alone(model: nn.Module, optimizer: LearnedTeleportOptimizer, inputs: Tensor) -> None:
    """A first step at rate 0 teleports: it moves the parameters of the spec and leaves the function as it is."""
    assert optimizer.param_groups[0]["lr"] == NO_STEP
    assert not len(optimizer.spec)
    state = copy.deepcopy(model.state_dict())
    outputs = {mode: model.train(mode)(inputs).detach() for mode in (False, True)}
    step_on(optimizer, model(inputs))
    assert optimizer.teleport_size > 1e-3
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, state[name])}
    assert {leg.name for symmetry in optimizer.spec for leg in symmetry.legs} == moved
    for name, buffer in model.named_buffers():
        buffer.copy_(state[name])
    for mode, output in outputs.items():
        torch.testing.assert_close(model.train(mode)(inputs), output, rtol=1e-9, atol=1e-11)


def test_a_network_that_is_no_sequence_teleports() -> None:
    model = seeded(Residual).double()
    optimizer = LearnedTeleportOptimizer.for_model(model, lr=NO_STEP, total_steps=20)
    assert_teleports_alone(model, optimizer, IMAGES.double())
    assert {"inner.1:scaling", "hidden:scaling"} <= {symmetry.id for symmetry in optimizer.spec}


def test_tied_parameters_teleport_under_one_name() -> None:
    model = seeded(Tied).double()
    optimizer = LearnedTeleportOptimizer.for_model(model, lr=NO_STEP, total_steps=20)
    assert_teleports_alone(model, optimizer, X.double())
    (symmetry,) = optimizer.spec
    assert [str(leg) for leg in symmetry.legs] == ["first.weight[0]^+1", "first.bias[0]^+1", "head.weight[1]^-1"]
    assert model.second.weight is model.first.weight


def test_inputs_by_name_are_learned() -> None:
    model = Named()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=20)
    before = step_on(optimizer, model(x=X, sign=-1.0))
    assert [symmetry.id for symmetry in optimizer.spec] == ["inner.0:scaling", "inner.2:scaling"]
    assert optimizer.teleport_size > 0
    for _ in range(15):
        step_on(optimizer, model(x=X, sign=-1.0))
    assert F.cross_entropy(model(x=X, sign=-1.0), Y).item() < before


def test_a_model_that_is_never_called_trains_and_warns_once() -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=200)
    with pytest.warns(UserWarning, match=r"the model \(Sequential\) has not been called.*example_inputs") as record:
        before = step_on(optimizer, model.forward(X))
    assert [warning.filename for warning in record] == [__file__]
    for _ in range(TELEPORT_INTERVAL + 4):
        step_on(optimizer, model.forward(X))
        assert optimizer.teleport_size == 0.0
    assert F.cross_entropy(model.forward(X), Y).item() < before
    train(
        model, optimizer, TELEPORT_INTERVAL - 4
    )  # the last of them is the first since the call at which it may teleport
    assert len(optimizer.spec) == 2
    assert optimizer.teleport_size > 0
    given = LearnedTeleportOptimizer.for_model(model, total_steps=20, example_inputs=X)
    step_on(given, model.forward(X))
    assert given.teleport_size > 0


def test_a_model_whose_way_depends_on_data_trains_without_teleports() -> None:
    model = Branching()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=100)
    before = step_on(optimizer, model(X))
    for _ in range(TELEPORT_INTERVAL + 4):
        step_on(optimizer, model(X))
        assert optimizer.teleport_size == 0.0
    assert F.cross_entropy(model(X), Y).item() < before
    assert not len(optimizer.spec)
    assert [refusal.name for refusal in optimizer.spec.refusals] == ["(root)"]


@pytest.mark.parametrize(("make", "inputs"), [(network, X), (Residual, IMAGES), (Tied, X)])
def test_inputs_that_are_given_and_those_that_are_learned_train_alike(
    make: Callable[[], nn.Module], inputs: Tensor
) -> None:
    ends = []
    for options in ({}, {}, {"example_inputs": inputs}, {"example_inputs": (inputs[:2],)}):
        model = seeded(make)
        optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=200, **options)
        assert (len(optimizer.spec) > 0) == ("example_inputs" in options)
        sizes = []
        for _ in range(2 * TELEPORT_INTERVAL + 5):
            step_on(optimizer, model(inputs))
            sizes.append(optimizer.teleport_size)
        assert sum(size > 0 for size in sizes) == 3
        ends.append((model.state_dict(), sizes))
    for state, sizes in ends[1:]:
        assert sizes == ends[0][1]
        assert all(torch.equal(value, ends[0][0][name]) for name, value in state.items())


@pytest.mark.parametrize("step", [1, TELEPORT_INTERVAL, TELEPORT_INTERVAL + 3])
def test_a_state_dict_continues_teleports_bit_for_bit(step: int) -> None:
    model, other = network(), network(seed=9)
    optimizer = LearnedTeleportOptimizer.for_model(
        model, lr=0.1, total_steps=400
    )  # slow enough to have gradients to the end
    train(model, optimizer, step)
    resumed = LearnedTeleportOptimizer.for_model(other, lr=0.1, total_steps=400)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    sizes = []
    for _ in range(3 * TELEPORT_INTERVAL):
        assert train(model, optimizer, 1) == train(other, resumed, 1)
        assert resumed.teleport_size == optimizer.teleport_size
        sizes.append(resumed.teleport_size)
    assert sum(size > 0 for size in sizes) == 2
    assert all(torch.equal(first, second) for first, second in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_made_before_the_first_step_teleport(clone: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=100)
    other, copied = clone((model, optimizer))
    assert train(other, copied, 82) == train(model, optimizer, 82)
    assert len(copied.spec) == len(optimizer.spec) == 2
    assert all(torch.equal(first, second) for first, second in zip(model.parameters(), other.parameters()))


def test_waiting_for_the_first_call_leaves_no_trace_in_the_model() -> None:
    """Neither in what others find in it, nor in copies, which average models make."""
    model = network()
    optimizer = LearnedTeleportOptimizer.for_model(model, total_steps=20)
    assert find_symmetries(model, X) == find_symmetries(network(), X)
    averaged = copy.deepcopy(model)
    averaged(X[:2])
    assert find_symmetries(averaged, X) == find_symmetries(network(), X)
    train(model, optimizer, 1)
    assert optimizer.teleport_size > 0
    assert find_symmetries(model, X) == find_symmetries(network(), X)


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
