"""Public benchmarks by name: contrast pairs (right against wrong answer) and a behaviour from
disjoint items.

    pubmedqa = esl.benchmarks.load("pubmedqa", path="ori_pqal.json")   # or without path: from the
    Hugging Face hub fit = esl.ExpertSteer().fit(expert, target, pubmedqa.pairs(),
    behaviour=pubmedqa.behaviour())

The choice of benchmarks is ours: sets in wide use in four domains whose published columns we could
confirm. A direction learnt from right against wrong answers need not be one of knowledge: look at
`esl.evaluate`, and at accuracy, before saying so."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens.data.contrast import Behaviour, ContrastPairs, multiple_choice_item
from expertsteer_lens.errors import ArgumentError, DataError

from . import readers
from .readers import Item, Reader, UnusableRow

DOMAINS = ("medicine", "finance", "mathematics", "general")
QUESTION = "Question: {question}\nAnswer: {choice}"
BARE = "{question}\nAnswer: {choice}"
CONTINUED = "{question} {choice}"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True, eq=False)
class Preset:
    """Where a public benchmark is found and how its rows are read; it holds no data."""

    name: str
    domain: str
    """ "medicine", "finance", "mathematics" or "general"."""
    hub_id: str
    """Data set on the Hugging Face hub."""
    config: str | None
    """Its configuration, if it has several."""
    split: str
    """Split read by default; always one that is published with answers."""
    columns: tuple[str, ...]
    """Published columns that are read; a local file needs these."""
    read: Reader
    licence: str
    """As its publishers state it; check before use."""
    template: str = QUESTION
    """Text of one answer; the prompt is what stands before `{choice}`."""
    note: str = ""
    only: tuple[str, str] | None = None
    """(column, value): other rows are left out."""
    data_files: str | None = None
    """Files on the hub where the data set itself cannot be loaded by name."""

    def __repr__(self) -> str:
        config = f", {self.config!r}" if self.config else ""
        where = f"{self.hub_id!r}{config}, split {self.split!r}"
        return f"Preset({self.name!r}, {self.domain}: {where}, {self.licence})"


@dataclass(frozen=True, eq=False)
class Benchmark:
    """The items of one benchmark, divided into a part for contrast pairs and a part for prompts.

    No question is in both parts: items that ask the same question stay together.
    """

    preset: Preset
    pair_items: tuple[Item, ...]
    """Items behind `pairs`."""
    prompt_items: tuple[Item, ...]
    """Items behind `behaviour`."""
    seed: int
    source: str
    """The file or the hub id with its split."""
    skipped: tuple[tuple[int, str], ...] = ()
    """Rows left out (row number in the source, from 0) and why."""

    def pairs(self, *, chat: bool = False, seed: int | None = None) -> ContrastPairs:
        """One pair an item: the right answer, and a wrong one drawn by `seed` (default: the seed of
        `load`).

        With `chat` as conversations, each model's template around them; else in the preset's own
        words."""
        return ContrastPairs.from_multiple_choice(
            self.pair_items,
            template=self.preset.template,
            chat=chat,
            seed=self.seed if seed is None else seed,
        )

    def behaviour(self, *, chat: bool = False) -> Behaviour:
        """The other items: the question as prompt, the right answer wanted, every wrong one not;
        `chat` as in `pairs`."""
        template = self.preset.template.removesuffix("{choice}").rstrip(" ")
        return Behaviour.from_multiple_choice(self.prompt_items, template=template, chat=chat)

    def __len__(self) -> int:
        return len(self.pair_items) + len(self.prompt_items)

    def __repr__(self) -> str:
        left_out = f", {len(self.skipped)} rows left out" if self.skipped else ""
        return (
            f"Benchmark({self.preset.name!r} from {self.source}: {len(self.pair_items)} items for "
            "pairs, "
            f"{len(self.prompt_items)} for prompts{left_out})"
        )


def names(domain: str | None = None) -> list[str]:
    """Names of all presets, or of one domain's."""
    if domain is not None:
        check_choice("domain", domain, DOMAINS)
    return [name for name, p in PRESETS.items() if domain in (None, p.domain)]


