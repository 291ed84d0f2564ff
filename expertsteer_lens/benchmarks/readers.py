"""How a row of each public benchmark becomes (question, choices, answer); plain functions, one per
schema.

A reader takes a row (a dict of the published columns) and returns an item as
`ContrastPairs.from_multiple_choice` takes it: `question`, `choices` (list or dict) and `answer`
(index, key or text; None where the split is published without answers)."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from expertsteer_lens.errors import DataError

Row = Mapping[str, Any]
Item = dict[str, Any]
Reader = Callable[[Row, random.Random], Item]

N_WRONG_NUMBERS = 3
NEAR = Decimal("0.2")


class UnusableRow(Exception):  # noqa: N818 - not an error of the caller: the row is left out and counted
    """This row cannot become an item (e.g. its options are all the same); it is left out, and the
    reason kept."""


def item(question: Any, choices: Any, answer: Any) -> Item:
    """An item in the form `from_multiple_choice` takes."""
    return {"question": str(question).strip(), "choices": choices, "answer": answer}


def written(row: Row, column: str) -> str:
    """What stands in a column that the question needs.

    Raises:
        UnusableRow: nothing does.
    """
    text = str(row[column])
    if not text.strip():
        raise UnusableRow(f"the column {column!r} is empty")
    return text


def columns(question: str, choices: str, answer: str) -> Reader:
    """Reader of a set whose three columns are used as they are; text labels of the answer are keys
    of `choices`."""

    def read(row: Row, _: random.Random) -> Item:
        """The row's three columns as an item."""
        options, right = listed(row[choices], choices), row[answer]
        # Where the list is a text, as in a CSV file, its index is one too, and not the choice that
        # happens to be that number.
        if isinstance(row[choices], str) and isinstance(options, list) and str(right).isdigit():
            right = int(right)
        return item(row[question], options, right)

    return read


def labelled_choices(question: str) -> Reader:
    """ARC, OpenBookQA, CommonsenseQA: `choices` holds parallel lists `text` and `label`,
    `answerKey` one of the labels."""

    def read(row: Row, _: random.Random) -> Item:
        """The row as an item, its choices by their labels."""
        choices = listed(row["choices"], "choices")
        table = dict(zip(choices["label"], choices["text"], strict=True))
        return item(row[question], table, str(row["answerKey"]).strip() or None)

    return read


def sentiment(column: str, names: Sequence[str]) -> Reader:
    """One text with one of a few class names (or its number)."""

    def read(row: Row, _: random.Random) -> Item:
        """The row as a question about the text."""
        return item(
            f"{written(row, column)}\nWhat is the sentiment of this financial text?",
            list(names),
            _class(row["label"], names),
        )

    return read


def medmcqa(row: Row, _: random.Random) -> Item:
    """The hub's columns (opa … opd, cop), or a dict of options with `answer_idx`."""
    if "opa" not in row and "options" in row:
        return item(row["question"], listed(row["options"], "options"), row["answer_idx"])
    options = [row[name] for name in ("opa", "opb", "opc", "opd")]
    return item(row["question"], options, _index(row["cop"]))


def pubmedqa(row: Row, _: random.Random) -> Item:
    """The hub's columns, or those of the authors' `ori_pqal.json`; the abstract comes first,
    without its conclusion."""
    if "QUESTION" in row:
        contexts, question = row["CONTEXTS"], row["QUESTION"]
    else:
        contexts, question = listed(row["context"], "context")["contexts"], row["question"]
    abstract = " ".join(listed(contexts, "contexts"))
    return item(
        f"Abstract: {abstract}\nQuestion: {question}", ["yes", "no", "maybe"], row["final_decision"]
    )


def truthfulqa(row: Row, _: random.Random) -> Item:
    """The hub's "multiple_choice" or "generation" columns, or the authors' `mc_task.json` or
    `TruthfulQA.csv`."""
    if "mc1_targets" in row:
        targets = listed(row["mc1_targets"], "mc1_targets")
        if "labels" in targets:
            choices, labels = list(targets["choices"]), list(targets["labels"])
        else:
            choices, labels = list(targets), list(targets.values())
        return item(row["question"], choices, labels.index(1))
    if "best_answer" in row:
        wrong = listed(row["incorrect_answers"], "incorrect_answers")
        return item(row["question"], [row["best_answer"], *wrong], 0)
    wrong = [w.strip() for w in str(row["Incorrect Answers"]).split(";") if w.strip()]
    return item(row["Question"], [str(row["Best Answer"]).strip(), *wrong], 0)


