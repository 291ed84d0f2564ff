"""One self-contained HTML page with the figures, tables and texts of a fit and its evaluation."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertsteer_lens._atomic import write_text
from expertsteer_lens.errors import DataError

from .tokens import TokenView, visible

if TYPE_CHECKING:
    import pandas

    from expertsteer_lens.evaluation.result import Evaluation
    from expertsteer_lens.measure.calibration import Calibration
    from expertsteer_lens.pipeline.fitted import ExpertSteering

STYLE = """
:root{color-scheme:light dark;--ink:#1f2933;--soft:#52606d;--line:#e4e7eb;--fill:#f5f7fa;
--note:#edf4fb;--paper:#fff}
@media (prefers-color-scheme:dark){:root{--ink:#e4e7eb;--soft:#a8b3bf;--line:#37414d;--fill:#1e252d;
--note:#1b2a3a;--paper:#14181d}}
body{font-family:Inter,Helvetica,Arial,sans-serif;color:var(--ink);background:var(--paper);
max-width:980px;margin:40px auto;padding:0 20px;line-height:1.5;overflow-wrap:anywhere}
h1{font-size:26px;margin-bottom:4px}
h2{font-size:19px;margin-top:44px;border-bottom:1px solid var(--line);padding-bottom:6px}
.lead,.plain{color:var(--soft)} .verdict,.next{background:var(--note);padding:12px 16px}
.verdict{border-left:4px solid #2b6cb0;font-size:16px} .next{border-left:4px solid #c05621}
.wide{overflow-x:auto} table{border-collapse:collapse;font-size:14px;margin:12px 0}
.wide table{overflow-wrap:normal} .wide td{white-space:nowrap}
th,td{padding:5px 12px;text-align:right;border-bottom:1px solid var(--line)}
th{background:var(--fill)} td:first-child,th:first-child{text-align:left}
table.texts{table-layout:fixed;width:100%;min-width:560px}
.wide table.texts th,.wide table.texts td{text-align:left;vertical-align:top;white-space:pre-wrap;
overflow-wrap:anywhere}
.found{font-size:13px;margin:28px 0 0} .found b{font-size:17px;font-weight:600}
pre{background:var(--fill);padding:12px;overflow-x:auto;font-size:13px}
"""
# Figures are drawn in the light style; on a dark page their ink and grid follow it.
SCRIPT = """
(function(){var q=matchMedia('(prefers-color-scheme: dark)');
function paint(){var d=q.matches,ink=d?'#e4e7eb':'#1f2933',grid=d?'#37414d':'#e4e7eb';
document.querySelectorAll('.plotly-graph-div').forEach(function(g){
var u={'modebar.bgcolor':'rgba(0,0,0,0)',paper_bgcolor:'rgba(0,0,0,0)',plot_bgcolor:'rgba(0,0,0,0)','font.color':ink};
Object.keys(g.layout).forEach(function(k){if(/^[xy]axis[0-9]*$/.test(k)){
u[k+'.gridcolor']=grid;u[k+'.zerolinecolor']=grid;}});
(g.layout.shapes||[]).forEach(function(s,i){var f={'#e4e7eb':'#3a4450','#e6f4ea':'#1d3a2a'};
if(d&&f[s.fillcolor])u['shapes['+i+'].fillcolor']=f[s.fillcolor];
if(d&&s.line&&s.line.color==='#1f2933')u['shapes['+i+'].line.color']=ink;});
Plotly.relayout(g,u);});}
window.addEventListener('load',paint);q.addEventListener('change',function(){location.reload();});})();
"""


TITLE_ROOM = 50
"""Pixels above a figure that its title takes where it is drawn."""


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
    tokens: Sequence[TokenView] = (),
) -> Path:
    """Write the page; it holds its own scripts and opens without a network.

    Args:
        path: the file; its folder is made if missing.
        fit: what was fitted.
        evaluation: its comparison.
        calibration: the dose-response curve.
        texts: continuations to show, all at the same coefficients.
        title: heading of the page.
        tokens: which tokens were read and edited, see `show.tokens`.

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
    from .step_plots import plot_pairing_lines, plot_prompts

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
        f"<p class='next'><b>Next step.</b> {html.escape(next_step(evaluation, calibration))}</p>",
        "<h2>Comparison</h2>",
        _wide(table_for_people(evaluation).to_html(index=False, border=0)),
        "<p>Effect in nats; interval: bootstrap 95 % over the test prompts, or the range of "
        "several seeds. NLL rise, or KL to the"
        " unsteered model: on neutral texts that no coefficient was chosen on, nats per token.</p>",
        _plain(effect_in_words(evaluation)),
        _figure(plot_evaluation(evaluation), first=True),
        "<h2>Prompt by prompt</h2>",
        _plain(prompts_in_words(evaluation)),
        _figure(plot_prompts(evaluation)),
        "<h2>Coefficient</h2>",
        _plain(cost_in_words(calibration)),
        _figure(plot_dose_response(calibration)),
    ]
    if tokens:
        said = _plain(
            "Outlined tokens were read, underlined ones are edited; the colour is how far a token "
            "lies along the direction already, before anything is added."
        )
        body += ["<h2>Tokens</h2>", said, *(view.to_html() for view in tokens)]
    if texts:
        body += ["<h2>Texts</h2>", _text_table(texts)]
    body += [
        "<h2>Layer pairs: mutual information</h2>",
        "<p>Hidden states of distinct texts are deterministic functions of the text, so this is a "
        "score of shared geometry"
        " in nats, not a claim about random variables.</p>",
        _figure(mi),
        "<h2>Layer pairs: the rule that chose</h2>",
        _figure(plot_pairing_lines(fit.layer_pairs)),
        _figure(plot_layer_pairs(fit.layer_pairs)),
        "<h2>Steps</h2>",
        f"<pre>{html.escape(fit.summary())}</pre>",
        "<h2>Fitted pairs</h2>",
        _plain(
            "aligner_r2: share of the target's states that the map predicts on held-out anchors (0: "
            "no better than their mean). rfm_validation_auc: how often a positive text reads higher "
            "than a negative one (0.5: guessing); reading well is not steering. score: what the "
            "pairing rule goes by."
        ),
        _wide(fit.to_pandas().to_html(index=False, border=0, float_format=lambda v: f"{v:.3f}")),
    ]
    page = f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
    # No icon: a browser would look for one beside the page.
    page += "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    page += f"<style>{STYLE}</style></head><body>{''.join(body)}"
    page += f"<script>{SCRIPT}</script></body></html>"
    write_text(path, page)
    return Path(path)


def next_step(evaluation: Evaluation, calibration: Calibration | None = None) -> str:
    """What to do about the verdict, in a sentence."""
    plan, outcome = evaluation.plan, evaluation.outcome
    if outcome == "not measured":
        return "The plan itself was not measured: load the model in float32, or steer less."
    if outcome == "no floor":
        return (
            "Random directions cost more than the budget at any strength, so nothing says what "
            "chance does: raise the budget, steer another layer, or look at the row "
            "random (same norm)."
        )
    reversed_ = calibration is not None and calibration.sign == "reversed"
    against = plan.high < 0 if plan.side > 0 else plan.low > 0
    if reversed_ or against:
        return (
            "The direction moves the behaviour the wrong way: swap positive and negative if the "
            "labels are reversed, or steer another layer pair."
        )
    if outcome != "works":
        return (
            "The effect is not told apart from chance: give more or cleaner pairs and anchors, try "
            "other layer pairs (fit.refit(pairing=...)), or test on more prompts before anything "
            "is concluded."
        )
    wrong = plan.wrong_way
    if wrong is not None and wrong > 0.25:
        return (
            f"The mean effect is real, but {wrong:.0%} of the prompts move the wrong way: look at "
            "these prompts, and consider a gate (fit_gate) that steers only where it helps."
        )
    ceiling = evaluation.ceiling
    more = ceiling is not None and (
        ceiling.low > plan.high if plan.side > 0 else ceiling.high < plan.low
    )
    if more:
        return (
            "The plan works, but the target's own direction does more under the same budget: if "
            "labels on the target are at hand, use that one; else try more anchors."
        )
    return (
        "The plan works under this budget: read the texts below, repeat the fit with another seed, "
        "and save it (esl.save)."
    )


def effect_in_words(evaluation: Evaluation) -> str:
    """The plan's effect as odds, and what its interval allows."""
    plan = evaluation.plan
    if not plan.measured:
        return "The plan was not measured."
    odds = math.exp(min(plan.effect, 50.0))
    certain = "does not reach 0" if plan.low > 0 or plan.high < 0 else "includes 0: no effect"
    return (
        f"{plan.effect:+.2f} nats multiply the odds of a positive over a negative completion by "
        f"{odds:.3g}. The interval ({plan.low:+.2f} to {plan.high:+.2f}) {certain}. Random "
        "directions of the same cost show how much any push would do."
    )


def cost_in_words(calibration: Calibration) -> str:
    """What the budget means for a text."""
    row = next(r for r in calibration.curve if r["coefficient"] == calibration.coefficient)
    said = (
        f"At coefficient {calibration.coefficient:g} steering costs {row['cost']:.3f} nats a token"
    )
    if calibration.unit == "kl":
        return f"{said} (KL to the unsteered model): 0 would be the very same predictions."
    share = 1 - math.exp(-row["cost"])
    return f"{said}: the right next word of a neutral text is on average {share:.0%} less likely."


def prompts_in_words(evaluation: Evaluation) -> str:
    """How many prompts the plan moves the wrong way."""
    change = evaluation.plan.side * evaluation.plan.per_prompt
    wrong = int((change < 0).sum())
    return (
        f"{wrong} of {len(change)} test prompts ({wrong / max(1, len(change)):.0%}) move the wrong "
        "way, whatever the mean says."
    )


def _plain(text: str) -> str:
    return f"<p class='plain'>{html.escape(text)}</p>"


def _wide(table: str) -> str:
    return f"<div class='wide'>{table}</div>"


def _figure(figure: Any, *, first: bool = False) -> str:
    """A figure as wide as the page: on a narrow one it scrolls within itself, under its title,
    which is text of the page and breaks into lines."""
    least = min(620, figure.layout.width or 620)
    title, _, subtitle = (figure.layout.title.text or "").partition("<br><sup>")
    lines = html.escape(subtitle.removesuffix("</sup>")).replace("&lt;br&gt;", "<br>")
    found = f"<p class='found'><b>{html.escape(title)}</b><br>{lines}</p>"
    top = (figure.layout.margin.t or TITLE_ROOM) - TITLE_ROOM
    figure.update_layout(width=None, autosize=True, title=None, margin_t=max(30, top))
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=first,
        config={"displaylogo": False, "responsive": True},
        default_width="100%",
    )
    return f"{found}<div class='wide'><div style='min-width:{least}px'>{drawn}</div></div>"


def _shown(text: str) -> str:
    """A text of a model in a cell: line breaks stay, other control characters become visible."""
    return html.escape("\n".join(visible(line) for line in text.split("\n")))


def _text_table(texts: Sequence[SteeredText]) -> str:
    coefficients = sorted(texts[0].texts)
    head = "".join(f"<th>{'unsteered' if c == 0 else f'{c:+.3g}'}</th>" for c in coefficients)
    rows = []
    for item in texts:
        cells = "".join(f"<td>{_shown(item.texts[c])}</td>" for c in coefficients)
        rows.append(
            "<tr><td "
            f"colspan='{len(coefficients)}'><b>{_shown(item.prompt)}</b></td></tr><tr>{cells}</tr>"
        )
    return _wide(f"<table class='texts'><tr>{head}</tr>{''.join(rows)}</table>")
