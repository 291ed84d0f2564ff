"""What the commands read and print: inputs with errors that name the file, results as files, tables
and plain text."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.console import Console
from rich.highlighter import JSONHighlighter
from rich.markup import escape as escape_markup
from rich.table import Table

from expertsteer_lens._atomic import write_figure, write_file, write_text
from expertsteer_lens._checks import check_choice
from expertsteer_lens.data.chat import Chat, Text, check_texts
from expertsteer_lens.data.read_positions import OF_THE_ANSWER
from expertsteer_lens.data.texts import check_text, lines_of, parse_json, read_file
from expertsteer_lens.errors import ArgumentError, ArtifactError, DataError

if TYPE_CHECKING:
    from expertsteer_lens.data.contrast import ContrastPairs

    from .options import ModelOptions, TextOptions

console = Console(highlight=False)

STRENGTHS = (-1.0, 0.0, 0.5, 1.0, 1.5)
"""Multiples of the plan's coefficient at which a report shows texts."""


def read_texts(path: Path) -> list[Any]:
    """Texts of a file, one a line, empty lines skipped; in a `.jsonl` file a line is a JSON text or
    a list of messages.

    Raises:
        DataError: the file is not UTF-8 text, a line is not what it should be, or there is none.
    """
    lines = lines_of(path)
    if not lines:
        raise DataError(f"{path} holds no text; give one a line.")
    if path.suffix != ".jsonl":
        return [check_text(f"{path}, line {number}", line) for number, line in lines]
    out = []
    for number, line in lines:
        try:
            out.append(check_texts("text", [parse_json(line, path, line=number)])[0])
        except DataError as error:
            raise DataError(
                f"{path}, line {number}: give a JSON text or a list of messages with 'role' and "
                f"'content' ({error})."
            ) from error
    return out


def read_config(path: Path | None, preset: str) -> Any:
    """The preset's `ExpertSteerConfig` with the fields of a JSON file over it; a step's fields may
    be given in part.

    Raises:
        ArgumentError: an unknown field or a value that cannot be used; the message names file and
            field.
        DataError: the file is not JSON.
    """
    from expertsteer_lens._config import config_from_dict
    from expertsteer_lens.pipeline import ExpertSteerConfig

    base = ExpertSteerConfig.preset(preset)
    if path is None:
        return base
    merged = base.to_dict()
    for key, value in _json_object(path, "a config file").items():
        part = merged.get(key)
        in_part = isinstance(part, dict) and isinstance(value, dict)
        merged[key] = {**part, **value} if in_part and part else value
    return config_from_dict(ExpertSteerConfig, merged, str(path))


def _json_object(path: Path, what: str) -> dict[str, Any]:
    data = parse_json(read_file(path), path)
    if not isinstance(data, dict):
        raise DataError(
            f"{path} must hold one JSON object, got {type(data).__name__}; see the help for {what}."
        )
    return data


def texts_to_fit(texts: TextOptions, seed: int) -> tuple[Any, Any]:
    """Contrast pairs, and the behaviour if they come from a benchmark.

    Raises:
        ArgumentError: neither or both of --pairs and --benchmark, or options of the latter with the
            former.
        DataError: a file cannot be used.
    """
    from expertsteer_lens.benchmarks import public
    from expertsteer_lens.data.contrast import ContrastPairs

    if texts.benchmark is not None and texts.pairs is not None:
        raise ArgumentError("give either --pairs FILE or --benchmark NAME, not both.")
    if texts.benchmark is not None:
        check_choice("--benchmark", texts.benchmark, public.names())
        found = public.load(
            texts.benchmark, path=texts.benchmark_path, limit=texts.limit, seed=seed
        )
        say(repr(found))
        return found.pairs(chat=texts.chat), found.behaviour(chat=texts.chat)
    if texts.pairs is None:
        raise ArgumentError("give either --pairs FILE or --benchmark NAME, got neither.")
    if texts.benchmark_path is not None or texts.limit is not None or texts.chat:
        raise ArgumentError(
            "--benchmark-path, --limit and --chat go with --benchmark; leave them out with --pairs "
            "(a chat there is a list of messages)."
        )
    try:
        return ContrastPairs.from_jsonl(texts.pairs), None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{texts.pairs} is not UTF-8 text ({error.reason} at byte {error.start})."
        ) from error


