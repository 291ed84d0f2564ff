"""Figures (plotly): layer-pair scores, dose-response, comparison of methods.

Every function takes a result object and returns a `plotly.graph_objects.Figure`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from expertsteer_lens._checks import check_choice
from expertsteer_lens.data.activations import layer_or_none
from expertsteer_lens.errors import ArgumentError, ExpertSteerError
from expertsteer_lens.pair.rules import find_rule

if TYPE_CHECKING:
    from expertsteer_lens.benchmarks.offline import Bench
    from expertsteer_lens.evaluation.run import Evaluation
    from expertsteer_lens.measure.calibration import Calibration
    from expertsteer_lens.pair.mutual_information import LayerPairMI
    from expertsteer_lens.pair.rules import LayerPairs

BLUE, ORANGE, GREY, RED, INK = "#2b6cb0", "#c05621", "#8a94a3", "#b83232", "#1f2933"
FLOOR_FILL = "#e4e7eb"
ROLE_COLOURS = {
    "plan": BLUE,
    "ceiling": ORANGE,
    "floor": GREY,
    "control": GREY,
    "baseline": "#6b46c1",
    "compared": "#2c7a7b",
    "base": GREY,
}


def plot_layer_pair_mi(
    mi: LayerPairMI, *, layer_pairs: LayerPairs | None = None, what: str = "mi"
) -> Any:
    """Heat map of expert layer × target layer, with the null and the chosen pairs.

    Args:
        mi: the scores.
        layer_pairs: chosen pairs to outline.
        what: "mi" (the estimate), or "excess" (estimate minus the permutation null's mean).
    """
    check_choice("what", what, ("mi", "excess"))
    has_null = len(mi.null) > 0
    if what == "excess" and not has_null:
        raise ArgumentError(
            "what='excess' needs a null; fit with MIConfig(n_permutations=...) above 0."
        )
    matrix = mi.matrix if what == "mi" else mi.matrix - mi.null_mean
    unit = mi.unit
    hover = [
        [
            f"expert {e}<br>target {t}<br>{float(mi.matrix[i, j]):.3f} {unit}"
            f"<br>interval {float(mi.interval[i, j, 0]):.3f} to {float(mi.interval[i, j, 1]):.3f}"
            + (
                f"<br>null {float(mi.null_mean[i, j]):.3f} ± {float(mi.null_sd[i, j]):.3f}"
                if has_null
                else ""
            )
            for j, t in enumerate(mi.target_hook_names)
        ]
        for i, e in enumerate(mi.expert_hook_names)
    ]
    minus = "" if what == "mi" else " minus its permutation null"
    title = f"Layer-pair mutual information{minus} ({mi.config.estimator}, n = {mi.n_samples})"
    null = (
        f"permutation null {float(mi.null_mean.mean()):.3f} {unit}"
        if has_null
        else "no permutation null was drawn"
    )
    null += "; outlined: chosen" if layer_pairs is not None else ""
    return _heat_map(
        matrix, mi.expert_hook_names, mi.target_hook_names, title, null, unit, hover, layer_pairs
    )


def plot_layer_pairs(pairs: LayerPairs) -> Any:
    """Heat map of the pairing rule's own score, with the chosen pairs outlined; blank cells were
    not scored."""
    rule = find_rule(pairs.rule)
    subtitle = rule.score_name or f"score of rule {pairs.rule!r}"
    hover = [
        [
            f"expert {e}<br>target {t}<br>{float(pairs.scores[i, j]):+.3f}"
            for j, t in enumerate(pairs.target_hook_names)
        ]
        for i, e in enumerate(pairs.expert_hook_names)
    ]
    return _heat_map(
        pairs.scores,
        pairs.expert_hook_names,
        pairs.target_hook_names,
        f"Layer pairs by {pairs.rule}",
        subtitle,
        "score",
        hover,
        pairs,
        diverging=rule.signed,
    )


def plot_dose_response(calibration: Calibration) -> Any:
    """Effect on the behaviour (left axis) and cost on neutral text (right axis) against the
    coefficient.

    Shaded: the coefficients around 0 up to which the cost stays within the budget on either side.
    """
    go = _plotly()
    xs = [row["coefficient"] for row in calibration.curve]
    figure = go.Figure()
    has_effect = all("effect" in row for row in calibration.curve)
    if has_effect:
        ys = [row["effect"] for row in calibration.curve]
        figure.add_scatter(
            x=xs, y=ys, name="effect (nats)", mode="lines+markers", line={"color": BLUE, "width": 3}
        )
    cost = [row["cost"] for row in calibration.curve]
    figure.add_scatter(
        x=xs,
        y=cost,
        name=f"cost: {calibration.unit.upper()} per token (nats)",
        mode="lines+markers",
        line={"color": RED, "width": 2, "dash": "dot"},
        yaxis="y2" if has_effect else "y",
    )
    low, high = _within_budget(calibration)
    figure.add_vrect(x0=low, x1=high, fillcolor="#e6f4ea", line_width=0, layer="below")
    # "top" stands above the axes, where no point can be
    figure.add_vline(
        x=calibration.coefficient,
        line={"color": INK, "dash": "dash"},
        annotation_text=f"chosen {calibration.coefficient:g}",
        annotation_position="top",
    )
    _style(
        figure,
        "Dose–response on validation",
        f"shaded: cost within {calibration.budget:g} nats per token on {calibration.n_texts} "
        "neutral texts",
    )
    figure.update_xaxes(
        title="coefficient (× median residual norm, or the plan's own unit)",
        zeroline=True,
        zerolinecolor="#cbd2d9",
    )
    left = "effect, nats" if has_effect else "cost, nats per token"
    figure.update_layout(
        yaxis={"title": left, "zeroline": True, "zerolinecolor": "#cbd2d9"},
        yaxis2={
            "title": {"text": "cost, nats per token", "standoff": 12},
            "overlaying": "y",
            "side": "right",
            "showgrid": False,
            "tickmode": "auto",
            "automargin": True,
        },
        legend={"orientation": "h", "y": -0.22},
    )
    return figure


def _within_budget(calibration: Calibration) -> tuple[float, float]:
    """The coefficients around 0 up to the first on either side that costs more than the budget."""
    bounds = []
    for sign in (-1, 1):
        side = sorted(
            (r for r in calibration.curve if sign * r["coefficient"] >= 0),
            key=lambda r: abs(r["coefficient"]),
        )
        over = next((i for i, r in enumerate(side) if r["cost"] > calibration.budget), len(side))
        bounds.append(side[over - 1]["coefficient"] if over else 0.0)
    return bounds[0], bounds[1]


def plot_evaluation(evaluation: Evaluation) -> Any:
    """Effect of every method with its interval; grey band: random floor ± 2 sd; dashed line: native
    ceiling.

    Intervals are bootstrap intervals over prompts, or the range of the seeds of a method that has
    several."""
    go = _plotly()
    cost = (
        "KL to the unsteered model"
        if evaluation.provenance.get("budget_unit") == "kl"
        else "rise of NLL"
    )
    frame = evaluation.to_pandas()
    frame = frame[frame["role"] != "base"].iloc[::-1]  # the unsteered model is the zero of the axis
    figure = go.Figure()
    for _, row in frame.iterrows():
        colour = ROLE_COLOURS[row["role"]]
        figure.add_scatter(
            x=[row["effect"]],
            y=[row["method"]],
            mode="markers",
            showlegend=False,
            marker={"size": 13 if row["role"] == "plan" else 10, "color": colour},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [row["high"] - row["effect"]],
                "arrayminus": [row["effect"] - row["low"]],
                "color": colour,
                "thickness": 2,
            },
            hovertemplate=f"{row['method']}: {row['effect']:+.3f} nats, "
            f"NLL {row['nll_rise']:+.3f}<extra></extra>",
        )
    mean, sd = evaluation.floor
    figure.add_vrect(
        x0=mean - 2 * sd, x1=mean + 2 * sd, fillcolor=FLOOR_FILL, line_width=0, layer="below"
    )
    # In the legend, not beside band and line: a label inside the axes covers the markers of some
    # method.
    figure.add_scatter(
        x=[None],
        y=[None],
        mode="markers",
        name="random floor ± 2 sd",
        marker={"size": 14, "symbol": "square", "color": FLOOR_FILL},
    )
    if evaluation.ceiling is not None:
        figure.add_vline(x=evaluation.ceiling.effect, line={"color": ORANGE, "dash": "dash"})
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="lines",
            name="native ceiling",
            line={"color": ORANGE, "dash": "dash"},
        )
    _style(
        figure,
        "Effect on held-out prompts",
        f"same budget for all: {cost} ≤ {evaluation.budget:g} nats per token on neutral text",
    )
    figure.update_xaxes(
        title="change of log p(positive) − log p(negative), nats", zerolinecolor="#9aa5b1"
    )
    figure.update_layout(
        height=190 + 42 * len(frame),
        margin={"l": 190, "t": 120},
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"},
    )
    return figure


def plot_bench(bench: Bench) -> Any:
    """Effect of every method on every task with its interval; grey band: random floor ± 2 sd of the
    task."""
    go = _plotly()
    frame = bench.to_pandas()
    frame = frame[frame["role"] != "base"]
    tasks, methods = list(dict.fromkeys(frame["task"])), list(dict.fromkeys(frame["method"]))
    figure = go.Figure()
    for i, method in enumerate(methods):
        part = frame[frame["method"] == method]
        role = part["role"].iloc[0]
        colour = ROLE_COLOURS[role]
        main = role in ("plan", "ceiling")
        figure.add_scatter(
            x=part["effect"],
            y=[tasks.index(t) + 0.32 - 0.64 * i / max(1, len(methods) - 1) for t in part["task"]],
            name=method,
            mode="markers",
            marker={"size": 11 if main else 7, "color": colour, "symbol": i % 25},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": part["high"] - part["effect"],
                "arrayminus": part["effect"] - part["low"],
                "thickness": 1.5 if main else 0.7,
            },
            text=[
                f"{t}: {method} {e:+.2f} nats, accuracy {a:.0%}"
                for t, e, a in zip(part["task"], part["effect"], part["accuracy"], strict=True)
            ],
            hoverinfo="text",
        )
    for j, task in enumerate(tasks):
        floor = frame[(frame["task"] == task) & (frame["role"] == "floor")].iloc[0]
        reach = 2 * floor["seed_sd"]
        figure.add_shape(
            type="rect",
            x0=floor["effect"] - reach,
            x1=floor["effect"] + reach,
            y0=j - 0.42,
            y1=j + 0.42,
            fillcolor=FLOOR_FILL,
            line_width=0,
            layer="below",
        )
    _style(
        figure,
        "Benchmark: effect on test prompts",
        "right against wrong answers; grey: random directions ± 2 sd; same budget and choices for "
        "all",
    )
    figure.update_xaxes(
        title="change of log p(right) − log p(wrong), nats", zerolinecolor="#9aa5b1"
    )
    figure.update_yaxes(
        tickvals=list(range(len(tasks))),
        ticktext=tasks,
        autorange="reversed",
        showgrid=False,
        zeroline=False,
    )
    figure.update_layout(height=200 + 62 * len(tasks), width=1100, margin={"l": 110})
    return figure


def _heat_map(
    matrix: Any,
    expert_names: Sequence[str],
    target_names: Sequence[str],
    title: str,
    subtitle: str,
    unit: str,
    hover: list[list[str]],
    chosen: LayerPairs | None,
    *,
    diverging: bool = False,
) -> Any:
    go = _plotly()
    values = [[None if torch.isnan(v) else float(v) for v in row] for row in matrix]
    xs, ys = [_label(n) for n in target_names], [_label(n) for n in expert_names]
    numbers = [v for row in values for v in row if v is not None]
    scale: dict[str, Any] = {"colorscale": "Viridis"}
    if diverging:
        top = max((abs(v) for v in numbers), default=0.0) or 1.0
        scale = {"colorscale": "RdBu", "zmin": -top, "zmax": top}
    small = len(xs) * len(ys) <= 200
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=list(range(len(xs))),
            y=list(range(len(ys))),
            text=hover,
            hoverinfo="text",
            xgap=1,
            ygap=1,
            colorbar={"title": unit},
            texttemplate="%{z:.2f}" if small else None,
            **scale,
        )
    )
    for pair in chosen or ():
        if pair.expert in expert_names and pair.target in target_names:
            i, j = list(expert_names).index(pair.expert), list(target_names).index(pair.target)
            figure.add_shape(
                type="rect",
                x0=j - 0.5,
                x1=j + 0.5,
                y0=i - 0.5,
                y1=i + 0.5,
                line={"color": "#e53e3e", "width": 4},
            )
    _style(figure, title, subtitle)
    figure.update_xaxes(
        title="target layer",
        tickvals=list(range(len(xs))),
        ticktext=xs,
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        title="expert layer",
        tickvals=list(range(len(ys))),
        ticktext=ys,
        showgrid=False,
        zeroline=False,
    )
    figure.update_layout(
        width=max(520, 200 + 60 * len(xs)) if small else 900, height=max(420, 180 + 46 * len(ys))
    )
    return figure


def _label(hook_name: str) -> str:
    layer = layer_or_none(hook_name)
    if layer is None:
        return hook_name
    kind = hook_name.rsplit(".", 1)[-1]
    return str(layer) if kind == "hook_resid_post" else f"{layer} {kind.removeprefix('hook_')}"


def _style(figure: Any, title: str, subtitle: str) -> None:
    figure.update_layout(
        template="plotly_white",
        title={"text": f"{title}<br><sup>{subtitle}</sup>", "x": 0.02, "xanchor": "left"},
        font={"family": "Inter, Helvetica, Arial, sans-serif", "size": 14, "color": INK},
        margin={"l": 80, "r": 60, "t": 90, "b": 80},
        width=860,
        height=500,
    )


def _plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ExpertSteerError(
            "plots need plotly; install it with: pip install 'expertsteer-lens[plot]'"
        ) from error
    return go
