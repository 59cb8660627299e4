"""Markdown tables, and putting them into the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["centre", "insert", "markdown", "number", "percent", "times"]


def number(x: float) -> str:
    """Two significant digits."""
    if math.isinf(x):
        return "∞"
    return f"{x:.2g}" if 1e-3 <= abs(x) < 1e3 or x == 0 else f"{x:.1e}".replace("e-0", "e-").replace("e+0", "e")


def centre(summary: Mapping[str, Any]) -> str:
    """Median over meta-seeds, with the lowest and the highest."""
    return f"{number(summary['median'])} [{number(summary['lowest'])}, {number(summary['highest'])}]"


def times(comparison: Mapping[str, Any]) -> str:
    """Ratio of two results, with the number of pairs of meta-seeds that agree."""
    return f"{number(comparison['ratio'])} ({comparison['wins']}/{comparison['pairs']})"


def percent(x: float) -> str:
    """A share in percent."""
    return f"{100.0 * x:.0f} %"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def insert(page: str, name: str, text: str) -> str:
    """The page with ``text`` between its marks ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        ValueError: if the marks are missing.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in page or end not in page:
        raise ValueError(f"the page has no place for the table {name!r}: write {start} and {end} into it")
    return page[: page.index(start) + len(start)] + f"\n{text}\n" + page[page.index(end) :]
