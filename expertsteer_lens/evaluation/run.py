"""Does it work: the effect of a plan beside its random floor and its native ceiling, all under one
budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens.data.chat import Text, check_texts
from expertsteer_lens.data.contrast import Behaviour, text_hash
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.measure.calibration import calibrate
from expertsteer_lens.measure.metrics import NeutralTexts, behaviour_and_accuracy, repeated_trigrams
from expertsteer_lens.steer.plan import SteeringPlan

from .comparisons import FLOOR, Job, comparison

if TYPE_CHECKING:
    import pandas

    from expertsteer_lens.data.activations import ActivationStore
    from expertsteer_lens.hosts import Host
    from expertsteer_lens.pipeline.fitted import ExpertSteering

METHODS = ("controls", "all")
TextScore = Callable[[list[str]], Sequence[float]]
"""Number per generated continuation, larger = more of the behaviour."""


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
    repetition: float | None = None
    """Share of repeated word trigrams in greedy continuations; None if nothing was generated."""
    length: float | None = None
    """Mean words per continuation."""
    text_score: float | None = None
    """Mean of the user's score of the continuations."""


_GENERATED = ("repetition", "length", "text_score")
_COLUMNS = (
    "method",
    "role",
    "seed",
    "coefficient",
    "effect",
    "low",
    "high",
    "accuracy",
    "nll_rise",
    "kl",
    *_GENERATED,
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
        nats."""
        values = torch.tensor(
            [r.effect for r in self.rows if r.method == FLOOR], dtype=torch.float64
        )
        return float(values.mean()), float(values.std())

    @property
    def ceiling(self) -> EvaluationRow | None:
        """The better of the target's own RFM and mean difference; None if they were not
        measured."""
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
                f"The target cannot express this: its own direction reaches {ceiling.effect:+.2f} "
                "nats, no better than "
                f"random directions ({mean:+.2f} ± {sd:.2f}, {n_floor} seeds); the plan's "
                f"{plan.effect:+.2f} means nothing."
            )
        if above < 2 or plan.low <= mean:
            return (
                f"Not distinguishable from chance: {plan.effect:+.2f} nats [{plan.low:+.2f}, "
                f"{plan.high:+.2f}] against "
                f"random directions {mean:+.2f} ± {sd:.2f} ({above:.1f} sd); {cost}."
            )
        share = (
            ""
            if ceiling is None
            else f"; {100 * plan.effect / ceiling.effect:.0f} % of the native ceiling"
        )
        return (
            f"Works: {plan.effect:+.2f} nats [{plan.low:+.2f}, {plan.high:+.2f}], {above:.1f} sd "
            "above the random floor "
            f"({mean:+.2f} ± {sd:.2f}, {n_floor} seeds){share}; {cost}."
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
        means = [
            c
            for c in ("coefficient", "effect", "accuracy", "nll_rise", "kl", *_GENERATED)
            if c in frame
        ]
        out = []
        for method, part in frame.groupby("method", sort=False):
            single = len(part) == 1
            out.append(
                {
                    "method": method,
                    "role": part.role.iloc[0],
                    "n": len(part),
                    **{c: part[c].mean() for c in means},
                    "sd": None if single else part.effect.std(),
                    "low": part.low.iloc[0] if single else part.effect.min(),
                    "high": part.high.iloc[0] if single else part.effect.max(),
                }
            )
        return pd.DataFrame(out)

    def differences(self, *, n_bootstrap: int = 1000, seed: int = 0) -> pandas.DataFrame:
        """The plan minus every other method, paired by prompt: mean difference in nats and its 95 %
        bootstrap interval.

        Methods with several seeds are averaged per prompt first.
        """
        import pandas as pd

        n = len(self.plan.per_prompt)
        draws = torch.randint(n, (n_bootstrap, n), generator=torch.Generator().manual_seed(seed))
        out = []
        for method in dict.fromkeys(r.method for r in self.rows if r.role != "plan"):
            other = torch.stack([r.per_prompt for r in self.rows if r.method == method]).mean(0)
            difference = self.plan.per_prompt - other
            means = difference[draws].mean(1)
            low, high = float(means.quantile(0.025)), float(means.quantile(0.975))
            out.append(
                {"method": method, "difference": float(difference.mean()), "low": low, "high": high}
            )
        return pd.DataFrame(out)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content: every row, the verdict, budget and provenance (seeds, hashes)."""
        rows = [
            {
                **{k: getattr(r, k) for k in _COLUMNS},
                "hook_names": list(r.hook_names),
                "per_prompt": r.per_prompt.tolist(),
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
        from expertsteer_lens.show.plots import plot_evaluation

        return plot_evaluation(self)

    def __repr__(self) -> str:
        return f"Evaluation({len(self.rows)} rows): {self.verdict}"


def evaluate(
    plan: SteeringPlan,
    model: Any,
    *,
    fit: ExpertSteering | None = None,
    behaviour: Behaviour | None = None,
    neutral: Sequence[Text] | None = None,
    calibration_texts: Sequence[Text] | None = None,
    methods: str = "controls",
    n_random: int = 5,
    n_shuffles: int = 3,
    budget: float | None = None,
    prompt_prefix: str | None = None,
    base: ActivationStore | None = None,
    compare: Mapping[str, SteeringPlan] | None = None,
    n_generate: int = 0,
    max_new_tokens: int = 40,
    text_score: TextScore | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Measure a plan and what it must be compared with, each at the largest coefficient the same
    budget allows.

    Every method has the same choices: layers by predicted effect on the validation prompts,
    strength on the calibration texts. Test prompts and test texts are read here and nowhere else.

    Args:
        plan: the plan under test.
        model: the target.
        fit: the fit it came from; gives test prompts, held-out texts, the label-shuffled control,
            the native ceiling and the baselines.
        behaviour: test prompts; default: those the fit kept for test.
        neutral: test texts for the side effects; default: those the fit kept for test.
        calibration_texts: texts on which every row is calibrated; default: the fit's.
        methods: "controls": random directions, shuffled labels, wrong layer, native ceiling. "all":
            also the target's own PCA and logistic probe, the fit's maps with the mean difference,
            other aligners, a least-squares map, and the paper's preset in two gauges.
        n_random: random directions, drawn twice: at the same norm as the plan, and calibrated to
            the same budget.
        n_shuffles: RFMs fitted on shuffled labels.
        budget: damage to the calibration texts, nats per token, in the fit's unit (else rise of
            NLL); default: the fit's, else 0.10.
        prompt_prefix: text put in front of every prompt for the prompting baseline; skipped if
            None.
        base: states of the expert's base model on the texts of the fit's contrast pairs, for the
            expert-minus-base baseline; skipped if None.
        compare: further plans by name, calibrated in the same way.
        n_generate: continue this many test prompts greedily under every method, for repetition,
            length and `text_score`.
        max_new_tokens: length of these continuations.
        text_score: the user's own measure of generated texts.
        n_bootstrap: resamples of the prompts for the intervals.
        seed: of random directions, shuffles and resampling.
        progress: show a progress bar.

    Raises:
        DataError: no behaviour or no neutral texts are given and `fit` has none.
        ArgumentError: arguments that need others (`text_score` without `n_generate`, "all" or
            `base` without `fit`).
    """
    check_choice("methods", methods, METHODS)
    check_number("n_random", n_random, low=2, integer=True)
    check_number("n_shuffles", n_shuffles, low=0, integer=True)
    check_number("n_generate", n_generate, low=0, integer=True)
    check_number("n_bootstrap", n_bootstrap, low=10, integer=True)
    if text_score is not None and n_generate == 0:
        raise ArgumentError(
            "text_score is given, but nothing is generated; set n_generate, e.g. to 16."
        )
    if fit is None and (methods == "all" or base is not None):
        raise ArgumentError("methods='all' and base need fit=, the fit that the plan came from.")
    host = as_host(model)
    run = _Run(host, fit, behaviour, neutral, calibration_texts, budget, n_bootstrap, seed)
    run.generation = (n_generate, max_new_tokens, text_score)
    from tqdm.auto import tqdm

    rows = [run.row("unsteered", "base", 0, None)]
    jobs = comparison(
        plan,
        fit,
        everything=methods == "all",
        n_random=n_random,
        n_shuffles=n_shuffles,
        base=base,
        seed=seed,
    )
    jobs += [
        Job(name, "compared", 0, lambda other=other: other)
        for name, other in (compare or {}).items()
    ]  # type: ignore[misc]
    for job in tqdm(jobs, desc="evaluate", disable=not progress, leave=False):
        candidate = job.make()
        if candidate is not None:
            rows.append(
                run.row(
                    job.method,
                    job.role,
                    job.seed,
                    run.calibrated(candidate) if job.calibrate else candidate,
                )
            )
    if prompt_prefix is not None:
        rows.append(run.row("prompting", "baseline", 0, None, prefix=prompt_prefix))
    return Evaluation(
        tuple(rows),
        float(run.base.mean()),
        float(run.base_hits.mean()),
        run.budget,
        run.provenance(plan),
    )


class _Run:
    """What all rows of one evaluation share."""

    generation: tuple[int, int, TextScore | None] = (0, 0, None)

    def __init__(
        self,
        host: Host,
        fit: ExpertSteering | None,
        behaviour: Behaviour | None,
        neutral: Sequence[Text] | None,
        calibration_texts: Sequence[Text] | None,
        budget: float | None,
        n_bootstrap: int,
        seed: int,
    ) -> None:
        behaviour = fit.test_behaviour if behaviour is None and fit else behaviour
        if behaviour is None:
            raise DataError(
                "behaviour is missing: pass behaviour=Behaviour(...), or a fit that was given one."
            )
        texts = fit.test_texts if neutral is None and fit else neutral
        calibration = (
            fit.calibration_texts if calibration_texts is None and fit else calibration_texts
        )
        if texts is None or calibration is None:
            raise DataError(
                "neutral and calibration_texts are missing: pass both, or a fit, which holds some "
                "out."
            )
        self.host, self.behaviour, self.seed = host, behaviour, seed
        self.neutral = NeutralTexts(host, check_texts("neutral", texts))
        self.calibration = NeutralTexts(host, check_texts("calibration_texts", calibration))
        self.budget = budget if budget is not None else (fit.config.budget if fit else 0.10)
        self.unit = fit.config.budget_unit if fit else "nll"
        self.base, self.base_hits = behaviour_and_accuracy(host, behaviour)
        draws = (n_bootstrap, len(behaviour))
        self.resample = torch.randint(
            len(behaviour), draws, generator=torch.Generator().manual_seed(seed)
        )

    def row(
        self,
        method: str,
        role: str,
        seed: int,
        plan: SteeringPlan | None,
        *,
        prefix: str | None = None,
    ) -> EvaluationRow:
        behaviour = self.behaviour if prefix is None else self.behaviour.with_prefix(prefix)
        metric, hits = behaviour_and_accuracy(self.host, behaviour, plan=plan)
        change = metric - self.base
        means = change[self.resample].mean(1)
        rise, divergence = (0.0, 0.0) if plan is None else self.neutral.cost(plan)
        return EvaluationRow(
            method=method,
            role=role,
            seed=seed,
            hook_names=() if plan is None else tuple(v.hook_name for v in plan.vectors),
            coefficient=0.0
            if plan is None
            else max((v.coefficient for v in plan.vectors), key=abs),
            effect=float(change.mean()),
            low=float(means.quantile(0.025)),
            high=float(means.quantile(0.975)),
            accuracy=float(hits.mean()),
            nll_rise=rise,
            kl=float(divergence or 0.0),
            per_prompt=change,
            correct=hits,
            **self.generated(behaviour, plan),
        )

    def generated(self, behaviour: Behaviour, plan: SteeringPlan | None) -> dict[str, float]:
        n, length, score = self.generation
        if n == 0:
            return {}
        prompts = list(behaviour.prompts[:n])
        with nullcontext() if plan is None else plan.hooks(self.host.model):
            texts = self.host.generate(prompts, max_new_tokens=length)
        out = {
            "repetition": sum(map(repeated_trigrams, texts)) / len(texts),
            "length": sum(len(t.split()) for t in texts) / len(texts),
        }
        if score is not None:
            values = [float(v) for v in score(texts)]
            if len(values) != len(texts):
                raise DataError(
                    f"text_score returned {len(values)} numbers for {len(texts)} texts; return one "
                    "for each."
                )
            out["text_score"] = sum(values) / len(values)
        return out

    def calibrated(self, plan: SteeringPlan) -> SteeringPlan:
        return calibrate(
            plan, self.host.model, self.calibration, budget=self.budget, unit=self.unit, curve=False
        ).apply(plan)

    def provenance(self, plan: SteeringPlan) -> dict[str, Any]:
        return {
            "behaviour_hash": self.behaviour.hash,
            "budget_unit": self.unit,
            "n_prompts": len(self.behaviour),
            "seed": self.seed,
            "neutral_hash": text_hash(self.neutral.texts),
            "n_neutral": len(self.neutral.texts),
            "calibration_hash": text_hash(self.calibration.texts),
            "target": dict(plan.target),
            "plan": dict(plan.provenance),
        }
