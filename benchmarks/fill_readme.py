"""Copy the measured tables into the README and `docs/`: `python benchmarks/fill_readme.py`.

Between `<!-- begin FILE -->` and `<!-- end -->` stands the content of FILE, without its heading. A
test holds the two equal."""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- begin (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def content(name: str) -> str:
    """The table of a results file as a page shows it."""
    lines = (ROOT / name).read_text(encoding="utf-8").strip().splitlines()
    return "\n".join(line for line in lines if not line.startswith("# ")).strip() + "\n"


def pages() -> list[pathlib.Path]:
    """Where tables may stand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """A page with every block as its file says."""
    return BLOCK.sub(lambda m: f"<!-- begin {m[1]} -->\n\n{content(m[1])}\n<!-- end -->", text)


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
