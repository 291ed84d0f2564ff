"""How a result looks in a notebook."""

from __future__ import annotations

import html
from typing import Any

ROWS = 20
"""Rows of a result's table that are shown."""


def repr_html(result: Any) -> str:
    """What a result says of itself, and the first rows of its table; classes take it as their
    `_repr_html_`.

    Example:
        >>> repr_html(1 < 2)
        "<pre style='white-space:pre-wrap'>True</pre>"
    """
    said = f"<pre style='white-space:pre-wrap'>{html.escape(repr(result))}</pre>"
    if not hasattr(result, "to_pandas"):
        return said
    frame = result.to_pandas()
    more = f"<p>the first {ROWS} of {len(frame)} rows</p>" if len(frame) > ROWS else ""
    table = frame.head(ROWS).to_html(index=False, border=0)
    return f"{said}<div style='overflow-x:auto'>{table}</div>{more}"