def gsm8k(row: Row, rng: random.Random) -> Item:
    """Free answers: the number after `####` is right; the wrong ones are made (`near_numbers`)."""
    text = str(row["answer"]).rsplit("####", 1)[-1].strip().replace(",", "").removeprefix("$")
    try:
        right = Decimal(text)
    except InvalidOperation:
        raise UnusableRow(f"the final answer {text!r} is not a number") from None
    return item(row["question"], [_plain(right), *near_numbers(right, rng)], 0)


def near_numbers(right: Decimal, rng: random.Random) -> list[str]:
    """`N_WRONG_NUMBERS` distinct wrong numbers within 20 % of the right one, or within 4 units of
    it where that is more.

    A unit is 1, or the last decimal place; no wrong number crosses zero. So neither size, decimals
    nor sign give it away."""
    step = Decimal(1).scaleb(min(0, int(right.as_tuple().exponent)))  # 1, or the last decimal place
    reach = max(N_WRONG_NUMBERS + 1, int(abs(right) * NEAR / step))
    found: list[Decimal] = []
    while len(found) < N_WRONG_NUMBERS:
        wrong = right + step * rng.choice((-1, 1)) * rng.randint(1, reach)
        if wrong not in found and (wrong < 0) == (right < 0):
            found.append(wrong)
    return [_plain(w) for w in found]


def aqua_rat(row: Row, _: random.Random) -> Item:
    """Options such as "B)21.5", the answer a letter."""
    table = {}
    for option in listed(row["options"], "options"):
        letter, _bracket, text = str(option).partition(")")
        table[letter.strip()] = text.strip()
    return item(row["question"], table, row["correct"])


def math_qa(row: Row, _: random.Random) -> Item:
    """Options in one string, "a ) 38 , b ) 27.675 , c ) 30", the answer a letter."""
    found = re.findall(
        r"([a-e]) \) ?(.*?)(?=\s*'?\s*,\s*'?[a-e] \)|\s*,?\s*'?\]?\s*$)", str(row["options"])
    )
    if len(found) < 2:
        raise UnusableRow(f"the options {row['options']!r} cannot be told apart")
    return item(row["Problem"], dict(found), str(row["correct"]).strip())


def hellaswag(row: Row, _: random.Random) -> Item:
    """Endings of a described activity; WikiHow's bracketed marks are removed."""
    begin = f"{written(row, 'activity_label')}: {written(row, 'ctx_a')}"
    context = f"{begin} {str(row['ctx_b']).capitalize()}"
    endings = [_without_marks(e) for e in listed(row["endings"], "endings")]
    return item(_without_marks(context), endings, _index(row["label"]))


def winogrande(row: Row, _: random.Random) -> Item:
    """A sentence with a gap: the question is what stands before the gap, a choice fills it and goes
    on to the end."""
    before, gap, after = str(row["sentence"]).partition("_")
    if not gap or not before.strip():
        raise UnusableRow("the sentence has no gap, or nothing before it")
    answer = str(row["answer"]).strip()
    return item(
        before, {n: f"{written(row, f'option{n}')}{after}" for n in ("1", "2")}, answer or None
    )


def piqa(row: Row, _: random.Random) -> Item:
    """Two ways to reach a goal."""
    label = _index(row["label"])
    return item(row["goal"], [row["sol1"], row["sol2"]], None if label == -1 else label)


def sciq(row: Row, _: random.Random) -> Item:
    """One right answer and three distractors, without the supporting passage."""
    names = ("correct_answer", "distractor1", "distractor2", "distractor3")
    return item(row["question"], [row[n] for n in names], 0)


def boolq(row: Row, _: random.Random) -> Item:
    """A passage and a yes/no question about it."""
    answer = str(row["answer"]).strip().lower()
    right = {"true": "yes", "1": "yes", "false": "no", "0": "no"}.get(answer)
    question = written(row, "question").strip().rstrip("?")
    return item(f"{written(row, 'passage')}\nQuestion: {question}?", ["yes", "no"], right)


def listed(value: Any, column: str) -> Any:
    """A list or dict; a text is read as JSON, which is how a CSV file can hold one.

    Raises:
        DataError: a text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(
            f"column {column!r} must hold a list or a dict, got the text {value[:60]!r}; in a CSV "
            "file write it as JSON, or "
            "use JSON lines or parquet."
        ) from error


def _class(label: Any, names: Sequence[str]) -> str | None:
    text = str(label).strip()
    if text.lower() in names:
        return text.lower()
    return names[int(text)] if text.isdigit() and int(text) < len(names) else None


def _index(value: Any) -> int | None:
    """The number of the right choice; None where nothing is said."""
    text = str(value).strip()
    return int(text) if text else None


def _plain(number: Decimal) -> str:
    return format(number, "f")


def _without_marks(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))).strip()
