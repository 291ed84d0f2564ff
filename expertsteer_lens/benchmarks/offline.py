"""The offline benchmark: 15 tasks in four domains, every method under the same choices, on models
that ship with the package.

One fit a domain: its expert teaches the general target on right and wrong answers to some facts;
layers and strength are chosen on validation facts, and everything is reported once on test facts
(`zoo.domains`). Two studies follow: the width of the expert, and its domain."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import torch
from torch import Tensor

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.evaluation.run import Evaluation, EvaluationRow, evaluate
from expertsteer_lens.hosts import as_host
from expertsteer_lens.measure.metrics import behaviour_and_accuracy
from expertsteer_lens.pipeline.expert_steer import ExpertSteer, ExpertSteerConfig
from expertsteer_lens.zoo import domains as world

if TYPE_CHECKING:
    import pandas

    from expertsteer_lens.data.contrast import Behaviour
    from expertsteer_lens.pipeline.fitted import ExpertSteering

BUDGET = 0.10
"""Mean KL to the unsteered target on lists of questions, nats per token."""
WIDTHS = {32: "medicine-32", 64: "medicine", 128: "medicine-128"}
"""Experts of the size study, by width."""
N_BOOTSTRAP = 1000
PLAN = "ExpertSteer (anchored)"
NAMES = {"this plan": PLAN}
"""Names of methods here, where they differ from those of `evaluate`."""


@dataclass(frozen=True)
class BenchRow:
    """One method on one task."""

    task: str
    domain: str
    method: str
    role: str
    n_seeds: int
    effect: float
    """Change of log p(right) - log p(any wrong) on the test prompts, nats; mean over prompts and
    seeds."""
    low: float
    high: float
    """Bounds of the 95 % bootstrap interval over prompts (of the mean over seeds)."""
    seed_sd: float | None
    """Standard deviation of the effect over seeds; None for a single one."""
    accuracy: float
    """Share of test prompts whose likeliest answer is right."""


@dataclass(frozen=True)
class StudyRow:
    """One expert on the tasks of one domain."""

    study: str
    """"width" or "domain"."""
    expert: str
    d_model: int
    domain: str
    expert_hook: str
    target_hook: str
    coefficient: float
    effect: float
    low: float
    high: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Bench:
    """Everything the benchmark measured."""

    rows: tuple[BenchRow, ...]
    studies: tuple[StudyRow, ...]
    evaluations: dict[str, Evaluation]
    """Per domain: all its tasks together, with floor, ceiling and verdict."""
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a task and method."""
        import pandas as pd

        return pd.DataFrame([vars(row) for row in self.rows])

    def studies_to_pandas(self) -> pandas.DataFrame:
        """One row an expert and domain."""
        import pandas as pd

        return pd.DataFrame([vars(row) for row in self.studies])

    def table(self, value: str = "accuracy") -> pandas.DataFrame:
        """Tasks by methods, with a last line of means; `value` is "accuracy" or "effect"."""
        check_choice("value", value, ("accuracy", "effect"))
        frame = self.to_pandas()
        order = list(dict.fromkeys(frame.method))
        wide = frame.pivot(index="task", columns="method", values=value)
        wide = wide.loc[list(dict.fromkeys(frame.task)), order]
        wide.loc["mean"] = wide.mean()
        return wide

    def by_domain(self) -> pandas.DataFrame:
        """Methods by domains: mean accuracy over the tasks of each and over all, and the mean
        effect over all, nats."""
        frame = self.to_pandas()
        wide = frame.pivot_table(index="method", columns="domain", values="accuracy", sort=False)
        wide["all tasks"] = frame.groupby("method").accuracy.mean()
        wide["effect"] = frame.groupby("method").effect.mean()
        return wide

    def summary(self) -> str:
        """`by_domain` as Markdown, with the command."""
        wide = self.by_domain()
        shown = wide.drop(columns="effect").mul(100).map("{:.0f}".format)
        shown["effect, nats"] = wide.effect.map("{:+.2f}".format)
        shown.index.name = "right answer likeliest, % of test prompts"
        return f"{_markdown(shown, '{}')}\n\n{self._command()}\n"

    def _command(self) -> str:
        return (
            f"Command: `expertsteer-lens bench` ({self.seconds:.0f} s on {joblib.cpu_count()} "
            "processors; "
            f"torch {torch.__version__})."
        )

    def to_markdown(self) -> str:
        """Accuracy and effect by task, and the two studies."""
        parts = [
            "Accuracy on test prompts, %:",
            "",
            _markdown(self.table("accuracy").mul(100).T, "{:.0f}"),
            "",
        ]
        parts += ["All tasks of a domain together:", ""]
        parts += [f"- {name}: {found.verdict}" for name, found in self.evaluations.items()]
        frame = self.studies_to_pandas()
        if len(frame):
            frame["cell"] = [
                f"{r.accuracy:.0%} ({r.effect:+.2f} ± {(r.high - r.low) / 2:.2f})"
                for r in frame.itertuples()
            ]
            width = (
                frame[frame.study == "width"]
                .set_index("d_model")
                .cell.to_frame("accuracy (effect, nats)")
            )
            width.index.name = "width of the medical expert"
            parts += [
                "",
                "Width of the medical expert, on all medical tasks:",
                "",
                _markdown(width, "{}"),
            ]
            other = frame[frame.study == "domain"].pivot(
                index="domain", columns="expert", values="cell"
            )
            other = (
                other.reindex(index=world.DOMAINS, columns=[*world.DOMAINS, "all"])
                .dropna(how="all")
                .fillna("")
            )
            other.index.name = "tasks of / expert of"
            parts += [
                "",
                "Domain of the expert, on all tasks of each domain; accuracy (effect, nats):",
                "",
            ]
            parts.append(_markdown(other, "{}"))
        parts += [
            "",
            "<details><summary>Effect on test prompts, nats, ± half of its 95 % interval over "
            "prompts (random, same "
            "budget: ± standard deviation over seeds)</summary>",
            "",
            _markdown(self._effects().T, "{}"),
            "",
            "</details>",
            "",
        ]
        parts.append(self._command())
        return "\n".join(parts) + "\n"

    def _effects(self) -> pandas.DataFrame:
        frame = self.to_pandas()
        spread = [
            r.seed_sd if r.role == "floor" else (r.high - r.low) / 2 for r in frame.itertuples()
        ]
        frame["cell"] = [f"{e:+.2f} ± {s:.2f}" for e, s in zip(frame.effect, spread, strict=True)]
        wide = frame[frame.role != "base"].pivot(index="task", columns="method", values="cell")
        return wide.loc[
            list(dict.fromkeys(frame.task)), [m for m in dict.fromkeys(frame.method) if m in wide]
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        return {
            "settings": self.settings,
            "seconds": self.seconds,
            "rows": [vars(row) for row in self.rows],
            "studies": [vars(row) for row in self.studies],
            "evaluations": {name: found.to_dict() for name, found in self.evaluations.items()},
        }

    def plot(self) -> Any:
        """Plotly figure: effect of every method on every task, with intervals."""
        from expertsteer_lens.show.plots import plot_bench

        return plot_bench(self)

    def save(self, folder: str | Path) -> Path:
        """Write `bench.json`, `bench.csv`, `studies.csv`, `bench.md`, `summary.md` and `bench.html`
        (needs plotly)."""
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench.json").write_text(
            json.dumps(self.to_dict(), indent=1, default=str) + "\n", encoding="utf-8"
        )
        (out / "bench.md").write_text(self.to_markdown(), encoding="utf-8")
        (out / "summary.md").write_text(self.summary(), encoding="utf-8")
        self.to_pandas().to_csv(out / "bench.csv", index=False)
        self.studies_to_pandas().to_csv(out / "studies.csv", index=False)
        self.plot().write_html(out / "bench.html", include_plotlyjs="directory")
        return out

    def __repr__(self) -> str:
        means = self.table().loc["mean"]
        return (
            f"Bench({len(set(r.task for r in self.rows))} tasks, {len(means)} methods; mean "
            "accuracy: unsteered "
            f"{means['unsteered']:.0%}, {PLAN} {means[PLAN]:.0%}; {self.seconds:.0f} s)"
        )


