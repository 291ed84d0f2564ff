"""The figure of the benchmark on real models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expertsteer_lens.show.drawing import BLUE, FLOOR_FILL, GREY, ORANGE, import_plotly, set_style

from .result import ANOTHER
from .tables import n_shown

if TYPE_CHECKING:
    from .result import TransferBench

CURVES = {
    "expert as labeller": (BLUE, "circle", "solid"),
    "self as labeller": ("#2c7a7b", "square", "dash"),
    "expert as labeller, instructed": (BLUE, "star", "solid"),
    "self as labeller, instructed": ("#2c7a7b", "star-square", "solid"),
    f"self as labeller{ANOTHER}": (GREY, "x", "solid"),
    "native": (ORANGE, "diamond", "solid"),
    "expert, mapped": ("#6b46c1", "triangle-up", "solid"),
}
"""Colour, symbol and line of each method that is drawn."""


def plot_transfer(bench: TransferBench) -> Any:
    """Effect against the number of labelled pairs, a panel per transfer; whiskers: 95 % intervals
    over tasks; grey band: random directions within the budget, mean ± 2 sd of their means over
    tasks."""
    go = import_plotly()
    from plotly.subplots import make_subplots

    summary = bench.summary()
    counts = sorted(set(summary.n_pairs))
    place = {n: i for i, n in enumerate(counts)}
    titles = [f"{expert} → {target}" for expert, target in bench.transfers]
    figure = make_subplots(rows=1, cols=len(titles), subplot_titles=titles, horizontal_spacing=0.07)
    for column, (expert, target) in enumerate(bench.transfers, start=1):
        mine = summary[(summary.target == target) & summary.expert.isin([expert, target])]
        means = bench.floor_means(target)
        figure.add_hrect(
            y0=means.mean() - 2 * means.std(),
            y1=means.mean() + 2 * means.std(),
            fillcolor=FLOOR_FILL,
            line_width=0,
            layer="below",
            row=1,
            col=column,
            exclude_empty_subplots=False,
        )
        for i, (method, (colour, symbol, dash)) in enumerate(CURVES.items()):
            part = mine[mine.method == method].sort_values("n_pairs")
            shift = 0.09 * (i - (len(CURVES) - 1) / 2)  # so that the whiskers stand side by side
            figure.add_trace(
                go.Scatter(
                    x=[place[n] + shift for n in part.n_pairs],
                    y=part.effect,
                    error_y={
                        "type": "data",
                        "symmetric": False,
                        "array": part.high - part.effect,
                        "arrayminus": part.effect - part.low,
                        "width": 3,
                        "thickness": 1.3,
                    },
                    name=method,
                    legendgroup=method,
                    showlegend=column == 1 and bool((summary.method == method).any()),
                    mode="lines+markers",
                    line={"color": colour, "dash": dash, "width": 2},
                    marker={"symbol": symbol, "size": 9, "color": colour},
                ),
                row=1,
                col=column,
            )
    set_style(figure, _title(bench), _subtitle(bench))
    figure.update_xaxes(
        tickvals=list(place.values()),
        ticktext=[n_shown(n) for n in counts],
        title="labelled pairs",
        range=[-0.5, len(counts) - 0.5],
    )
    figure.update_yaxes(zerolinecolor=GREY)
    figure.update_yaxes(title="effect, nats per answer token", col=1)
    figure.update_layout(
        width=max(900, 130 + 390 * len(titles)),
        height=560,
        legend={"orientation": "h", "y": -0.2},
        margin={"b": 120, "t": 120},
    )
    return figure


def _title(bench: TransferBench) -> str:
    """The finding: where the expert's labels beat the target's own."""
    gains = bench.differences()
    gains = gains[gains.difference == "expert as labeller - self as labeller"]
    won = gains[gains.low > 0]
    if not len(won):
        return "The expert's labels are not distinguishable from the target's own"
    where = "; ".join(
        f"at {n_shown(n)} labelled pairs{'' if n else ', asked,'} in {len(part)} of "
        f"{len(bench.transfers)} pairs of models"
        for n, part in won.groupby("n_pairs")
    )
    return f"The expert's labels beat the target's own {where}"


def _subtitle(bench: TransferBench) -> str:
    counts = bench.summary().tasks
    n = f"{counts.min()} to {counts.max()}" if counts.min() < counts.max() else str(counts.max())
    return (
        f"{n} tasks; whiskers: 95 % interval over tasks; grey: random directions within the "
        "budget ± 2 sd; same block and strength for all others"
    )
