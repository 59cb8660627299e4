"""What layers without channels of their own do to the hidden channels that pass through them.

Activations decide which groups survive. Pools, paddings and upsampling work on spatial axes and on each channel alone.
Flatten and its relatives change where on the activation the entries of a channel lie.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from torch import nn

from teleport_optim.groups import GROUPS
from teleport_optim.symmetry.sites import PASS_INPUTS, OpenSite, Shape, Walk

__all__ = [
    "ALL",
    "ELEMENTWISE",
    "HOMOGENEOUS",
    "ODD",
    "assume_spatial",
    "constant_pad",
    "flatten",
    "hardtanh",
    "pixel_shuffle",
    "pixel_unshuffle",
    "pointwise",
    "prelu",
    "spatial",
    "unflatten",
    "upsample",
]

ALL = frozenset(GROUPS)
"""What commutes with a linear layer that works on each channel alone."""
HOMOGENEOUS = frozenset({"permutation", "scaling"})
"""What commutes with an activation for which f(s x) = s f(x) for positive s."""
ODD = frozenset({"permutation", "sign"})
"""What commutes with an activation for which f(-x) = -f(x)."""
ELEMENTWISE = frozenset({"permutation"})
"""What commutes with any activation."""


def assume_spatial(walk: Walk, name: str, num_spatial: int) -> None:
    """Take the input to be ``(batch, channels, *spatial)`` if nothing is known of it.

    Inputs without a batch axis are taken too, but only where example inputs show that there is none.
    """
    walk.assume_rank(num_spatial + 2, always=True)
    shape = walk.shape or ()
    if len(shape) == num_spatial + 2 or (len(shape) == num_spatial + 1 and None not in shape):
        return
    walk.contradict(name, f"it takes inputs of {num_spatial + 2} axes, but the layers before it lead to {len(shape)}")
    walk.assume_rank(num_spatial + 2, always=True)


def pointwise(walk: Walk, name: str, layer: nn.Module, groups: Iterable[str]) -> None:
    walk.keep(groups)


def hardtanh(walk: Walk, name: str, layer: nn.Hardtanh) -> None:
    walk.keep(ODD if layer.min_val == -layer.max_val else ELEMENTWISE)


def prelu(walk: Walk, name: str, layer: nn.PReLU) -> None:
    walk.keep(HOMOGENEOUS)
    if layer.num_parameters == 1 or not walk.sites:
        return
    if walk.shape is None:
        walk.refuse_unknown_rank(name)
        return
    walk.align(name, 1 - len(walk.shape), layer.num_parameters, verb="has one slope for each entry of")
    if "permutation" in walk.sites:
        walk.sites["permutation"].plan(f"{name}.weight", 0, 1)


def spatial(walk: Walk, name: str, layer: nn.Module, groups: Iterable[str], num_spatial: int) -> None:
    """A layer that works on the last ``num_spatial`` axes, and on each channel alone."""
    assume_spatial(walk, name, num_spatial)
    walk.keep(groups)
    if getattr(layer, "return_indices", False):
        walk.refuse(name, "it returns indices as well as values")
    for group, site in list(walk.sites.items()):
        if site.axis >= -num_spatial:
            walk.refuse(name, f"it mixes the channels of {site.writer!r}, which lie on axis {site.axis}", [group])
    walk.shape = walk.shape and (*walk.shape[:-num_spatial], *(None,) * num_spatial)


def constant_pad(walk: Walk, name: str, layer: nn.modules.padding._ConstantPadNd, num_spatial: int) -> None:
    spatial(walk, name, layer, ALL if layer.value == 0 else ELEMENTWISE, num_spatial)


def upsample(walk: Walk, name: str, layer: nn.Upsample) -> None:
    if walk.shape is None:
        walk.refuse_unknown_rank(name)
    else:
        spatial(walk, name, layer, ALL, len(walk.shape) - 2)


def flatten(walk: Walk, name: str, layer: nn.Flatten) -> None:
    if walk.shape is None and not walk.sites and (layer.start_dim, layer.end_dim) == (1, -1):
        walk.shape = (None, None)
    if walk.shape is None:
        walk.refuse_unknown_rank(name)
        return
    rank = len(walk.shape)
    if not all(-rank <= axis < rank for axis in (layer.start_dim, layer.end_dim)):
        walk.contradict(name, f"it flattens the axes {layer.start_dim} to {layer.end_dim} of the {rank} of its input")
        return
    start, end = layer.start_dim % rank, layer.end_dim % rank
    for group, site in list(walk.sites.items()):
        axis = site.axis + rank
        if start < axis <= end:
            walk.refuse(name, f"it interleaves the channels of {site.writer!r} with the axes to their left", [group])
        elif axis == start:
            site.repeat = _product((site.repeat, *walk.shape[start + 1 : end + 1]))
        if axis <= start:
            site.axis += end - start
    walk.shape = (*walk.shape[:start], _product(walk.shape[start : end + 1]), *walk.shape[end + 1 :])


def _product(sizes: Shape) -> int | None:
    known = [size for size in sizes if size is not None]
    return prod(known) if len(known) == len(sizes) else None


def unflatten(walk: Walk, name: str, layer: nn.Unflatten) -> None:
    if layer.dim in (1, -1):
        walk.assume_rank(2)
    if walk.shape is None or not isinstance(layer.dim, int):  # older torch has named axes
        walk.refuse_unknown_rank(name)
        return
    rank, sizes = len(walk.shape), tuple(None if size == -1 else size for size in layer.unflattened_size)
    axis = layer.dim % rank
    for site in list(walk.sites.values()):
        if site.axis + rank == axis:
            _regroup(walk, name, site, sizes[0])
        if site.axis + rank <= axis:
            site.axis -= len(sizes) - 1
    walk.shape = (*walk.shape[:axis], *sizes, *walk.shape[axis + 1 :])


def _regroup(walk: Walk, name: str, site: OpenSite, num_channels: int | None) -> None:
    """Let the entries of a site's axis become ``num_channels`` channels, each with pixels of its own."""
    extent = None if site.repeat is None else site.size * site.repeat
    if extent is None or not num_channels or extent % num_channels != 0:
        reason = f"the channels of {site.writer!r} cannot be followed through it, the sizes are not known"
        walk.refuse(name, f"{reason}: {PASS_INPUTS} and spell out every size", [site.group])
        return
    pixels = extent // num_channels
    if site.entries % pixels == 0:
        site.repeat = site.entries // pixels
    elif pixels % site.entries == 0 and num_channels % site.num_blocks == 0:
        site.merge(pixels // site.entries)
        site.repeat = 1
    else:
        walk.refuse(name, f"it cuts through the channels of {site.writer!r}", [site.group])


def pixel_shuffle(walk: Walk, name: str, layer: nn.PixelShuffle) -> None:
    for site in _image_sites(walk, name):
        pixels = layer.upscale_factor**2
        _regroup(walk, name, site, None if site.repeat is None else site.size * site.repeat // pixels)


def pixel_unshuffle(walk: Walk, name: str, layer: nn.PixelUnshuffle) -> None:
    for site in _image_sites(walk, name):
        site.repeat = _product((site.repeat, layer.downscale_factor**2))


def _image_sites(walk: Walk, name: str) -> list[OpenSite]:
    """The sites on the channel axis of an image; the channels change their number, the rank stays."""
    assume_spatial(walk, name, 2)
    for group, site in list(walk.sites.items()):
        if site.axis != -3:
            walk.refuse(name, f"it mixes the channels of {site.writer!r}, which lie on axis {site.axis}", [group])
    walk.shape = walk.shape and (*walk.shape[:-3], None, None, None)
    return list(walk.sites.values())
