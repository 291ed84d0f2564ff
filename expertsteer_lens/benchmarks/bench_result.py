"""Result of the offline benchmark: rows, tables, files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expertsteer_lens._atomic import write_figure, write_file, write_text
from expertsteer_lens._checks import check_choice
from expertsteer_lens._html import repr_html
from expertsteer_lens.evaluation.result import Evaluation, Role

from . import bench_tables

if TYPE_CHECKING:
    import pandas

Study = Literal["width", "domain"]


@dataclass(frozen=True)
class BenchRow:
    """One method on one task."""

    task: str
    domain: str
    method: str
    role: Role | str
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

    study: Study
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
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What `run_bench` was given, and the whole configuration of the fits."""

    @property
    def plan_name(self) -> str:
        """What the method under test is called in the tables."""
        return next((r.method for r in self.rows if r.role == "plan"), "ExpertSteer")

    @property
    def command(self) -> str:
        """What to type to get these numbers again."""
        return bench_tables.command_of(self.settings)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a task and method."""
        import pandas as pd

        return pd.DataFrame([vars(row) for row in self.rows])

    def studies_to_pandas(self) -> pandas.DataFrame:
        """One row an expert and domain."""
        import pandas as pd

        return pd.DataFrame([vars(row) for row in self.studies])

    def table(self, value: Literal["accuracy", "effect"] = "accuracy") -> pandas.DataFrame:
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
        return bench_tables.summary(self)

    def to_markdown(self) -> str:
        """Accuracy and effect by task, and the two studies."""
        return bench_tables.everything(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        return {
            "settings": dict(self.settings),
            "seconds": self.seconds,
            "rows": [vars(row) for row in self.rows],
            "studies": [vars(row) for row in self.studies],
            "evaluations": {name: e.to_dict() for name, e in self.evaluations.items()},
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
        write_text(out / "bench.json", json.dumps(self.to_dict(), indent=1, default=str) + "\n")
        write_text(out / "bench.md", self.to_markdown())
        write_text(out / "summary.md", self.summary())
        write_file(out / "bench.csv", lambda file: self.to_pandas().to_csv(file, index=False))
        write_file(
            out / "studies.csv", lambda file: self.studies_to_pandas().to_csv(file, index=False)
        )
        write_figure(out / "bench.html", self.plot())
        return out

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        means = self.table().loc["mean"]
        return (
            f"Bench({len(set(r.task for r in self.rows))} tasks, {len(means)} methods; mean "
            f"accuracy: unsteered {means['unsteered']:.0%}, {self.plan_name} "
            f"{means[self.plan_name]:.0%}; {self.seconds:.0f} s)"
        )
