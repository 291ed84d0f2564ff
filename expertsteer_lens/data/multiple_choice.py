"""Multiple-choice items, whatever way their options and answer are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from expertsteer_lens._checks import check_list
from expertsteer_lens.errors import DataError


def multiple_choice_items(
    items: Iterable[Mapping[str, Any]], question: str, choices: str, answer: str
) -> list[tuple[str, str, list[str]]]:
    """`multiple_choice_item` of each."""
    return [
        multiple_choice_item(item, i, question, choices, answer)
        for i, item in enumerate(check_list("items", items, of="items"))
    ]


def multiple_choice_item(
    item: Mapping[str, Any], index: int, question: str, choices: str, answer: str
) -> tuple[str, str, list[str]]:
    """(question, right answer, wrong answers) of one item, whatever way its options and answer are
    written.

    Raises:
        DataError: a field is missing, the answer is not among the choices, or there is no wrong
            choice.
    """
    if not isinstance(item, Mapping):
        raise DataError(f"item {index} must be a dict, got {type(item).__name__}.")
    for name in (question, choices, answer):
        if name not in item:
            raise DataError(f"item {index} has no field {name!r}; its fields are {sorted(item)}.")
    options = item[choices]
    if not isinstance(options, Mapping):
        options = dict(enumerate(check_list(f"item {index}: {choices}", options, of="choices")))
    table = dict(options)
    key = item[answer]
    if isinstance(key, Mapping | list | set):
        raise DataError(
            f"item {index}: {answer} must be a key or one of the choices, got a "
            f"{type(key).__name__}."
        )
    if key not in table:
        by_text = [k for k, v in table.items() if v == key]
        if not by_text and isinstance(key, str):
            by_text = [k for k in table if str(k) == key]
        if not by_text:
            raise DataError(
                f"item {index}: answer {key!r} is neither a key nor one of the choices "
                f"{list(table.values())}."
            )
        key = by_text[0]
    right = str(table[key])
    wrong = [str(v) for k, v in table.items() if k != key and str(v) != right]
    if not wrong:
        raise DataError(f"item {index} has no wrong choice; drop it.")
    return str(item[question]), right, wrong
