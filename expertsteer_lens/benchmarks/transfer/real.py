"""The tasks, anchors and neutral texts of `expertsteer-lens bench --real`, from local folders."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from expertsteer_lens.data.texts import csv_rows
from expertsteer_lens.errors import DataError

from .tasks import (
    DEVELOPMENT_FIELDS,
    FIELDS,
    TransferTask,
    json_lines,
    read_field,
    read_styles,
    read_truthfulqa,
    shown,
)

N_WORKED, N_FACTS, N_NEUTRAL = 60, 103, 8
"""Worked problems and facts that are anchors, and further problems that are neutral texts."""
STYLES = {
    "sentiment": (40, "You answer warmly and see the good side.", "Is this text warm and happy?"),
    "formality": (20, "You answer in formal language.", "Is this text written in formal language?"),
}
"""Number of pairs, instruction and question of each style."""


@dataclass(frozen=True, kw_only=True)
class RealData:
    """All that `bench_transfer` needs but the models."""

    tasks: tuple[TransferTask, ...]
    development: tuple[TransferTask, ...]
    anchors: tuple[str, ...]
    neutral: tuple[str, ...]


def read_real_data(
    models: str | Path, data: str | Path, *, only: tuple[str, ...] | None = None
) -> RealData:
    """Read the tasks.

    Args:
        models: folder with `domainsteer`, as `benchmarks/fetch_real.py` makes it.
        data: folder with `gsm8k/test.jsonl`, `truthfulqa/TruthfulQA.csv` and
            `steerkit_pairs/{sentiment,formality}.jsonl`.
        only: names of tasks; default: all fields, both styles and TruthfulQA.

    Raises:
        DataError: a file is missing, or no task has one of these names.
    """
    data, fields = Path(data), Path(models) / "domainsteer"
    needed = [fields, data / "gsm8k/test.jsonl", data / "truthfulqa/TruthfulQA.csv"]
    needed += [data / f"steerkit_pairs/{name}.jsonl" for name in STYLES]
    missing = [str(path) for path in needed if not path.exists()]
    if missing:
        raise DataError(
            f"{missing[0]} is not there; benchmarks/fetch_real.py makes the models and "
            "domainsteer, docs/results.md#where-models-and-texts-come-from says where the other "
            "texts are had."
        )
    # One field of every domain, then the next: an unfinished run is of all domains.
    turns = zip_longest(*([(code, domain) for code in codes] for domain, codes in FIELDS.items()))
    names = [turn for row in turns for turn in row if turn is not None]
    makers: dict[str, Callable[[], TransferTask]] = {
        code: partial(read_field, fields, code, domain) for code, domain in names
    }
    for name, (n, instruction, question) in STYLES.items():
        path = data / f"steerkit_pairs/{name}.jsonl"
        makers[name] = partial(
            read_styles, path, name, n_pairs=n, instruction=instruction, question=question
        )
    truthful = data / "truthfulqa/TruthfulQA.csv"
    makers["truthfulqa"] = partial(read_truthfulqa, truthful, n_pairs=30, n_tests=30)
    unknown = sorted(set(only or ()) - set(makers))
    if unknown:
        raise DataError(f"task {unknown[0]!r} is none of {', '.join(makers)}.")
    tasks = tuple(_made(n, make) for n, make in makers.items() if only is None or n in only)
    worked = _made("gsm8k", partial(_read_worked, data / "gsm8k/test.jsonl"))
    facts = _made("truthfulqa", partial(csv_rows, truthful))
    facts = facts[:: max(1, len(facts) // N_FACTS)][:N_FACTS]
    truths = _made("truthfulqa", makers["truthfulqa"])
    tested = {row.question for row in (*truths.pairs, *truths.tests)}
    asked = worked[:N_WORKED]
    asked += [(row["Question"], row["Best Answer"]) for row in facts]
    return RealData(
        tasks=tasks,
        development=tuple(
            _made(code, partial(read_field, fields, code, domain))
            for code, domain in DEVELOPMENT_FIELDS.items()
        ),
        anchors=tuple(str(shown(q, a, "plain")) for q, a in asked if q not in tested),
        neutral=tuple(question for question, _ in worked[N_WORKED:]),
    )


def _read_worked(path: Path) -> list[tuple[str, str]]:
    return [(row["question"], row["answer"]) for row in json_lines(path)[: N_WORKED + N_NEUTRAL]]


T = TypeVar("T")


def _made(name: str, read: Callable[[], T]) -> T:
    """What is read, or an error that says which data cannot be."""
    try:
        return read()
    except (KeyError, TypeError, ValueError, OSError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"the data of {name!r} cannot be read ({type(error).__name__}: {error}); make the "
            "folder again."
        ) from error
