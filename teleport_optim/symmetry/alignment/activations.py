"""Correlation of the activations of two networks, channel by channel."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from teleport_optim.symmetry.alignment.networks import (
    ROUNDING,
    call,
)
from teleport_optim.symmetry.inputs import ExampleInputs
from teleport_optim.symmetry.moves import leg_channels
from teleport_optim.symmetry.named_tensors import cuda_devices
from teleport_optim.symmetry.spec import Leg, Symmetry

__all__ = ["activation_correlations"]


_OUTPUT_AXES: dict[type[nn.Module], int] = {nn.Linear: -1, nn.Conv1d: -2, nn.Conv2d: -3, nn.Conv3d: -4}
"""On which axis of its output a layer puts the channels of axis 0 of its weight."""


class _Moments:
    """Sums over many examples from which the correlation of channels of two networks follows."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: tuple[Tensor, ...] = ()

    def add(self, first: Tensor, second: Tensor) -> None:
        """Take in activations ``[size, repeat, num_examples]`` of both networks."""
        first, second = (x.detach().cpu().double().transpose(0, 1) for x in (first, second))
        sums = (first.sum(-1), second.sum(-1), first.square().sum(-1), second.square().sum(-1), first @ second.mT)
        self._sums = tuple(old + new for old, new in zip(self._sums, sums)) if self._sums else sums
        self._count += first.shape[-1]

    def correlation(self) -> Tensor:
        """``[size, size]``, summed over the entries of a channel; 0 where a channel is constant."""
        first, second, first_squares, second_squares, products = (total / self._count for total in self._sums)
        spreads = [
            torch.where((variance := square - mean.square()) > ROUNDING * square, variance, torch.inf).sqrt()
            for mean, square in ((first, first_squares), (second, second_squares))
        ]
        centred = products - first.unsqueeze(2) * second.unsqueeze(1)
        return (centred / spreads[0].unsqueeze(2) / spreads[1].unsqueeze(1)).sum(dim=0)


def activation_correlations(
    sites: Sequence[Symmetry], model: nn.Module, reference: nn.Module, batches: Sequence[ExampleInputs]
) -> dict[str, Tensor]:
    """For each site with layers whose outputs hold its channels, the correlation ``[reference, model]`` of these."""
    writers = {site.id: list(_writing_layers(site, model)) for site in sites}
    layers = dict.fromkeys(name for own in writers.values() for name, _ in own)
    twins = [copy.deepcopy(network).eval() for network in (reference, model)]
    moments: dict[tuple[str, str], _Moments] = {}
    with torch.no_grad(), torch.random.fork_rng(cuda_devices(model)):
        for batch in batches:
            first, second = (_outputs(twin, layers, batch) for twin in twins)
            for site in sites:
                for name, leg in writers[site.id]:
                    for pair in zip(first[name], second[name]):
                        channels = (
                            leg_channels(site, replace(leg, axis=x.dim() + leg.axis), x).flatten(2) for x in pair
                        )
                        moments.setdefault((site.id, name), _Moments()).add(*channels)
    correlations: dict[str, Tensor] = {}
    for (site_id, _), own in moments.items():
        correlations[site_id] = correlations.get(site_id, torch.zeros(())) + own.correlation()
    return correlations


def _writing_layers(site: Symmetry, model: nn.Module) -> Iterator[tuple[str, Leg]]:
    """The layers that write the channels of a site, each with the leg on its output (its axis counted from the right)."""
    modules = dict(model.named_modules())
    for leg in site.writers:
        name, _, tensor = leg.name.rpartition(".")
        axis = next((axis for kind, axis in _OUTPUT_AXES.items() if isinstance(modules[name], kind)), None)
        if axis is not None and tensor == "weight" and leg.axis == 0 and leg.within is None:
            yield name, replace(leg, axis=axis)


def _outputs(model: nn.Module, layers: Iterable[str], batch: ExampleInputs) -> dict[str, list[Tensor]]:
    """Outputs of each layer, call by call, while the model runs on one batch."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, output: outputs[name].append(output.clone())

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in outputs]
    try:
        call(model, batch)
    except Exception as error:
        raise ValueError(
            f"the networks cannot take a batch of data: {error}. Pass it as you would pass it to them"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return outputs
