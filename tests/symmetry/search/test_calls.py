"""Inputs and outputs of all kinds: objects, dictionaries, scripted parts and batches of one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.symmetry import find_symmetries
from tests.helpers.small_models import Model
from tests.helpers.specs import reasons_of

pytestmark = pytest.mark.private_torch


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def ids(model: nn.Module, inputs: Any, **options: Any) -> list[str]:
    return [symmetry.id for symmetry in find_symmetries(model, inputs, **options)]


@dataclass
class Answer:
    logits: Tensor
    hidden: Any = None


def test_objects_as_outputs_do_not_move_and_refuse_nothing_else() -> None:
    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 5), "c": nn.Linear(5, 2)}

    def with_output(make: Callable[[Tensor, Tensor], Any]) -> list[str]:
        def forward(m: Any, x: Tensor) -> Any:
            h = m.b(m.a(x).relu()).relu()
            return make(m.c(h), h)

        return ids(Model(forward, **layers), torch.randn(3, 4), groups=["scaling"])

    assert with_output(lambda y, h: Answer(y)) == ["a:scaling", "b:scaling"]
    assert with_output(lambda y, h: Answer(y, {"h": [Answer(h)]})) == ["a:scaling"]
    assert with_output(lambda y, h: torch.distributions.Categorical(logits=y)) == ["a:scaling", "b:scaling"]
    assert with_output(lambda y, h: torch.distributions.Normal(y, h.exp()[:, :2])) == ["a:scaling"]
    assert with_output(lambda y, h: (y, lambda: h)) == ["a:scaling"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_part_is_refused_alone() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()))
    model = nn.Sequential(*mlp()[:2], nn.Linear(6, 6), scripted, *mlp()[2:], nn.ReLU(), nn.Linear(2, 3))
    inputs = torch.randn(5, 4)
    expected = model.eval()(inputs)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spec = find_symmetries(model, inputs, groups=["scaling"])
    assert [symmetry.id for symmetry in spec] == ["0:scaling", "4:scaling"]
    assert list(reasons_of(spec)) == ["3"]
    assert "scripted" in reasons_of(spec)["3"]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(model(inputs), expected)
    with_root = find_symmetries(torch.jit.script(mlp()), inputs)
    assert "scripted" in reasons_of(with_root)["(root)"]


def test_a_model_that_takes_one_dictionary() -> None:
    model = Model(lambda m, batch: m.b(m.a(batch["x"]).relu()) + batch["y"], a=nn.Linear(4, 6), b=nn.Linear(6, 2))

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            out: Tensor = self.inner(batch)
            return out

    example = {"x": torch.randn(3, 4), "y": torch.randn(3, 2)}
    assert ids(One(), example) == ["inner.a:permutation", "inner.a:scaling"]
    assert ids(One(), (example,)) == ["inner.a:permutation", "inner.a:scaling"]
    optimizer = LearnedTeleportOptimizer.for_model(One(), example_inputs=example)
    assert len(optimizer.spec) == 1


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.Identity()])
def test_a_batch_of_one_gives_what_a_batch_of_two_does(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    assert ids(model, torch.randn(1, 4)) == ids(model, torch.randn(2, 4)) != []


def test_a_batch_of_one_image() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1),
    )  # fmt: skip
    assert ids(model, torch.randn(1, 3, 6, 6)) == ids(model, torch.randn(3, 3, 6, 6)) != []


def test_no_batch_at_all_is_explained() -> None:
    with pytest.raises(ValueError, match=r"cannot take example_inputs in evaluation mode: .*as you would pass them"):
        find_symmetries(mlp(), torch.randn(1, 5))
