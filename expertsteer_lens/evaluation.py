"""Does it work: the effect of a plan beside its random floor and its native ceiling, all under one budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ._checks import check_number, check_texts
from .calibration import calibrate
from .contrast import Behaviour, text_hash
from .directions import mean_difference
from .errors import ArgumentError, DataError
from .hosts import as_host
from .metrics import behaviour_gradient, behaviour_metric, neutral_nll
from .pairing import allowed_targets
from .plan import SteeringPlan
from .rfm import fit_rfm

if TYPE_CHECKING:
    import pandas

    from .fitted import ExpertSteering
    from .hosts import Host

FLOOR = "random (same budget)"
CEILINGS = ("native RFM", "native mean difference")


@dataclass(frozen=True, eq=False)
class EvaluationRow:
    """One steering under test."""

    method: str
    role: str
    """"plan", "floor", "control", "ceiling", "baseline" or "compared"."""
    seed: int
    hook_names: tuple[str, ...]
    coefficient: float
    """In units of the median residual norm, as calibrated on the calibration texts."""
    effect: float
    """Mean over test prompts of the change of m = log p(positive) - log p(negative), nats."""
    low: float
    high: float
    """Bounds of the bootstrap interval of `effect` over prompts (95 %)."""
    nll_rise: float
    """Rise of the mean NLL on the neutral test texts, nats per token."""
    per_prompt: Float[Tensor, " n_prompts"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Every row of the comparison, and what follows from it."""

    rows: tuple[EvaluationRow, ...]
    base_metric: float
    """Mean m of the unsteered target on the test prompts, nats."""
    budget: float
    provenance: dict[str, Any]

    def row(self, method: str) -> EvaluationRow:
        """The first row of a method."""
        for row in self.rows:
            if row.method == method:
                return row
        raise ArgumentError(f"no method {method!r} in this evaluation; it has {sorted({r.method for r in self.rows})}.")

    @property
    def plan(self) -> EvaluationRow:
        """The row of the plan under test."""
        return next(r for r in self.rows if r.role == "plan")

    @property
    def floor(self) -> tuple[float, float]:
        """Mean and standard deviation of the effects of random directions under the same budget, nats."""
        values = torch.tensor([r.effect for r in self.rows if r.method == FLOOR], dtype=torch.float64)
        return float(values.mean()), float(values.std())

    @property
    def ceiling(self) -> EvaluationRow | None:
        """The better of the target's own RFM and mean difference; None if they were not measured."""
        found = [r for r in self.rows if r.role == "ceiling"]
        return max(found, key=lambda r: r.effect) if found else None

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        mean, sd = self.floor
        plan, ceiling = self.plan, self.ceiling
        cost = f"neutral NLL {plan.nll_rise:+.2f}"
        n_floor = sum(r.method == FLOOR for r in self.rows)
        above = (plan.effect - mean) / sd if sd > 0 else float("inf")
        if ceiling is not None and ceiling.effect < mean + 2 * sd:
            return (
                f"The target cannot express this: its own direction reaches {ceiling.effect:+.2f} nats, no better than "
                f"random directions ({mean:+.2f} ± {sd:.2f}, {n_floor} seeds); the plan's {plan.effect:+.2f} means nothing."
            )
        if above < 2 or plan.low <= mean:
            return (
                f"Not distinguishable from chance: {plan.effect:+.2f} nats [{plan.low:+.2f}, {plan.high:+.2f}] against "
                f"random directions {mean:+.2f} ± {sd:.2f} ({above:.1f} sd); {cost}."
            )
        share = "" if ceiling is None else f"; {100 * plan.effect / ceiling.effect:.0f} % of the native ceiling"
        return (
            f"Works: {plan.effect:+.2f} nats [{plan.low:+.2f}, {plan.high:+.2f}], {above:.1f} sd above the random floor "
            f"({mean:+.2f} ± {sd:.2f}, {n_floor} seeds){share}; {cost}."
        )

    def to_pandas(self, *, collapse: bool = True) -> pandas.DataFrame:
        """The table; with `collapse`, seeds of one method become one row with `effect` their mean and `sd` their spread."""
        import pandas as pd

        frame = pd.DataFrame(
            [
                {
                    "method": r.method, "role": r.role, "seed": r.seed, "layers": ", ".join(r.hook_names),
                    "coefficient": r.coefficient, "effect": r.effect, "low": r.low, "high": r.high, "nll_rise": r.nll_rise,
                }
                for r in self.rows
            ]
        )  # fmt: skip
        if not collapse:
            return frame
        out = []
        for method, part in frame.groupby("method", sort=False):
            single = len(part) == 1
            out.append(
                {
                    "method": method, "role": part.role.iloc[0], "n": len(part), "coefficient": part.coefficient.mean(),
                    "effect": part.effect.mean(), "sd": None if single else part.effect.std(),
                    "low": part.low.iloc[0] if single else part.effect.min(),
                    "high": part.high.iloc[0] if single else part.effect.max(), "nll_rise": part.nll_rise.mean(),
                }
            )  # fmt: skip
        return pd.DataFrame(out)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content: every row, the verdict, budget and provenance (seeds, hashes)."""
        rows = [
            {**{k: getattr(r, k) for k in ("method", "role", "seed", "coefficient", "effect", "low", "high", "nll_rise")},
             "hook_names": list(r.hook_names), "per_prompt": r.per_prompt.tolist()}
            for r in self.rows
        ]  # fmt: skip
        return {
            "verdict": self.verdict, "base_metric": self.base_metric, "budget": self.budget, "rows": rows,
            "provenance": self.provenance,
        }  # fmt: skip

    def plot(self) -> Any:
        """Plotly figure: the effect of every method with its interval, floor band and ceiling line."""
        from .plots import plot_evaluation

        return plot_evaluation(self)

    def __repr__(self) -> str:
        return f"Evaluation({len(self.rows)} rows): {self.verdict}"


def evaluate(
    plan: SteeringPlan,
    model: Any,
    *,
    fit: ExpertSteering | None = None,
    behaviour: Behaviour | None = None,
    neutral: Sequence[str] | None = None,
    calibration_texts: Sequence[str] | None = None,
    n_random: int = 5,
    n_shuffles: int = 3,
    budget: float | None = None,
    prompt_prefix: str | None = None,
    compare: Mapping[str, SteeringPlan] | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Measure a plan and its controls, each at the largest coefficient the same budget allows.

    Args:
        plan: the plan under test.
        model: the target.
        fit: the fit it came from; gives test prompts, held-out texts, the label-shuffled control and the native ceiling.
        behaviour: test prompts; default: those the fit kept for test.
        neutral: test texts for the rise of NLL; default: those the fit kept for test.
        calibration_texts: texts on which every row is calibrated; default: the fit's.
        n_random: random directions, drawn twice: at the same norm as the plan, and calibrated to the same budget.
        n_shuffles: RFMs fitted on shuffled labels.
        budget: rise of neutral NLL, nats per token; default: the fit's, else 0.10.
        prompt_prefix: text put in front of every prompt for the prompting baseline; skipped if None.
        compare: further plans by name, calibrated in the same way.
        n_bootstrap: resamples of the prompts for the intervals.
        seed: of random directions, shuffles and resampling.
        progress: show a progress bar.

    Raises:
        DataError: no behaviour or no neutral texts are given and `fit` has none.
    """
    check_number("n_random", n_random, low=2, integer=True)
    check_number("n_shuffles", n_shuffles, low=0, integer=True)
    check_number("n_bootstrap", n_bootstrap, low=10, integer=True)
    run = _Run(as_host(model), fit, behaviour, neutral, calibration_texts, budget, n_bootstrap, seed)
    jobs: list[tuple[str, str, int, Callable[[], SteeringPlan | None]]] = [("this plan", "plan", 0, lambda: plan)]
    for s in range(n_random):
        fixed = plan.with_random_directions(seed=seed + s)
        jobs.append(("random (same norm)", "control", seed + s, lambda p=fixed: p))  # type: ignore[misc]
        jobs.append((FLOOR, "floor", seed + s, lambda p=fixed: run.calibrated(p)))  # type: ignore[misc]
    if fit is not None:
        for s in range(n_shuffles):
            jobs.append(("label-shuffled RFM", "control", seed + s, lambda s=s: run.shuffled(plan, seed + s)))  # type: ignore[misc]
        jobs.append(("wrong layer", "control", 0, lambda: run.wrong_layer(plan)))
        for name in CEILINGS:
            jobs.append((name, "ceiling", 0, lambda name=name: run.native(plan, name)))  # type: ignore[misc]
    for name, other in (compare or {}).items():
        jobs.append((name, "compared", 0, lambda other=other: run.calibrated(other)))  # type: ignore[misc]
    from tqdm.auto import tqdm

    rows = []
    for method, role, row_seed, make in tqdm(jobs, desc="evaluate", disable=not progress, leave=False):
        candidate = make()
        if candidate is not None:
            rows.append(run.row(method, role, row_seed, candidate))
    if prompt_prefix is not None:
        rows.append(run.prompted(prompt_prefix))
    return Evaluation(tuple(rows), float(run.base.mean()), run.budget, run.provenance(plan))


