"""Figures (plotly): layer-pair scores, dose-response, comparison of methods.

Every function takes a result object and returns a `plotly.graph_objects.Figure`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.pair.rules import find_rule

from .drawing import (
    BLUE,
    FLOOR_FILL,
    INK,
    ORANGE,
    RED,
    heat_map,
    import_plotly,
    layer_label,
    role_colour,
    set_style,
)

if TYPE_CHECKING:
    import pandas

    from expertsteer_lens.evaluation.result import Evaluation
    from expertsteer_lens.measure.calibration import Calibration
    from expertsteer_lens.pair.mutual_information import LayerPairMI
    from expertsteer_lens.pair.rules import LayerPairs

Quantity = Literal["mi", "excess"]


SYMBOLS = (
    *("circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star"),
    *("pentagon", "hourglass", "bowtie", "circle-open", "square-open", "diamond-open"),
    *("triangle-up-open", "hexagram", "star-open", "cross-open"),
)
"""One for each method of the benchmark: of plotly's own order the eighth to the thirteenth are one
small triangle, turned."""


class _DrawnBench(Protocol):
    """What a figure reads of `Bench`."""

    def to_pandas(self) -> pandas.DataFrame:
        """One row a task and method."""


def plot_layer_pair_mi(
    mi: LayerPairMI,
    *,
    layer_pairs: LayerPairs | None = None,
    what: Quantity = "mi",
    significance: float | None = None,
) -> Any:
    """Heat map of expert layer × target layer, with the null and the chosen pairs.

    Args:
        mi: the scores.
        layer_pairs: chosen pairs to outline.
        what: "mi" (the estimate), or "excess" (estimate minus the permutation null's mean).
        significance: false discovery rate, e.g. 0.05: pairs that do not exceed their null at it
            (Benjamini-Hochberg over the whole matrix) are crossed out.
    """
    check_choice("what", what, get_args(Quantity))
    if significance is not None:
        check_number("significance", significance, low=0.0, high=1.0, low_open=True)
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
    i, j = divmod(int(matrix.argmax()), len(mi.target_hook_names))
    e, t = layer_label(mi.expert_hook_names[i]), layer_label(mi.target_hook_names[j])
    most = "share most" if what == "mi" else "exceed chance most"
    value = f"{float(matrix[i, j]):.2f} {unit}"
    title = f"Expert layer {e} and target layer {t} {most}: {value}"
    size = f"n = {mi.n_samples}"
    size += "" if mi.n_groups is None else f" in {mi.n_groups} texts"
    null = f"mutual information{minus}, {mi.config.estimator}, {size}"
    if not has_null:
        null += "; no permutation null was drawn"
    elif what == "mi":
        null += f"; permutation null {float(mi.null_mean.mean()):.3f} {unit}"
    null += "; outlined: chosen" if layer_pairs is not None else ""
    corrected = None
    if significance is not None:
        corrected = corrected_p_values(mi)
        n_above = int((corrected <= significance).sum())
        null += (
            f"<br>{n_above} of {corrected.numel()} pairs exceed it at a false discovery rate of "
            f"{significance:g} (Benjamini-Hochberg); ×: the others"
        )
    figure = heat_map(
        matrix, mi.expert_hook_names, mi.target_hook_names, title, null, unit, hover, layer_pairs
    )
    if corrected is not None and significance is not None:
        rows, columns = (corrected > significance).nonzero(as_tuple=True)
        figure.add_scatter(
            x=columns.tolist(),
            y=rows.tolist(),
            mode="markers",
            name="not significant",
            showlegend=False,
            hoverinfo="skip",
            marker={"symbol": "x-thin", "size": 16, "line": {"width": 2, "color": "#d9d9d9"}},
        )
    return figure


def corrected_p_values(mi: LayerPairMI) -> Tensor:
    """Permutation p-values `[n_expert, n_target]` adjusted for the number of pairs
    (Benjamini-Hochberg, `scipy.stats.false_discovery_control`): a pair at or below q is among
    findings of which at most a share q is expected to be false.

    Raises:
        ArgumentError: there is no null.
    """
    from scipy.stats import false_discovery_control

    if not len(mi.null):
        raise ArgumentError(
            "significance needs a null; fit with MIConfig(n_permutations=...) above 0."
        )
    adjusted = false_discovery_control(mi.p_values.cpu().numpy(), axis=None, method="bh")
    return torch.as_tensor(adjusted).reshape(mi.matrix.shape)


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
    return heat_map(
        pairs.scores,
        pairs.expert_hook_names,
        pairs.target_hook_names,
        _pairs_finding(pairs),
        f"{subtitle} (rule {pairs.rule}); outlined: chosen",
        "score",
        hover,
        pairs,
        diverging=rule.signed,
    )


def _pairs_finding(pairs: LayerPairs) -> str:
    """Which pair was chosen first, of how many that were scored."""
    first, n = pairs[0], int((~pairs.scores.isnan()).sum())
    e, t = layer_label(first.expert), layer_label(first.target)
    more = f" and {len(pairs) - 1} more" if len(pairs) > 1 else ""
    return f"Expert layer {e} → target layer {t} ({first.score:+.2f}){more}, of {n} pairs"


def plot_dose_response(calibration: Calibration) -> Any:
    """Effect on the behaviour (left axis) and cost on neutral text (right axis) against the
    coefficient.

    Shaded: the coefficients around 0 up to which the cost stays within the budget on either side.
    """
    go = import_plotly()
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
    set_style(
        figure,
        _dose_finding(calibration),
        f"dose–response on validation; shaded: cost within {calibration.budget:g} nats per token "
        f"on {calibration.n_texts} neutral texts",
    )
    figure.update_xaxes(
        title="coefficient (× median residual norm, or the plan's own unit)",
        zeroline=True,
        zerolinecolor="#cbd2d9",
    )
    _set_two_axes(figure, has_effect)
    return figure


def _dose_finding(calibration: Calibration) -> str:
    """What the curve says at the coefficient chosen."""
    row = next(r for r in calibration.curve if r["coefficient"] == calibration.coefficient)
    effect = f"{row['effect']:+.2f} nats for " if "effect" in row else ""
    return f"Coefficient {calibration.coefficient:g}: {effect}{row['cost']:.3f} nats per token"


def _set_two_axes(figure: Any, has_effect: bool) -> None:
    """Effect on the left and cost on the right, or cost alone on the left."""
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
    several. What could not be measured is named above the axes."""
    go = import_plotly()
    unit = evaluation.provenance.get("budget_unit")
    cost = "KL to the unsteered model" if unit == "kl" else "rise of NLL"
    frame = evaluation.to_pandas()
    # The unsteered model is the zero of the axis.
    frame = frame[(frame["role"] != "base") & frame["effect"].notna()].iloc[::-1]
    figure = go.Figure()
    for _, row in frame.iterrows():
        _add_method(figure, row)
    _add_floor_and_ceiling(figure, evaluation)
    missing = ", ".join(evaluation.not_measured)
    mean, sd = evaluation.floor
    chance = "cost too much" if math.isnan(sd) else f"by {mean:+.2f} ± {sd:.2f}"
    moved = f"moves the behaviour by {evaluation.plan.effect:+.2f} nats"
    set_style(
        figure,
        f"The plan {moved if evaluation.plan.measured else 'was not measured'}, random directions "
        + chance,
        f"held-out prompts; same budget for all: {cost} ≤ {evaluation.budget:g} nats per token on "
        "neutral text" + (f"; not measured: {missing}" if missing else ""),
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


def _add_method(figure: Any, row: Any) -> None:
    """A marker at the effect of one method, with its interval."""
    colour = role_colour(row["role"])
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
        hovertemplate=f"{row['method']}: {row['effect']:+.3f} nats"
        + ("" if math.isnan(row["nll_rise"]) else f", NLL {row['nll_rise']:+.3f}")
        + "<extra></extra>",
    )


def _add_floor_and_ceiling(figure: Any, evaluation: Evaluation) -> None:
    """Band and line, explained in the legend: a label inside the axes covers some marker."""
    mean, sd = evaluation.floor
    if not math.isnan(sd):
        figure.add_vrect(
            x0=mean - 2 * sd, x1=mean + 2 * sd, fillcolor=FLOOR_FILL, line_width=0, layer="below"
        )
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            name="random floor ± 2 sd",
            marker={"size": 14, "symbol": "square", "color": FLOOR_FILL},
        )
    if evaluation.ceiling is None:
        return
    dashed = {"color": ORANGE, "dash": "dash"}
    figure.add_vline(x=evaluation.ceiling.effect, line=dashed)
    figure.add_scatter(x=[None], y=[None], mode="lines", name="native ceiling", line=dashed)


