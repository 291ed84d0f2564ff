"""What the commands say in the terminal: plain text, JSON, tables and steps."""

from __future__ import annotations

import json
import unicodedata
from typing import TYPE_CHECKING, Any

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.console import Console
from rich.highlighter import JSONHighlighter
from rich.markup import escape as escape_markup
from rich.table import Table

if TYPE_CHECKING:
    pass


console = Console(highlight=False)


def describe(model: Any) -> str:
    """Name, width and depth of a model."""
    from expertsteer_lens.hosts import as_host

    host = as_host(model)
    return f"{host.name} (d={host.d_model}, {host.n_layers} layers)"


_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
"""Characters that reorder the text after them, by their bidirectional class."""


def visible(text: str) -> str:
    """Text whose control characters, but for line ends and tabs, are written as in JSON: files of
    others must not move the cursor, clear the screen or reorder what is read.

    >>> print(visible("a\x1b[2Jb"))
    a\\u001b[2Jb
    """
    return "".join(f"\\u{ord(c):04x}" if _controls(c) else c for c in text)


def _controls(c: str) -> bool:
    if c in "\n\t":
        return False
    return (
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(c) in _TURNS
    )


def escape(text: str) -> str:
    """Text of a table or a title: neither styles nor control characters."""
    return escape_markup(visible(text))


def say(text: str, *, style: str | None = None) -> None:
    """Print text as it is: brackets in it are not styles, and control characters are shown."""
    console.print(visible(text), markup=False, soft_wrap=True, style=style)


def say_json(value: Any) -> None:
    """Print a value as JSON for people."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    console.print(JSONHighlighter()(visible(text)), soft_wrap=True)


def print_step(step: dict[str, Any]) -> None:
    """A line of figures for a finished step of a fit."""
    named = {k.replace("_", " "): v for k, v in step.items() if k not in ("step", "seconds")}
    figures = " · ".join(f"{name}: {value}" for name, value in named.items())
    console.print(
        f"  [green]{step['step']:<10}[/green] {step['seconds']:5.1f} s  {escape(figures)}"
    )


def print_texts(texts: list[Any]) -> None:
    """Continuations side by side, a table a prompt."""
    for item in texts:
        table = Table(
            title=escape(f"“{item.prompt} …”"), title_justify="left", show_lines=False, expand=True
        )
        coefficients = sorted(item.texts)
        for c in coefficients:
            table.add_column("unsteered" if c == 0 else f"coefficient {c:+.3g}", ratio=1)
        table.add_row(*(escape(item.texts[c]) for c in coefficients))
        console.print()
        console.print(table)


def print_evaluation(result: Any) -> None:
    """The comparison and its verdict."""
    from expertsteer_lens.show.report import table_for_people

    console.print()
    print_frame(
        table_for_people(result),
        "effect on held-out prompts (nats), all under one budget on neutral text",
        whole=True,
    )
    say("interval: bootstrap 95 % over prompts, or the range of several seeds")
    console.print()
    say(result.verdict, style="bold")


def print_frame(frame: Any, title: str, *, whole: bool = False, names: bool = False) -> None:
    """A table; in a narrow terminal `whole` breaks only the first column into lines, `names` only
    the others."""
    table = Table(
        title=escape(title), title_justify="left", box=SIMPLE_HEAD if whole else HEAVY_HEAD
    )
    for i, column in enumerate(frame.columns):
        table.add_column(
            escape(str(column)),
            justify="left" if i == 0 else "right",
            overflow="fold",
            no_wrap=whole if i > 0 else names,
        )
    for row in frame.itertuples(index=False):
        table.add_row(*(escape(f"{v:.4g}" if isinstance(v, float) else str(v)) for v in row))
    console.print(table)
