"""Result of an evaluation: every row of the comparison, and the verdict that follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import explained_at
from expertsteer_lens._html import repr_html
from expertsteer_lens._upward import upward
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.measure.intervals import bootstrap_draws, mean_interval, student

if TYPE_CHECKING:
    import pandas

Role = Literal["base", "plan", "floor", "control", "ceiling", "baseline", "compared"]
FLOOR, SAME_NORM = "random (same budget)", "random (same norm)"
"""Random directions, each at the largest strength within the budget (the rows with the role
"floor"), and at the strength of the plan."""
SETTING = "setting"
"""Where the provenance has the digest of all that decides the rows, see `FinishedRows`."""
PLAN_COST = "plan_cost"
"""In the provenance: what the plan costs on the calibration texts, in the unit of the budget."""
NEAR_CHANCE = 2.0
"""A ceiling within so many standard deviations of random directions says that the target cannot."""
SLACK = 1.05
"""By so much a plan may exceed the budget: it was calibrated elsewhere, or batched otherwise."""


@dataclass(frozen=True, eq=False)
class EvaluationRow:
    """One steering under test."""

    method: str
    role: Role | str
    """"base" (the unsteered target), "plan", "floor" (random directions under the same budget),
    "control", "ceiling" (the target's own direction), "baseline" or "compared"; or the role that a
    registered control was given."""
    seed: int
    hook_names: tuple[str, ...]
    coefficient: float
    """In units of the median residual norm, as calibrated on the calibration texts."""
    effect: float
    """Mean over test prompts of the change of m = log p(positive) - log p(negative), nats."""
    low: float
    high: float
    """Bounds of the bootstrap interval of `effect` over prompts (95 %)."""
    accuracy: float
    """Share of test prompts whose likeliest completion is a positive one."""
    nll_rise: float
    """Rise of the mean NLL on the neutral test texts, nats per token; NaN of an instruction in the
    prompt, which neutral texts have none of."""
    kl: float
    """Mean KL(unsteered || steered) of the next token on the neutral test texts, nats per token."""
    per_prompt: Float[Tensor, " n_prompts"]
    """Change of m, prompt by prompt."""
    correct: Float[Tensor, " n_prompts"]
    """1 where the likeliest completion is a positive one, else 0."""
    effect_per_token: float | None = None
    """Mean over test prompts of the change of: nats per completion token, mean over the positive
    completions minus mean over the negative ones. For completions of real length, whose sums swing
    by tens of nats. None in results of version 0.1."""
    low_per_token: float | None = None
    high_per_token: float | None = None
    """Bounds of the bootstrap interval of `effect_per_token` over prompts (95 %)."""
    wrong_way: float | None = None
    """Share of test prompts whose m moved against the sign of the coefficient."""
    repetition: float | None = None
    """Share of repeated word trigrams in greedy continuations; None if nothing was generated."""
    length: float | None = None
    """Mean words per continuation."""
    text_score: float | None = None
    """Mean of the user's score of the continuations."""
    note: str | None = None
    """Why this could not be measured; all numbers are NaN then. None: it was."""

    @property
    def side(self) -> float:
        """-1 of a negative coefficient, which steers away: lower is better there; else 1."""
        return -1.0 if self.coefficient < 0 else 1.0

    @property
    def measured(self) -> bool:
        """Whether there are numbers in this row."""
        return self.note is None

    @classmethod
    def unmeasured(
        cls, method: str, role: Role | str, seed: int, note: str, *, n_prompts: int
    ) -> EvaluationRow:
        """A row for what could not be measured, and why."""
        nothing = torch.full((n_prompts,), math.nan, dtype=torch.float64)
        numbers = ("coefficient", "effect", "low", "high", "accuracy", "nll_rise", "kl")
        return cls(
            method=method,
            role=role,
            seed=seed,
            hook_names=(),
            per_prompt=nothing,
            correct=nothing.clone(),
            note=note,
            **dict.fromkeys(numbers, math.nan),
        )


_GENERATED = ("repetition", "length", "text_score")
_COLUMNS = (
    "method",
    "role",
    "seed",
    "coefficient",
    "effect",
    "low",
    "high",
    "effect_per_token",
    "low_per_token",
    "high_per_token",
    "wrong_way",
    "accuracy",
    "nll_rise",
    "kl",
    *_GENERATED,
    "note",
)


Outcome = Literal["works", "no gain", "chance", "target cannot", "no floor", "not measured"]


@dataclass(frozen=True)
class _Chance:
    """What random directions do."""

    n: int
    mean: float
    sd: float
    side: float
    """That of the plan's coefficient."""

    @property
    def luck(self) -> float:
        """How many standard deviations from the mean of n a further random direction is in 2.5 %
        of cases (normal distribution, mean and deviation estimated from the n)."""
        return student(self.n) * math.sqrt(1 + 1 / self.n)

    def sd_of(self, effect: float) -> float:
        """How far an effect is from their mean, in their standard deviations, better = positive."""
        away = self.side * (effect - self.mean)
        return away / self.sd if self.sd > 0 else math.copysign(math.inf, away)

    def least(self, row: EvaluationRow) -> float:
        """The worst of its interval, better = positive."""
        return row.low if self.side > 0 else -row.high

    def is_beyond(self, row: EvaluationRow) -> bool:
        """Whether its effect, and all of its interval, is better than random directions."""
        return self.sd_of(row.effect) > self.luck and self.least(row) > self.side * self.mean


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Every row of the comparison, and what follows from it."""

    rows: tuple[EvaluationRow, ...]
    base_metric: float
    """Mean m of the unsteered target on the test prompts, nats."""
    base_accuracy: float
    """Its share of test prompts whose likeliest completion is a positive one."""
    budget: float
    """nats per token, in the unit `provenance["budget_unit"]`."""
    provenance: dict[str, Any]

    def row(self, method: str) -> EvaluationRow:
        """The first row of a method."""
        for row in self.rows:
            if row.method == method:
                return row
        raise ArgumentError(
            f"no method {method!r} in this evaluation; it has "
            f"{sorted({r.method for r in self.rows})}."
        )

    @property
    def plan(self) -> EvaluationRow:
        """The row of the plan under test."""
        return next(r for r in self.rows if r.role == "plan")

    @property
    def floor(self) -> tuple[float, float]:
        """Mean and standard deviation of the effects of random directions under the same budget,
        nats; NaN where fewer than two of them fit it at any strength."""
        values = torch.tensor(
            [r.effect for r in self.rows if r.role == "floor" and r.measured], dtype=torch.float64
        )
        if len(values) < 2:
            return math.nan, math.nan
        return float(values.mean()), float(values.std())

    @property
    def ceiling(self) -> EvaluationRow | None:
        """The better of the target's own RFM and mean difference (the one that lowers the behaviour
        most, for a plan with a negative coefficient); None if they were not measured."""
        ceilings = [r for r in self.rows if r.role == "ceiling" and r.measured]
        return max(ceilings, key=lambda r: self.plan.side * r.effect) if ceilings else None

    @property
    def not_measured(self) -> dict[str, str]:
        """Method: why it has no numbers."""
        return {r.method: r.note for r in self.rows if r.note is not None}

    @property
    def not_held_out(self) -> list[str]:
        """What was tested on although the fit chose by it or was fitted on it, in words; empty if
        all was held out, or if nothing is known of the fit."""
        return list(self.provenance.get("not_held_out", ()))

    @property
    def verdict(self) -> str:
        """The outcome in one sentence; further ones name what was not held out, and controls that
        could not be measured."""
        missing = {r.method: r.note for r in self.rows if not r.measured and r.role != "baseline"}
        said = [self._said()]
        if self.not_held_out:
            said.append(f"Not held out, so likely too good: {'; '.join(self.not_held_out)}.")
        if missing:
            listed = "; ".join(f"{method} ({note})" for method, note in missing.items())
            said.append(f"Not measured: {listed}.")
        return " ".join(said)

    @property
    def over_budget(self) -> bool:
        """Whether the plan costs more on the calibration texts than all it is compared with may;
        False where that is not known (results of before it was measured)."""
        cost = self.provenance.get(PLAN_COST)
        return cost is not None and not cost <= SLACK * self.budget

    @property
    def outcome(self) -> Outcome:
        """What the verdict says, as one of a few words."""
        plan = self.plan
        if not plan.measured:
            return "not measured"
        chance = self._chance()
        if chance is None:
            return "no floor"
        if chance.is_beyond(plan):
            return "works" if chance.least(plan) > 0 else "no gain"
        # The ceiling keeps to the budget. That it is too near to chance to be told apart from luck
        # is no finding where few seeds were drawn.
        own, floor = self.ceiling, self._chance(FLOOR)
        if own is not None and floor is not None and floor.sd_of(own.effect) < NEAR_CHANCE:
            return "target cannot"
        return "chance"

    def _chance(self, method: str | None = None) -> _Chance | None:
        """What random directions do; None where fewer than two were measured. Default: those beside
        which the plan stands."""
        method = method or (SAME_NORM if self.over_budget else FLOOR)
        measured = [r.effect for r in self.rows if r.method == method and r.measured]
        if len(measured) < 2:
            return None
        values = torch.tensor(measured, dtype=torch.float64)
        return _Chance(len(values), float(values.mean()), float(values.std()), self.plan.side)

    def _said(self) -> str:
        """The outcome with its numbers."""
        plan, chance, outcome = self.plan, self._chance(), self.outcome
        if outcome == "not measured":
            return f"Nothing is known of this plan: {plan.note}."
        if chance is None:
            drawn = [r for r in self.rows if r.method == (SAME_NORM if self.over_budget else FLOOR)]
            return (
                f"Nothing to tell the plan's {plan.effect:+.2f} nats from chance by: "
                f"{sum(r.measured for r in drawn)} of {len(drawn)} random directions fit the "
                "budget at any strength." + explained_at("no-floor")
            )
        measured = f"{plan.effect:+.2f} nats [{plan.low:+.2f}, {plan.high:+.2f}]"
        floor = f"{chance.mean:+.2f} ± {chance.sd:.2f}"
        away = chance.sd_of(plan.effect)
        cost = f"neutral NLL {plan.nll_rise:+.2f}"
        if self.over_budget:
            cost += (
                f"; over the budget of {self.budget:g} that everything else keeps "
                f"({self.provenance[PLAN_COST]:.2f} on the calibration texts), so compared with "
                "random directions of its norm"
            )
        own = None if self.ceiling is None else self.ceiling.effect
        if outcome == "target cannot":
            mean, sd = self.floor
            return (
                f"The target cannot express this: its own direction reaches {own:+.2f} nats, no "
                f"better than random directions ({mean:+.2f} ± {sd:.2f}, {chance.n} seeds); the "
                f"plan's {plan.effect:+.2f} means nothing." + explained_at("the-target-cannot")
            )
        if outcome == "chance":
            return (
                f"Not distinguishable from chance: {measured} against random directions {floor} "
                f"({away:.1f} sd; with {chance.n} seeds {chance.luck:.1f} may be luck); {cost}."
                + explained_at("no-better-than-chance")
            )
        side = "above" if chance.side > 0 else "below"
        beyond = f"{away:.1f} sd {side} the random floor ({floor}, {chance.n} seeds)"
        if outcome == "no gain":
            return (
                f"Better than chance, but it does not {'raise' if chance.side > 0 else 'lower'} "
                f"the behaviour: {measured}, {beyond}; {cost}."
                + explained_at("no-better-than-chance")
            )
        share = ""
        if own is not None and chance.side * own > 0:
            share = f"; {100 * plan.effect / own:.0f} % of the native ceiling"
        return f"Works: {measured}, {beyond}{share}; {cost}."

    def to_pandas(self, *, collapse: bool = True) -> pandas.DataFrame:
        """The table; with `collapse`, seeds of one method become one row with `effect` their mean
        and `sd` their spread."""
        import pandas as pd

        frame = pd.DataFrame(
            [
                {**{k: getattr(r, k) for k in _COLUMNS}, "layers": ", ".join(r.hook_names)}
                for r in self.rows
            ]
        )
        frame = frame.dropna(axis="columns", how="all")
        if not collapse:
            return frame
        columns = (
            "coefficient",
            "effect",
            "effect_per_token",
            "wrong_way",
            "accuracy",
            "nll_rise",
            "kl",
            *_GENERATED,
        )
        means = [c for c in columns if c in frame]
        out = []
        for method, part in frame.groupby("method", sort=False):
            single = len(part) == 1
            line = {
                "method": method,
                "role": part.role.iloc[0],
                "n": len(part),
                **{c: part[c].mean() for c in means},
                "sd": None if single else part.effect.std(),
                "low": part.low.iloc[0] if single else part.effect.min(),
                "high": part.high.iloc[0] if single else part.effect.max(),
            }
            if "note" in frame:
                notes = part.note.dropna()
                line["note"] = notes.iloc[0] if len(notes) else None
            out.append(line)
        return pd.DataFrame(out)

    def differences(self, *, n_bootstrap: int = 1000, seed: int = 0) -> pandas.DataFrame:
        """The plan minus every other method, paired by prompt: mean difference in nats and its 95 %
        bootstrap interval.

        Methods with several seeds are averaged per prompt first; of what was not measured, the
        difference is NaN.
        """
        import pandas as pd

        draws = bootstrap_draws(len(self.plan.per_prompt), n_bootstrap, seed)
        out = []
        for method in dict.fromkeys(r.method for r in self.rows if r.role != "plan"):
            rows = [r for r in self.rows if r.method == method]
            rows = [r for r in rows if r.measured] or rows
            difference = self.plan.per_prompt - torch.stack([r.per_prompt for r in rows]).mean(0)
            low, high = mean_interval(difference, draws)
            out.append(
                {"method": method, "difference": float(difference.mean()), "low": low, "high": high}
            )
        return pd.DataFrame(out)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content: every row, the verdict, budget and provenance (seeds, hashes)."""
        rows = [
            {
                **{k: _or_none(getattr(r, k)) for k in _COLUMNS},
                "hook_names": list(r.hook_names),
                "per_prompt": r.per_prompt.tolist() if r.measured else None,
            }
            for r in self.rows
        ]
        return {
            "verdict": self.verdict,
            "base_metric": self.base_metric,
            "base_accuracy": self.base_accuracy,
            "budget": self.budget,
            "rows": rows,
            "provenance": {name: _or_none(value) for name, value in self.provenance.items()},
        }

    def plot(self) -> Any:
        """Plotly figure: the effect of every method with its interval, floor band and ceiling
        line."""
        return upward("plot_evaluation")(self)

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        return f"Evaluation({len(self.rows)} rows): {self.verdict}"


def _or_none(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value
