"""`--json`: one JSON object on standard output; all else that is said goes to standard error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from . import terminal


@contextmanager
def tables_as_json(wanted: bool) -> Iterator[None]:
    """A block in which, if wanted, what is said goes to standard error."""
    before = terminal.console.stderr
    terminal.console.stderr = wanted or before
    try:
        yield
    finally:
        terminal.console.stderr = before


def print_json(value: Any) -> None:
    """One JSON object; numbers that JSON does not know are null."""
    # Control characters stand inside of JSON's texts only, where their escapes mean the same.
    typer.echo(terminal.visible(json.dumps(_plain(value), ensure_ascii=False, default=str)))


def rows_of(frame: Any) -> list[dict[str, Any]]:
    """A table as a list of rows."""
    return list(frame.to_dict("records"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and not hasattr(value, "__len__"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
