"""Networks to align, and copies of them whose channels are permuted."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_optim.symmetry import find_symmetries
from teleport_optim.symmetry.action import act


class Residual(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.first, self.inner = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.second, self.outer = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(4 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.outer(self.second(F.relu(self.inner(self.first(x))))))
        return self.head(F.avg_pool2d(x, 3).flatten(1))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True)
        self.embedding, self.norm, self.head = nn.Embedding(9, 16), nn.LayerNorm(16), nn.Linear(16, 9)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embedding(x))))


class Recurrent(nn.Module):
    """Its one site lies on both axes of a weight, which is used several times."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.step, self.head = nn.Linear(3, 12), nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.read(x).tanh()
        for _ in range(3):
            hidden = (self.step(hidden) + self.read(x)).tanh()
        return self.head(hidden)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(4, 10), nn.Linear(10, 4)
        self.again, self.head = nn.Linear(4, 10), nn.Linear(10, 2)
        self.again.weight = self.read.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.write(self.read(x).relu())).relu())


def perceptron() -> nn.Module:
    layers = [nn.Linear(4, 24), nn.GELU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 2)]
    return nn.Sequential(*layers)


def grouped() -> nn.Module:
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)]
    return nn.Sequential(*layers)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "perceptron": (perceptron, numbers(9, 4)),
    "residual": (Residual, numbers(6, 1, 6, 6)),
    "grouped": (grouped, numbers(6, 1, 6, 6)),
    "attention": (lambda: nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), numbers(6, 5, 16)),
    "language": (Language, torch.arange(30).view(6, 5) % 9),
    "recurrent": (Recurrent, numbers(9, 3)),
    "tied": (Tied, numbers(9, 4)),
}

every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str, seed: int) -> nn.Module:
    """A network in which nothing is at a special value, also not its running statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name][0]().double()
        if name == "residual":
            model.train()(3.0 * torch.randn(40, 1, 6, 6, dtype=torch.float64))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    return model.eval()


def permuted(reference: nn.Module, inputs: Tensor, seed: int) -> nn.Module:
    spec = find_symmetries(reference, inputs).of_group("permutation")
    model = copy.deepcopy(reference)
    model.load_state_dict(act(spec, spec.random_element(torch.Generator().manual_seed(seed)), model.state_dict()))
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def distance(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters())
    return sum((x - y).square().sum() for x, y in pairs).sqrt().item()


def small(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
