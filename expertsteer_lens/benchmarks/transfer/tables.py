"""The tables of the benchmark on real models as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from expertsteer_lens.benchmarks.bench_tables import markdown_table

if TYPE_CHECKING:
    import pandas

    from .result import TransferBench


def as_markdown(bench: TransferBench) -> str:
    """What was chosen, the summary of each transfer, and the differences."""
    summary, differences = bench.summary(), bench.differences()
    parts = []
    for expert, target in bench.transfers:
        mine = summary[(summary.target == target) & summary.expert.isin([expert, target])]
        parts += [f"**{expert} → {target}** ({_chosen(bench, expert, target)})", _summary(mine)]
        gains = differences[(differences.expert == expert) & (differences.target == target)]
        if len(gains):
            parts.append(_differences(gains))
    return "\n\n".join(parts) + "\n"


def _chosen(bench: TransferBench, expert: str, target: str) -> str:
    steering = bench.choices.get(f"steering of {target}", {})
    read = bench.choices.get(f"block of {expert} for {target}", {})
    if not steering or not read:
        return "choices not recorded"
    return (
        f"learnt at {steering['hook']}, written to {steering.get('written', steering['hook'])} at "
        f"{steering['coefficient']:g} of its median norm; expert's direction from {read['hook']}; "
        "chosen on development tasks"
    )


SUMMARY = (
    "labelled pairs",
    "direction",
    "effect, nats per answer token",
    "of native with all pairs",
    "sd above random",
    "right answer likelier",
    "wrong way",
    "labels right",
    "neutral NLL",
)
"""Columns of the summary."""


def _summary(frame: pandas.DataFrame) -> str:
    rows = [
        [
            n_shown(row.n_pairs),
            row.method + _of_tasks(row.tasks, frame.tasks.max()),
            f"{row.effect:+.3f}{_interval(row.low, row.high)}",
            _form(row.share, ".0%"),
            _form(row.sd_above_floor, "+.1f"),
            _form(row.accuracy, ".0%"),
            _form(row.wrong_way, ".0%"),
            _form(row.agreement, ".0%"),
            _form(row.nll_rise, "+.3f"),
        ]
        for row in frame.sort_values(["n_pairs"], kind="stable").itertuples()
    ]
    return markdown_table(SUMMARY, rows)


def n_shown(n_pairs: float) -> str:
    """A number of labelled pairs."""
    return "all" if math.isinf(n_pairs) else f"{n_pairs:.0f}"


def _of_tasks(n: int, n_all: int) -> str:
    """Said where a row is of fewer tasks than others."""
    return "" if n == n_all else f" ({n} of {n_all} tasks)"


def _differences(frame: pandas.DataFrame) -> str:
    rows = [
        [
            n_shown(row.n_pairs),
            row.difference,
            f"{row.effect:+.3f}{_interval(row.low, row.high)}",
            f"{round(row.won * row.tasks)} of {row.tasks}",
        ]
        for row in frame.sort_values(["n_pairs"], kind="stable").itertuples()
    ]
    heads = ("labelled pairs", "difference", "nats per answer token", "tasks won")
    return markdown_table(heads, rows)


def _interval(low: float, high: float, digits: int = 3) -> str:
    return "" if math.isnan(low) else f" [{low:+.{digits}f}, {high:+.{digits}f}]"


def _form(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


OVERVIEW = (
    ("unsteered", 0),
    ("random", 0),
    ("random, same budget", 0),
    ("prompting", 0),
    ("self as labeller", 0),
    ("expert as labeller", 0),
    ("self as labeller, another domain's instruction", 0),
    ("self as labeller, a neighbour's instruction", 0),
    ("self as labeller, instructed", 0),
    ("expert as labeller, instructed", 0),
    ("native", 1),
    ("self as labeller", 1),
    ("expert as labeller", 1),
    ("shuffled labels", None),
    ("native, far block", None),
    ("native", None),
    ("self, mapped", None),
    ("expert, mapped", None),
    ("expert, mapped, cost of native", None),
    ("paper's alignment", None),
)
"""Rows of the overview: method, and number of labelled pairs (None: all)."""


def overview(
    benches: Sequence[TransferBench], names: Mapping[str, str], said: Sequence[str] = ()
) -> str:
    """One row a method, one column a transfer: mean effect and its interval over tasks.

    Args:
        benches: runs on the same tasks.
        names: what models are called in the table.
        said: what is said of each run in the heads of its columns; default: nothing.
    """
    of_run = list(said) or [""] * len(benches)
    columns = [
        (bench, *pair, of)
        for bench, of in zip(benches, of_run, strict=True)
        for pair in bench.transfers
    ]
    heads = [f"{names.get(e, e)} → {names.get(t, t)}{of}" for _, e, t, of in columns]
    rows = []
    for method, n in OVERVIEW:
        cells = []
        for bench, expert, target, _ in columns:
            frame = bench.summary()
            frame = frame[(frame.target == target) & frame.expert.isin([expert, target])]
            n_tasks = frame.tasks.max()
            frame = frame[frame.method == method]
            frame = frame[frame.n_pairs == (frame.n_pairs.max() if n is None else n)]
            row = frame.iloc[0] if len(frame) else None
            cells.append(
                ""
                if row is None
                else f"{row.effect:+.2f}{_interval(row.low, row.high, 2)}"
                + _of_tasks(row.tasks, n_tasks)
            )
        if not any(cells):  # a run of before there were such rows
            continue
        shown = "all" if n is None else n
        rows.append([shown, method, *cells])
    return markdown_table(["labelled pairs", "direction", *heads], rows) + "\n"
