"""How strong: the largest coefficient whose damage to neutral text stays within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._checks import check_choice, check_number, check_texts
from .contrast import Behaviour, text_hash
from .errors import ArgumentError, DataError
from .hosts import as_host
from .metrics import behaviour_metric, kl_per_token, neutral_nll
from .plan import SteeringPlan

if TYPE_CHECKING:
    import pandas

DEFAULT_GRID = (0.02, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8)
"""Coefficients in units of the median residual norm."""
BUDGET_UNITS = ("nll", "kl")


@dataclass(frozen=True, eq=False)
class Calibration:
    """A coefficient with the dose-response curve it was read off."""

    coefficient: float
    """Largest coefficient on the grid up to which the cost stays within the budget; 0 never appears (it raises)."""
    budget: float
    unit: str
    """"nll": rise of the mean negative log-likelihood; "kl": mean KL(unsteered || steered). Both nats per token."""
    curve: tuple[dict[str, float], ...]
    """Per coefficient: `coefficient`, `cost` (nats per token), and `effect` (nats of the behaviour metric) if measured."""
    texts_hash: str
    n_texts: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content, as stored in a plan."""
        return {
            "coefficient": self.coefficient,
            "budget": self.budget,
            "unit": self.unit,
            "curve": [dict(row) for row in self.curve],
            "texts_hash": self.texts_hash,
            "n_texts": self.n_texts,
        }

    def to_pandas(self) -> pandas.DataFrame:
        """The dose-response curve, one row a coefficient, with a column `band` ("usable" or "broken")."""
        import pandas as pd

        frame = pd.DataFrame([dict(row) for row in self.curve])
        frame["band"] = ["usable" if cost <= self.budget else "broken" for cost in frame["cost"]]
        return frame

    def plot(self) -> Any:
        """Plotly figure of effect and cost against the coefficient."""
        from .plots import plot_dose_response

        return plot_dose_response(self)

    def __repr__(self) -> str:
        return (
            f"Calibration(coefficient={self.coefficient:g}, budget={self.budget:g} nats/token ({self.unit}), "
            f"{len(self.curve)} points on {self.n_texts} texts)"
        )


def calibrate(
    plan: SteeringPlan,
    model: Any,
    texts: Sequence[str],
    *,
    budget: float = 0.10,
    unit: str = "nll",
    grid: Sequence[float] = DEFAULT_GRID,
    behaviour: Behaviour | None = None,
    curve: bool = True,
    negative: bool = False,
    batch_size: int = 32,
) -> Calibration:
    """Find the largest coefficient within a budget on neutral texts; the ratio between the plan's layers is kept.

    With `curve` the grid is walked upwards and left once the cost exceeds five times the budget; the coefficient returned
    is the last one before the cost first exceeds the budget, so a curve that dips again later is not exploited. Without,
    the grid is bisected: about four measurements, the same answer wherever the cost grows with the coefficient.

    Args:
        plan: its directions, positions and edits; its own coefficients give only the ratio between layers.
        model: the target.
        texts: neutral texts, none of them used for fitting.
        budget: nats per token.
        unit: "nll" (rise of the mean NLL; can be negative) or "kl" (mean KL to the unsteered model; never negative).
        grid: positive coefficients.
        behaviour: if given, the effect is recorded at each coefficient; it does not influence the choice.
        curve: measure the whole dose-response curve.
        negative: also walk the negative coefficients (for the curve only).
        batch_size: texts per forward pass.

    Raises:
        ArgumentError: even the smallest coefficient exceeds the budget.
    """
    check_number("budget", budget, low=0.0, low_open=True)
    check_choice("unit", unit, BUDGET_UNITS)
    neutral = check_texts("texts", texts)
    steps = sorted(float(g) for g in grid)
    if not steps or steps[0] <= 0:
        raise ArgumentError(
            f"grid must hold positive coefficients, got {list(grid)[:5]}; negative=True adds their mirror."
        )
    host = as_host(model)
    totals = neutral_nll(host, neutral, batch_size=batch_size)
    if float(totals[:, 1].sum()) == 0:
        raise DataError("texts: every text is a single token, so nothing is predicted; give longer neutral texts.")
    base_nll = _mean(totals)
    base_effect = None if behaviour is None else behaviour_metric(host, behaviour)

    def measure(coefficient: float) -> dict[str, float]:
        steered = plan.with_coefficient(coefficient)
        if unit == "kl":
            cost = _mean(kl_per_token(host, neutral, steered, batch_size=batch_size))
        else:
            cost = _mean(neutral_nll(host, neutral, plan=steered, batch_size=batch_size)) - base_nll
        row = {"coefficient": coefficient, "cost": cost}
        if behaviour is not None and base_effect is not None:
            row["effect"] = float((behaviour_metric(host, behaviour, plan=steered) - base_effect).mean())
        return row

    upward = _walk(measure, steps, budget) if curve else _bisect(measure, steps, budget)
    over = [row["coefficient"] for row in upward if row["cost"] > budget]
    within = [row["coefficient"] for row in upward if not over or row["coefficient"] < over[0]]
    if not within:
        raise ArgumentError(
            f"even coefficient {steps[0]:g} costs {upward[0]['cost']:.3f} nats per token, more than budget={budget:g}; "
            "raise budget, give a grid with smaller coefficients, or steer fewer layers."
        )
    downward = _walk(measure, [-s for s in steps], budget) if negative else []
    origin = {"coefficient": 0.0, "cost": 0.0, **({"effect": 0.0} if behaviour is not None else {})}
    points = tuple(sorted([*downward, origin, *upward], key=lambda row: row["coefficient"]))
    return Calibration(within[-1], budget, unit, points, text_hash(neutral), len(neutral))


def _walk(measure: Any, coefficients: Sequence[float], budget: float) -> list[dict[str, float]]:
    rows = []
    for coefficient in coefficients:
        rows.append(measure(coefficient))
        if rows[-1]["cost"] > 5 * budget:
            break
    return rows


def _bisect(measure: Any, coefficients: Sequence[float], budget: float) -> list[dict[str, float]]:
    """Rows of the points visited, in order of coefficient; the last within and the first over are neighbours."""
    rows = {}
    low, high = -1, len(coefficients)
    while high - low > 1:
        middle = (low + high) // 2
        rows[middle] = measure(coefficients[middle])
        if rows[middle]["cost"] <= budget:
            low = middle
        else:
            high = middle
    return [rows[i] for i in sorted(rows)]


def _mean(totals: Any) -> float:
    return float(totals[:, 0].sum() / totals[:, 1].sum())