def write_pairs(path: Path, pairs: ContrastPairs) -> None:
    """Contrast pairs as the JSON lines that `fit --pairs` reads."""
    import pandas as pd

    def plain(text: Text) -> Any:
        if not isinstance(text, Chat):
            return text
        return [{"role": role, "content": said} for role, said in text.messages]

    rows = [
        {"positive": plain(p), "negative": plain(n)}
        for p, n in zip(pairs.positive, pairs.negative, strict=True)
    ]
    frame = pd.DataFrame(rows)
    write_file(
        path,
        lambda file: frame.to_json(file, orient="records", lines=True, force_ascii=False),
    )


def read_behaviour(path: Path) -> Any:
    """A `Behaviour` from a JSON file with the keys prompts, positive and negative.

    Raises:
        DataError: the file is not such an object.
    """
    from expertsteer_lens.data.contrast import Behaviour

    return Behaviour.from_json(path)


def load_saved(name: str, kind: str, *, target: Any = None) -> Any:
    """What `save` wrote, which must be of one kind.

    Args:
        name: folder or hub id.
        kind: name of the class, "SteeringPlan" or "ExpertSteering".
        target: the model that a fit steers.

    Raises:
        ArtifactError: something of another kind is there, or nothing.
    """
    from expertsteer_lens.files.io import kind_of_saved, load

    there = kind_of_saved(Path(name))  # None: on the hub, or nowhere; `load` says which
    if there is None or there == kind:
        loaded = load(name, target=target)
        there = type(loaded).__name__
        if there == kind:
            return loaded
    hint = ""
    if kind == "SteeringPlan" and there == "ExpertSteering":
        hint = " (`fit` wrote one to OUT/plan; or in Python: esl.save(fit.plan(), folder))"
    raise ArtifactError(f"{name} holds a {there}, but a {kind} is needed here{hint}.")


def load_states_or_model(name: str, models: ModelOptions) -> Any:
    """What `capture` saved of an expert, or the expert itself.

    Raises:
        ArtifactError: something else that `save` wrote.
    """
    from expertsteer_lens.data.states_folder import is_states_folder
    from expertsteer_lens.files.io import kind_of_saved, load

    kind = kind_of_saved(Path(name))
    if kind == "ActivationStore" or is_states_folder(Path(name)):
        return load(name)
    if kind is not None:
        raise ArtifactError(
            f"{name} holds a {kind}, which is no expert; give a model, or the states that "
            "`capture` saved of one."
        )
    return models.load(name)


def steered_texts(
    plan: Any,
    model: Any,
    prompts: list[Any],
    coefficient: float,
    max_new_tokens: int = 40,
    allow_mismatch: bool = False,
    shares: Sequence[float] = (-1.0, 0.0, 1.0),
) -> list[Any]:
    """Each prompt continued at these multiples of the coefficient."""
    from expertsteer_lens.data.spans import content
    from expertsteer_lens.hosts import as_host
    from expertsteer_lens.show.report import SteeredText

    host = as_host(model)
    out = []
    for prompt in prompts:
        texts = {}
        for c in sorted({share * coefficient for share in shares}):
            with plan.with_coefficient(c).hooks(host.model, allow_mismatch=allow_mismatch):
                texts[c] = host.generate([prompt], max_new_tokens=max_new_tokens)[0]
        out.append(SteeredText(content(check_texts("prompt", [prompt])[0]), texts))
    return out


