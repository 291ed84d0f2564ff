"""The offline benchmark's tables as Markdown, and the command that made them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import joblib
import torch

from expertsteer_lens.zoo import domains as zoo_domains

if TYPE_CHECKING:
    import pandas

    from .bench_result import Bench

OPTIONS = {
    "domains": lambda v: [f"--domain {shlex.quote(name)}" for name in v],
    "studies": lambda v: ["--studies" if v else "--no-studies"],
    "n_random": lambda v: [f"--n-random {shlex.quote(str(v))}"],
    "seed": lambda v: [f"--seed {shlex.quote(str(v))}"],
}
"""Arguments of `run_bench` that the command line knows, as it writes them."""


def command_of(settings: Mapping[str, Any]) -> str:
    """The shell command, or the call where the command line has no word for an argument.

    Args:
        settings: "arguments" holds what `run_bench` was given other than its defaults.

    Example:
        >>> command_of({"arguments": {"domains": ["finance"], "studies": False}})
        'expertsteer-lens bench --domain finance --no-studies'
        >>> command_of({"arguments": {"n_shuffles": 1}})
        'esl.benchmarks.run_bench(n_shuffles=1)'
    """
    given = settings.get("arguments", {})
    if set(given) <= set(OPTIONS):
        words = [word for name, value in given.items() for word in OPTIONS[name](value)]
        return " ".join(["expertsteer-lens bench", *words])
    arguments = [f"{name}={_argument(name, value)}" for name, value in given.items()]
    return f"esl.benchmarks.run_bench({', '.join(arguments)})"


def _argument(name: str, value: Any) -> str:
    return f"esl.ExpertSteerConfig.from_dict({value!r})" if name == "config" else repr(value)


def summary(bench: Bench) -> str:
    """Methods by domains, with the command."""
    wide = bench.by_domain()
    shown = wide.drop(columns="effect").mul(100).map("{:.0f}".format)
    shown["effect, nats"] = wide.effect.map("{:+.2f}".format)
    shown.index.name = "right answer likeliest, % of test prompts"
    return f"{_markdown(shown)}\n\n{_origin(bench)}\n"


def everything(bench: Bench) -> str:
    """Accuracy and effect by task, and the two studies."""
    parts = [
        "Accuracy on test prompts, %:",
        _markdown(bench.table("accuracy").mul(100).T, "{:.0f}"),
        "All tasks of a domain together:",
        "\n".join(f"- {name}: {e.verdict}" for name, e in bench.evaluations.items()),
        *_studies(bench),
        "<details><summary>Effect on test prompts, nats, ± half of its 95 % interval over prompts "
        "(random, same budget: ± standard deviation over seeds)</summary>",
        _markdown(_effects(bench).T),
        "</details>",
        _origin(bench),
    ]
    return "\n\n".join(parts) + "\n"


def _studies(bench: Bench) -> list[str]:
    frame = bench.studies_to_pandas()
    if not len(frame):
        return []
    frame["cell"] = [
        f"{r.accuracy:.0%} ({r.effect:+.2f} ± {(r.high - r.low) / 2:.2f})"
        for r in frame.itertuples()
    ]
    width = frame[frame.study == "width"].set_index("d_model")
    width = width.cell.to_frame("accuracy (effect, nats)")
    width.index.name = "width of the medical expert"
    domain = frame[frame.study == "domain"].pivot(index="domain", columns="expert", values="cell")
    order = zoo_domains.DOMAINS
    domain = domain.reindex(index=order, columns=[*order, "all"]).dropna(how="all").fillna("")
    domain.index.name = "tasks of / expert of"
    return [
        "Width of the medical expert, on all medical tasks:",
        _markdown(width),
        "Domain of the expert, on all tasks of each domain; accuracy (effect, nats):",
        _markdown(domain),
    ]


def _effects(bench: Bench) -> pandas.DataFrame:
    frame = bench.to_pandas()
    spread = [r.seed_sd if r.role == "floor" else (r.high - r.low) / 2 for r in frame.itertuples()]
    frame["cell"] = [f"{e:+.2f} ± {s:.2f}" for e, s in zip(frame.effect, spread, strict=True)]
    wide = frame[frame.role != "base"].pivot(index="task", columns="method", values="cell")
    methods = [m for m in dict.fromkeys(frame.method) if m in wide]
    return wide.loc[list(dict.fromkeys(frame.task)), methods]


def _origin(bench: Bench) -> str:
    return (
        f"Command: `{bench.command}` ({bench.seconds:.0f} s on {joblib.cpu_count()} processors; "
        f"torch {torch.__version__})."
    )


def _markdown(frame: pandas.DataFrame, form: str = "{}") -> str:
    heads = [frame.index.name or "", *frame.columns]
    rows = [[name, *(form.format(v) for v in row)] for name, row in frame.iterrows()]
    return markdown_table(heads, rows)


def markdown_table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table of what these say as text.

    Example:
        >>> print(markdown_table(["task", "n"], [["cure", 2]]))
        | task | n |
        |---|---|
        | cure | 2 |
    """
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])
