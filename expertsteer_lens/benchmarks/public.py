"""Public benchmarks by name: contrast pairs (right against wrong answer) and a behaviour from
disjoint items.

    # without path: from the Hugging Face hub
    pubmedqa = esl.benchmarks.load("pubmedqa", path="ori_pqal.json")
    fit = esl.ExpertSteer().fit(
        expert, target, pubmedqa.pairs(), behaviour=pubmedqa.behaviour()
    )

A direction learnt from right against wrong answers need not be one of knowledge: look at
`esl.evaluate`, and at accuracy, before saying so."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens._moved import Renamed
from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.data.contrast import ContrastPairs, multiple_choice_item
from expertsteer_lens.data.texts import csv_rows, lines_of, parse_json, read_file
from expertsteer_lens.errors import ArgumentError, DataError

from .public_sets import (
    BARE,
    CONTINUED,
    DOMAINS,
    PUBLIC_BENCHMARKS,
    QUESTION,
    Domain,
    PublicBenchmark,
)
from .readers import Item, UnusableRow

__all__ = [
    "BARE",
    "CONTINUED",
    "DOMAINS",
    "PUBLIC_BENCHMARKS",
    "QUESTION",
    "Benchmark",
    "Domain",
    "PublicBenchmark",
    "get",
    "load",
    "names",
]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True, eq=False)
class Benchmark:
    """The items of one benchmark, divided into a part for contrast pairs and a part for prompts.

    No question is in both parts: items that ask the same question stay together.
    """

    definition: PublicBenchmark
    """Where it is found and how its rows are read."""
    pair_items: tuple[Item, ...]
    """Items behind `pairs`."""
    prompt_items: tuple[Item, ...]
    """Items behind `behaviour`."""
    seed: int
    source: str
    """The file or the hub id with its split."""
    skipped: tuple[tuple[int, str], ...] = ()
    """Rows left out (row number in the source, from 0) and why."""

    preset = Renamed("definition")  # its name in version 0.1

    def pairs(self, *, chat: bool = False, seed: int | None = None) -> ContrastPairs:
        """One pair an item: the right answer, and a wrong one drawn by `seed` (default: the seed of
        `load`).

        With `chat` as conversations, each model's template around them; else in the benchmark's own
        words."""
        return ContrastPairs.from_multiple_choice(
            self.pair_items,
            template=self.definition.template,
            chat=chat,
            seed=self.seed if seed is None else seed,
        )

    def behaviour(self, *, chat: bool = False) -> Behaviour:
        """The other items: the question as prompt, the right answer wanted, every wrong one not;
        `chat` as in `pairs`."""
        template = self.definition.template.removesuffix("{choice}").rstrip(" ")
        return Behaviour.from_multiple_choice(self.prompt_items, template=template, chat=chat)

    def __len__(self) -> int:
        return len(self.pair_items) + len(self.prompt_items)

    def __repr__(self) -> str:
        left_out = f", {len(self.skipped)} rows left out" if self.skipped else ""
        return (
            f"Benchmark({self.definition.name!r} from {self.source}: {len(self.pair_items)} items "
            f"for pairs, {len(self.prompt_items)} for prompts{left_out})"
        )


def names(domain: Domain | str | None = None) -> list[str]:
    """Names of all public benchmarks, or of one domain's.

    Example:
        >>> names("mathematics")[:3]
        ['gsm8k', 'aqua_rat', 'math_qa']
    """
    if domain is not None:
        check_choice("domain", domain, DOMAINS)
    return [name for name, b in PUBLIC_BENCHMARKS.items() if domain in (None, b.domain)]


def get(name: str) -> PublicBenchmark:
    """The definition of the benchmark of that name; it holds no data.

    Raises:
        ArgumentError: no such benchmark (naming the closest).
    """
    return PUBLIC_BENCHMARKS[check_choice("name", name, PUBLIC_BENCHMARKS)]


def load(
    name: str,
    *,
    path: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    pair_share: float = 0.5,
) -> Benchmark:
    """Read a benchmark from a local file, or from the hub.

    Args:
        name: one of `names()`.
        path: file with the published columns (`.jsonl`, `.json`, `.csv` or `.parquet`); None: the
            hub, through `datasets`.
        split: split of the hub set; default: the benchmark's. A local file has none.
        limit: use at most this many rows, drawn by `seed` (benchmarks are often ordered by topic).
        seed: of the draw, of the division into pairs and prompts, of made-up wrong numbers, and of
            the wrong answer in `pairs`.
        pair_share: share of the questions that goes to `pairs`; the rest become prompts.

    Raises:
        ArgumentError: unknown name, an unknown kind of file, or a split with a local file.
        DataError: the hub cannot be reached, a column is missing, answers are not published, or too
            few usable rows.
    """
    definition = get(name)
    check_number("pair_share", pair_share, low=0.0, high=1.0)
    if limit is not None:
        check_number("limit", limit, low=1, integer=True)
    rows, source = (
        _from_hub(definition, split or definition.split)
        if path is None
        else _from_file(path, split)
    )
    if definition.only is not None:
        column, value = definition.only
        rows = [row for row in rows if str(row.get(column)) == value]
        if not rows:
            raise DataError(
                f"{source} has no row whose {column!r} is {value!r}, which benchmark {name!r} "
                "asks for."
            )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()[
        :limit
    ]
    items: list[Item] = []
    skipped: list[tuple[int, str]] = []
    for i in sorted(order):
        try:
            items.append(_item(definition, rows[i], i, source, seed))
        except UnusableRow as reason:
            skipped.append((i, str(reason)))
    first, second = _divide(items, pair_share, seed, source)
    return Benchmark(definition, first, second, seed, source, tuple(skipped))


def _item(
    definition: PublicBenchmark, row: Mapping[str, Any], index: int, source: str, seed: int
) -> Item:
    where = f"{source}, row {index}"
    row = {column: _text_of(value) for column, value in row.items()}
    try:
        found = definition.read(
            row, random.Random(f"{seed} {definition.name} {sorted(row.items(), key=str)}")
        )
    except KeyError as error:
        raise DataError(
            f"{where} has no column {error.args[0]!r}; benchmark {definition.name!r} reads "
            f"{list(definition.columns)}, the row has "
            f"{sorted(map(str, row))}."
        ) from error
    except (TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise DataError(f"{where}: {error}") from error
        raise DataError(
            f"{where} does not have the form that benchmark {definition.name!r} expects: {error}."
        ) from error
    if found["answer"] is None or found["answer"] in (-1, ""):
        raise DataError(
            f"{where} has no answer; this split is published without answers, use another "
            f"(default: {definition.split!r})."
        )
    if isinstance(found["choices"], dict):
        found["choices"] = {k: _text_of(v) for k, v in found["choices"].items()}
    elif isinstance(found["choices"], list):
        found["choices"] = [_text_of(v) for v in found["choices"]]
    try:
        question, right, wrong = multiple_choice_item(found, index, "question", "choices", "answer")
    except DataError as error:
        if "no wrong choice" in str(error):
            raise UnusableRow("every choice is the right answer") from None
        raise DataError(f"{where}: {error}") from error
    right, wrong = (
        right.strip(),
        [w.strip() for w in wrong if w.strip() and w.strip() != right.strip()],
    )
    if not question or not right or not wrong:
        raise UnusableRow("the question, the right answer or every wrong answer is empty")
    return {"question": question, "choices": [right, *dict.fromkeys(wrong)], "answer": 0}


def _text_of(value: Any) -> Any:
    """Nothing (null) as the empty text, not as the text "None"."""
    return "" if value is None else value


def _divide(
    items: list[Item], share: float, seed: int, source: str
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    questions = list(dict.fromkeys(item["question"] for item in items))
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {questions[i] for i in order[: round(len(questions) * share)]}
    first = tuple(item for item in items if item["question"] in chosen)
    second = tuple(item for item in items if item["question"] not in chosen)
    if len(first) < 2 or not second:
        raise DataError(
            f"{source}: {len(questions)} different questions at pair_share={share:g} leave "
            f"{len(first)} items for pairs and "
            f"{len(second)} for prompts; at least 2 and 1 are needed."
        )
    return first, second


def _from_hub(definition: PublicBenchmark, split: str) -> tuple[list[Mapping[str, Any]], str]:
    import datasets

    part = f"/{definition.config}" if definition.config else ""
    source = f"{definition.hub_id}{part}, split {split!r}"
    try:
        if definition.data_files is None:
            found = datasets.load_dataset(definition.hub_id, definition.config, split=split)
        else:
            found = datasets.load_dataset(
                "parquet", data_files={split: definition.data_files}, split=split
            )
    except Exception as error:  # the hub client raises many kinds; all mean the same to the caller
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{source} could not be read from the hub ({type(error).__name__}: {reason}); without "
            "a network pass path= with "
            f"a local file that has the columns {list(definition.columns)}."
        ) from error
    return list(found), source


def _from_file(path: str | Path, split: str | None) -> tuple[list[Mapping[str, Any]], str]:
    path = Path(path)
    if split is not None:
        raise ArgumentError(
            f"split={split!r} has no meaning for a local file; leave it out and pass that split's "
            "file."
        )
    if path.suffix not in SUFFIXES:
        raise ArgumentError(f"path must end in one of {', '.join(SUFFIXES)}, got {str(path)!r}.")
    if not path.is_file():
        raise DataError(f"path {str(path)!r} is not a file.")
    # JSON not as a table: its columns are typed, and keys of a dict would become columns.
    out = _table_rows(path) if path.suffix in (".csv", ".parquet") else _json_rows(path)
    if not out or not all(isinstance(row, Mapping) for row in out):
        raise DataError(
            f"{path} must hold rows as JSON objects or table rows, got {len(out)} entries of "
            "another kind."
        )
    return out, str(path)


def _table_rows(path: Path) -> list[Any]:
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            found: list[Any] = parquet.read_table(path).to_pylist()
            return found
        return list(csv_rows(path))
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, ArithmeticError, OSError) as error:
        # What pyarrow raises for a damaged file is one of these.
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is not {path.suffix[1:].upper()}: {reason}.") from error


def _json_rows(path: Path) -> list[Any]:
    if path.suffix == ".jsonl":
        return [parse_json(line, path, line=number) for number, line in lines_of(path)]
    data = parse_json(read_file(path), path)
    if not isinstance(data, dict | list):
        raise DataError(f"{path} must hold a JSON list or object, got {type(data).__name__}.")
    return list(data.values()) if isinstance(data, dict) else list(data)


def __getattr__(name: str) -> Any:
    """Names of version 0.1."""
    old = {"Preset": "PublicBenchmark", "PRESETS": "PUBLIC_BENCHMARKS"}
    if name not in old:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now {old[name]}", DeprecationWarning, stacklevel=2)
    return globals()[old[name]]
