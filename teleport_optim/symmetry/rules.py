"""What each layer type does to the hidden channels that pass through it.

A rule takes the walk, the layer's name and the layer, and changes the walk: it adds legs to open sites, closes those
that the layer reads completely, opens those that it writes and drops those that do not survive. Types are looked up
exactly, never by inheritance: a subclass may compute anything, and what is not in :data:`RULES` lets nothing through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from teleport_optim.groups import GROUPS
from teleport_optim.symmetry import layout_rules as layout
from teleport_optim.symmetry.layout_rules import ALL, ELEMENTWISE, HOMOGENEOUS, ODD, assume_spatial
from teleport_optim.symmetry.sites import LegPlan, OpenSite, Walk

__all__ = ["RULES", "Rule"]

Rule = Callable[[Walk, str, Any], None]


def _writers(name: str, layer: nn.Module, weight_axis: int = 0, bias_axis: int = 0) -> list[LegPlan]:
    """The legs with which a layer's weight and bias write into a channel."""
    legs = [LegPlan(f"{name}.weight", weight_axis, 1), LegPlan(f"{name}.bias", bias_axis, 1)]
    return legs[: 1 + (getattr(layer, "bias", None) is not None)]


# ------------------------------------------------------------------------------------ layers that write and read


def _linear(walk: Walk, name: str, layer: nn.Linear) -> None:
    walk.assume_rank(2)
    walk.align(name, -1, layer.in_features, verb="reads")
    for group, site in list(walk.sites.items()):
        site.plan(f"{name}.weight", 1, -1)
        walk.close(group)
    for group in GROUPS:
        walk.open(name, -1, layer.out_features, _writers(name, layer), group=group)
    walk.shape = walk.shape and (*walk.shape[:-1], layer.out_features)


def _embedding(walk: Walk, name: str, layer: nn.Embedding) -> None:
    walk.assume_rank(2)
    walk.shape = walk.shape and (*walk.shape, layer.embedding_dim)
    if layer.max_norm is not None:
        walk.refuse(name, "max_norm rescales the rows of its weight on the fly")
        return
    for group in GROUPS:
        walk.open(name, -1, layer.embedding_dim, [LegPlan(f"{name}.weight", 1, 1)], group=group)


def _convolution(walk: Walk, name: str, layer: nn.modules.conv._ConvNd, num_spatial: int) -> None:
    axis, num_groups = -1 - num_spatial, layer.groups
    fan_in, fan_out = layer.in_channels // num_groups, layer.out_channels // num_groups
    is_depthwise = num_groups > 1 and fan_in == 1
    assume_spatial(walk, name, num_spatial)
    walk.align(name, axis, layer.in_channels, verb="reads")
    if not is_depthwise:
        _refuse_cut_channels(walk, name, num_groups)

    for group, site in list(walk.sites.items()):
        if is_depthwise:
            site.plan(f"{name}.weight", 0, -1, repeat=1 if layer.transposed else fan_out)
            if group == "permutation":
                site.repeat = site.entries * fan_out
                if layer.bias is not None:
                    site.plan(f"{name}.bias", 0, 1)
                continue
        elif layer.transposed:
            site.plan(f"{name}.weight", 0, -1)
            site.split(num_groups if group == "permutation" else 1)
        else:
            site.plan(f"{name}.weight", 1, -1, num_groups=num_groups, num_rows=fan_out)
        walk.close(group)

    legs = _writers(name, layer)
    if layer.transposed and fan_out == 1 and num_groups > 1:
        legs[0] = LegPlan(f"{name}.weight", 0, 1, repeat=fan_in)
    elif layer.transposed:
        legs[0] = LegPlan(f"{name}.weight", 1, 1, num_groups=num_groups, num_rows=fan_in)
    for group in [group for group in GROUPS if group not in walk.sites]:
        blocks = num_groups if group == "permutation" else 1
        walk.open(name, axis, layer.out_channels, legs, group=group, num_blocks=blocks)
    if walk.shape is not None:
        walk.shape = (*walk.shape[:axis], layer.out_channels, *(None,) * num_spatial)


def _refuse_cut_channels(walk: Walk, name: str, num_groups: int) -> None:
    """Drop the sites whose channels do not fall into ``num_groups`` equal groups."""
    for group, site in list(walk.sites.items()):
        if site.size % num_groups != 0:
            walk.refuse(
                name, f"its {num_groups} groups cut through the {site.size} channels of {site.writer!r}", [group]
            )


# ----------------------------------------------------------------------------------------------- normalisations


def _normalise(
    walk: Walk,
    name: str,
    layer: nn.Module,
    axis: int,
    extent: int,
    passes: Callable[[OpenSite], Iterable[str]],
    weight_axis: int = 0,
) -> None:
    """Move what a normalisation keeps per channel; ``passes`` tells which groups survive its statistics.

    Scaling in front of a normalisation is undone by it, up to eps. A sign passes through, and ends at the weight.
    """
    walk.align(name, axis, extent, verb="normalises")
    affine = _writers(name, layer, weight_axis, weight_axis) if getattr(layer, "weight", None) is not None else []
    for group, site in list(walk.sites.items()):
        if group not in passes(site) or (group == "scaling" and not walk.include_approximate):
            walk.sites.pop(group)
            continue
        if getattr(layer, "running_mean", None) is not None:
            site.plan(f"{name}.running_mean", 0, 1)
            site.plan(f"{name}.running_var", 0, 2)
        if group == "permutation":
            for leg in affine:
                site.plan(leg.name, leg.axis, leg.degree)
        elif group == "sign" and affine:
            site.plan(affine[0].name, weight_axis, -1)
            walk.close(group)
        elif group == "scaling":
            site.is_exact = False
            walk.close(group)
    for group in ("scaling", "sign") if affine else ():
        walk.open(name, axis, extent, affine, group=group)