def run_bench(
    *,
    domains: Sequence[str] = world.DOMAINS,
    config: ExpertSteerConfig | None = None,
    n_random: int = 5,
    n_shuffles: int = 3,
    studies: bool = True,
    seed: int = 0,
    host: str = "huggingface",
    n_jobs: int = -1,
    on_progress: Callable[[str], None] | None = None,
) -> Bench:
    """Run the benchmark.

    Args:
        domains: which of `zoo.domains.DOMAINS`.
        config: settings of the fits; default: the preset "anchored" with a budget of `BUDGET` nats
            of KL.
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
        raise ArgumentError(f"domains is empty; leave it out for all of {world.DOMAINS}.")
    for name in domains:
        check_choice("domains", name, world.DOMAINS)
    check_number("n_random", n_random, low=2, integer=True)
    config = config or ExpertSteerConfig(budget=BUDGET, budget_unit="kl")
    say = on_progress or (lambda _: None)
    started = time.perf_counter()
    controls = {"n_random": n_random, "n_shuffles": n_shuffles}
    jobs = [joblib.delayed(_main_part)(config, domain, seed, host, controls) for domain in domains]
    if studies:
        jobs += [
            joblib.delayed(_study_part)(config, *part, seed, host) for part in _further(domains)
        ]
    rows: list[BenchRow] = []
    found: list[StudyRow] = []
    evaluations = {}
    for done in joblib.Parallel(n_jobs=n_jobs, return_as="generator")(jobs):
        if isinstance(done, StudyRow):
            say(f"expert {done.expert} on {done.domain}: {done.effect:+.2f} nats")
            found.append(done)
            continue
        domain, result, own = done
        say(f"{domain}: {result.verdict}")
        evaluations[domain] = result
        rows += _rows_of(result, domain, seed)
        if studies:
            found += [own, *([replace(own, study="width")] if domain == "medicine" else [])]
    seconds = time.perf_counter() - started
    settings = {"seed": seed, **controls, "config": config.to_dict()}
    found.sort(key=lambda r: (r.study, r.d_model if r.study == "width" else 0))
    return Bench(tuple(rows), tuple(found), evaluations, seconds, settings)


def _main_part(
    config: ExpertSteerConfig, domain: str, seed: int, host: str, controls: dict[str, Any]
) -> tuple[str, Evaluation, StudyRow]:
    """All methods on one domain."""
    torch.set_num_threads(1)  # tiny models gain nothing from more, and domains run side by side
    target = world.load("target", host)
    fit = _fit(config, world.load(domain, host), target, domain, seed)
    plan = fit.plan(coefficient="auto")
    result = evaluate(
        plan,
        target,
        fit=fit,
        methods="all",
        prompt_prefix=world.PROMPT,
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
    config: ExpertSteerConfig, study: str, expert: str, domain: str, seed: int, host: str
) -> StudyRow:
    """One expert on one domain."""
    torch.set_num_threads(1)
    target = world.load("target", host)
    fit = _fit(config, world.load(expert, host), target, domain, seed)
    plan = fit.plan(coefficient="auto")
    change, correct = _measured(target, plan, world.behaviour(domain, "test"))
    return _study_row(study, expert, fit, plan, change, correct, domain, seed)


def _fit(
    config: ExpertSteerConfig, expert: Any, target: Any, domain: str, seed: int
) -> ExpertSteering:
    return ExpertSteer(config, seed=seed).fit(
        expert,
        target,
        world.contrast_pairs(domain, seed=seed),
        anchors=world.anchors(seed=seed),
        behaviour=world.behaviour(domain, "validation"),
        test_behaviour=world.behaviour(domain, "test"),
        neutral=world.neutral_texts(160, seed=seed),
        progress=False,
    )


def _further(domains: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(study, expert, domain) of what the main part does not fit."""
    for domain in domains:
        for name in (*world.DOMAINS, "all"):
            if name != domain:
                yield "domain", name, domain
    if "medicine" in domains:
        for name in WIDTHS.values():
            if name != "medicine":
                yield "width", name, "medicine"


