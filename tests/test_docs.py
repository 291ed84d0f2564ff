"""The pages run: every Python block of the README and of `docs/`, in order, and every link to a
file leads somewhere.

A page becomes a script of the same number of lines in which all that is not Python is blank, so the
line numbers of an error are the page's. It runs in an empty folder."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import runpy
import traceback
import types

import pytest

import expertsteer_lens as esl

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^ {0,3}(```+|~~~+)\s*(\w*)")


def script_of(page: str) -> str:
    """The Python blocks of a page, each line at the line it has there."""
    lines, fence, python = [], "", False
    for line in page.splitlines():
        mark = FENCE.match(line)
        if mark and not fence:
            fence, python = mark.group(1), mark.group(2).lower() in ("python", "py")
            lines.append("")
        elif mark and mark.group(1).startswith(fence) and not mark.group(2):
            fence, python = "", False
            lines.append("")
        else:
            lines.append(line if python else "")
    return "\n".join(lines) + "\n"


def run(page: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, work = folder / "page.py", folder / "work"
    script.write_text(script_of(page))  # a real file: nnsight reads the source of a trace
    work.mkdir()
    monkeypatch.chdir(work)
    runpy.run_path(str(script), run_name="__page__")


PYTHON_PAGES = [page for page in PAGES if script_of(page.read_text()).strip()]


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run(
    page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(page.read_text(), tmp_path, monkeypatch)


def test_the_readme_and_the_page_on_steering_are_among_them() -> None:
    assert {"README.md", "what_is_steered_and_when.md"} <= {page.name for page in PYTHON_PAGES}


def test_a_block_that_fails_is_noticed_at_its_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = "# Title\n\n```bash\nexit 1\n```\n\n```python\nx = 1\n```\n\ntext\n\n```py\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as failure:
        run(page, tmp_path, monkeypatch)
    assert traceback.extract_tb(failure.value.__traceback__)[-1].lineno == 14


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: pathlib.Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = [
        t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", t)
    ]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


def script(name: str) -> types.ModuleType:
    """A script of `benchmarks/`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_pages_are_those_that_were_measured() -> None:
    fill = script("fill_readme")
    assert fill.pages() == PAGES
    texts = [page.read_text() for page in PAGES]
    blocks = [block for text in texts for block in fill.BLOCK.findall(text)]
    assert len(blocks) >= 6
    assert all("|" in table for _, table in blocks)
    for text in texts:
        assert fill.filled(text) == text
        assert fill.filled(text.replace("| +0.", "| +1.", 1)) == text


def test_the_pictures_of_measured_tables_are_on_a_page_and_say_what_they_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    figures = script("draw_pictures").figures()
    assert set(figures) == {"real_fields", "bench", "method_choices", "fit_at_size"}
    pages = "".join(page.read_text() for page in PAGES)
    for name, figure in figures.items():
        assert f"({name}.png)" in pages
        title = figure.layout.title.text.split("<br>")[0]
        assert re.search(r"[0-9]", title), f"{name} does not say what was found: {title}"
        assert len(title) <= 100
    choices = (ROOT / "benchmarks/results/method_choices.md").read_text()
    worst = {
        name: min(
            float(share) for share in re.findall(rf"^\| {name}.* ([0-9.]+) \|$", choices, re.M)
        )
        for name in ("aligner", "pairing rule", "RFM")
    }
    said = figures["method_choices"].layout.title.text
    assert all(f"{share:.0%}" in said for share in worst.values())


def test_the_cost_of_a_fit_is_fitted_to_small_sizes_and_tried_on_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    costs = script("fit_at_size")
    planted = {"1": 0.5, "n^2 d": 3e-9, "n d": 2e-7}
    sizes = costs.grid(n=(100, 200, 400), d=(512, 1024))
    rows = [(each, costs.value_at(planted, each)) for each in sizes]
    found = costs.fitted(("1", "n^3", "n^2 d", "n d", "d^2"), rows)
    far = {"n": 4000, "d": 8192}
    assert costs.value_at(found, far) == pytest.approx(costs.value_at(planted, far), rel=1e-6)
    assert costs.exponents([(each, each["n"] ** 2 * each["d"]) for each in sizes]) == "n^2.0, d^1.0"
    # What was measured, and what the page says of it.
    rows = costs.read_rows(ROOT / "benchmarks/results/fit_at_size.csv")
    fitted = [(row.part, row.sizes) for row in rows if row.kind == "sweep"]
    tried = costs.tried(rows)
    assert {one.part for one in tried} == set(costs.PARTS) == {part for part, _ in fitted}
    for one in tried:
        largest = max(row.seconds for row in rows if row[:2] == (one.part, "sweep"))
        assert (one.part, one.sizes) not in fitted
        assert one.seconds[0] < 20 * largest
    worst = [max(abs(costs.off(getattr(t, what))) for t in tried) for what in ("seconds", "bytes")]
    page = (ROOT / "docs/speed.md").read_text()
    assert f"none of the {len(tried)} is off by more than {worst[0]:.0%} in seconds" in page
    assert f"in seconds or {worst[1]:.0%} in memory" in page


def test_every_public_class_and_function_has_an_example():
    things = {name: getattr(esl, name) for name in esl.__all__}
    things = {name: thing for name, thing in things.items() if callable(thing)}
    assert len(things) > 15
    assert [name for name, thing in things.items() if ">>>" not in (thing.__doc__ or "")] == []
