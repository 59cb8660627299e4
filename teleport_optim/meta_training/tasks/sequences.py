"""Character-level language models: small transformers and recurrent networks that predict Python's documentation.

The layers are written out in plain matrix products, because many networks run at once under :func:`torch.func.vmap`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from teleport_optim.meta_training.tasks.data import ALPHABET, text
from teleport_optim.meta_training.tasks.draws import Draw
from teleport_optim.meta_training.tasks.networks import cross_entropy, draw_activation, network_problem
from teleport_optim.meta_training.tasks.problem import InnerProblem, SampleBatch, Task
from teleport_optim.meta_training.tasks.splits import SEQUENCE_WIDTHS

__all__ = ["CharRecurrent", "CharTransformer"]


class PositionedEmbedding(nn.Module):
    """Embeddings of tokens ``[batch, length]`` plus embeddings of their positions."""

    def __init__(self, num_tokens: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_tokens, width)
        self.positions = nn.Embedding(length, width)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.tokens(tokens)
        return embedded + self.positions.weight


class CausalAttention(nn.Module):
    """Attention with several heads of every position to itself and those before it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.from_input = nn.Linear(width, 3 * width)
        self.to_output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-2]
        heads = self.from_input(x).unflatten(-1, (3, self.num_heads, -1)).transpose(-4, -2)
        queries, keys, values = heads.unbind(-3)
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
        is_later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        attended = scores.masked_fill(is_later, -math.inf).softmax(dim=-1) @ values
        output: Tensor = self.to_output(attended.transpose(-3, -2).flatten(-2))
        return output


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each normalised before and added to its input."""

    def __init__(self, width: int, num_heads: int, expansion: int, make_activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), CausalAttention(width, num_heads))
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, expansion * width),
            make_activation(),
            nn.Linear(expansion * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        output: Tensor = x + self.perceptron(x)
        return output


class LSTMLayer(nn.Module):
    """A long short-term memory over ``[batch, length, width_in]``; gives its output at every position."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.from_input = nn.Linear(width_in, 4 * width)
        self.from_state = nn.Linear(width, 4 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        state = cell = x.new_zeros(x.shape[0], self.from_state.in_features)
        states = []
        for from_input in self.from_input(x).unbind(1):
            keep, write, show, new = (from_input + self.from_state(state)).chunk(4, dim=-1)
            cell = torch.sigmoid(keep) * cell + torch.sigmoid(write) * torch.tanh(new)
            state = torch.sigmoid(show) * torch.tanh(cell)
            states.append(state)
        return torch.stack(states, dim=1)


class GRULayer(nn.Module):
    """Gated recurrent units over ``[batch, length, width_in]``; gives their output at every position."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.from_input = nn.Linear(width_in, 3 * width)
        self.from_state = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], self.from_state.in_features)
        states = []
        for from_input in self.from_input(x).unbind(1):
            reset_in, update_in, new_in = from_input.chunk(3, dim=-1)
            reset, update, new = self.from_state(state).chunk(3, dim=-1)
            candidate = torch.tanh(new_in + torch.sigmoid(reset_in + reset) * new)
            state = torch.lerp(candidate, state, torch.sigmoid(update_in + update))
            states.append(state)
        return torch.stack(states, dim=1)


def _draw_excerpts(num_problems: int, length: int, draw: Draw) -> tuple[SampleBatch, str]:
    """Minibatches of ``length`` characters and those that follow each, from one random excerpt for each problem."""
    characters = text(draw.split)
    batch_size = draw.integer(8, 16)
    excerpt = min(int(draw.log_uniform(2000, 20000)), len(characters))
    offsets = draw.integers(len(characters) - excerpt + 1, num_problems)[:, None, None]

    def sample_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(excerpt - length, (num_problems, batch_size, 1), generator=generator)
        windows = characters[offsets + starts + torch.arange(length + 1)]
        return windows[..., :-1], windows[..., 1:]

    return sample_batch, f"batch={batch_size} excerpt={excerpt}"


class _LanguageTask(Task):
    """Base of the character-level families."""

    share = 0.05

    @abstractmethod
    def draw_model(self, draw: Draw, length: int) -> tuple[nn.Module, str]:
        """A model of ``length`` characters, and its architecture in words."""

    def sample(
        self, num_problems: int, horizons: tuple[int, int], split: str, generator: torch.Generator
    ) -> InnerProblem:
        draw = Draw(generator, self.name, split)
        length = draw.integer(16, 24)
        model, architecture = self.draw_model(draw, length)
        batches = _draw_excerpts(num_problems, length, draw)
        architecture = f"{architecture} length={length}"
        return network_problem(model, architecture, num_problems, batches, cross_entropy, horizons, draw)


class CharTransformer(_LanguageTask):
    """Transformers of one or two blocks."""

    name = "char_transformer"

    def draw_model(self, draw: Draw, length: int) -> tuple[nn.Module, str]:
        width, depth = draw.choice(SEQUENCE_WIDTHS[draw.split]), draw.integer(1, 2)
        num_heads, expansion = draw.choice((1, 2, 4)), draw.choice((2, 4))
        activation, make_activation = draw_activation(draw)
        blocks = [TransformerBlock(width, num_heads, expansion, make_activation) for _ in range(depth)]
        embedding = PositionedEmbedding(len(ALPHABET), length, width)
        model = nn.Sequential(embedding, *blocks, nn.LayerNorm(width), nn.Linear(width, len(ALPHABET)))
        return model, f"{activation} {width}x{depth} heads={num_heads} expansion={expansion}"


class CharRecurrent(_LanguageTask):
    """Long short-term memories and gated recurrent units of one or two layers."""

    name = "char_recurrent"

    def draw_model(self, draw: Draw, length: int) -> tuple[nn.Module, str]:
        width, depth = draw.choice(SEQUENCE_WIDTHS[draw.split]), draw.choice((1, 2), [0.75, 0.25])
        kind = draw.choice(("lstm", "gru"))
        make_layer = LSTMLayer if kind == "lstm" else GRULayer
        layers = [make_layer(width, width) for _ in range(depth)]
        model = nn.Sequential(nn.Embedding(len(ALPHABET), width), *layers, nn.Linear(width, len(ALPHABET)))
        return model, f"{kind} {width}x{depth}"