def _measured(target: Any, plan: Any, behaviour: Behaviour) -> tuple[Tensor, Tensor]:
    host = as_host(target)
    base, _ = behaviour_and_accuracy(host, behaviour)
    metric, correct = behaviour_and_accuracy(host, behaviour, plan=plan)
    return metric - base, correct


def _rows_of(result: Evaluation, domain: str, seed: int) -> list[BenchRow]:
    """The rows of an evaluation over the prompts of all tasks of a domain, task by task."""
    out: list[BenchRow] = []
    start = 0
    for task in world.tasks(domain):
        part = slice(start, start + len(task.test))
        start += len(task.test)
        for method in dict.fromkeys(r.method for r in result.rows):
            of: list[EvaluationRow] = [r for r in result.rows if r.method == method]
            change = torch.stack([r.per_prompt[part] for r in of])
            low, high = _interval(change.mean(0), seed)
            out.append(
                BenchRow(
                    task=task.name,
                    domain=domain,
                    method=NAMES.get(method, method),
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
    study: str,
    expert: str,
    fit: ExpertSteering,
    plan: Any,
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
    draws = torch.randint(
        len(change), (N_BOOTSTRAP, len(change)), generator=torch.Generator().manual_seed(seed)
    )
    means = change[draws].mean(1)
    return float(means.quantile(0.025)), float(means.quantile(0.975))


def _markdown(frame: pandas.DataFrame, form: str) -> str:
    head = f"| {frame.index.name or ''} | " + " | ".join(map(str, frame.columns)) + " |"
    lines = [head, "|---" * (len(frame.columns) + 1) + "|"]
    for name, row in frame.iterrows():
        lines.append(f"| {name} | " + " | ".join(form.format(v) for v in row) + " |")
    return "\n".join(lines)
