"""One self-contained HTML page with the figures, tables and texts of a fit and its evaluation."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertsteer_lens.errors import DataError

if TYPE_CHECKING:
    import pandas

    from expertsteer_lens.evaluation.result import Evaluation
    from expertsteer_lens.measure.calibration import Calibration
    from expertsteer_lens.pipeline.fitted import ExpertSteering

STYLE = """
body{font-family:Inter,Helvetica,Arial,sans-serif;color:#1f2933;max-width:980px;margin:40px auto;padding:0 20px;
line-height:1.5} h1{font-size:26px;margin-bottom:4px} h2{font-size:19px;margin-top:44px;border-bottom:1px solid #e4e7eb;
padding-bottom:6px} .lead{color:#52606d} .verdict{background:#edf4fb;border-left:4px solid #2b6cb0;padding:12px 16px;
font-size:16px} table{border-collapse:collapse;font-size:14px;margin:12px 0} th,td{padding:5px 12px;text-align:right;
border-bottom:1px solid #e4e7eb} th{background:#f5f7fa} td:first-child,th:first-child{text-align:left}
table.texts th,table.texts td{text-align:left;vertical-align:top;width:33%;white-space:pre-wrap} pre{background:#f5f7fa;padding:12px;overflow-x:auto;
font-size:13px}
"""


@dataclass(frozen=True)
class SteeredText:
    """One prompt continued at several coefficients."""

    prompt: str
    texts: Mapping[float, str]
    """Continuation by coefficient; 0 is the unsteered model."""


def table_for_people(evaluation: Evaluation) -> pandas.DataFrame:
    """The comparison with rounded numbers and short column names, ready to print: effects in nats,
    costs in nats per token."""
    import pandas as pd

    column, header, form = ("nll_rise", "NLL rise", "+.3f")
    if evaluation.provenance.get("budget_unit") == "kl":
        column, header, form = ("kl", "KL", ".3f")
    rows = []
    for row in evaluation.to_pandas().to_dict("records"):
        note = row.get("note")
        blank = isinstance(note, str)  # nothing was measured, so there is nothing to round
        unsteered = row["coefficient"] == 0  # the base model, or prompting, which costs no budget
        interval = f"{row['low']:+.2f} … {row['high']:+.2f}"
        line = {
            "method": row["method"] if row["n"] == 1 else f"{row['method']}, {row['n']} seeds",
            "effect": "–" if blank else f"{row['effect']:+.2f}",
            "interval": "–" if blank or row["role"] == "base" else interval,
            "coeff.": "–" if blank or unsteered else f"{row['coefficient']:.3g}",
        }
        if "accuracy" in row:
            line["accuracy"] = "–" if blank else f"{row['accuracy']:.0%}"
        line[header] = "–" if blank or unsteered else format(row[column], form)
        if evaluation.not_measured:
            line["note"] = note if blank else ""
        rows.append(line)
    return pd.DataFrame(rows)


def write_report(
    path: str | Path,
    fit: ExpertSteering,
    evaluation: Evaluation,
    calibration: Calibration,
    texts: Sequence[SteeredText] = (),
    *,
    title: str = "ExpertSteer report",
) -> Path:
    """Write the page; it holds its own scripts and opens without a network.

    Args:
        path: the file; its folder is made if missing.
        fit: what was fitted.
        evaluation: its comparison.
        calibration: the dose-response curve.
        texts: continuations to show, all at the same coefficients.
        title: heading of the page.

    Returns:
        The path written.

    Raises:
        DataError: `texts` were generated at different coefficients.
    """
    if len({tuple(sorted(t.texts)) for t in texts}) > 1:
        raise DataError(
            "texts must share their coefficients, got "
            f"{sorted({tuple(sorted(t.texts)) for t in texts})}."
        )
    from .plots import plot_dose_response, plot_evaluation, plot_layer_pair_mi, plot_layer_pairs

    mi = plot_layer_pair_mi(fit.layer_pair_mi, layer_pairs=fit.layer_pairs)
    expert, target = fit.provenance["expert"], fit.provenance["target"]
    lead = (
        f"Expert {expert['name']} (d = {expert['d_model']}, {expert['n_layers']} layers) steers "
        f"target {target['name']} "
        f"(d = {target['d_model']}, {target['n_layers']} layers), seed {fit.seed}."
    )
    body = [
        f"<h1>{html.escape(title)}</h1><p class='lead'>{html.escape(lead)}</p>",
        f"<p class='verdict'>{html.escape(evaluation.verdict)}</p>",
        "<h2>Comparison</h2>",
        table_for_people(evaluation).to_html(index=False, border=0),
        "<p>Effect in nats; interval: bootstrap 95 % over the test prompts, or the range of "
        "several seeds. NLL rise, or KL to the"
        " unsteered model: on neutral texts that no coefficient was chosen on, nats per token.</p>",
        _figure(plot_evaluation(evaluation), first=True),
        "<h2>Coefficient</h2>",
        _figure(plot_dose_response(calibration)),
    ]
    if texts:
        body += ["<h2>Texts</h2>", _text_table(texts)]
    body += [
        "<h2>Layer pairs: mutual information</h2>",
        "<p>Hidden states of distinct texts are deterministic functions of the text, so this is a "
        "score of shared geometry"
        " in nats, not a claim about random variables.</p>",
        _figure(mi),
        "<h2>Layer pairs: the rule that chose</h2>",
        _figure(plot_layer_pairs(fit.layer_pairs)),
        "<h2>Steps</h2>",
        f"<pre>{html.escape(fit.summary())}</pre>",
        "<h2>Fitted pairs</h2>",
        fit.to_pandas().to_html(index=False, border=0, float_format=lambda v: f"{v:.3f}"),
    ]
    page = f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
    page += f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _figure(figure: Any, *, first: bool = False) -> str:
    return str(
        figure.to_html(full_html=False, include_plotlyjs=first, config={"displaylogo": False})
    )


def _text_table(texts: Sequence[SteeredText]) -> str:
    coefficients = sorted(texts[0].texts)
    head = "".join(f"<th>{'unsteered' if c == 0 else f'{c:+.3g}'}</th>" for c in coefficients)
    rows = []
    for item in texts:
        cells = "".join(f"<td>{html.escape(item.texts[c])}</td>" for c in coefficients)
        rows.append(
            "<tr><td "
            f"colspan='{len(coefficients)}'><b>{html.escape(item.prompt)}</b></td></tr><tr>{cells}</tr>"
        )
    return f"<table class='texts'><tr>{head}</tr>{''.join(rows)}</table>"
