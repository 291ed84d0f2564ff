"""What the commands read and print: inputs with errors that name the file, results as files, tables
and plain text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from expertsteer_lens.data.chat import check_texts
from expertsteer_lens.errors import ArgumentError, DataError

console = Console(highlight=False)


def read_texts(path: Path) -> list[Any]:
    """Texts of a file, one a line, empty lines skipped; in a `.jsonl` file a line is a JSON text or
    a list of messages.

    Raises:
        DataError: the file is not UTF-8 text, a line is not what it should be, or there is none.
    """
    try:
        lines = [
            (i, x)
            for i, x in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
            if x.strip()
        ]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})."
        ) from error
    if not lines:
        raise DataError(f"{path} holds no text; give one a line.")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    out = []
    for number, line in lines:
        try:
            out.append(check_texts("text", [json.loads(line)])[0])
        except (json.JSONDecodeError, DataError) as error:
            raise DataError(
                f"{path}, line {number}: give a JSON text or a list of messages with 'role' and "
                f"'content' ({error})."
            ) from error
    return out


def read_config(path: Path | None, preset: str) -> Any:
    """The preset's `ExpertSteerConfig` with the fields of a JSON file over it; a step's fields may
    be given in part."""
    from expertsteer_lens.pipeline.expert_steer import ExpertSteerConfig

    base = ExpertSteerConfig.preset(preset)
    if path is None:
        return base
    merged = base.to_dict()
    for key, value in _json_object(path, "a config file").items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            unknown = sorted(set(value) - set(inner))
            if unknown:
                raise ArgumentError(
                    f"{path}: {key!r} has unknown field {unknown[0]!r}; known fields are "
                    f"{sorted(inner)}."
                )
            value = {**inner, **value}
        merged[key] = value
    return ExpertSteerConfig.from_dict(merged)


def _json_object(path: Path, what: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error.msg}, line {error.lineno}).") from error
    if not isinstance(data, dict):
        raise DataError(
            f"{path} must hold one JSON object, got {type(data).__name__}; see the help for {what}."
        )
    return data


def texts_to_fit(
    pairs: Path | None,
    benchmark: str | None,
    benchmark_path: Path | None,
    limit: int | None,
    seed: int,
    chat: bool = False,
) -> tuple[Any, Any]:
    """Contrast pairs, and the behaviour if they come from a benchmark."""
    from expertsteer_lens.benchmarks import public as presets
    from expertsteer_lens.data.contrast import ContrastPairs

    if (pairs is None) == (benchmark is None):
        raise ArgumentError(
            "give either --pairs FILE or --benchmark NAME, "
            + ("got neither." if pairs is None else "not both.")
        )
    if benchmark is None:
        if benchmark_path is not None or limit is not None or chat:
            raise ArgumentError(
                "--benchmark-path, --limit and --chat go with --benchmark; leave them out with "
                "--pairs (a chat there is a list "
                "of messages)."
            )
        return ContrastPairs.from_jsonl(pairs), None  # type: ignore[arg-type]
    found = presets.load(benchmark, path=benchmark_path, limit=limit, seed=seed)
    say(repr(found))
    return found.pairs(chat=chat), found.behaviour(chat=chat)


def read_behaviour(path: Path) -> Any:
    """A `Behaviour` from a JSON file with the keys prompts, positive and negative."""
    from expertsteer_lens.data.contrast import Behaviour

    return Behaviour.from_json(path)


def steered_texts(
    plan: Any,
    model: Any,
    prompts: list[str],
    strength: float,
    max_new_tokens: int = 40,
    allow_mismatch: bool = False,
) -> list[Any]:
    """Each prompt continued at minus, zero and plus the strength."""
    from expertsteer_lens.hosts import as_host
    from expertsteer_lens.show.report import SteeredText

    host = as_host(model)
    out = []
    for prompt in prompts:
        texts = {}
        for coefficient in (-strength, 0.0, strength):
            with plan.with_coefficient(coefficient).hooks(model, allow_mismatch=allow_mismatch):
                texts[coefficient] = host.generate([prompt], max_new_tokens=max_new_tokens)[0]
        out.append(SteeredText(prompt, texts))
    return out


def calibrated(fit: Any) -> tuple[Any, Any]:
    """The fitted plan at the strength its budget allows, and the dose-response curve, both signs,
    that this was read off."""
    plan = fit.plan(coefficient=0.1)
    curve = fit.calibrate(plan, negative=True)
    return curve.apply(plan), curve


def write_results(
    out: Path, fit: Any, plan: Any, result: Any, curve: Any, texts: list[Any]
) -> None:
    """Figures, tables, the plan and the report of a fit that was evaluated."""
    from expertsteer_lens.files.io import save
    from expertsteer_lens.show.plots import plot_dose_response, plot_layer_pair_mi, plot_layer_pairs
    from expertsteer_lens.show.report import write_report

    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "layer_pair_mi": plot_layer_pair_mi(fit.layer_pair_mi, layer_pairs=fit.layer_pairs),
        "layer_pairs": plot_layer_pairs(fit.layer_pairs),
        "dose_response": plot_dose_response(curve),
    }
    for name, figure in figures.items():
        _write_figure(figure, out / f"{name}.html")
    write_evaluation(out, result)
    fit.to_pandas().to_csv(out / "layer_pairs.csv", index=False)
    save(plan, out / "plan")
    write_report(out / "report.html", fit, result, curve, texts)


def write_evaluation(out: Path, result: Any) -> None:
    """Figure, table and JSON of an evaluation."""
    from expertsteer_lens.show.plots import plot_evaluation

    _write_figure(plot_evaluation(result), out / "comparison.html")
    result.to_pandas(collapse=False).to_csv(out / "comparison.csv", index=False)
    (out / "evaluation.json").write_text(
        json.dumps(result.to_dict(), indent=1, default=str), encoding="utf-8"
    )


def _write_figure(figure: Any, path: Path) -> None:
    # "directory": the figures of a folder share one plotly.min.js beside them and open offline
    figure.write_html(path, include_plotlyjs="directory")


def describe(model: Any) -> str:
    """Name, width and depth of a model."""
    from expertsteer_lens.hosts import as_host

    host = as_host(model)
    return f"{host.name} (d={host.d_model}, {host.n_layers} layers)"


def say(text: str, *, style: str | None = None) -> None:
    """Print text as it is: brackets in it are not styles."""
    console.print(text, markup=False, soft_wrap=True, style=style)


def print_step(step: dict[str, Any]) -> None:
    """A line of figures for a finished step of a fit."""
    figures = "  ".join(f"{k} {v}" for k, v in step.items() if k not in ("step", "seconds"))
    console.print(
        f"  [green]{step['step']:<10}[/green] {step['seconds']:5.1f} s  {escape(figures)}"
    )


def print_texts(texts: list[Any]) -> None:
    """Continuations side by side, a table a prompt."""
    for item in texts:
        table = Table(
            title=escape(f"“{item.prompt} …”"), title_justify="left", show_lines=False, expand=True
        )
        strengths = sorted(item.texts)
        for s in strengths:
            table.add_column("unsteered" if s == 0 else f"coefficient {s:+.3g}", ratio=1)
        table.add_row(*(escape(item.texts[s]) for s in strengths))
        console.print()
        console.print(table)


def print_evaluation(result: Any) -> None:
    """The comparison and its verdict."""
    from expertsteer_lens.show.report import table_for_people

    console.print()
    print_frame(
        table_for_people(result),
        "effect on held-out prompts (nats), all under one budget on neutral text",
        whole=True,
    )
    say("interval: bootstrap 95 % over prompts, or the range of several seeds")
    console.print()
    say(result.verdict, style="bold")


def print_frame(frame: Any, title: str, *, whole: bool = False, names: bool = False) -> None:
    """A table; in a narrow terminal `whole` breaks only the first column into lines, `names` only
    the others."""
    table = Table(
        title=escape(title), title_justify="left", box=SIMPLE_HEAD if whole else HEAVY_HEAD
    )
    for i, column in enumerate(frame.columns):
        table.add_column(
            escape(str(column)),
            justify="left" if i == 0 else "right",
            overflow="fold",
            no_wrap=whole if i > 0 else names,
        )
    for row in frame.itertuples(index=False):
        table.add_row(*(escape(f"{v:.4g}" if isinstance(v, float) else str(v)) for v in row))
    console.print(table)
