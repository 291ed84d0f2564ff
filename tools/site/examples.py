"""Examples in docstrings as code: griffe itself knows only the heading `Examples:`."""

from __future__ import annotations

import re
from typing import Any

import griffe


def with_headings(text: str) -> str:
    """A docstring in which every example stands under `Examples:`."""
    text = re.sub(r"^Example:\n", "Examples:\n", text, flags=re.MULTILINE)
    paragraphs = text.split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if paragraph.startswith(">>>"):
            paragraphs[i] = "Examples:\n" + re.sub("^", "    ", paragraph, flags=re.MULTILINE)
    return "\n\n".join(paragraphs)


class Examples(griffe.Extension):  # type: ignore[misc]
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = with_headings(obj.docstring.value)