class _Run:
    """What all rows of one evaluation share."""

    def __init__(
        self,
        host: Host,
        fit: ExpertSteering | None,
        behaviour: Behaviour | None,
        neutral: Sequence[str] | None,
        calibration_texts: Sequence[str] | None,
        budget: float | None,
        n_bootstrap: int,
        seed: int,
    ) -> None:
        behaviour = behaviour or (fit.test_behaviour if fit else None)
        if behaviour is None:
            raise DataError("behaviour is missing: pass behaviour=Behaviour(...), or a fit that was given one.")
        texts = neutral or (fit.test_texts if fit else None)
        calibration = calibration_texts or (fit.calibration_texts if fit else None)
        if texts is None or calibration is None:
            raise DataError("neutral and calibration_texts are missing: pass both, or a fit, which holds some out.")
        self.host, self.fit, self.behaviour, self.seed = host, fit, behaviour, seed
        self.neutral, self.calibration = check_texts("neutral", texts), check_texts("calibration_texts", calibration)
        self.budget = budget if budget is not None else (fit.config.budget if fit else 0.10)
        self.base = behaviour_metric(host, behaviour)
        self.base_nll = self._nll()
        draws = (n_bootstrap, len(behaviour))
        self.resample = torch.randint(len(behaviour), draws, generator=torch.Generator().manual_seed(seed))

    def _nll(self, plan: SteeringPlan | None = None) -> float:
        totals = neutral_nll(self.host, self.neutral, plan=plan)
        return float(totals[:, 0].sum() / totals[:, 1].sum())

    def interval(self, change: Tensor) -> tuple[float, float]:
        means = change[self.resample].mean(1)
        return float(means.quantile(0.025)), float(means.quantile(0.975))

    def row(self, method: str, role: str, seed: int, plan: SteeringPlan) -> EvaluationRow:
        change = behaviour_metric(self.host, self.behaviour, plan=plan) - self.base
        rise = self._nll(plan) - self.base_nll
        low, high = self.interval(change)
        names = tuple(v.hook_name for v in plan.vectors)
        strength = max((v.coefficient for v in plan.vectors), key=abs)
        return EvaluationRow(method, role, seed, names, strength, float(change.mean()), low, high, rise, change)

    def prompted(self, prefix: str) -> EvaluationRow:
        change = behaviour_metric(self.host, self.behaviour.with_prefix(prefix)) - self.base
        low, high = self.interval(change)
        return EvaluationRow("prompting", "baseline", 0, (), 0.0, float(change.mean()), low, high, 0.0, change)

    def calibrated(self, plan: SteeringPlan) -> SteeringPlan:
        found = calibrate(plan, self.host.model, self.calibration, budget=self.budget, curve=False)
        return plan.with_coefficient(found.coefficient)

    def redirected(self, plan: SteeringPlan, directions: Sequence[Tensor]) -> SteeringPlan:
        """The same hooks, positions and edits with other directions."""
        pairs = zip(plan.vectors, directions, strict=True)
        return replace(plan, vectors=tuple(replace(v, direction=d, provenance={}) for v, d in pairs))

    def shuffled(self, plan: SteeringPlan, seed: int) -> SteeringPlan | None:
        assert self.fit is not None
        generator = torch.Generator().manual_seed(seed)
        directions = []
        for vector in plan.vectors:
            key = (vector.provenance.get("expert_hook_name"), vector.hook_name)
            if key not in self.fit.aligners:
                return None
            mapped = self.fit.aligners[key].encode(self.fit.expert_pairs[key[0]])
            labels = self.fit.expert_pairs.labels
            assert labels is not None
            permuted = labels[torch.randperm(len(labels), generator=generator)]
            directions.append(fit_rfm(mapped, permuted, self.fit.config.rfm, seed=seed).direction)
        return self.calibrated(self.redirected(plan, directions))

    def wrong_layer(self, plan: SteeringPlan) -> SteeringPlan | None:
        """The same directions, each written to the allowed target layer farthest from its own."""
        assert self.fit is not None
        names = list(self.fit.target_pairs)
        allowed = [names[j] for j in allowed_targets(len(names), self.fit.config.pairing)]
        taken = [v.hook_name for v in plan.vectors]
        free = [n for n in allowed if n not in taken]
        if len(free) < len(taken) or any(t not in names for t in taken):
            return None
        vectors = []
        for vector in plan.vectors:
            here = names.index(vector.hook_name)
            there = max(free, key=lambda n: abs(names.index(n) - here))
            free.remove(there)
            norm = self.fit.target_anchors.median_norm(there)
            vectors.append(replace(vector, hook_name=there, median_norm=norm, provenance={}))
        return self.calibrated(replace(plan, vectors=tuple(vectors)))

    def native(self, plan: SteeringPlan, method: str) -> SteeringPlan:
        """The target's own direction from the same labelled texts, at the layers its own attribution prefers."""
        fit = self.fit
        assert fit is not None
        store, anchors, labels = fit.target_pairs, fit.target_anchors, fit.target_pairs.labels
        assert labels is not None
        names = list(store)
        allowed = [names[j] for j in allowed_targets(len(names), fit.config.pairing)]
        found = {}
        for name in allowed:
            if method == "native RFM":
                found[name] = fit_rfm(store[name], labels, fit.config.rfm, seed=fit.seed).direction
            else:
                found[name] = mean_difference(store[name], labels)
        if fit.validation_behaviour is not None:
            gradients = behaviour_gradient(self.host, fit.validation_behaviour, allowed)
            order = sorted(allowed, key=lambda n: -anchors.median_norm(n) * float(gradients[n] @ found[n].double()))
        else:
            order = sorted(allowed, key=lambda n: abs(names.index(n) - names.index(plan.vectors[0].hook_name)))
        chosen = order[: len(plan.vectors)]
        template = plan.vectors[0]
        vectors = tuple(
            replace(template, hook_name=n, direction=found[n], median_norm=anchors.median_norm(n), provenance={})
            for n in chosen
        )
        return self.calibrated(replace(plan, vectors=vectors))

    def provenance(self, plan: SteeringPlan) -> dict[str, Any]:
        return {
            "behaviour_hash": self.behaviour.hash, "n_prompts": len(self.behaviour), "seed": self.seed,
            "neutral_hash": text_hash(self.neutral), "n_neutral": len(self.neutral),
            "calibration_hash": text_hash(self.calibration), "target": dict(plan.target), "plan": dict(plan.provenance),
        }  # fmt: skip