def _batch_norm(walk: Walk, name: str, layer: nn.modules.batchnorm._BatchNorm, num_spatial: int) -> None:
    if num_spatial == 1:  # takes (batch, features) as well as (batch, channels, length)
        walk.assume_rank(2)
        if walk.shape is None or len(walk.shape) not in (2, 3):
            walk.refuse_unknown_rank(name)
            return
        num_spatial = len(walk.shape) - 2
    else:
        assume_spatial(walk, name, num_spatial)
    _normalise(walk, name, layer, -1 - num_spatial, layer.num_features, lambda site: ALL)


def _instance_norm(walk: Walk, name: str, layer: nn.modules.instancenorm._InstanceNorm, num_spatial: int) -> None:
    assume_spatial(walk, name, num_spatial)
    _normalise(walk, name, layer, -1 - num_spatial, layer.num_features, lambda site: ALL)


def _group_norm(walk: Walk, name: str, layer: nn.GroupNorm) -> None:
    if walk.shape is None or len(walk.shape) < 2:
        walk.refuse_unknown_rank(name)
        return
    axis, group_size = 1 - len(walk.shape), layer.num_channels // layer.num_groups
    walk.align(name, axis, layer.num_channels, verb="normalises")
    is_mixed = {group: site.entries % group_size != 0 for group, site in walk.sites.items()}
    if is_mixed.get("permutation"):
        _refuse_cut_channels(walk, name, layer.num_groups)
        if "permutation" in walk.sites:
            walk.sites["permutation"].split(layer.num_groups)
    _normalise(walk, name, layer, axis, layer.num_channels, lambda site: ELEMENTWISE if is_mixed[site.group] else ALL)


def _layer_norm(walk: Walk, name: str, layer: nn.LayerNorm | nn.RMSNorm) -> None:
    num_axes = len(layer.normalized_shape)
    axis = max((site.axis for site in walk.sites.values()), default=-num_axes)
    axis = axis if axis >= -num_axes else -num_axes  # the channels if they are normalised over, else the first axis
    passes = ODD if isinstance(layer, nn.RMSNorm) else ELEMENTWISE
    weight_axis = num_axes + axis
    _normalise(walk, name, layer, axis, layer.normalized_shape[weight_axis], lambda site: passes, weight_axis)


# -------------------------------------------------------------------------------------------------- the table


def _for_dimensions(rule: Callable[..., None], *stems: str) -> dict[type[nn.Module], Rule]:
    """``rule`` for the one-, two- and three-dimensional layers whose names start with ``stems``."""
    return {getattr(nn, f"{stem}{n}d"): partial(rule, num_spatial=n) for stem in stems for n in (1, 2, 3)}


def _for_types(groups: frozenset[str], *types: type[nn.Module]) -> dict[type[nn.Module], Rule]:
    """The rule of activations that commute with ``groups``."""
    return dict.fromkeys(types, partial(layout.pointwise, groups=groups))


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    **_for_dimensions(_convolution, "Conv", "ConvTranspose"),
    **_for_dimensions(_batch_norm, "BatchNorm"),
    **_for_dimensions(_instance_norm, "InstanceNorm"),
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    **_for_types(ALL, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    **_for_types(HOMOGENEOUS, nn.ReLU, nn.LeakyReLU, nn.RReLU),
    **_for_types(ODD, nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink),
    **_for_types(ELEMENTWISE, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid, nn.ELU, nn.SELU, nn.CELU),
    **_for_types(ELEMENTWISE, nn.Softplus, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Threshold),
    **_for_types(ELEMENTWISE, nn.AlphaDropout, nn.FeatureAlphaDropout),
    nn.Hardtanh: layout.hardtanh,
    nn.PReLU: layout.prelu,
    **_for_dimensions(partial(layout.spatial, groups=ALL), "AvgPool", "AdaptiveAvgPool", "ZeroPad"),
    **_for_dimensions(partial(layout.spatial, groups=ALL), "ReflectionPad", "ReplicationPad", "CircularPad"),
    **_for_dimensions(partial(layout.spatial, groups=HOMOGENEOUS), "MaxPool", "AdaptiveMaxPool"),
    **_for_dimensions(partial(layout.spatial, groups=ELEMENTWISE), "LPPool"),
    **_for_dimensions(layout.constant_pad, "ConstantPad"),
    nn.Upsample: layout.upsample,
    nn.UpsamplingNearest2d: layout.upsample,
    nn.UpsamplingBilinear2d: layout.upsample,
    nn.Flatten: layout.flatten,
    nn.Unflatten: layout.unflatten,
    nn.PixelShuffle: layout.pixel_shuffle,
    nn.PixelUnshuffle: layout.pixel_unshuffle,
}
"""The rule of every known layer type."""
