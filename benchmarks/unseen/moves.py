"""Moves of arrays, written in numpy apart from the package, and distances between results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Array",
    "Arrays",
    "Site",
    "distance",
    "draw_element",
    "gradient_distance",
    "move_arrays",
    "places_of",
    "slice_of",
]


Array = npt.NDArray[Any]


Arrays = dict[str, Array]


Site = dict[str, Any]


def places_of(site: Site, leg: dict[str, Any]) -> Array:
    """The entries of each channel along the axis of a leg, ``[size, repeat]``."""
    count = site["size"] * leg["repeat"]
    places = leg["index"] if leg["index"] is not None else range(leg["offset"], leg["offset"] + count)
    return np.array(list(places)).reshape(site["size"], leg["repeat"])


def slice_of(leg: dict[str, Any], array: Array) -> Array:
    """A view of what a leg acts in, its axis first."""
    cut = [slice(None)] * array.ndim
    if leg["within"] is not None:
        axis, start, length = leg["within"]
        cut[axis] = slice(start, start + length)
    return np.moveaxis(array[tuple(cut)], leg["axis"], 0)


def draw_element(site: Site, generator: np.random.Generator) -> Array:
    size: int = site["size"]
    drawn: dict[str, Callable[[], Array]] = {
        "permutation": lambda: generator.permutation(size),
        "scaling": lambda: np.exp(generator.uniform(-1, 1, size)),
        "sign": lambda: generator.choice([-1.0, 1.0], size),
        "linear": lambda: np.eye(size) + generator.uniform(-0.4, 0.4, (size, size)) / np.sqrt(size),
    }
    return drawn[site["group"]]()


def move_arrays(sites: list[Site], elements: Arrays, arrays: Arrays, kind: int) -> None:
    """Move arrays in place: parameters with ``kind=1``, gradients with ``kind=-1``. Those that are missing are left out."""
    for site in sites:
        element = elements[site["id"]]
        for leg in site["legs"]:
            if leg["name"] not in arrays:
                continue
            inner, places, degree = slice_of(leg, arrays[leg["name"]]), places_of(site, leg), kind * leg["degree"]
            channels = inner[places]
            if site["group"] == "permutation":
                inner[places] = channels[element]
            elif site["group"] == "linear":
                matrix = element if degree == 1 else np.linalg.inv(element).T
                inner[places] = np.tensordot(matrix, channels, axes=1)
            else:
                inner[places] = channels * (element**degree).reshape(-1, *[1] * (channels.ndim - 1))


def distance(expected: list[Array], actual: list[Array]) -> float:
    """The largest difference of two lists of arrays, each relative to the largest entry of the expected one."""
    if [array.shape for array in expected] != [array.shape for array in actual]:
        return float("inf")
    worst = 0.0
    for one, other in zip(expected, actual):
        if one.size == 0 or np.array_equal(one, other, equal_nan=one.dtype.kind in "fc"):
            continue
        if one.dtype == bool:
            return float("inf")
        if not np.array_equal(np.isfinite(one), np.isfinite(other)):
            return float("inf")
        finite = np.isfinite(one)
        scale = float(np.abs(one[finite]).max(initial=0.0)) or 1.0
        worst = max(worst, float(np.abs(other[finite] - one[finite]).max(initial=0.0)) / scale)
    return worst


def gradient_distance(expected: Arrays, actual: Arrays) -> float:
    """The same of gradients. One that is nothing but rounding errors is measured by those of other parameters."""
    largest = max((float(np.abs(array).max(initial=0.0)) for array in expected.values()), default=0.0)
    worst = 0.0
    for name, one in expected.items():
        scale = max(float(np.abs(one).max(initial=0.0)), 1e-4 * largest) or 1.0
        error = float(np.abs(actual[name] - one).max(initial=0.0)) / scale
        worst = max(worst, error if error == error else float("inf"))
    return worst
