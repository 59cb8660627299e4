"""Graph networks of ``torch_geometric`` with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.unseen.case import Case, Sizes

__all__ = ["CASES"]

_FEATURES, _HIDDEN, _CLASSES, _EDGE_FEATURES, _RELATIONS = 5, 12, 3, 4, 3


class _Network(nn.Module):
    """Two convolutions of a graph with an activation in between; further inputs belong to the edges."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, edges: Tensor, *of_edges: Tensor) -> Any:
        return self.second(self.first(x, edges, *of_edges).relu(), edges, *of_edges)


class _Pooled(nn.Module):
    """A network whose nodes are summed graph by graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.head = network, nn.Linear(_HIDDEN, _CLASSES)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor, count: int) -> Any:
        sums = x.new_zeros(count, _HIDDEN)
        return self.head(sums.index_add(0, graph, self.network(x, edges)))


def _edges(nodes: int) -> Tensor:
    ring = torch.arange(nodes)
    return torch.stack([torch.cat([ring, ring]), torch.cat([ring.roll(1), torch.randint(nodes, (nodes,))])])


def _graph(batch: int, length: int) -> tuple[Tensor, Tensor]:
    nodes = batch * length
    return torch.randn(nodes, _FEATURES), _edges(nodes)


def _with_features(batch: int, length: int) -> tuple[Tensor, ...]:
    x, edges = _graph(batch, length)
    return x, edges, torch.randn(edges.shape[1], _EDGE_FEATURES)


def _with_relations(batch: int, length: int) -> tuple[Tensor, ...]:
    x, edges = _graph(batch, length)
    return x, edges, torch.arange(edges.shape[1]) % _RELATIONS


def _several(batch: int, length: int) -> tuple[Any, ...]:
    return *_graph(batch, length), torch.arange(batch).repeat_interleave(length), batch


def _layer(name: str, *arguments: Any, **options: Any) -> nn.Module:
    layer: nn.Module = getattr(importlib.import_module("torch_geometric.nn"), name)(*arguments, **options)
    return layer


def _two(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: _Network(_layer(name, _FEATURES, _HIDDEN, **options), _layer(name, _HIDDEN, _CLASSES, **options))


def _perceptron(*widths: int) -> nn.Module:
    return nn.Sequential(nn.Linear(widths[0], widths[1]), nn.ReLU(), nn.Linear(widths[1], widths[2]))


def _isomorphism() -> nn.Module:
    first = _layer("GINConv", _perceptron(_FEATURES, _HIDDEN, _HIDDEN), train_eps=True)
    return _Pooled(_Network(first, _layer("GINConv", _perceptron(_HIDDEN, _HIDDEN, _HIDDEN))))


def _edge_conditioned() -> nn.Module:
    first = _layer("NNConv", _FEATURES, _HIDDEN, _perceptron(_EDGE_FEATURES, 6, _FEATURES * _HIDDEN))
    return _Network(first, _layer("NNConv", _HIDDEN, _CLASSES, _perceptron(_EDGE_FEATURES, 6, _HIDDEN * _CLASSES)))


def _network(name: str, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: _layer(name, *arguments, **options)


_SIZES = Sizes((2, 6), (3, 8))


def _case(name: str, build: Callable[[], nn.Module], inputs: Callable[[int, int], Any] = _graph) -> tuple[str, Case]:
    return f"graph {name}", Case("torch_geometric", build, inputs, _SIZES)


CASES: dict[str, Case] = dict(
    [
        _case("GCN", _network("GCN", _FEATURES, _HIDDEN, 3, _CLASSES, norm="batch_norm", jk="cat")),
        _case("GraphSAGE", _network("GraphSAGE", _FEATURES, _HIDDEN, 2, _CLASSES, aggr="max")),
        _case("GATv2", _two("GATv2Conv", edge_dim=_EDGE_FEATURES, heads=2, concat=False), _with_features),
        _case("GIN", _isomorphism, _several),
        _case("EdgeCNN", _network("EdgeCNN", _FEATURES, _HIDDEN, 2, _CLASSES)),
        _case("RGCN", _two("RGCNConv", num_relations=_RELATIONS, num_bases=2), _with_relations),
        _case("TransformerConv", _two("TransformerConv", heads=2, concat=False, beta=True)),
        _case("ChebConv", _two("ChebConv", K=3)),
        _case("NNConv", _edge_conditioned, _with_features),
        _case(
            "PNA",
            _network(
                "PNA",
                *(_FEATURES, _HIDDEN, 2, _CLASSES),
                aggregators=["mean", "max", "std"],
                scalers=["identity", "amplification"],
                deg=torch.tensor([0, 0, 3, 5, 3, 1]),
            ),
        ),
    ]
)