def token_views(fit: Any, plan: Any, contrast: ContrastPairs, prompts: list[Any]) -> list[Any]:
    """For the report: what was read in the first pair, and what the plan edits in a prompt and in
    what follows."""
    from expertsteer_lens.show.tokens import view_edits, view_reading

    reading = fit.data.provenance["reading"]
    chosen = fit.layer_pairs[0]
    read = [
        view_reading(
            fit.target.model,
            text,
            chosen.target,
            positions=reading,
            span=span if reading in OF_THE_ANSWER else None,
            direction=fit.direction(chosen.expert, chosen.target),
        )
        for text, span in zip(contrast.texts[:2], contrast.answer_spans[:2], strict=True)
    ]
    edited = [v for p in prompts[:1] for v in view_edits(plan, fit.target, p, max_new_tokens=24)]
    return read + edited


def calibrated(fit: Any, *, place: bool = False) -> tuple[Any, Any]:
    """The fitted plan at the coefficient its budget allows, and the dose-response curve of both
    signs that this was read off.

    Args:
        fit: the fit.
        place: first look for the block where the direction is best written.
    """
    plan = fit.plan(coefficient=0.1)
    if place:
        placement = fit.place(plan, progress=True)
        plan = placement.plan
        say(f"  {placement!r}")
    curve = fit.calibrate(plan, negative=True)
    return curve.apply(plan), curve


def write_results(
    out: Path, fit: Any, plan: Any, result: Any, curve: Any, contrast: ContrastPairs
) -> None:
    """Figures, tables, the plan and the report of a fit that was evaluated; texts and tokens in it
    are of prompts kept for test."""
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
        write_figure(out / f"{name}.html", figure)
    write_evaluation(out, result)
    write_table(out / "layer_pairs.csv", fit.to_pandas())
    save(plan, out / "plan")
    prompts = list(fit.data.test_behaviour.prompts[:3])
    write_report(
        out / "report.html",
        fit,
        result,
        curve,
        steered_texts(plan, fit.target, prompts, plan.vectors[0].coefficient, shares=STRENGTHS),
        tokens=token_views(fit, plan, contrast, prompts),
    )


def write_evaluation(out: Path, result: Any) -> None:
    """Figure, table and JSON of an evaluation."""
    from expertsteer_lens.show.plots import plot_evaluation

    write_figure(out / "comparison.html", plot_evaluation(result))
    write_table(out / "comparison.csv", result.to_pandas(collapse=False))
    write_text(out / "evaluation.json", json.dumps(result.to_dict(), indent=1, default=str))


def write_table(path: Path, frame: Any) -> None:
    """A table as CSV."""
    write_file(path, lambda file: frame.to_csv(file, index=False))


def describe(model: Any) -> str:
    """Name, width and depth of a model."""
    from expertsteer_lens.hosts import as_host

    host = as_host(model)
    return f"{host.name} (d={host.d_model}, {host.n_layers} layers)"


_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
"""Characters that reorder the text after them, by their bidirectional class."""


def visible(text: str) -> str:
    """Text whose control characters, but for line ends and tabs, are written as in JSON: files of
    others must not move the cursor, clear the screen or reorder what is read.

    >>> print(visible("a\x1b[2Jb"))
    a\\u001b[2Jb
    """
    return "".join(f"\\u{ord(c):04x}" if _controls(c) else c for c in text)


def _controls(c: str) -> bool:
    if c in "\n\t":
        return False
    return (
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(c) in _TURNS
    )


def escape(text: str) -> str:
    """Text of a table or a title: neither styles nor control characters."""
    return escape_markup(visible(text))


def say(text: str, *, style: str | None = None) -> None:
    """Print text as it is: brackets in it are not styles, and control characters are shown."""
    console.print(visible(text), markup=False, soft_wrap=True, style=style)


def say_json(value: Any) -> None:
    """Print a value as JSON for people."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    console.print(JSONHighlighter()(visible(text)), soft_wrap=True)


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
        coefficients = sorted(item.texts)
        for c in coefficients:
            table.add_column("unsteered" if c == 0 else f"coefficient {c:+.3g}", ratio=1)
        table.add_row(*(escape(item.texts[c]) for c in coefficients))
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
