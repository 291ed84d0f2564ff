"""Does it work: the effect of a plan beside its random floor and its native ceiling, all under one
budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from expertsteer_lens._checks import check_number
from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.data.chat import Text, check_texts
from expertsteer_lens.data.contrast import text_hash
from expertsteer_lens.data.parts import hashes_of, shared
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.measure.calibration import BudgetUnit, OverBudgetError, calibrate
from expertsteer_lens.measure.completions import repeated_trigrams
from expertsteer_lens.measure.intervals import bootstrap_draws, mean_interval
from expertsteer_lens.measure.neutral import NeutralTexts
from expertsteer_lens.measure.prepared import Completions
from expertsteer_lens.steer.plan import SteeringPlan

from .comparisons import (
    COMPARISONS,
    Job,
    Methods,
    Setting,
    check_methods,
    comparisons,
)
from .finished import FinishedRows, KeptRows, facts_of_base, facts_of_fit
from .methods import NotMeasured, with_gradients
from .result import FLOOR, PLAN_COST, SETTING, Evaluation, EvaluationRow, Role

if TYPE_CHECKING:
    from expertsteer_lens.data.activations import ActivationStore
    from expertsteer_lens.hosts import Host
    from expertsteer_lens.pipeline.fitted import ExpertSteering

__all__ = ["FLOOR", "Evaluation", "EvaluationRow", "TextScore", "evaluate"]

TextScore = Callable[[list[str]], Sequence[float]]
"""Number per generated continuation, larger = more of the behaviour."""


def evaluate(
    plan: SteeringPlan,
    model: Any,
    *,
    fit: ExpertSteering | None = None,
    behaviour: Behaviour | None = None,
    neutral: Sequence[Text] | None = None,
    calibration_texts: Sequence[Text] | None = None,
    methods: Methods = "controls",
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
    progress: bool | None = False,
    finished: FinishedRows | None = None,
) -> Evaluation:
    """Measure a plan as it is, and what it must be compared with, each at the largest coefficient
    that the same budget allows, on the plan's side of zero. A plan over this budget is compared
    with random directions of its own norm instead, and the verdict says so.

    Every method has the same choices: layers by predicted effect on the validation prompts,
    coefficient on the calibration texts. Test prompts and test texts are read here and nowhere
    else. What could not be measured is a row that says why; `register_control` adds a control of
    yours. Prompts or texts given here that the fit chose or was fitted on are measured all the
    same, and the verdict says how many are not held out.

    Args:
        plan: the plan under test.
        model: the target.
        fit: the fit it came from; gives test prompts, held-out texts, the label-shuffled control,
            the native ceiling and the baselines. The verdict says so if the plan says that it comes
            from another one.
        behaviour: test prompts, none of which the fit chose by; default: those the fit kept for
            test.
        neutral: texts on which steering should change nothing, for the side effects that are
            reported; default: those the fit kept for test.
        calibration_texts: other such texts, on which every row is calibrated; default: the fit's.
        methods: "controls": random directions, shuffled labels, wrong layer, native ceiling. "all":
            also the target's own PCA and logistic probe, the fit's maps with the mean difference,
            other aligners, a least-squares map, the paper's preset in two gauges, and what is left
            where only one of the pairs is labelled: the target's own direction from this pair, and
            from labels that the expert, or the target itself, gives the other texts.
        n_random: random directions, drawn twice: at the same norm as the plan, and calibrated to
            the same budget.
        n_shuffles: RFMs fitted on shuffled labels, and draws of the labelled pair.
        budget: damage to the calibration texts, nats per token, in the fit's unit (else rise of
            NLL); default: the fit's, else 0.10.
        prompt_prefix: text put in front of every prompt for the prompting baseline; skipped if
            None.
        base: states of the expert's base model on the texts of the fit's contrast pairs, for the
            expert-minus-base baseline; skipped if None.
        compare: further plans by name, calibrated in the same way; names of other rows are taken.
        n_generate: continue this many test prompts greedily under every method, for repetition,
            length and `text_score`.
        max_new_tokens: length of these continuations.
        text_score: the user's own measure of generated texts.
        n_bootstrap: resamples of the prompts for the intervals.
        seed: of random directions, shuffles and resampling.
        progress: show a progress bar; None: where standard error is a terminal.
        finished: rows of an evaluation with these very arguments that was stopped, from
            `Interrupted.finished`; they are not measured again.

    Raises:
        Interrupted: the user stopped it; rows that were finished are kept in `.finished`, as in any
            error that comes after the first row.
        DataError: no behaviour or no neutral texts are given and `fit` has none, or the unsteered
            model gives no finite probabilities on them.
        ArgumentError: arguments that need others (`text_score` without `n_generate`, "all" or
            `base` without `fit`), or a name in `compare` that another row has.

    Example:
        >>> import expertsteer_lens as esl
        >>> from expertsteer_lens import directions, zoo
        >>> target, pairs = zoo.load("target", host="huggingface"), zoo.contrast_pairs(30)
        >>> hook = "blocks.2.hook_resid_post"
        >>> states = esl.capture(target, pairs.texts, [hook], labels=pairs.labels)
        >>> vectors = {hook: directions.mean_difference(states[hook], states.labels)}
        >>> plan = esl.SteeringPlan.from_vectors(vectors, coefficient=0.3, median_norms=states)
        >>> texts = zoo.neutral_texts(20)
        >>> result = esl.evaluate(
        ...     plan, target, behaviour=zoo.behaviour(8),
        ...     neutral=texts[:10], calibration_texts=texts[10:],
        ... )
        >>> result.outcome, result.plan.effect > 1.0, result.plan.nll_rise < 0.1
        ('works', True, True)
    """
    _check_arguments(methods, n_random, n_shuffles, n_generate, n_bootstrap)
    compare = dict(compare or {})
    if text_score is not None and n_generate == 0:
        raise ArgumentError(
            "text_score is given, but nothing is generated; set n_generate, e.g. to 16."
        )
    if fit is None and (methods == "all" or base is not None):
        raise ArgumentError("methods='all' and base need fit=, the fit that the plan came from.")
    setting = Setting(
        plan=plan, fit=fit, base=base, n_random=n_random, n_shuffles=n_shuffles, seed=seed
    )
    taken = {"unsteered", "prompting", *(job.method for job in comparisons(setting, methods))}
    if taken & set(compare):
        raise ArgumentError(
            f"compare={sorted(taken & set(compare))[0]!r} is the name of another row of this "
            "evaluation; choose a new one."
        )
    run = _Run(
        as_host(model),
        fit,
        behaviour,
        neutral,
        calibration_texts,
        budget,
        n_bootstrap,
        seed,
        Generation(n_generate, max_new_tokens, text_score),
    )
    run.not_held_out += _of_another_fit(plan, fit)
    if fit is not None:
        setting = replace(setting, fit=with_gradients(fit))
    jobs = comparisons(setting, methods)
    for name, other in compare.items():
        jobs.append(Job(name, "compared", 0, partial(_same, other)))
    rows = [run.row("unsteered", "base", 0, None)]
    facts = run.facts(plan) | {
        "model": [run.host.kind, run.host.fingerprint, str(run.host.dtype)],
        "fit": None if fit is None else facts_of_fit(fit),
        "base": None if base is None or fit is None else facts_of_base(base, fit),
        "n_bootstrap": n_bootstrap,
        "methods": list(COMPARISONS),
    }
    kept = KeptRows({"this plan": plan, **compare}, facts, run.budget, run.generation, finished)
    rows += kept.measured(jobs, run.row_of, progress)
    if prompt_prefix is not None:
        rows.append(run.row("prompting", "baseline", 0, None, prefix=prompt_prefix))
    return Evaluation(
        tuple(rows),
        float(run.base.mean()),
        float(run.base_hits.mean()),
        run.budget,
        run.provenance(plan, rows) | {SETTING: kept.setting},
    )


def _check_arguments(
    methods: str, n_random: int, n_shuffles: int, n_generate: int, n_bootstrap: int
) -> None:
    check_methods(methods)
    check_number("n_random", n_random, low=2, integer=True)
    check_number("n_shuffles", n_shuffles, low=0, integer=True)
    check_number("n_generate", n_generate, low=0, integer=True)
    check_number("n_bootstrap", n_bootstrap, low=10, integer=True)


def _same(plan: SteeringPlan) -> SteeringPlan:
    return plan


@dataclass(frozen=True)
class Generation:
    """What is written under every method, and how it is scored."""

    n_prompts: int = 0
    max_new_tokens: int = 40
    score: TextScore | None = None

    def figures(
        self, host: Host, behaviour: Behaviour, plan: SteeringPlan | None
    ) -> dict[str, Any]:
        """Repetition, length and score of greedy continuations; empty where none are asked for."""
        if self.n_prompts == 0:
            return {}
        prompts = list(behaviour.prompts[: self.n_prompts])
        with nullcontext() if plan is None else plan.hooks(host.model):
            texts = host.generate(prompts, max_new_tokens=self.max_new_tokens)
        out = {
            "repetition": sum(map(repeated_trigrams, texts)) / len(texts),
            "length": sum(len(t.split()) for t in texts) / len(texts),
        }
        if self.score is not None:
            values = [float(v) for v in self.score(texts)]
            if len(values) != len(texts):
                raise DataError(
                    f"text_score returned {len(values)} numbers for {len(texts)} texts; return one "
                    "for each."
                )
            out["text_score"] = sum(values) / len(values)
        return out


def _not_held_out(
    fit: ExpertSteering | None,
    prompts: Sequence[Text],
    neutral: Sequence[Text],
    calibration: Sequence[Text],
) -> list[str]:
    """What is tested on although it was fitted or chosen on, in words.

    Where the texts of the pairs stand in for anchors, neutral texts are among them by design."""
    test, chosen = "neutral test texts", "calibration texts"
    parts = {"test prompts": prompts, test: neutral, chosen: calibration}
    keys = {name: hashes_of(those) for name, those in parts.items()}
    disjoint = [(test, chosen)]
    if fit is not None:
        data = fit.data
        validation = "validation prompts of the fit"
        if data.validation_behaviour is not None:
            keys[validation] = hashes_of(data.validation_behaviour.prompts)
        keys["calibration texts of the fit"] = hashes_of(data.calibration_texts)
        keys["texts of its pairs"] = data.text_hashes.get("pairs", ())
        keys["anchors it was fitted on"] = data.text_hashes.get("anchors", ())
        disjoint += [("test prompts", validation)]
        disjoint += [("test prompts", "texts of its pairs")]
        disjoint += [(validation, "texts of its pairs"), (chosen, validation)]
        disjoint += [(part, "anchors it was fitted on") for part in (test, chosen)]
        if data.provenance.get("anchors", {}).get("given", True):
            disjoint += [("test prompts", "anchors it was fitted on")]
            disjoint += [(part, "texts of its pairs") for part in (test, chosen)]
        if keys["calibration texts of the fit"] != keys[chosen]:
            disjoint += [(test, "calibration texts of the fit")]
    return [str(both) for both in shared(keys, disjoint)]


def _of_another_fit(plan: SteeringPlan, fit: ExpertSteering | None) -> list[str]:
    """Whether the plan says that it comes from a fit on other texts, models or divisions of them
    than `fit`, in words: what this one keeps for test may be what the plan was chosen by.

    A plan that says nothing of a fit is taken as it is, as is one of `fit.refit`, which shares the
    texts of its fit."""
    if fit is None:
        return []
    there, here = plan.provenance, fit.provenance
    names = ("pairs", "anchors", "behaviour", "test_behaviour", "neutral", "read_under")
    other = [n for n in names if n in there and n in here and there[n] != here[n]]
    for side in ("expert", "target"):
        prints = [(facts.get(side) or {}).get("fingerprint") for facts in (there, here)]
        if None not in prints and prints[0] != prints[1]:
            other.append(side)
    if not other:
        return []
    differ = ", ".join("seed or settings of reading" if n == "read_under" else n for n in other)
    return [
        f"the plan comes from another fit than the one given ({differ} differ), which may have "
        "chosen by the prompts and texts that it is tested on"
    ]


class _Run:
    """What all rows of one evaluation share."""

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
        generation: Generation,
    ) -> None:
        behaviour = fit.test_behaviour if behaviour is None and fit else behaviour
        if behaviour is None:
            raise DataError(
                "behaviour is missing: pass behaviour=Behaviour(...), or a fit that was given one."
            )
        texts = fit.data.test_texts if neutral is None and fit else neutral
        calibration = (
            fit.calibration_texts if calibration_texts is None and fit else calibration_texts
        )
        if texts is None or calibration is None:
            raise DataError(
                "neutral and calibration_texts are missing: pass both, or a fit, which holds some "
                "out."
            )
        self.not_held_out = _not_held_out(fit, behaviour.prompts, texts, calibration)
        self.host, self.behaviour, self.seed, self.generation = host, behaviour, seed, generation
        self.neutral = NeutralTexts(host, check_texts("neutral", texts))
        self.calibration = NeutralTexts(host, check_texts("calibration_texts", calibration))
        self.budget = budget if budget is not None else (fit.config.budget if fit else 0.10)
        self.unit: BudgetUnit = fit.config.budget_unit if fit else "nll"
        self.completions = Completions(host, behaviour)
        self.base_scores = self.completions.scores()
        self.base, self.base_hits = self.base_scores.log_odds(), self.base_scores.correct()
        if not bool(self.base_scores.total.isfinite().all()):
            i = int(self.base_scores.owner[~self.base_scores.total.isfinite()][0])
            raise DataError(
                f"a completion of prompt {i} has no finite log-probability without any steering; "
                "load the model in float32 (float16 overflows above 65504)."
            )
        self.draws = bootstrap_draws(len(behaviour), n_bootstrap, seed)

    def row_of(self, job: Job) -> EvaluationRow:
        """Make and measure one plan, or say why there is none."""
        try:
            plan = job.make()
            if job.calibrate:
                plan = self.calibrated(plan)
            return self.row(job.method, job.role, job.seed, plan)
        except NotMeasured as reason:
            return EvaluationRow.unmeasured(
                job.method, job.role, job.seed, str(reason), n_prompts=len(self.behaviour)
            )

    def row(
        self,
        method: str,
        role: Role | str,
        seed: int,
        plan: SteeringPlan | None,
        *,
        prefix: str | None = None,
    ) -> EvaluationRow:
        """Measure one steering, or prompts behind a prefix.

        Raises:
            NotMeasured: what the model says at this strength is no number.
        """
        behaviour, completions = self.behaviour, self.completions
        if prefix is not None:
            behaviour = behaviour.with_prefix(prefix)
            completions = Completions(self.host, behaviour)
        unsteered = plan is None and prefix is None
        scores = self.base_scores if unsteered else completions.scores(plan)
        change = scores.log_odds() - self.base
        per_token = scores.margin_per_token() - self.base_scores.margin_per_token()
        low, high = mean_interval(change, self.draws)
        low_per_token, high_per_token = mean_interval(per_token, self.draws)
        rise, divergence = (0.0, 0.0) if plan is None else self.neutral.cost(plan)
        if prefix is not None:  # neutral texts have no prompt that it could stand in front of
            rise = divergence = math.nan
        elif not (bool(scores.total.isfinite().all()) and math.isfinite(rise)):
            raise NotMeasured(
                "at this strength the model's probabilities are no finite numbers; load it in "
                "float32 or steer less"
            )
        vectors = () if plan is None else plan.vectors
        coefficient = max((v.coefficient for v in vectors), key=abs, default=0.0)
        return EvaluationRow(
            method=method,
            role=role,
            seed=seed,
            hook_names=tuple(v.hook_name for v in vectors),
            coefficient=coefficient,
            effect=float(change.mean()),
            low=low,
            high=high,
            effect_per_token=float(per_token.mean()),
            low_per_token=low_per_token,
            high_per_token=high_per_token,
            wrong_way=float(((change > 0) if coefficient < 0 else (change < 0)).double().mean()),
            accuracy=float(scores.correct().mean()),
            nll_rise=rise,
            kl=0.0 if divergence is None else float(divergence),
            per_prompt=change,
            correct=scores.correct(),
            **self.generation.figures(self.host, behaviour, plan),
        )

    def calibrated(self, plan: SteeringPlan) -> SteeringPlan:
        """The plan at the largest coefficient within the budget.

        Raises:
            NotMeasured: there is none.
        """
        try:
            found = calibrate(
                plan,
                self.host.model,
                self.calibration,
                budget=self.budget,
                unit=self.unit,
                curve=False,
            )
        except OverBudgetError as error:
            raise NotMeasured(str(error).split(";")[0]) from error
        return found.apply(plan)

    def provenance(self, plan: SteeringPlan, rows: Sequence[EvaluationRow]) -> dict[str, Any]:
        """What was measured on what, and what the plan costs in the unit of the budget."""
        rise, divergence = self.calibration.cost(plan, kl=self.unit == "kl")
        return self.facts(plan) | {
            PLAN_COST: rise if divergence is None else divergence,
            "not_measured": {r.method: r.note for r in rows if not r.measured},
        }

    def facts(self, plan: SteeringPlan) -> dict[str, Any]:
        """Of the plan, the texts and the seed."""
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
            "not_held_out": self.not_held_out,
        }
