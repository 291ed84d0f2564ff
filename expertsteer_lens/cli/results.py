"""What the commands leave as files: figures, tables, plans and the report."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertsteer_lens._atomic import write_figure, write_file, write_text
from expertsteer_lens.data.chat import Chat, Text, check_texts
from expertsteer_lens.data.read_positions import OF_THE_ANSWER
from expertsteer_lens.errors import ArtifactError

from .terminal import say

if TYPE_CHECKING:
    from expertsteer_lens.data.contrast import ContrastPairs


STRENGTHS = (-1.0, 0.0, 0.5, 1.0, 1.5)
"""Multiples of the plan's coefficient at which a report shows texts."""


EVALUATION_FILES = ("comparison.html", "comparison.csv", "evaluation.json")
FIT_FILES = (
    *EVALUATION_FILES,
    "report.html",
    "layer_pairs.csv",
    "layer_pair_mi.html",
    "layer_pairs.html",
    "dose_response.html",
)


def check_out(
    out: Path, *, files: Sequence[str] = (), saved: Mapping[str, str] | None = None
) -> None:
    """Whether results can be written to a folder, asked before any work is done.

    Args:
        out: the folder, which need not exist.
        files: names of files that will be written to it.
        saved: names of folders that `save` will write to it, each with the kind of what it writes.

    Raises:
        ArtifactError: it is no folder, may not be written to, or something else is where a result
            will be written.
    """
    from expertsteer_lens.files.io import check_replaceable

    place = out
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ArtifactError(f"--out {out} cannot be made: {place} is no folder; give another.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ArtifactError(f"--out {out}: {place} may not be written to; give another folder.")
    for name, kind in (saved or {}).items():
        check_replaceable(out / name, kind)
    for name in files:
        if (out / name).is_dir():
            raise ArtifactError(
                f"{out / name} is a folder, but a file of this name will be written; choose "
                "another --out or remove it yourself."
            )


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
    """A table as CSV.

    Spreadsheets run a cell that begins like a formula, and names and texts in a table come from
    files and models of others: such a cell gets an apostrophe in front, which they take for text.
    """
    safe = frame.map(lambda cell: f"'{cell}" if _looks_like_a_formula(cell) else cell)
    # The csv module does not quote a carriage return, which ends a row for its readers.
    returns = bool(safe.map(lambda cell: isinstance(cell, str) and "\r" in cell).to_numpy().any())
    quoting = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    write_file(path, lambda file: safe.to_csv(file, index=False, quoting=quoting))


def _looks_like_a_formula(cell: Any) -> bool:
    return isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
