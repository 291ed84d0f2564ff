"""The largest coefficient whose damage to neutral text stays within a budget."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens._html import repr_html
from expertsteer_lens._progress import Step
from expertsteer_lens._upward import upward
from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.data.chat import Text, check_texts
from expertsteer_lens.data.contrast import text_hash
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.interventions.edits import find_edit
from expertsteer_lens.steer.plan import SteeringPlan
from expertsteer_lens.steer.vector import SteeringVector

from .neutral import NeutralTexts
from .prepared import Completions
from .strengths import CURVE, DEFAULT_GRID, around, is_over, search, walk

if TYPE_CHECKING:
    import pandas

BudgetUnit = Literal["nll", "kl"]
BUDGET_UNITS: tuple[BudgetUnit, ...] = get_args(BudgetUnit)
Band = Literal["no effect", "usable", "broken"]
Sign = Literal["as labelled", "reversed", "unclear"]


class OverBudgetError(ArgumentError):
    """Even the smallest coefficient costs more than the budget."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """A coefficient with the dose-response curve it was read off."""

    coefficient: float
    """Largest coefficient on the grid up to which the cost stays within the budget, with the sign
    of the plan's own; 0 never appears (it raises)."""
    coefficients: dict[str, float]
    """Per hook name, at that coefficient of the plan."""
    budget: float
    unit: BudgetUnit
    """"nll": rise of the mean negative log-likelihood; "kl": mean KL(unsteered || steered). Both
    nats per token."""
    curve: tuple[dict[str, Any], ...]
    """Per coefficient: `coefficient`, `cost` (nats per token), `band`, and, where a behaviour was
    given, `effect` (nats of its metric) with `effect_se`, the standard error over prompts.

    Bands: "broken" where the cost exceeds the budget or is no number, as where a strength overflows
    the model's dtype (and beyond, in the same direction); else "no effect" where the effect is
    within two standard errors of zero; else "usable"."""
    texts_hash: str
    n_texts: int

    @property
    def sign(self) -> Sign | None:
        """Does the direction point the right way? "as labelled", "reversed", or "unclear" (within
        two standard errors of zero at the chosen coefficient); None if no behaviour was given. A
        negative coefficient should lower the behaviour."""
        row = next(r for r in self.curve if r["coefficient"] == self.coefficient)
        if "effect" not in row:
            return None
        if not abs(row["effect"]) > 2 * row["effect_se"]:
            return "unclear"
        return "as labelled" if row["effect"] * self.coefficient > 0 else "reversed"

    def apply(self, plan: SteeringPlan) -> SteeringPlan:
        """The plan at the coefficients found, with this calibration in its provenance.

        Warns if the direction turned out to be reversed on the behaviour that was given; the
        numbers are the same with or without the warning.

        Raises:
            ArgumentError: the plan steers other hook points than the one calibrated.
        """
        if {v.hook_name for v in plan.vectors} != set(self.coefficients):
            raise ArgumentError(
                f"plan steers {[v.hook_name for v in plan.vectors]}, but this calibration is for "
                f"{list(self.coefficients)}."
            )
        if self.sign == "reversed":
            warnings.warn(
                "the calibrated direction moves the behaviour metric on the validation prompts "
                "against its sign: it points the wrong way there. Swap positive and negative if "
                "the labels are reversed, or steer another layer.",
                stacklevel=2,
            )
        vectors = tuple(
            replace(v, coefficient=self.coefficients[v.hook_name]) for v in plan.vectors
        )
        return replace(
            plan, vectors=vectors, provenance={**plan.provenance, "calibration": self.to_dict()}
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content, as stored in a plan."""
        return {
            "coefficient": self.coefficient,
            "coefficients": dict(self.coefficients),
            "budget": self.budget,
            "unit": self.unit,
            "sign": self.sign,
            "curve": [dict(row) for row in self.curve],
            "texts_hash": self.texts_hash,
            "n_texts": self.n_texts,
        }

    def to_pandas(self) -> pandas.DataFrame:
        """The dose-response curve, one row a coefficient."""
        import pandas as pd

        return pd.DataFrame([dict(row) for row in self.curve])

    def plot(self) -> Any:
        """Plotly figure of effect and cost against the coefficient."""
        return upward("plot_dose_response")(self)

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        return (
            f"Calibration(coefficient={self.coefficient:g}, budget={self.budget:g} nats/token "
            f"({self.unit}), "
            f"{len(self.curve)} points on {self.n_texts} texts)"
        )


def calibrate(
    plan: SteeringPlan,
    model: Any,
    texts: Sequence[Text] | NeutralTexts,
    *,
    budget: float = 0.10,
    unit: BudgetUnit = "nll",
    grid: Sequence[float] | None = None,
    behaviour: Behaviour | None = None,
    curve: bool = True,
    negative: bool = False,
    per_layer: bool = False,
    batch_size: int = 32,
    progress: bool | None = False,
) -> Calibration:
    """Find the largest coefficient within a budget on neutral texts.

    The plan's layers are scaled together: their coefficients keep the ratio and the signs they have
    in the plan or, with `per_layer`, the ratio of the largest coefficients that each layer could
    afford if it were steered alone. A plan whose largest coefficient is negative is searched on
    that side of zero.

    The grid is searched from the plan's own coefficient on, where a cost that grows with the square
    of the coefficient would meet the budget: two or three measurements, eight at most. With `curve`
    points around the one found are measured too, up to five times the budget; a `grid` of yours is
    measured point by point. The coefficient returned is the last one before the cost first exceeds
    the budget at any point measured, so a curve that dips again later is not exploited.

    Args:
        plan: its directions, positions and edits; its own coefficients give only the ratio between
            layers.
        model: the target.
        texts: neutral texts, none of them used for fitting; `NeutralTexts` when several plans are
            calibrated on them.
        budget: nats per token.
        unit: "nll" (rise of the mean NLL; can be negative) or "kl" (mean KL to the unsteered model;
            never negative).
        grid: positive coefficients, in the unit of the plan's; default: `DEFAULT_GRID`, of which a
            curve takes about ten, times the median norm of the neutral texts' tokens where the
            plan's coefficients are lengths (`relative_to="unit"`).
        behaviour: if given, the effect is recorded at each coefficient; it does not influence the
            choice.
        curve: measure the whole dose-response curve.
        negative: also walk the coefficients of the other sign (for the curve only).
        per_layer: first search the grid for each layer by itself; needs edits whose coefficients
            are comparable.
        batch_size: texts per forward pass.
        progress: show progress; None: where standard error is a terminal.

    Raises:
        ArgumentError: even the smallest coefficient exceeds the budget.
        DataError: the unsteered model gives no finite probabilities on the texts.

    Example:
        >>> import expertsteer_lens as esl
        >>> from expertsteer_lens import directions, zoo
        >>> target, pairs = zoo.load("target", host="huggingface"), zoo.contrast_pairs(30)
        >>> hook = "blocks.2.hook_resid_post"
        >>> states = esl.capture(target, pairs.texts, [hook], labels=pairs.labels)
        >>> vectors = {hook: directions.mean_difference(states[hook], states.labels)}
        >>> plan = esl.SteeringPlan.from_vectors(vectors, coefficient=0.3, median_norms=states)
        >>> found = calibrate(plan, target, zoo.neutral_texts(8), budget=0.05, curve=False)
        >>> 0.1 < found.coefficient < 1.0
        True
    """
    check_number("budget", budget, low=0.0, low_open=True)
    check_choice("unit", unit, BUDGET_UNITS)
    given = None if grid is None else sorted(float(g) for g in grid)
    if given is not None and (not given or given[0] <= 0):
        raise ArgumentError(
            f"grid must hold positive coefficients, got {given[:5]}; negative=True adds their "
            "mirror."
        )
    host = as_host(model)
    if isinstance(texts, NeutralTexts):
        neutral = texts
    else:
        neutral = NeutralTexts(host, check_texts("texts", texts), batch_size=batch_size)
    if neutral.n_tokens == 0:
        raise DataError(
            "texts: every text is a single token, so nothing is predicted; give longer neutral "
            "texts."
        )
    if per_layer and len(plan.vectors) > 1:
        plan = _balanced(plan, neutral, given, budget, unit)
    leading = max(plan.vectors, key=lambda v: abs(v.coefficient))
    side = -1.0 if leading.coefficient < 0 else 1.0
    steps = _steps(given, leading, neutral)
    completions = None if behaviour is None else Completions(host, behaviour)
    base = None if completions is None else completions.scores().log_odds()

    def measure(coefficient: float) -> dict[str, Any]:
        steered = plan.with_coefficient(side * coefficient)
        row = {"coefficient": coefficient, "cost": _cost(neutral, steered, unit)}
        if completions is not None and base is not None:
            change = completions.scores(steered).log_odds() - base
            row["effect"] = float(change.mean())
            row["effect_se"] = float(change.std() / len(change) ** 0.5) if len(change) > 1 else 0.0
        step.advance()
        return row

    each_point = curve and grid is not None
    drawn = (len(steps) if each_point else 3 + len(CURVE)) * (1 + negative)
    with Step(
        "calibrate",
        total=drawn if curve else len(steps).bit_length(),
        progress=progress,
        unit="coefficient",
        cost=f"each one pass over {len(neutral.texts)} neutral texts ({neutral.n_tokens} tokens)"
        + ("" if behaviour is None else f" and {len(behaviour)} prompts")
        + ("; fewer where the budget is exceeded early" if curve else ""),
    ) as step:
        if each_point:
            rising = walk(measure, steps, budget)
        else:
            rising = search(measure, steps, budget, abs(leading.coefficient))
            if curve:
                found = _within(rising, steps, budget, "the plan")
                rising = walk(measure, around(steps, found, rising), budget, rising)
        best = _within(rising, steps, budget, "the plan")
        falling = []
        if negative:
            falling = walk(measure, [-row["coefficient"] for row in rising], budget)
    origin = {"coefficient": 0.0, "cost": 0.0}
    if behaviour is not None:
        origin |= {"effect": 0.0, "effect_se": 0.0}
    points = [
        {**row, "coefficient": side * row["coefficient"] or 0.0}
        for row in (*_banded(falling, budget), *_banded([origin], budget), *_banded(rising, budget))
    ]
    points.sort(key=lambda row: row["coefficient"])
    best *= side
    return Calibration(
        coefficient=best,
        coefficients={v.hook_name: v.coefficient for v in plan.with_coefficient(best).vectors},
        budget=budget,
        unit=unit,
        curve=tuple(points),
        texts_hash=text_hash(neutral.texts),
        n_texts=len(neutral.texts),
    )


def _cost(neutral: NeutralTexts, plan: SteeringPlan, unit: BudgetUnit) -> float:
    """What the budget counts: nats per token."""
    rise, divergence = neutral.cost(plan, kl=unit == "kl")
    return rise if divergence is None else divergence


def _steps(
    given: Sequence[float] | None, vector: SteeringVector, neutral: NeutralTexts
) -> Sequence[float]:
    """The strengths to search, in the unit of the vector's coefficient."""
    if given is not None:
        return given
    is_length = vector.relative_to == "unit" and find_edit(vector.edit).coefficient == "length"
    norm = neutral.median_norm(vector.hook_name) if is_length else 1.0
    return [share * norm for share in DEFAULT_GRID]


def _balanced(
    plan: SteeringPlan,
    neutral: NeutralTexts,
    given: Sequence[float] | None,
    budget: float,
    unit: BudgetUnit,
) -> SteeringPlan:
    """The plan with the largest coefficient that each of its layers affords alone, of its sign."""

    def affords(vector: SteeringVector) -> float:
        alone = replace(plan, vectors=(vector,))
        side = -1.0 if vector.coefficient < 0 else 1.0
        steps = _steps(given, vector, neutral)

        def measure(coefficient: float) -> dict[str, Any]:
            cost = _cost(neutral, alone.with_coefficient(side * coefficient), unit)
            return {"coefficient": coefficient, "cost": cost}

        rows = search(measure, steps, budget, near=abs(vector.coefficient))
        return side * _within(rows, steps, budget, vector.hook_name)

    return replace(plan, vectors=tuple(replace(v, coefficient=affords(v)) for v in plan.vectors))


def _within(
    rows: Sequence[dict[str, Any]], steps: Sequence[float], budget: float, what: str
) -> float:
    """The last coefficient before the cost first exceeds the budget."""
    over = [row["coefficient"] for row in rows if is_over(row["cost"], budget)]
    within = [row["coefficient"] for row in rows if not over or row["coefficient"] < over[0]]
    if not within:
        raise OverBudgetError(
            f"{what}: even coefficient {steps[0]:g} costs {rows[0]['cost']:.3f} nats per token, "
            f"more than budget={budget:g}; "
            "raise budget, give a grid with smaller coefficients, or steer fewer layers."
        )
    return float(within[-1])


def _banded(rows: Sequence[dict[str, Any]], budget: float) -> list[dict[str, Any]]:
    """Rows ordered outwards from zero, each with its band; once broken, all beyond are broken."""
    out: list[dict[str, Any]] = []
    broken = False
    for row in rows:
        broken = broken or is_over(row["cost"], budget)
        flat = "effect" in row and abs(row["effect"]) <= 2 * row["effect_se"]
        band: Band = "usable"
        if broken:
            band = "broken"
        elif flat or not row["coefficient"]:
            band = "no effect"
        out.append({**row, "band": band})
    return out
