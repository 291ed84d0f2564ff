"""Figures of the single steps: pairing, directions, maps, and the way of the steering."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from expertsteer_lens.linalg.row_space import row_space

from .drawing import BLUE, GREY, ORANGE, RED, heat_map, import_plotly, layer_label, set_style
from .tokens import visible

if TYPE_CHECKING:
    from expertsteer_lens.evaluation.result import Evaluation
    from expertsteer_lens.learn.rfm import RFM
    from expertsteer_lens.measure.placement import Placement
    from expertsteer_lens.pair.rules import LayerPairs
    from expertsteer_lens.pipeline.fitted import ExpertSteering

    from .inspection import AnchorCurve, DirectionWords, SteeringPath


def plot_pairing_lines(pairs: LayerPairs) -> Any:
    """The two stacks of layers side by side, a line for each chosen pair, thicker where the rule's
    score is larger in size."""
    go = import_plotly()
    figure = go.Figure()
    stacks = (
        (0, "expert", pairs.expert_hook_names, BLUE),
        (1, "target", pairs.target_hook_names, ORANGE),
    )
    height = {}
    for x, who, names, colour in stacks:
        ys = [i / max(1, len(names) - 1) for i in range(len(names))]
        height[who] = dict(zip(names, ys, strict=True))
        figure.add_scatter(
            x=[x] * len(names),
            y=ys,
            name=who,
            mode="markers+text",
            text=[layer_label(n) for n in names],
            textposition="middle left" if x == 0 else "middle right",
            marker={"size": 13, "symbol": "square", "color": colour},
            hovertext=list(names),
            hoverinfo="text",
        )
    top = max((abs(p.score) for p in pairs), default=0.0) or 1.0
    for pair in pairs:
        figure.add_scatter(
            x=[0, 1],
            y=[height["expert"][pair.expert], height["target"][pair.target]],
            mode="lines",
            showlegend=False,
            line={"color": GREY, "width": 1.5 + 5 * abs(pair.score) / top},
            hovertext=f"{pair.expert} → {pair.target}: {pair.score:+.3f}",
            hoverinfo="text",
        )
    chosen = [f"{layer_label(p.expert)} → {layer_label(p.target)}" for p in pairs]
    more = "" if len(chosen) <= 4 else f" and {len(chosen) - 4} more"
    set_style(
        figure,
        f"Expert layer → target layer: {', '.join(chosen[:4])}{more}",
        f"chosen by rule {pairs.rule}; first layers at the bottom; thicker: larger score",
    )
    hidden = {"showgrid": False, "zeroline": False, "showticklabels": False}
    figure.update_xaxes(range=[-0.35, 1.35], **hidden)
    figure.update_yaxes(range=[-0.06, 1.06], **hidden)
    figure.update_layout(width=560, height=max(420, 160 + 28 * len(height["target"])))
    return figure


def rfm_spectrum(rfm: RFM) -> torch.Tensor:
    """Eigenvalues of the AGOP over their sum, largest first."""
    values = row_space(rfm.predictor.gradient_factor()).singular_values.double()
    return values.square() / values.square().sum()


def plot_rfm(fit: ExpertSteering, *, n_eigenvalues: int = 10) -> Any:
    """Held-out AUC by target layer, and the first eigenvalues of each layer's AGOP."""
    go = import_plotly()
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=("held-out AUC", "share of the AGOP by eigenvalue"))
    keys = sorted(fit.rfms, key=lambda k: list(fit.data.target_pair_states).index(k[1]))
    labels = [f"{layer_label(e)} → {layer_label(t)}" for e, t in keys]
    aucs = [fit.rfms[k].validation_auc for k in keys]
    figure.add_trace(
        go.Scatter(x=labels, y=aucs, mode="markers", marker={"color": BLUE, "size": 11}), 1, 1
    )
    figure.add_hline(y=0.5, line={"color": GREY, "dash": "dash"}, row=1, col=1)
    chosen = set(fit.layer_pairs.keys())
    for key, label in zip(keys, labels, strict=True):
        share = rfm_spectrum(fit.rfms[key])[:n_eigenvalues].tolist()
        colour, width = (BLUE, 3) if key in chosen else (GREY, 1)
        line = {"color": colour, "width": width}
        xs = list(range(1, len(share) + 1))
        figure.add_trace(
            go.Scatter(x=xs, y=share, name=label, mode="lines+markers", line=line), 1, 2
        )
    first = max((fit.rfms[k].eigenvalue_share for k in chosen & set(keys)), default=0.0)
    known = [a for a in aucs if a is not None]
    best = f"AUC up to {max(known):.2f}; " if known else ""
    set_style(
        figure,
        f"Reading: {best}one direction holds {first:.0%} of what the predictor uses",
        "expert layer → target layer; blue: chosen; dashed: guessing. Reading well is not steering",
    )
    figure.update_layout(showlegend=False)
    figure.update_yaxes(range=[0, 1.05])
    return figure


