"""The site: what errors and verdicts point at is there, the gallery shows every notebook as stored,
and the link check finds what it should. The site itself is built by `make site`."""

from __future__ import annotations

import base64
import json
import pathlib
import re
import runpy
import subprocess
import sys
import types

import pytest
import torch

from expertsteer_lens._checks import WHY_NOTHING_HAPPENS, explained_at
from expertsteer_lens.show.tokens import TokenView

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHECK = ROOT / "tools" / "site" / "check_links.py"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def headings(page: str) -> set[str]:
    """Anchors of the headings, as the site and code hosts make them of plain words."""
    found = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", h).strip().lower().replace(" ", "-") for h in found}


def test_what_errors_and_verdicts_point_at_is_a_heading_of_the_page() -> None:
    there = headings((ROOT / WHY_NOTHING_HAPPENS).read_text(encoding="utf-8"))
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "expertsteer_lens").rglob("*.py")]
    used = {h for text in sources for h in re.findall(r'explained_at\("([\w-]+)"\)', text)}
    assert {"not-run", "never-fired", "no-token-selected", "no-better-than-chance"} <= used
    assert used <= there
    assert explained_at("not-run").endswith("docs/why_nothing_happens.md#not-run.")


def test_pages_that_messages_name_have_the_heading() -> None:
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "expertsteer_lens").rglob("*.py")]
    named = {m for text in sources for m in re.findall(r"docs/(\w+\.md)#([\w-]+)", text)}
    assert ("results.md", "where-models-and-texts-come-from") in named
    for page, anchor in named:
        assert anchor in headings((ROOT / "docs" / page).read_text(encoding="utf-8"))


def test_links_between_pages_lead_to_headings() -> None:
    pages = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md")}
    links = [
        (name, goal or name, anchor)
        for name, text in pages.items()
        for goal, anchor in re.findall(r"\]\((\w+\.md)?#([\w-]+)\)", text)
    ]
    assert len(links) > 20
    assert not [link for link in links if link[2] not in headings(pages[link[1]])]


def test_llms_txt_names_every_page_and_no_other() -> None:
    named = re.findall(r"\]\(([\w/]+\.md)\)", (ROOT / "docs" / "llms.txt").read_text())
    assert all((ROOT / "docs" / name).is_file() for name in named)
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {"inside.md"}
    assert pages == {name for name in named if "/" not in name}


def test_the_navigation_names_every_page_and_every_notebook() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [p.name for p in (ROOT / "docs").rglob("*.md") if p.name not in navigation]
    missing += [p.name for p in NOTEBOOKS if f"notebooks/{p.stem}.md" not in navigation]
    assert not missing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_was_run_and_readable_without_scripts(
    path: pathlib.Path,
) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [c for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    assert all(c["execution_count"] for c in code)
    outputs = [o for c in code for o in c["outputs"]]
    assert outputs
    assert not [o for o in outputs if o["output_type"] == "error"]
    drawn = [o for o in outputs if "application/vnd.plotly.v1+json" in o.get("data", {})]
    assert not drawn, "figures are kept as pictures: make notebooks-stored"
    assert "/work/" not in path.read_text(encoding="utf-8")
    assert not re.search(r"^\s*(class |@dataclass)", "\n".join("".join(c["source"]) for c in code))


@pytest.mark.parametrize(
    ("picture", "notebook"),
    [("anchor_curve.png", "05_paper_preset"), ("few_labels.png", "07_few_labels")],
)
def test_curves_on_pages_are_those_of_the_notebooks(picture: str, notebook: str) -> None:
    cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text("utf-8"))["cells"]
    drawn = [o.get("data", {}).get("image/png") for c in cells for o in c.get("outputs", [])]
    found = {base64.b64decode("".join(data)) for data in drawn if data}
    assert (ROOT / "docs" / picture).read_bytes() in found, "tools/site/tidy_notebooks.py copies it"


def test_the_gallery_shows_tables_and_token_views_in_one_line_of_html(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("mkdocs", "mkdocs.config", "mkdocs.config.defaults", "mkdocs.structure"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    files = types.ModuleType("mkdocs.structure.files")
    monkeypatch.setitem(sys.modules, files.__name__, files)
    monkeypatch.setattr(sys.modules["mkdocs.config.defaults"], "MkDocsConfig", None, raising=False)
    monkeypatch.setattr(files, "File", None, raising=False)
    monkeypatch.setattr(files, "Files", None, raising=False)
    hooks = runpy.run_path(str(ROOT / "tools" / "site" / "hooks.py"))

    def shown(html: str) -> str:
        text: str = hooks["output_markdown"]({"data": {"text/html": [html]}}, {}, "stem")
        return text

    table = shown("<style>x</style><pre>a plan,\n  b</pre>\n<table>\n <tr></tr></table>")
    assert table == (
        '<div class="nb-output"><pre>a plan,&#10;  b</pre> <table> <tr></tr></table></div>'
    )
    view = TokenView(("a", "b\n"), 1, "hook", "'all'", torch.tensor([True, False]), "edited")
    page = shown(view.to_html())
    assert "\n" not in page
    assert "<style>" in page
    assert "1 of 2 tokens edited at hook" in page


def test_the_link_check_finds_missing_files_missing_anchors_and_loaded_scripts(
    tmp_path: pathlib.Path,
) -> None:
    def check() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(CHECK), str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert check().returncode == 1  # an empty site is no site
    (tmp_path / "a.html").write_text('<h1 id="here">A</h1><a href="b.html#there">b</a>')
    (tmp_path / "b.html").write_text('<h1 id="there">B</h1><a href="a.html#here">a</a>')
    assert check().returncode == 0
    (tmp_path / "b.html").write_text(
        '<a href="a.html#gone">a</a><a href="c.html">c</a><script src="https://x.org/y.js"></script>'
    )
    result = check()
    assert result.returncode == 1
    for fault in (
        "a.html -> b.html#there: no such anchor",
        "b.html -> a.html#gone: no such anchor",
        "b.html -> c.html: no such file",
        "b.html loads https://x.org/y.js",
    ):
        assert fault in result.stdout
