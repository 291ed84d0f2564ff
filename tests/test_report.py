"""The HTML report: complete, escaped, and readable without a network."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import results
import torch

from expertsteer_lens.errors import DataError
from expertsteer_lens.show.report import (
    SteeredText,
    next_step,
    prompts_in_words,
    table_for_people,
    write_report,
)
from expertsteer_lens.show.step_plots import plot_prompts
from expertsteer_lens.show.tokens import TokenView

pytest.importorskip("plotly")

TEXTS = [
    SteeredText(
        "Once <b>upon</b>",
        {-0.2: "sad & <script>alert(1)</script>", 0.0: "a cat\nsat", 0.2: "glad"},
    ),
    SteeredText("Second", {-0.2: "one", 0.0: "two", 0.2: "three"}),
]


class Page(HTMLParser):
    """Text outside scripts and styles, headings, cells, and every address a browser would load."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.resources, self.text, self.headings, self.cells, self.tags = [], [], [], [], []
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        self.resources += [
            v for k, v in attributes if k in ("src", "href", "srcset", "data", "action")
        ]

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if any(t in ("script", "style") for t in self.open):
            if "@import" in data[:2000] and "style" in self.open:
                self.resources.append(data)
            return
        self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] in ("td", "b"):
            self.cells.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    fit = results.fit(expert="an <i>expert</i>")
    assert (
        write_report(path, fit, results.evaluation(), results.calibration(), TEXTS, title="A & B")
        == path
    )
    return Page(path.read_text(encoding="utf-8"))


def test_nothing_is_loaded_from_anywhere(page):
    assert page.resources == []


def test_the_verdict_and_the_models_are_said(page):
    text = "".join(page.text)
    assert results.evaluation().verdict in text
    assert (
        "Expert an <i>expert</i> (d = 8, 3 layers) steers target a target (d = 8, 3 layers), seed "
        "7." in text
    )
    assert "A & B" in text


def test_text_of_models_is_never_markup(page):
    text = "".join(page.text)
    assert "sad & <script>alert(1)</script>" in page.cells
    assert "Once <b>upon</b>" in page.cells
    assert "paper <preset>" in page.cells
    assert "preset" not in page.tags
    assert "i" not in page.tags
    assert "a cat\nsat" in text


def test_every_part_is_there(page):
    assert page.headings == [
        "Comparison",
        "Prompt by prompt",
        "Coefficient",
        "Texts",
        "Layer pairs: mutual information",
        "Layer pairs: the rule that chose",
        "Steps",
        "Fitted pairs",
    ]
    assert "1.235" in page.cells


def test_what_a_figure_shows_is_text_of_the_page_that_breaks_into_lines(tmp_path):
    """Within the figure it would be cut off on a narrow screen."""
    path = write_report(
        tmp_path / "r.html", results.fit(), results.evaluation(), results.calibration()
    )
    source = path.read_text(encoding="utf-8")
    found = re.findall(r"<p class='found'><b>(.+?)</b><br>(.+?)</p>", source)
    assert len(found) == source.count('class="plotly-graph-div"') >= 6
    assert any("random directions by" in title for title, _ in found)
    assert not [lines for _, lines in found if "sup" in lines]
    figures = source[source.rindex("Plotly.newPlot", 0, source.index("Prompt by prompt")) :]
    assert "\\u003csup\\u003e" not in figures  # no second time within the figures


def test_the_scripts_are_in_the_page_once(tmp_path):
    source = write_report(
        tmp_path / "r.html", results.fit(), results.evaluation(), results.calibration()
    ).read_text()
    assert source.count("Plotly.newPlot(") >= 4
    assert source.count("plotly.js v") == 1
    assert len(source) < 8_000_000
    assert "<h2>Texts</h2>" not in source


def test_texts_at_unequal_coefficients_are_refused(tmp_path):
    texts = [TEXTS[0], SteeredText("p", {0.0: "a", 0.3: "b"})]
    with pytest.raises(DataError, match="texts must share their coefficients"):
        write_report(
            tmp_path / "r.html", results.fit(), results.evaluation(), results.calibration(), texts
        )
    assert not (tmp_path / "r.html").exists()


def test_the_table_for_people_rounds_and_counts_seeds():
    frame = table_for_people(results.evaluation()).set_index("method")
    assert frame.loc["this plan", "effect"] == "+1.00"
    assert frame.loc["this plan", "interval"] == "+0.75 … +1.50"
    assert frame.loc["random (same budget), 3 seeds", "interval"] == "-0.20 … +0.20"
    assert frame.loc["this plan", "coeff."] == "0.1"
    assert frame.loc["this plan", "NLL rise"] == "+0.050"
    assert frame.loc["prompting", "coeff."] == frame.loc["prompting", "NLL rise"] == "–"


def test_the_cost_shown_is_the_one_of_the_budget():
    result = results.evaluation()
    result.provenance["budget_unit"] = "kl"
    frame = table_for_people(result).set_index("method")
    assert "NLL rise" not in frame
    assert frame.loc["this plan", "KL"] == "0.020"


@pytest.mark.parametrize(
    ("effect", "said"),
    [(1.0, "The plan works"), (0.2, "not told apart from chance"), (-1.0, "the wrong way")],
)
def test_the_next_step_follows_from_the_verdict(effect, said):
    assert said in next_step(results.evaluation(plan=effect, ceiling=False))


def test_prompts_that_move_the_wrong_way_are_counted():
    result = results.evaluation()
    result.plan.per_prompt[:3] = torch.tensor([-1.0, -0.1, 0.0])
    assert "2 of 4 test prompts (50%)" in prompts_in_words(result)


def test_prompts_of_a_plan_that_steers_away_are_counted_from_the_other_side():
    result = results.evaluation()
    rows = [
        dataclasses.replace(row, coefficient=-0.1, per_prompt=torch.tensor([-1.0, -0.1, 0.2, -2.0]))
        if row.role == "plan"
        else row
        for row in result.rows
    ]
    result = dataclasses.replace(result, rows=tuple(rows))
    assert "1 of 4 test prompts (25%)" in prompts_in_words(result)
    assert plot_prompts(result).layout.title.text.startswith("1 of 4 prompts")


HOSTILE = "<script>document.title='hit'</script>\x00\x1b</td></table>" + "long" * 2000


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium in the PATH")
def test_a_browser_draws_every_figure_without_errors_and_fetches_nothing(tmp_path):
    tokens = [TokenView((HOSTILE, "b"), 1, "<i>", "'all'", torch.tensor([True, False]), "edited")]
    path = write_report(
        tmp_path / "report.html",
        results.fit(expert=HOSTILE[:60]),
        results.evaluation(name=HOSTILE[:60]),
        results.calibration(),
        [SteeredText(HOSTILE, {-0.2: HOSTILE, 0.0: "a", 0.2: "b"})],
        tokens=tokens,
    )
    # Any address but the file itself would be an error of the browser: nothing can be resolved.
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=20000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    page = done.stdout
    assert re.findall(r"CONSOLE.*", done.stderr) == []
    assert "Outlined tokens were read, underlined ones are edited" in page
    assert "<title>ExpertSteer report</title>" in page  # no script of a text was run
    assert page.count('class="main-svg"') >= page.count("plotly-graph-div") >= 6
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert re.findall(r"(?:src|href)=.https?:", outside) == []