def plot_aligner_quality(fit: ExpertSteering) -> Any:
    """Held-out R² by expert layer and target layer; blank: not fitted, or a kind without R²."""
    experts = list(dict.fromkeys(e for e, _ in fit.aligners))
    targets = list(dict.fromkeys(t for _, t in fit.aligners))
    matrix = torch.full((len(experts), len(targets)), torch.nan, dtype=torch.float64)
    for (e, t), aligner in fit.aligners.items():
        if aligner.quality.r2 is not None:
            matrix[experts.index(e), targets.index(t)] = aligner.quality.r2
    hover = [
        [f"{e} → {t}<br>R² {float(matrix[i, j]):.3f}" for j, t in enumerate(targets)]
        for i, e in enumerate(experts)
    ]
    known = matrix[~matrix.isnan()]
    best = f"best R² {float(known.max()):.2f}" if len(known) else "no R²: fitted without the target"
    title = f"Maps ({fit.config.aligner.kind}): {best}"
    subtitle = "held-out R² of the target's states; 0: no better than their mean; outlined: chosen"
    return heat_map(matrix, experts, targets, title, subtitle, "R²", hover, fit.layer_pairs)


def plot_anchor_curve(curve: AnchorCurve) -> Any:
    """R² against the number of anchors."""
    figure = import_plotly().Figure()
    r2 = curve.r2.tolist()
    line = {"color": BLUE, "width": 3}
    figure.add_scatter(x=list(curve.n_anchors), y=r2, mode="lines+markers", line=line)
    gain = r2[-1] - r2[-2] if len(r2) > 1 else 0.0
    finding = "more anchors would help" if gain > 0.02 else "more anchors would add little"
    e, t = (layer_label(name) for name in curve.pair)
    set_style(
        figure,
        f"Held-out R² {r2[-1]:.2f} at {curve.n_anchors[-1]} anchors: {finding}",
        f"expert layer {e} → target layer {t}; the last step changed it by {gain:+.3f}",
    )
    figure.update_xaxes(title="anchors", type="log", tickvals=list(curve.n_anchors))
    figure.update_yaxes(title="held-out R²")
    return figure


def plot_placement(placement: Placement) -> Any:
    """Effect by the block that the direction is written to, each time at the largest strength
    within the budget; whiskers: two standard errors over prompts."""
    go = import_plotly()
    rows = [row for row in placement.rows if "effect" in row]
    places = {
        placement.learnt_at: ("learnt here", ORANGE, "diamond"),
        placement.hook_name: ("chosen", BLUE, "circle"),
    }
    figure = go.Figure()
    figure.add_hline(y=0, line={"color": GREY, "width": 1})
    figure.add_trace(
        go.Scatter(
            x=[layer_label(row["hook_name"]) for row in rows],
            y=[row["effect"] for row in rows],
            error_y={"type": "data", "array": [2 * row["effect_se"] for row in rows], "width": 3},
            mode="lines+markers",
            line={"color": GREY, "width": 1.5},
            marker={"color": GREY, "size": 8},
            customdata=[[row["coefficient"], row["cost"]] for row in rows],
            hovertemplate="%{x}: %{y:+.2f} nats<br>strength %{customdata[0]:g}, cost "
            "%{customdata[1]:.3f} nats a token<extra></extra>",
            showlegend=False,
        )
    )
    for row in rows:
        if row["hook_name"] in places:
            label, colour, symbol = places[row["hook_name"]]
            figure.add_trace(
                go.Scatter(
                    x=[layer_label(row["hook_name"])],
                    y=[row["effect"]],
                    mode="markers",
                    name=label,
                    marker={"color": colour, "size": 14, "symbol": symbol},
                )
            )
    chosen = next(row for row in rows if row["hook_name"] == placement.hook_name)
    where = layer_label(placement.hook_name)
    if placement.hook_name == placement.learnt_at:
        title = f"No block beats {where}, where the direction was learnt"
    else:
        title = (
            f"Written to {where} instead of {layer_label(placement.learnt_at)}: "
            f"{chosen['effect']:+.2f} nats"
            + (f", {chosen['gain']:+.2f} more" if "gain" in chosen else "")
        )
    set_style(
        figure,
        title,
        f"validation prompts; each block at its largest strength within {placement.budget:g} nats "
        "a token; whiskers: 2 standard errors",
    )
    figure.update_xaxes(title="block that is written to", type="category")
    figure.update_yaxes(title="effect, nats")
    return figure


