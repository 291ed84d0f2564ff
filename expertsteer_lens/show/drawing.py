"""What the figures share: colours, axes, heat maps, intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from expertsteer_lens.data.activations import layer_or_none
from expertsteer_lens.errors import ExpertSteerError

if TYPE_CHECKING:
    from expertsteer_lens.pair.rules import LayerPairs

BLUE, ORANGE, GREY, RED, INK = "#2b6cb0", "#c05621", "#8a94a3", "#d64545", "#1f2933"
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
OTHER = "#0987a0"
"""Of a role that a user made up."""


def role_colour(role: str) -> str:
    """The colour of a row of the comparison.

    Example:
        >>> role_colour("plan"), role_colour("my own")
        ('#2b6cb0', '#0987a0')
    """
    return ROLE_COLOURS.get(role, OTHER)


def heat_map(
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
    """Expert layer by target layer, NaN cells blank, chosen pairs outlined; with `diverging` the
    colours are symmetric about zero."""
    go = import_plotly()
    values = [[None if torch.isnan(v) else float(v) for v in row] for row in matrix]
    scale: dict[str, Any] = {"colorscale": "Viridis"}
    if diverging:
        top = max((abs(v) for row in values for v in row if v is not None), default=0.0) or 1.0
        scale = {"colorscale": "RdBu", "zmin": -top, "zmax": top}
    n_rows, n_columns = len(expert_names), len(target_names)
    small = n_rows * n_columns <= 200
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=list(range(n_columns)),
            y=list(range(n_rows)),
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
            corners = {"x0": j - 0.5, "x1": j + 0.5, "y0": i - 0.5, "y1": i + 0.5}
            figure.add_shape(type="rect", line={"color": "#e53e3e", "width": 4}, **corners)
    set_style(figure, title, subtitle)
    for update, model, names in (
        (figure.update_xaxes, "target", target_names),
        (figure.update_yaxes, "expert", expert_names),
    ):
        update(
            title=f"{model} layer",
            tickvals=list(range(len(names))),
            ticktext=[layer_label(n) for n in names],
            showgrid=False,
            zeroline=False,
        )
    width = max(600, 200 + 60 * n_columns) if small else 900  # room for the title
    figure.update_layout(width=width, height=max(420, 180 + 46 * n_rows))
    return figure


def layer_label(hook_name: str) -> str:
    """A hook point on an axis: its layer, and its kind unless that is the residual after the block;
    before it the expert, where there are several.

    Example:
        >>> layer_label("blocks.3.hook_resid_post"), layer_label("blocks.3.hook_mlp_out")
        ('3', '3 mlp_out')
        >>> layer_label("qwen/blocks.3.hook_resid_post")
        'qwen 3'
    """
    expert, _, own = hook_name.rpartition("/")
    layer = layer_or_none(own)
    if layer is None:
        return hook_name
    kind = own.rsplit(".", 1)[-1]
    label = str(layer) if kind == "hook_resid_post" else f"{layer} {kind.removeprefix('hook_')}"
    return f"{expert} {label}" if expert else label


def set_style(figure: Any, title: str, subtitle: str) -> None:
    """Title, font and size that all figures share."""
    figure.update_layout(
        template="plotly_white",
        title={"text": f"{title}<br><sup>{subtitle}</sup>", "x": 0.02, "xanchor": "left"},
        font={"family": "Inter, Helvetica, Arial, sans-serif", "size": 14, "color": INK},
        margin={"l": 80, "r": 60, "t": 90 + 16 * subtitle.count("<br>"), "b": 80},
        width=860,
        height=500,
    )


DARK_INK, DARK_PAPER, DARK_GRID = "#e4e7eb", "#14181d", "#37414d"


def dark(figure: Any) -> Any:
    """A copy of a figure of this package for dark pages.

    Example:
        >>> import plotly.graph_objects as go
        >>> dark(go.Figure()).layout.paper_bgcolor
        '#14181d'
    """
    go = import_plotly()
    copy = go.Figure(figure)
    copy.update_layout(
        template="plotly_dark",
        paper_bgcolor=DARK_PAPER,
        plot_bgcolor=DARK_PAPER,
        font_color=DARK_INK,
    )
    axes = {"gridcolor": DARK_GRID, "zerolinecolor": DARK_GRID}
    copy.update_xaxes(**axes)
    copy.update_yaxes(**axes)
    for shape in copy.layout.shapes or ():
        shape.fillcolor = _DARK_FILL.get(shape.fillcolor, shape.fillcolor)
        if shape.line.color == INK:
            shape.line.color = DARK_INK
    for trace in copy.data:
        if "marker" in trace and trace.marker.color == FLOOR_FILL:
            trace.marker.color = _DARK_FILL[FLOOR_FILL]
    return copy


_DARK_FILL = {FLOOR_FILL: "#3a4450", "#e6f4ea": "#1d3a2a"}


def import_plotly() -> Any:
    """`plotly.graph_objects`.

    Raises:
        ExpertSteerError: plotly is not installed; the message says how to.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ExpertSteerError(
            "plots need plotly; install it with: pip install 'expertsteer-lens[plot]'"
        ) from error
    return go
