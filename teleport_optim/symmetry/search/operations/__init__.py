"""Rules of operations: conditions on the channels that pass through them.

A rule takes a call and an analysis, tells the analysis what must hold, and returns the channels of each result. It asks the
analysis for what its group does (``moves_entries``, say), never for its class. Operations are named as in PyTorch's ATen, without
the overload. An operation that is not in :data:`RULES` is followed through the operations of which torch makes it; if there are
none, it lets nothing through.

To add an operation, write its rule in one of these files, name it in :data:`RULES`, and give
tests/symmetry/search/test_operations.py a model with it: there every symmetry found is verified by numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from teleport_optim.symmetry.search.analysis import EVEN, HOMOGENEOUS, LINEAR, MASK, NOTHING, ODD
from teleport_optim.symmetry.search.graph import Call, Source
from teleport_optim.symmetry.search.operations import (
    convolutions,
    entrywise,
    layout,
    normalisations,
    products,
    recurrent,
    reductions,
    selections,
)
from teleport_optim.symmetry.search.operations.call import Rule, axes_of

__all__ = ["COPIES", "CREATIONS", "RULES", "SELECTIONS", "VIEWS", "fill_of", "source_view"]


def _names(text: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(text.split(), rule)


COPIES = frozenset({"clone", "contiguous", "to", "_to_copy", "detach", "alias", "lift_fresh", "lift"})
"""Operations whose result has the entries of their tensor."""


SELECTIONS = frozenset({
    "slice", "narrow", "select", "split", "split_with_sizes", "chunk", "unbind", "tensor_split", "index", "index_select"
})  # fmt: skip
"""Operations that read some of the entries of their first tensor."""


VIEWS = frozenset({"view", "reshape", "flatten", "unflatten"})
"""Operations that give their first tensor another shape."""


CREATIONS = frozenset({
    "zeros", "ones", "full", "empty", "arange", "linspace", "eye", "rand", "randn", "randint", "randperm",
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like",
    "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor", "tril_indices", "triu_indices",
    "normal_", "uniform_", "bernoulli_", "random_", "empty_strided", "new_empty_strided", "fill_",
})  # fmt: skip
"""Operations whose result takes at most its shape from their tensors."""


RULES: dict[str, Rule] = {
    **_names(f"neg positive {' '.join(COPIES)}", partial(entrywise.each_entry, tags=LINEAR)),
    "zero_": partial(entrywise.each_entry, tags=LINEAR),  # in place, on a part of a tensor, it is a mask
    **_names("dropout feature_dropout native_dropout", partial(entrywise.each_entry, tags=MASK)),
    **_names("relu leaky_relu rrelu rrelu_with_noise", partial(entrywise.each_entry, tags=HOMOGENEOUS)),
    **_names("abs", partial(entrywise.each_entry, tags=HOMOGENEOUS | EVEN)),
    **_names(
        "tanh sin asin sinh atan asinh atanh tan erf sign sgn softshrink hardshrink round trunc",
        partial(entrywise.each_entry, tags=ODD),
    ),
    **_names("cos cosh square", partial(entrywise.each_entry, tags=EVEN)),
    **_names(
        "gelu silu mish sigmoid log_sigmoid elu celu selu softplus relu6 hardswish hardsigmoid threshold exp exp2 expm1 log log1p "
        "log2 log10 sqrt rsqrt reciprocal floor ceil logical_not isnan isfinite isinf nan_to_num alpha_dropout "
        "feature_alpha_dropout erfc lgamma frac",
        partial(entrywise.each_entry, tags=NOTHING),
    ),
    **_names("add sub rsub", partial(entrywise.combined, tags=LINEAR)),
    **_names("maximum minimum", partial(entrywise.combined, tags=HOMOGENEOUS)),
    **_names(
        "eq ne lt le gt ge logical_and logical_or atan2 fmod remainder floor_divide bitwise_and bitwise_or",
        partial(entrywise.combined, tags=NOTHING),
    ),
    "mul": entrywise.multiply,
    "div": entrywise.divide,
    "where": entrywise.where,
    "lerp": entrywise.lerp,
    "masked_fill": entrywise.masked_fill,
    **_names("clamp clamp_min clamp_max hardtanh", entrywise.clamp),
    "prelu": entrywise.prelu,
    "pow": entrywise.power,
    "linear": products.linear,
    "max_pool2d_with_indices": partial(reductions.spatial, tags=HOMOGENEOUS, num_spatial=2),
    **_names("matmul mm bmm mv dot", products.matmul),
    **_names("addmm baddbmm addmv", products.added_matmul),
    "outer": products.outer,
    "einsum": products.einsum,
    "scaled_dot_product_attention": products.attention,
    **_names("softmax log_softmax", products.softmax),
    **_names("conv1d conv2d conv3d", partial(convolutions.convolution, is_transposed=False)),
    **_names(
        "conv_transpose1d conv_transpose2d conv_transpose3d", partial(convolutions.convolution, is_transposed=True)
    ),
    **_names("batch_norm instance_norm", normalisations.batch_norm),
    "group_norm": normalisations.group_norm,
    **_names("layer_norm rms_norm", normalisations.layer_norm),
    **_names(" ".join(VIEWS), layout.reshape),
    **_names("permute transpose t swapaxes movedim numpy_T mT", layout.permute),
    **_names("expand expand_as", layout.expand),
    **_names("repeat tile", layout.repeat),
    "repeat_interleave": layout.repeat_interleave,
    **_names("slice narrow", selections.take_slice),
    "select": selections.select,
    **_names("split split_with_sizes chunk unbind tensor_split", selections.split),
    **_names("cat stack", selections.cat),
    "flip": layout.flip,
    "roll": layout.roll,
    **_names("index index_select", selections.index),
    "squeeze": layout.squeeze,
    "unsqueeze": layout.unsqueeze,
    "pad": layout.pad,
    **_names("pixel_shuffle pixel_unshuffle", layout.pixel_shuffle),
    "channel_shuffle": layout.channel_shuffle,
    **{
        f"{stem}{n}d": partial(reductions.spatial, tags=LINEAR, num_spatial=n)
        for stem in ("avg_pool", "adaptive_avg_pool")
        for n in (1, 2, 3)
    },
    **{
        f"{stem}{n}d": partial(reductions.spatial, tags=HOMOGENEOUS, num_spatial=n)
        for stem in ("max_pool", "adaptive_max_pool")
        for n in (1, 2, 3)
    },
    **_names(
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
        "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa",
        partial(reductions.spatial, tags=LINEAR),
    ),
    **_names("mean sum", partial(reductions.reduce, tags=LINEAR)),
    **_names("amax amin std", partial(reductions.reduce, tags=HOMOGENEOUS)),
    "linalg_vector_norm": reductions.norm,
    **_names("var prod logsumexp any all var_mean std_mean", partial(reductions.reduce, tags=NOTHING)),
    **_names("max min", reductions.extreme),
    "embedding": selections.embedding,
    **_names("lstm gru rnn_tanh rnn_relu", recurrent.recurrent),
}
"""The rule of every known operation."""


def fill_of(name: str, arguments: Mapping[str, Any]) -> float | None:
    """The one number that all entries of a new tensor are, where the call tells it."""
    if name in ("zeros", "zeros_like", "new_zeros", "zero_"):
        return 0.0
    if name in ("ones", "ones_like", "new_ones"):
        return 1.0
    key = {"full": "fill_value", "full_like": "fill_value", "new_full": "fill_value", "fill_": "value"}.get(name)
    fill = None if key is None else arguments.get(key)
    return float(fill) if isinstance(fill, (int, float)) else None


def source_view(call: Call) -> Source | None:
    """Source of a result that is a parameter with its axes in another order, or with axes of length one put in or taken out.

    None for all other calls.
    """
    value = next(iter(call.values), None)
    if value is None or value.source is None or len(call.values) != 1:
        return None
    axes: list[int | None] = list(value.source.axes)
    if call.name in COPIES:
        dtype = call["dtype"]
        if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
            return None  # other numbers
    elif RULES.get(call.name) is layout.permute:
        axes = [axes[k] for k in layout.axis_order(call)]
    elif call.name == "unsqueeze":
        axes.insert(call["dim"] % len(call.shape), None)
    elif call.name == "squeeze":
        gone = [axis for axis in axes_of(call["dim"], len(value.shape)) if value.shape[axis] == 1]
        axes = [own for axis, own in enumerate(axes) if axis not in gone]
    elif RULES.get(call.name) is layout.expand:
        axes = [*(None for _ in range(len(call.shape) - len(axes))), *axes]
        own = (1,) * (len(call.shape) - len(value.shape)) + value.shape
        axes = [axis if old == new else None for axis, old, new in zip(axes, own, call.shape)]
    else:
        return None
    return value.source._replace(axes=tuple(axes))