def plot_words(words: DirectionWords) -> Any:
    """Top tokens of a direction beside those of a random one."""
    go = import_plotly()
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=("the direction", "a random one, same length"))
    sides = ((words.tokens, words.logits, BLUE), (words.random_tokens, words.random_logits, GREY))
    for column, (tokens, logits, colour) in enumerate(sides, start=1):
        ranks = list(range(len(tokens)))
        figure.add_trace(
            go.Bar(x=logits.tolist(), y=ranks, orientation="h", marker={"color": colour}), 1, column
        )
        texts = [visible(t).replace("<", "&lt;").replace(" ", "·")[:24] for t in tokens]
        figure.update_yaxes(tickvals=ranks, ticktext=texts, autorange="reversed", row=1, col=column)
    top = float(torch.cat([words.logits, words.random_logits]).abs().max()) * 1.05
    figure.update_xaxes(range=[0, top], title="logit above the mean")
    ratio = float(words.logits[0] / words.random_logits[0]) if words.random_logits[0] else 0.0
    first = visible(words.tokens[0]).replace("<", "&lt;").strip() or "a space"
    set_style(
        figure,
        f"Raised most: “{first[:24]}”, {ratio:.1f} times what a random direction does to its best",
        f"{words.hook_name}, read through the target's final norm and unembedding",
    )
    figure.update_layout(showlegend=False, height=160 + 26 * len(words.tokens))
    return figure


def plot_path(path: SteeringPath) -> Any:
    """Norm (left) and attribution (right) of the steered difference by layer."""
    figure = import_plotly().Figure()
    xs = [layer_label(n) for n in path.hook_names]
    norm = path.norm.tolist()
    line = {"color": BLUE, "width": 3}
    figure.add_scatter(x=xs, y=norm, name="norm", mode="lines+markers", line=line)
    if path.attribution is not None:
        figure.add_scatter(
            x=xs,
            y=path.attribution.tolist(),
            name="direct logit attribution",
            mode="lines+markers",
            line={"color": RED, "width": 2, "dash": "dot"},
            yaxis="y2",
        )
    started = next((i for i, v in enumerate(norm) if v > 0), len(norm) - 1)
    way = "grows" if norm[-1] > norm[started] else "fades"
    set_style(
        figure,
        f"Steered at layer {xs[started]}, the difference {way} to {norm[-1]:.0%} of the state",
        "at the last token of the prompts; |steered − unsteered| / |unsteered|",
    )
    figure.update_layout(
        xaxis={"title": "target layer", "type": "category"},
        yaxis={"title": "share of the unsteered norm", "rangemode": "tozero"},
        yaxis2={"title": "logits", "overlaying": "y", "side": "right", "showgrid": False},
        legend={"orientation": "h", "y": -0.22},
    )
    return figure


def plot_prompts(evaluation: Evaluation) -> Any:
    """Effect of the plan on each test prompt, sorted; orange: the wrong way."""
    figure = import_plotly().Figure()
    change, order = evaluation.plan.per_prompt.sort()
    values, side = change.tolist(), evaluation.plan.side
    figure.add_bar(
        x=list(range(len(values))),
        y=values,
        marker={"color": [ORANGE if side * v < 0 else BLUE for v in values]},
        hovertext=[
            f"prompt {i}: {v:+.2f} nats" for i, v in zip(order.tolist(), values, strict=True)
        ],
        hoverinfo="text",
    )
    wrong = sum(side * v < 0 for v in values)
    set_style(
        figure,
        f"{wrong} of {len(values)} prompts move the wrong way",
        "change of log p(positive) − log p(negative), nats; one bar a test prompt, sorted",
    )
    figure.update_xaxes(title="test prompts, sorted", showticklabels=False)
    figure.update_yaxes(title="nats")
    figure.update_layout(height=380)
    return figure
