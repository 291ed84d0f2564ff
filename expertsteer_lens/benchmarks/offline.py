"""The offline benchmark: 15 tasks in four domains, every method under the same choices, on models
that ship with the package.

One fit a domain: its expert teaches the general target on right and wrong answers to some facts;
layers and coefficient are chosen on validation facts, and everything is reported once on test facts
(`zoo.domains`). Two studies follow: the width of the expert, and its domain."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import joblib
import torch
from torch import Tensor

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.evaluation.run import Evaluation, evaluate
from expertsteer_lens.hosts import as_host
from expertsteer_lens.measure.completions import behaviour_and_accuracy
from expertsteer_lens.measure.intervals import bootstrap_draws, mean_interval
from expertsteer_lens.pipeline import PRESETS, ExpertSteer, ExpertSteerConfig
from expertsteer_lens.zoo import domains as zoo_domains

from .bench_result import Bench, BenchRow, Study, StudyRow

if TYPE_CHECKING:
    from expertsteer_lens.data.behaviour import Behaviour
    from expertsteer_lens.hosts.loading import LoadedAs
    from expertsteer_lens.pipeline.fitted import ExpertSteering
    from expertsteer_lens.steer.plan import SteeringPlan

__all__ = ["Bench", "BenchRow", "StudyRow", "run_bench"]

BUDGET = 0.10
"""Mean KL to the unsteered target on lists of questions, nats per token."""
READING: dict[str, Any] = {"reading": "last", "pair_tokens": False, "align_on_pairs": False}
"""The pairs end at a further question whose answer is still to come, so the last token is where
carefulness shows; the mean over the answer, right where an answer is a text, dilutes it."""
WIDTHS = {32: "medicine-32", 64: "medicine", 128: "medicine-128"}
"""Experts of the size study, by width."""
N_BOOTSTRAP = 1000


def run_bench(
    *,
    domains: Sequence[str] = zoo_domains.DOMAINS,
    config: ExpertSteerConfig | None = None,
    n_random: int = 5,
    n_shuffles: int = 3,
    studies: bool = True,
    seed: int = 0,
    host: LoadedAs = "huggingface",
    n_jobs: int = -1,
    on_progress: Callable[[str], None] | None = None,
) -> Bench:
    """Run the benchmark.

    Args:
        domains: which of `zoo.domains.DOMAINS`.
        config: settings of the fits; default: the preset "anchored" with a budget of `BUDGET` nats
            of KL, read as `READING` says.
        n_random: random directions per domain.
        n_shuffles: label-shuffled fits per domain.
        studies: also measure the width and the domain of the expert.
        seed: of every random choice.
        host: as for `zoo.load`; the numbers are the same on each, plain Hugging Face is the fastest
            for tiny models.
        n_jobs: domains and studies measured side by side, each on one thread; -1: as many as there
            are processors.
        on_progress: called with a line of text at the end of each part.

    Raises:
        ArgumentError: no domain, or one that does not exist.
    """
    if not domains:
        raise ArgumentError(f"domains is empty; leave it out for all of {zoo_domains.DOMAINS}.")
    for name in domains:
        check_choice("domains", name, zoo_domains.DOMAINS)
    check_number("n_random", n_random, low=2, integer=True)
    given = {
        "domains": list(domains),
        "config": None if config is None else _changed_fields(config),
        "n_random": n_random,
        "n_shuffles": n_shuffles,
        "studies": studies,
        "seed": seed,
        "host": host,
    }
    config = config or ExpertSteerConfig(budget=BUDGET, budget_unit="kl", **READING)
    say = on_progress or (lambda _: None)
    started = time.perf_counter()
    controls = {"n_random": n_random, "n_shuffles": n_shuffles}
    jobs = [joblib.delayed(_main_part)(config, domain, seed, host, controls) for domain in domains]
    if studies:
        jobs += [
            joblib.delayed(_study_part)(config, *part, seed, host) for part in _further(domains)
        ]
    rows: list[BenchRow] = []
    study_rows: list[StudyRow] = []
    evaluations = {}
    for done in joblib.Parallel(n_jobs=n_jobs, return_as="generator")(jobs):
        if isinstance(done, StudyRow):
            say(f"expert {done.expert} on {done.domain}: {done.effect:+.2f} nats")
            study_rows.append(done)
            continue
        domain, result, own = done
        say(f"{domain}: {result.verdict}")
        evaluations[domain] = result
        rows += _rows_of(result, domain, seed, plan_name(config))
        if studies:
            as_width = [replace(own, study="width")] if domain == "medicine" else []
            study_rows += [own, *as_width]
    seconds = time.perf_counter() - started
    study_rows.sort(key=lambda r: (r.study, r.d_model if r.study == "width" else 0))
    settings = {
        "seed": seed,
        **controls,
        "config": config.to_dict(),
        "arguments": _without_defaults(given),
    }
    return Bench(tuple(rows), tuple(study_rows), evaluations, seconds, settings)


def plan_name(config: ExpertSteerConfig) -> str:
    """What the method under test is called: the preset's name if its settings are those of one,
    whatever the budget, and read as it does or as this benchmark does.

    Example:
        >>> plan_name(ExpertSteerConfig(budget_unit="kl"))
        'ExpertSteer (anchored)'
        >>> plan_name(ExpertSteerConfig(rfm={"n_rounds": 2}))
        'ExpertSteer (own settings)'
    """
    for name in PRESETS:
        preset = ExpertSteerConfig.preset(name).changed(
            {"budget": config.budget, "budget_unit": config.budget_unit}
        )
        if config in (preset, preset.changed(READING)):
            return f"ExpertSteer ({name})"
    return "ExpertSteer (own settings)"


def _changed_fields(config: ExpertSteerConfig) -> dict[str, Any]:
    default = ExpertSteerConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if value != default[name]}


def _without_defaults(given: dict[str, Any]) -> dict[str, Any]:
    defaults = {name: p.default for name, p in inspect.signature(run_bench).parameters.items()}
    defaults["domains"] = list(zoo_domains.DOMAINS)
    return {name: value for name, value in given.items() if value != defaults[name]}


def _main_part(
    config: ExpertSteerConfig, domain: str, seed: int, host: LoadedAs, controls: dict[str, Any]
) -> tuple[str, Evaluation, StudyRow]:
    """All methods on one domain."""
    torch.set_num_threads(1)  # tiny models gain nothing from more, and domains run side by side
    target = zoo_domains.load("target", host)
    fit = _fit(config, zoo_domains.load(domain, host), target, domain, seed)
    plan = fit.plan(coefficient="auto")
    result = evaluate(
        plan,
        target,
        fit=fit,
        methods="all",
        prompt_prefix=zoo_domains.PROMPT,
        n_bootstrap=N_BOOTSTRAP,
        seed=seed,
        **controls,
    )
    own = result.plan
    return (
        domain,
        result,
        _study_row("domain", domain, fit, plan, own.per_prompt, own.correct, domain, seed),
    )


def _study_part(
    config: ExpertSteerConfig, study: Study, expert: str, domain: str, seed: int, host: LoadedAs
) -> StudyRow:
    """One expert on one domain."""
    torch.set_num_threads(1)
    target = zoo_domains.load("target", host)
    fit = _fit(config, zoo_domains.load(expert, host), target, domain, seed)
    plan = fit.plan(coefficient="auto")
    change, correct = _measure(target, plan, zoo_domains.behaviour(domain, "test"))
    return _study_row(study, expert, fit, plan, change, correct, domain, seed)


def _fit(
    config: ExpertSteerConfig, expert: Any, target: Any, domain: str, seed: int
) -> ExpertSteering:
    return ExpertSteer(config, seed=seed).fit(
        expert,
        target,
        zoo_domains.contrast_pairs(domain, seed=seed),
        anchors=zoo_domains.anchors(seed=seed),
        behaviour=zoo_domains.behaviour(domain, "validation"),
        test_behaviour=zoo_domains.behaviour(domain, "test"),
        neutral=zoo_domains.neutral_texts(160, seed=seed),
        progress=False,
    )


def _further(domains: Sequence[str]) -> Iterator[tuple[Study, str, str]]:
    """(study, expert, domain) of what the main part does not fit."""
    for domain in domains:
        for name in (*zoo_domains.DOMAINS, "all"):
            if name != domain:
                yield "domain", name, domain
    if "medicine" in domains:
        for name in WIDTHS.values():
            if name != "medicine":
                yield "width", name, "medicine"


def _measure(target: Any, plan: SteeringPlan, behaviour: Behaviour) -> tuple[Tensor, Tensor]:
    host = as_host(target)
    base, _ = behaviour_and_accuracy(host, behaviour)
    metric, correct = behaviour_and_accuracy(host, behaviour, plan=plan)
    return metric - base, correct


def _rows_of(result: Evaluation, domain: str, seed: int, name: str) -> list[BenchRow]:
    """The rows of an evaluation over the prompts of all tasks of a domain, task by task; what could
    not be measured has none."""
    out: list[BenchRow] = []
    start = 0
    for task in zoo_domains.tasks(domain):
        part = slice(start, start + len(task.test))
        start += len(task.test)
        for method in dict.fromkeys(r.method for r in result.rows):
            of = [r for r in result.rows if r.method == method and r.measured]
            if not of:
                continue
            change = torch.stack([r.per_prompt[part] for r in of])
            low, high = _interval(change.mean(0), seed)
            out.append(
                BenchRow(
                    task=task.name,
                    domain=domain,
                    method=name if of[0].role == "plan" else method,
                    role=of[0].role,
                    n_seeds=len(of),
                    effect=float(change.mean()),
                    low=low,
                    high=high,
                    seed_sd=float(change.mean(1).std()) if len(of) > 1 else None,
                    accuracy=float(torch.stack([r.correct[part] for r in of]).mean()),
                )
            )
    return out


def _study_row(
    study: Study,
    expert: str,
    fit: ExpertSteering,
    plan: SteeringPlan,
    change: Tensor,
    correct: Tensor,
    domain: str,
    seed: int,
) -> StudyRow:
    low, high = _interval(change, seed)
    vector = plan.vectors[0]
    return StudyRow(
        study=study,
        expert=expert,
        d_model=fit.provenance["expert"]["d_model"],
        domain=domain,
        expert_hook=vector.provenance["expert_hook_name"],
        target_hook=vector.hook_name,
        coefficient=vector.coefficient,
        effect=float(change.mean()),
        low=low,
        high=high,
        accuracy=float(correct.mean()),
    )


def _interval(change: Tensor, seed: int) -> tuple[float, float]:
    return mean_interval(change, bootstrap_draws(len(change), N_BOOTSTRAP, seed))
