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
from expertsteer_lens.measure.intervals import bootstrap_draws, mean_interval

if TYPE_CHECKING:
    import pandas

Role = Literal["base", "plan", "floor", "control", "ceiling", "baseline", "compared"]
FLOOR = "random (same budget)"
"""The method whose rows have the role "floor"."""


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
    """Rise of the mean NLL on the neutral test texts, nats per token."""
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
    """Share of test prompts whose m fell."""
    repetition: float | None = None
    """Share of repeated word trigrams in greedy continuations; None if nothing was generated."""
    length: float | None = None
    """Mean words per continuation."""
    text_score: float | None = None
    """Mean of the user's score of the continuations."""
    note: str | None = None
    """Why this could not be measured; all numbers are NaN then. None: it was."""

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
        """The better of the target's own RFM and mean difference; None if they were not
        measured."""
        ceilings = [r for r in self.rows if r.role == "ceiling" and r.measured]
        return max(ceilings, key=lambda r: r.effect) if ceilings else None

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
        said = [self._outcome()]
        if self.not_held_out:
            said.append(f"Not held out, so likely too good: {'; '.join(self.not_held_out)}.")
        if missing:
            listed = "; ".join(f"{method} ({note})" for method, note in missing.items())
            said.append(f"Not measured: {listed}.")
        return " ".join(said)

    def _outcome(self) -> str:
        mean, sd = self.floor
        plan, ceiling = self.plan, self.ceiling
        cost = f"neutral NLL {plan.nll_rise:+.2f}"
        floor = f"random directions {mean:+.2f} ± {sd:.2f}"
        drawn = [r for r in self.rows if r.role == "floor"]
        n_floor = sum(r.measured for r in drawn)
        if n_floor < 2:
            return (
                f"Nothing to tell the plan's {plan.effect:+.2f} nats from chance by: {n_floor} of "
                f"{len(drawn)} random directions fit the budget at any strength."
                + explained_at("no-floor")
            )
        above = (plan.effect - mean) / sd if sd > 0 else float("inf")
        if ceiling is not None and ceiling.effect < mean + 2 * sd:
            return (
                f"The target cannot express this: its own direction reaches {ceiling.effect:+.2f} "
                f"nats, no better than random directions ({mean:+.2f} ± {sd:.2f}, {n_floor} "
                f"seeds); the plan's {plan.effect:+.2f} means nothing."
                + explained_at("the-target-cannot")
            )
        measured = f"{plan.effect:+.2f} nats [{plan.low:+.2f}, {plan.high:+.2f}]"
        if above < 2 or plan.low <= mean:
            return (
                f"Not distinguishable from chance: {measured} against {floor} ({above:.1f} sd); "
                f"{cost}." + explained_at("no-better-than-chance")
            )
        share = ""
        if ceiling is not None:
            share = f"; {100 * plan.effect / ceiling.effect:.0f} % of the native ceiling"
        return (
            f"Works: {measured}, {above:.1f} sd above the random floor ({mean:+.2f} ± {sd:.2f}, "
            f"{n_floor} seeds){share}; {cost}."
        )

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
            "provenance": self.provenance,
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
