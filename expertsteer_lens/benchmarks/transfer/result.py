"""Result of the benchmark on real models: rows, tables with intervals over tasks, a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from expertsteer_lens._atomic import write_figure, write_file, write_text
from expertsteer_lens._checked_json import DIGEST, digest_of, read_object
from expertsteer_lens._html import repr_html
from expertsteer_lens.errors import ArtifactError
from expertsteer_lens.measure.intervals import bootstrap_draws, mean_interval

if TYPE_CHECKING:
    import pandas

RUN_FILE = "run.json"
CEILING = "native"
"""The method, with all labelled pairs, that the others are given as a share of."""
FLOOR, SAME_BUDGET = "random", "random, same budget"
WRONG_BLOCK = "native, far block"
ALL_PAIRS = math.inf
"""Number of labelled pairs of rows from all of a task's, where tasks have different numbers."""
COST_OF_NATIVE = ", cost of native"
"""A direction at the strength that costs what the target's own costs at the strength of all
others."""
INSTRUCTED = ", instructed"
"""A labeller by how much likelier the task's instruction makes each text."""
NEIGHBOUR = ", a neighbour's instruction"
"""The same by the instructions of development tasks of the task's domain, each a row."""
ANOTHER = ", another domain's instruction"
"""The same by those of development tasks of other domains: what any such sentence does."""
N_BOOTSTRAP = 5000
KEYS = ("expert", "target", "method", "n_pairs")
COMPARED = (
    ("expert as labeller", "self as labeller"),
    (f"expert as labeller{INSTRUCTED}", f"self as labeller{INSTRUCTED}"),
    (f"expert as labeller{INSTRUCTED}", "expert as labeller"),
    ("expert as labeller", "native"),
    ("expert, mapped", "native"),
    (f"expert, mapped{COST_OF_NATIVE}", "native"),
    ("expert, mapped", "self, mapped"),
    (f"expert, mapped{COST_OF_NATIVE}", f"self, mapped{COST_OF_NATIVE}"),
    ("expert, mapped RFM", "native RFM"),
    ("expert as labeller", "prompting"),
    (f"expert as labeller{INSTRUCTED}", "prompting"),
    (f"self as labeller{INSTRUCTED}", f"self as labeller{ANOTHER}"),
    (f"self as labeller{INSTRUCTED}", f"self as labeller{NEIGHBOUR}"),
    (f"self as labeller{INSTRUCTED}", "prompting"),
    ("expert, mapped", "prompting"),
)
"""Differences that are given with an interval, task by task."""


