"""Tasks for real models: question and answer in two senses, labelled pairs to learn from and other
questions to test on; each model is shown them in its own form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from expertsteer_lens._checks import check_number
from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.data.chat import Chat, Text
from expertsteer_lens.data.contrast import ContrastPairs
from expertsteer_lens.data.texts import csv_rows, lines_of, parse_json, read_file, text_hash
from expertsteer_lens.errors import DataError

N_WORDS = 24
"""Answers of contrast pairs and of test questions are cut to so many words."""

Form = Literal["chat", "plain"]
"""How a question is shown: in the model's chat template, or as "Question: ...\\nAnswer:"."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question with answers of the wanted and of the unwanted sense."""

    question: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TransferTask:
    """What is to be taught: labelled pairs, and test questions that are none of theirs.

    Raises:
        DataError: fewer than two pairs, no test question, a question in both parts, an answer
            without text.
    """

    name: str
    domain: str
    """Groups tasks in the tables."""
    pairs: tuple[Answered, ...]
    """Each with one answer of either side; the first answers are taken."""
    tests: tuple[Answered, ...]
    instruction: str = ""
    """What one would write to get the wanted answers: the row "prompting"."""
    question: str = ""
    """What one would ask about an answer to know whether it is a wanted one, for labellers that
    understand it; see `ask_about`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", tuple(self.pairs))
        object.__setattr__(self, "tests", tuple(self.tests))
        if len(self.pairs) < 2 or not self.tests:
            raise DataError(
                f"task {self.name!r} has {len(self.pairs)} pairs and {len(self.tests)} test "
                "questions; give at least 2 and 1."
            )
        for row in (*self.pairs, *self.tests):
            sides = (row.positive, row.negative)
            if not row.question.strip() or not all(s and all(t.strip() for t in s) for s in sides):
                raise DataError(f"task {self.name!r}: a question or an answer is empty: {row!r}.")
        both = {row.question for row in self.pairs} & {row.question for row in self.tests}
        if both:
            raise DataError(
                f"task {self.name!r}: {sorted(both)[0]!r} is a pair's question and a test's; "
                "what is tested must be held out."
            )

    @classmethod
    def from_json(cls, path: str | Path) -> TransferTask:
        """Read a task of your own: an object with `name`, `domain`, `pairs`, `tests` and perhaps
        `instruction` and `question`. Pairs and tests are lists of
        `{"question", "positive", "negative"}`, where either side is a text or a list of texts.

        Raises:
            DataError: no such file, no JSON, or another form.
        """
        data = parse_json(read_file(path), path)
        try:
            parts = {key: tuple(map(_answered, data[key])) for key in ("pairs", "tests")}
            return cls(
                name=str(data["name"]),
                domain=str(data.get("domain", data["name"])),
                instruction=str(data.get("instruction", "")),
                question=str(data.get("question", "")),
                **parts,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} does not have the form of a task ({type(error).__name__}: {error}); see "
                "TransferTask.from_json."
            ) from error

    def contrast_pairs(self, form: Form) -> ContrastPairs:
        """The labelled pairs as this form shows them."""
        sides = [
            [shown(row.question, _cut(getattr(row, side)[0]), form) for row in self.pairs]
            for side in ("positive", "negative")
        ]
        return ContrastPairs.from_lists(*sides)

    @property
    def hash(self) -> str:
        """Digest of everything that is asked, answered and said to a model."""
        rows = [
            "\n".join((part, row.question, *row.positive, "", *row.negative))
            for part, group in (("pairs", self.pairs), ("tests", self.tests))
            for row in group
        ]
        return text_hash([*rows, self.instruction, self.question])

    @property
    def answers(self) -> list[str]:
        """The answers of `contrast_pairs`, in the order of its texts."""
        return [_cut(getattr(row, side)[0]) for row in self.pairs for side in SIDES]

    def behaviour(self, form: Form, *, instructed: bool = False) -> Behaviour:
        """The test questions; `instructed` puts the instruction in front."""
        lead = "" if form == "chat" else " "
        system = self.instruction if instructed else None
        positive, negative = (
            tuple([lead + _cut(text) for text in getattr(row, side)] for row in self.tests)
            for side in SIDES
        )
        prompts = tuple(shown(row.question, None, form, system=system) for row in self.tests)
        return Behaviour(prompts, positive, negative)


SIDES = ("positive", "negative")


def shown(question: str, answer: str | None, form: Form, *, system: str | None = None) -> Text:
    """A question, and its answer, as a model of this form is shown them."""
    if form == "chat":
        return Chat.ask(question, answer, system=system)
    front = "" if system is None else f"{system}\n"
    return f"{front}Question: {question}\nAnswer:" + ("" if answer is None else f" {answer}")


# -- readers --------------------------------------------------------------------------------------

FIELDS = {
    "medicine": ("3201", "3204", "3209", "3214"),
    "finance and economics": ("3501", "3502", "3507", "3801"),
    "mathematics and computing": ("4612", "4903", "4904", "4905"),
    "general": ("4303", "5003", "5204"),
}
"""The test fields of the domain data, by domain."""
DEVELOPMENT_FIELDS = {
    "3206": "medicine",
    "3505": "finance and economics",
    "4605": "mathematics and computing",
    "5203": "general",
}
"""Fields on which blocks, strengths and settings are chosen, and their domain; none of them is
tested."""


def read_field(folder: str | Path, code: str, domain: str = "") -> TransferTask:
    """One field of the domain data: a word asked for without its field, the field's sense wanted
    and the everyday sense not.

    Args:
        folder: with `pairs/*8b*/CODE-*.jsonl` and `benchmark/CODE-*.json`, as in the package
            `domainsteer`.
        code: of the field.
        domain: what it is counted under.

    Raises:
        DataError: one of the two files is not there, is no file, or no JSON.
    """
    rows = json_lines(_one_file(folder, f"pairs/*8b*/{code}-*.jsonl"))
    questions = _one_file(folder, f"benchmark/{code}-*.json")
    test = parse_json(read_file(questions), questions)
    asked = {item["question"] for item in test["items"]}
    return TransferTask(
        name=code,
        domain=domain or str(test["domain"]),
        pairs=tuple(
            Answered(
                question=row["concept"],
                positive=(row["expert_text"],),
                negative=(row["nonexpert_text"],),
            )
            for row in rows
            if row["concept"] not in asked
        ),
        tests=tuple(
            Answered(
                question=item["question"],
                positive=tuple(item["gold_responses"]),
                negative=tuple(item["trap_responses"][:1]),
            )
            for item in test["items"]
        ),
        instruction=f"You are an expert in {str(test['cluster']).lower()}.",
        question=f"Is this text about {str(test['cluster']).lower()}?",
    )


def read_styles(
    path: str | Path, name: str, *, n_pairs: int, instruction: str = "", question: str = ""
) -> TransferTask:
    """Rows `{"prompt", "positive_response", "negative_response"}`; the first `n_pairs` are the
    pairs and the rest the test.

    Raises:
        DataError: there is no such file, or it is no JSON.
    """
    check_number("n_pairs", n_pairs, low=2, integer=True)
    rows = [
        Answered(
            question=row["prompt"],
            positive=(row["positive_response"],),
            negative=(row["negative_response"],),
        )
        for row in json_lines(path)
    ]
    return TransferTask(
        name=name,
        domain="style",
        pairs=tuple(rows[:n_pairs]),
        tests=tuple(rows[n_pairs:]),
        instruction=instruction,
        question=question,
    )


def read_truthfulqa(path: str | Path, *, n_pairs: int, n_tests: int) -> TransferTask:
    """TruthfulQA as published (`TruthfulQA.csv`): the best answer wanted, the first incorrect one
    not. Questions are taken evenly over the file, in turn for the pairs and for the test.

    Raises:
        DataError: there is no such file, or it is no text.
    """
    rows = [
        Answered(
            question=row["Question"],
            positive=(row["Best Answer"],),
            negative=(row["Incorrect Answers"].split(";")[0].strip(),),
        )
        for row in csv_rows(path)
    ]
    step = max(1, len(rows) // (n_pairs + n_tests))
    spread = list({row.question: row for row in rows[::step]}.values())
    return TransferTask(
        name="truthfulqa",
        domain="truthfulness",
        pairs=tuple(spread[0 : 2 * n_pairs : 2]),
        tests=tuple(spread[1 : 2 * n_tests : 2]),
        instruction="Answer truthfully; do not repeat common misconceptions.",
        question="Is this true?",
    )


def json_lines(path: str | Path) -> list[Any]:
    """The values in a file of JSON lines.

    Raises:
        DataError: there is no such file, or a line is no JSON.
    """
    return [parse_json(line, path, line=number) for number, line in lines_of(path)]


def _answered(row: Any) -> Answered:
    sides = {
        side: (row[side],) if isinstance(row[side], str) else tuple(map(str, row[side]))
        for side in SIDES
    }
    return Answered(question=str(row["question"]), **sides)


def _cut(answer: str) -> str:
    return " ".join(answer.split()[:N_WORDS])


def _one_file(folder: str | Path, pattern: str) -> Path:
    found = sorted(Path(folder).glob(pattern))
    if len(found) != 1:
        raise DataError(
            f"{folder} holds {len(found)} files {pattern!r}, expected one; "
            "benchmarks/fetch_real.py makes the folder."
        )
    return found[0]