def plot_bench(bench: _DrawnBench) -> Any:
    """Effect of every method on every task with its interval; grey band: random floor ± 2 sd of the
    task."""
    go = import_plotly()
    frame = bench.to_pandas()
    frame = frame[frame["role"] != "base"]
    tasks, methods = list(dict.fromkeys(frame["task"])), list(dict.fromkeys(frame["method"]))
    figure = go.Figure()
    for i, method in enumerate(methods):
        part = frame[frame["method"] == method]
        shift = 0.32 - 0.64 * i / max(1, len(methods) - 1)
        heights = [tasks.index(t) + shift for t in part["task"]]
        _add_tasks(figure, part, method, heights, SYMBOLS[i % len(SYMBOLS)])
    own = frame[frame["role"] == "plan"].set_index("task")
    plan, wins = own["method"].iloc[0], 0
    for j, task in enumerate(tasks):
        floor = frame[(frame["task"] == task) & (frame["role"] == "floor")].iloc[0]
        reach = 2 * floor["seed_sd"]
        wins += int(own.loc[task, "effect"] > floor["effect"] + reach)
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
    set_style(
        figure,
        f"{plan}: {wins} of {len(tasks)} tasks above random directions",
        "effect on test prompts, right against wrong answers; grey: random directions ± 2 sd; same "
        "budget and choices for all",
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


def _add_tasks(figure: Any, part: Any, method: str, heights: list[float], symbol: str) -> None:
    """One method's markers on all tasks, with their intervals."""
    role = part["role"].iloc[0]
    main = role in ("plan", "ceiling")
    figure.add_scatter(
        x=part["effect"],
        y=heights,
        name=method,
        mode="markers",
        marker={"size": 11 if main else 8, "color": role_colour(role), "symbol": symbol},
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
