"""Hooks of mkdocs: a page for every notebook as it is stored, and links that lead out of `docs/`.

A stored notebook already holds its outputs; it is turned into Markdown without running anything."""

from __future__ import annotations

import base64
import json
import pathlib
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[2]


def title_of(notebook: dict[str, Any]) -> tuple[str, str]:
    """The heading of a notebook and the first paragraph under it."""
    text = "".join(notebook["cells"][0]["source"])
    heading, _, rest = text.partition("\n")
    return heading.lstrip("# "), rest.strip().split("\n\n")[0].replace("\n", " ")


def output_markdown(output: dict[str, Any], pictures: dict[str, bytes], stem: str) -> str:
    """One output: a picture, a table, or text; the richest form that needs no script."""
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{stem}_{len(pictures)}.png"
        pictures[name] = base64.b64decode("".join(data["image/png"]))
        return f'<div class="nb-output" markdown>\n![output]({name})\n</div>'
    html = "".join(data.get("text/html", ""))
    if "<table" in html or "esl-tokens" in html:
        if "esl-tokens" not in html:  # else the style is of this package
            html = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
        pieces = re.split(r"(<pre.*?</pre>)", html, flags=re.DOTALL)
        # In one line, or Markdown would read it; what stands in <pre> keeps its lines.
        pieces[::2] = [re.sub(r"\n\s*", " ", piece) for piece in pieces[::2]]
        pieces[1::2] = [piece.replace("\n", "&#10;") for piece in pieces[1::2]]
        return f'<div class="nb-output">{"".join(pieces)}</div>'
    text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
    # In a block of its own, whose lines the style sheet wraps: what was printed is read whole.
    return f'<div class="nb-text" markdown>\n\n````text\n{text}\n````\n\n</div>' if text else ""


def page_of(path: pathlib.Path) -> tuple[str, dict[str, bytes]]:
    """A stored notebook as Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"`docs/(\w+)\.md`", r"[\1](../\1.md)", source))
        elif source.strip():
            parts.append(f"````python\n{source}\n````")
        streamed = ""
        for output in cell.get("outputs", []):
            if output["output_type"] == "stream":
                streamed += "".join(output["text"])
                continue
            if streamed:
                parts.append(output_markdown({"text": streamed}, pictures, path.stem))
                streamed = ""
            parts.append(output_markdown(output, pictures, path.stem))
        if streamed:
            parts.append(output_markdown({"text": streamed}, pictures, path.stem))
    return "\n\n".join(part for part in parts if part) + "\n", pictures


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the gallery and a page for every notebook."""
    lines = ["# Notebooks", "", "As they were run, with their outputs.", ""]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, pictures = page_of(path)
        title, about = title_of(json.loads(path.read_text(encoding="utf-8")))
        first = next(iter(pictures), None)
        lines += [f"## [{title}]({path.stem}.md)", "", about, ""]
        lines += [f"[![{title}]({first}){{ width=420 }}]({path.stem}.md)", ""] if first else []
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    files.append(File.generated(config, "notebooks/index.md", content="\n".join(lines)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to notebooks lead to their pages; what lies outside is named."""
    markdown = re.sub(r"\]\(\.\./notebooks/(\w+)\.ipynb\)", r"](notebooks/\1.md)", markdown)
    outside = r"\[([^\]]+)\]\(\.\./((?:expertsteer_lens|benchmarks|tools|tests)/[^)]+)\)"
    return re.sub(outside, r"\1 (`\2`)", markdown)