def get(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ArgumentError: no such preset (naming the closest).
    """
    return PRESETS[check_choice("name", name, PRESETS)]


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
        split: split of the hub set; default: the preset's. A local file has none.
        limit: use at most this many rows, drawn by `seed` (benchmarks are often ordered by topic).
        seed: of the draw, of the division into pairs and prompts, of made-up wrong numbers, and of
            the wrong answer in `pairs`.
        pair_share: share of the questions that goes to `pairs`; the rest become prompts.

    Raises:
        ArgumentError: unknown name, an unknown kind of file, or a split with a local file.
        DataError: the hub cannot be reached, a column is missing, answers are not published, or too
            few usable rows.
    """
    preset = get(name)
    check_number("pair_share", pair_share, low=0.0, high=1.0)
    if limit is not None:
        check_number("limit", limit, low=1, integer=True)
    rows, source = (
        _from_hub(preset, split or preset.split) if path is None else _from_file(path, split)
    )
    if preset.only is not None:
        column, value = preset.only
        rows = [row for row in rows if str(row.get(column)) == value]
        if not rows:
            raise DataError(
                f"{source} has no row whose {column!r} is {value!r}, which preset {name!r} asks "
                "for."
            )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()[
        :limit
    ]
    items: list[Item] = []
    skipped: list[tuple[int, str]] = []
    for i in sorted(order):
        try:
            items.append(_item(preset, rows[i], i, source, seed))
        except UnusableRow as reason:
            skipped.append((i, str(reason)))
    first, second = _divide(items, pair_share, seed, source)
    return Benchmark(preset, first, second, seed, source, tuple(skipped))


def _item(preset: Preset, row: Mapping[str, Any], index: int, source: str, seed: int) -> Item:
    where = f"{source}, row {index}"
    try:
        found = preset.read(
            row, random.Random(f"{seed} {preset.name} {sorted(row.items(), key=str)}")
        )
    except KeyError as error:
        raise DataError(
            f"{where} has no column {error.args[0]!r}; preset {preset.name!r} reads "
            f"{list(preset.columns)}, the row has "
            f"{sorted(map(str, row))}."
        ) from error
    except (TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise DataError(f"{where}: {error}") from error
        raise DataError(
            f"{where} does not have the form that preset {preset.name!r} expects: {error}."
        ) from error
    if found["answer"] is None or found["answer"] in (-1, ""):
        raise DataError(
            f"{where} has no answer; this split is published without answers, use another "
            f"(default: {preset.split!r})."
        )
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


def _from_hub(preset: Preset, split: str) -> tuple[list[Mapping[str, Any]], str]:
    import datasets

    source = f"{preset.hub_id}{'/' + preset.config if preset.config else ''}, split {split!r}"
    try:
        if preset.data_files is None:
            found = datasets.load_dataset(preset.hub_id, preset.config, split=split)
        else:
            found = datasets.load_dataset(
                "parquet", data_files={split: preset.data_files}, split=split
            )
    except Exception as error:  # the hub client raises many kinds; all mean the same to the caller
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{source} could not be read from the hub ({type(error).__name__}: {reason}); without "
            "a network pass path= with "
            f"a local file that has the columns {list(preset.columns)}."
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
    if path.suffix in (".csv", ".parquet"):
        import datasets

        kind = datasets.Dataset.from_csv if path.suffix == ".csv" else datasets.Dataset.from_parquet
        rows: Iterable[Any] = kind(str(path), keep_in_memory=True)
    else:
        # Not through `datasets`: its columns are typed, and keys of a dict would become columns.
        rows = _json_rows(path)
    out = list(rows)
    if not out or not all(isinstance(row, Mapping) for row in out):
        raise DataError(
            f"{path} must hold rows as JSON objects or table rows, got {len(out)} entries of "
            "another kind."
        )
    return out, str(path)


def _json_rows(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not {path.suffix[1:].upper()}: {error}.") from error
    return list(data.values()) if isinstance(data, dict) else list(data)


def _mmlu(subject: str, domain: str) -> Preset:
    return Preset(
        f"mmlu_{subject}",
        domain,
        "cais/mmlu",
        subject,
        "test",
        ("question", "choices", "answer"),
        readers.columns("question", "choices", "answer"),
        "MIT",
        note="a subject's own dev split has five items, so the test split is read; "
        "report no accuracy on it afterwards",
    )


def _mmlu_pro(category: str, domain: str) -> Preset:
    return Preset(
        f"mmlu_pro_{category}",
        domain,
        "TIGER-Lab/MMLU-Pro",
        None,
        "test",
        ("question", "options", "answer_index", "category"),
        readers.columns("question", "options", "answer_index"),
        "MIT",
        only=("category", category),
    )


_LABELLED = ("choices", "answerKey")
_ARC = Preset(
    "arc_challenge",
    "general",
    "allenai/ai2_arc",
    "ARC-Challenge",
    "train",
    ("question", *_LABELLED),
    readers.labelled_choices("question"),
    "CC BY-SA 4.0",
)
_FPB = "hf://datasets/takala/financial_phrasebank@refs/convert/parquet/sentences_allagree/train/*.parquet"
_ALL = (
    Preset(
        "pubmedqa",
        "medicine",
        "qiaojin/PubMedQA",
        "pqa_labeled",
        "train",
        ("question", "context", "final_decision"),
        readers.pubmedqa,
        "MIT",
        BARE,
        "long prompts: the abstract is part of the question",
    ),
    Preset(
        "medmcqa",
        "medicine",
        "openlifescienceai/medmcqa",
        None,
        "train",
        ("question", "opa", "opb", "opc", "opd", "cop"),
        readers.medmcqa,
        "Apache-2.0",
        note="the test split has no answers",
    ),
    Preset(
        "medqa",
        "medicine",
        "GBaker/MedQA-USMLE-4-options",
        None,
        "train",
        ("question", "options", "answer_idx"),
        readers.columns("question", "options", "answer_idx"),
        "CC BY 4.0",
    ),
    *(
        _mmlu(s, "medicine")
        for s in (
            "anatomy",
            "clinical_knowledge",
            "college_biology",
            "college_medicine",
            "medical_genetics",
            "professional_medicine",
        )
    ),
    _mmlu_pro("health", "medicine"),
    Preset(
        "financial_phrasebank",
        "finance",
        "takala/financial_phrasebank",
        "sentences_allagree",
        "train",
        ("sentence", "label"),
        readers.sentiment("sentence", ("negative", "neutral", "positive")),
        "CC BY-NC-SA 3.0",
        BARE,
        "read from the hub's parquet copy: the set itself is a loading script",
        data_files=_FPB,
    ),
    Preset(
        "twitter_financial_news",
        "finance",
        "zeroshot/twitter-financial-news-sentiment",
        None,
        "train",
        ("text", "label"),
        readers.sentiment("text", ("bearish", "bullish", "neutral")),
        "MIT",
        BARE,
    ),
    *(
        _mmlu(s, "finance")
        for s in (
            "econometrics",
            "high_school_macroeconomics",
            "high_school_microeconomics",
            "professional_accounting",
        )
    ),
    _mmlu_pro("business", "finance"),
    _mmlu_pro("economics", "finance"),
    Preset(
        "gsm8k",
        "mathematics",
        "openai/gsm8k",
        "main",
        "train",
        ("question", "answer"),
        readers.gsm8k,
        "MIT",
        note="free answers: wrong numbers are made, three within 20 % of the right one, "
        "by the seed",
    ),
    Preset(
        "aqua_rat",
        "mathematics",
        "deepmind/aqua_rat",
        "raw",
        "train",
        ("question", "options", "correct"),
        readers.aqua_rat,
        "Apache-2.0",
    ),
    Preset(
        "math_qa",
        "mathematics",
        "regisss/math_qa",
        None,
        "train",
        ("Problem", "options", "correct"),
        readers.math_qa,
        "Apache-2.0",
    ),
    *(
        _mmlu(s, "mathematics")
        for s in (
            "abstract_algebra",
            "college_mathematics",
            "elementary_mathematics",
            "high_school_mathematics",
            "high_school_statistics",
        )
    ),
    _mmlu_pro("math", "mathematics"),
    Preset(
        "truthfulqa",
        "general",
        "truthfulqa/truthful_qa",
        "multiple_choice",
        "validation",
        ("question", "mc1_targets"),
        readers.truthfulqa,
        "Apache-2.0",
        note="one right answer (MC1)",
    ),
    _ARC,
    replace(_ARC, name="arc_easy", config="ARC-Easy"),
    Preset(
        "openbookqa",
        "general",
        "allenai/openbookqa",
        "main",
        "train",
        ("question_stem", *_LABELLED),
        readers.labelled_choices("question_stem"),
        "not stated on the hub",
    ),
    Preset(
        "commonsense_qa",
        "general",
        "tau/commonsense_qa",
        None,
        "train",
        ("question", *_LABELLED),
        readers.labelled_choices("question"),
        "MIT",
        note="the test split has no answers",
    ),
    Preset(
        "hellaswag",
        "general",
        "Rowan/hellaswag",
        None,
        "train",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        readers.hellaswag,
        "MIT",
        CONTINUED,
        "the test split has no answers",
    ),
    Preset(
        "boolq",
        "general",
        "google/boolq",
        None,
        "train",
        ("question", "passage", "answer"),
        readers.boolq,
        "CC BY-SA 3.0",
        BARE,
        "long prompts: the passage is part of the question",
    ),
    Preset(
        "winogrande",
        "general",
        "allenai/winogrande",
        "winogrande_xl",
        "train",
        ("sentence", "option1", "option2", "answer"),
        readers.winogrande,
        "not stated on the hub",
        CONTINUED,
        "the test split has no answers",
    ),
    Preset(
        "piqa",
        "general",
        "baber/piqa",
        None,
        "train",
        ("goal", "sol1", "sol2", "label"),
        readers.piqa,
        "AFL-3.0",
    ),
    Preset(
        "sciq",
        "general",
        "allenai/sciq",
        None,
        "train",
        ("question", "correct_answer", "distractor1", "distractor2", "distractor3"),
        readers.sciq,
        "CC BY-NC 3.0",
    ),
)
PRESETS: dict[str, Preset] = {p.name: p for p in _ALL}
