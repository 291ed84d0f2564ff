"""Which strengths are measured: a search for the largest within a budget, and the points of a
curve. Rows hold `coefficient` and `cost`, and whatever else is measured with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Measure = Callable[[float], Row]
"""A coefficient to its row."""
DEFAULT_GRID = (
    0.005,
    0.01,
    0.02,
    0.03,
    0.04,
    0.05,
    0.065,
    0.08,
    0.1,
    0.125,
    0.15,
    0.175,
    0.2,
    0.25,
    0.3,
    0.35,
    0.4,
    0.5,
    0.6,
    0.8,
)
"""Coefficients in units of the median residual norm."""
CURVE = (0.25, 0.5, 0.75, 1.5, 2.0, 3.0, 4.0)
"""Where a curve is drawn beside the points of the search, in multiples of the coefficient found;
the grid's nearest points are taken."""


def is_over(cost: float, budget: float) -> bool:
    """Whether a cost exceeds the budget; one that is no number does: the strength overflows."""
    return not cost <= budget


def walk(
    measure: Measure,
    coefficients: Sequence[float],
    budget: float,
    known: Sequence[Row] = (),
) -> list[Row]:
    """Rows of these coefficients, outwards from zero, until the cost exceeds five times the
    budget; rows already `known` are not measured again, and none of them is lost."""
    rows = {row["coefficient"]: row for row in known}
    for coefficient in coefficients:
        if coefficient not in rows:
            rows[coefficient] = measure(coefficient)
        if is_over(rows[coefficient]["cost"], 5 * budget):
            break
    return [rows[c] for c in sorted(rows, key=abs)]


def around(steps: Sequence[float], found: float, known: Sequence[Row]) -> list[float]:
    """The points of a curve: those of the search, and the grid's nearest to multiples of what it
    found."""
    points = {row["coefficient"] for row in known}
    points |= {min(steps, key=lambda s: abs(s - share * found)) for share in CURVE}
    return sorted(points)


def search(
    measure: Measure,
    coefficients: Sequence[float],
    budget: float,
    near: float,
) -> list[Row]:
    """Rows of the points visited, in order of coefficient; the last within and the first over are
    neighbours.

    It begins at the point nearest to `near`. Damage grows about with the square of the coefficient,
    so two more points are taken where that would meet the budget; then what is left is halved."""
    rows: dict[int, Row] = {}
    low, high = -1, len(coefficients)
    at = min(range(high), key=lambda i: abs(coefficients[i] - near))
    while high - low > 1:
        rows[at] = measure(coefficients[at])
        cost = rows[at]["cost"]
        low, high = (low, at) if is_over(cost, budget) else (at, high)
        if len(rows) < 4 and cost > 0:
            meets = coefficients[at] * (budget / cost) ** 0.5
            at = sum(c <= meets for c in coefficients) - 1
            at = min(max(at, low + 1), high - 1)
        else:
            at = (low + high) // 2
    return [rows[i] for i in sorted(rows)]