@dataclass(frozen=True, eq=False)
class TransferBench:
    """Everything that the benchmark on real models measured."""

    rows: Sequence[Mapping[str, Any]]
    """One for each expert, target, task, method, number of labelled pairs and draw. Rows that need
    no expert have the target's name as expert."""
    choices: Mapping[str, Any] = field(default_factory=dict)
    """What was chosen on the development tasks, with all that was tried."""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_pandas(self) -> pandas.DataFrame:
        """One line per row: effect (nats per answer token), accuracy, share of questions that move
        the wrong way, agreement of a labeller's labels with the known ones, cost, R² of the map."""
        import pandas as pd

        return pd.DataFrame(list(self.rows))

    @classmethod
    def read(cls, folder: str | Path) -> TransferBench:
        """What `bench_transfer(out=folder)` wrote.

        Raises:
            ArtifactError: nothing of the kind is there, or it was damaged or changed by hand.
        """
        file = Path(folder) / RUN_FILE
        content = read_object(file)
        if content.get(DIGEST) != digest_of(content):
            raise ArtifactError(f"{file} was changed or damaged: its checksum is another.")
        parts = {"rows": list, "choices": dict, "settings": dict}
        for name, kind in parts.items():
            if not isinstance(content.get(name), kind):
                raise ArtifactError(
                    f"{file} is no run of `bench_transfer`: its {name!r} is missing or no "
                    f"{kind.__name__}; run it again into another folder."
                )
        return cls(*(content[name] for name in parts))

    def by_task(self) -> pandas.DataFrame:
        """Mean over draws: one line per expert, target, method, number of pairs and task.

        Of a run that was stopped only the tasks that are complete: those whose rows are there for
        the target and for every expert of it. Where tasks have different numbers of labelled pairs,
        rows from all of them have `n_pairs` infinite (`ALL_PAIRS`), so that they stand together.
        """
        frame = self.to_pandas()
        done = frame.groupby(["target", "task"]).expert.nunique()
        frame = frame.join(done.rename("n_experts"), on=["target", "task"])
        needed = frame.groupby("target").expert.transform("nunique")
        frame = frame[frame.n_experts == needed]
        ceiling = frame[frame.method == CEILING]
        all_pairs = frame.task.map(ceiling.groupby("task").n_pairs.max())
        if all_pairs.nunique() > 1:
            frame = frame.assign(n_pairs=frame.n_pairs.where(frame.n_pairs < all_pairs, ALL_PAIRS))
        figures = [c for c in FIGURES if c in frame]
        return frame.groupby([*KEYS, "domain", "task"], sort=False)[figures].mean().reset_index()

    def summary(self, *, domain: str | None = None) -> pandas.DataFrame:
        """Mean over tasks with a 95 % bootstrap interval over tasks, per expert, target, method and
        number of labelled pairs.

        `share` is the effect as a share of the target's own direction from all labelled pairs
        (ratio of means). `sd_above_floor` is the distance from the random directions' mean in
        standard deviations of their means over tasks: of random directions within the budget for
        rows whose own cost, mean over tasks, is within it; of random directions at the same
        strength for all others.
        """
        import pandas as pd

        tasks = self.by_task()
        if domain is not None:
            tasks = tasks[tasks.domain == domain]
        lines = []
        for key, part in tasks.groupby(list(KEYS), sort=False):
            line: dict[str, Any] = dict(zip(KEYS, key, strict=True))
            line.update(tasks=len(part), effect=part.effect.mean())
            line["low"], line["high"] = _interval(part.effect)
            same = tasks[(tasks.target == line["target"]) & tasks.task.isin(part.task)]
            ceiling = same[same.method == CEILING]
            ceiling = ceiling[ceiling.n_pairs == ceiling.groupby("task").n_pairs.transform("max")]
            line["share"] = line["effect"] / ceiling.effect.mean() if len(ceiling) else None
            for name in FIGURES[1:]:
                line[name] = part[name].mean() if name in part else None
            cost, budget = line["nll_rise"], self.settings.get("config", {}).get("budget")
            within = cost is not None and budget is not None and cost <= budget
            floor = self.floor_means(line["target"], part.task, within_budget=within)
            line["sd_above_floor"] = _sd_above(floor, line["effect"])
            lines.append(line)
        return pd.DataFrame(lines)

    def differences(self) -> pandas.DataFrame:
        """Paired differences between methods, task by task, with 95 % bootstrap intervals over
        tasks; at equal numbers of labelled pairs, but for prompting, which takes none."""
        import pandas as pd

        tasks, lines = self.by_task(), []
        for expert, target in self.transfers:
            mine = tasks[(tasks.target == target) & tasks.expert.isin([expert, target])]
            for a, b in COMPARED:
                first, second = mine[mine.method == a], mine[mine.method == b]
                keys = ["task"] if b == "prompting" else ["task", "n_pairs"]
                both = first.merge(second, on=keys, suffixes=("", "_other"))
                for n, part in both.groupby("n_pairs"):
                    gain = part.effect - part.effect_other
                    low, high = _interval(gain)
                    line: dict[str, Any] = {"expert": expert, "target": target}
                    line["difference"] = f"{a} - {b}"
                    line |= {"n_pairs": n, "tasks": len(part), "effect": gain.mean()}
                    lines.append(line | {"low": low, "high": high, "won": (gain > 0).mean()})
        return pd.DataFrame(lines)

    @property
    def transfers(self) -> list[tuple[str, str]]:
        """(expert, target) that were measured."""
        pairs = dict.fromkeys((r["expert"], r["target"]) for r in self.rows)
        return [(expert, target) for expert, target in pairs if expert != target]

    def to_markdown(self) -> str:
        """Choices, the summary by transfer, and the differences."""
        from .tables import as_markdown

        return as_markdown(self)

    def plot(self) -> Any:
        """Plotly figure: effect against the number of labelled pairs, a panel per transfer."""
        from .figure import plot_transfer

        return plot_transfer(self)

    def save(self, folder: str | Path) -> Path:
        """Write `run.json`, `rows.csv`, `summary.csv`, `differences.csv`, `bench.md` and
        `bench.html` (needs plotly)."""
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        self.save_run(out)
        tables = {
            "rows": self.to_pandas(),
            "summary": self.summary(),
            "differences": self.differences(),
        }
        for name, frame in tables.items():
            write_file(out / f"{name}.csv", partial(frame.round(5).to_csv, index=False))
        write_text(out / "bench.md", self.to_markdown())
        write_figure(out / "bench.html", self.plot())
        return out

    def save_run(self, out: Path) -> None:
        """Write `run.json`, which `read` makes this of again: one file, so that rows, choices and
        settings are never of two moments."""
        rows = [
            {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
            for row in self.rows
        ]
        content = {"settings": dict(self.settings), "choices": dict(self.choices), "rows": rows}
        content = json.loads(json.dumps(content))  # tuples become lists before they are counted
        text = json.dumps({**content, DIGEST: digest_of(content)}, indent=None)
        write_text(out / RUN_FILE, text.replace('{"expert"', '\n{"expert"') + "\n")

    def floor_means(
        self, target: str, tasks: Any = None, *, within_budget: bool = True
    ) -> pandas.Series[float]:
        """Mean effect over tasks of each random direction.

        Args:
            target: the model.
            tasks: of these alone.
            within_budget: each at its largest strength within the budget, where the run has such
                rows of all tasks; else at the strength of all others.
        """
        frame = self.to_pandas()
        frame = frame[(frame.target == target) & frame.method.isin((FLOOR, SAME_BUDGET))]
        frame = frame if tasks is None else frame[frame.task.isin(tasks)]
        within = frame[frame.method == SAME_BUDGET]
        complete = set(within.task) == set(frame.task)
        floor = within if within_budget and complete else frame[frame.method == FLOOR]
        means: pandas.Series[float] = floor.groupby("draw").effect.mean()
        return means

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        n_tasks = len({row["task"] for row in self.rows})
        named = ", ".join(f"{e} → {t}" for e, t in self.transfers)
        return f"TransferBench({named}: {n_tasks} tasks, {len(self.rows)} rows)"


FIGURES = ("effect", "accuracy", "wrong_way", "agreement", "nll_rise", "r2")


def _sd_above(floor: pandas.Series[float], effect: float) -> float | None:
    if len(floor) < 2 or not floor.std() > 0:
        return None
    return float((effect - floor.mean()) / floor.std())


def _interval(values: Any) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over tasks."""
    if len(values) < 2:
        return float("nan"), float("nan")
    tensor = torch.tensor(values.to_numpy(), dtype=torch.float64)
    return mean_interval(tensor, bootstrap_draws(len(tensor), N_BOOTSTRAP, seed=0))
