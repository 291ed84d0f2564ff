"""What the scripts here show and keep: a page with a table, or numbers for a test."""

from __future__ import annotations

import json
import pathlib
from typing import Any

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def row(*cells: Any) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


def head(*names: str) -> list[str]:
    """The two lines above the rows."""
    return [row(*names), "|---" * len(names) + "|"]


def keep(page: str, output: pathlib.Path | None) -> None:
    """Write a page to its file, if it has one."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page.rstrip("\n") + "\n", encoding="utf-8")


def show(page: str, output: pathlib.Path | None) -> None:
    """Print a page, and keep it."""
    print(page.rstrip("\n"))
    keep(page, output)


def show_numbers(result: dict[str, Any], name: str) -> None:
    """Print what was measured, and keep it among the committed results, where tests and pages read
    it."""
    show(json.dumps(result, indent=2), RESULTS / f"{name}.json")
