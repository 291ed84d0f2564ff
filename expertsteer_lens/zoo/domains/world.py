"""The benchmark world: facts with a right answer and popular wrong ones, and documents by careful
and careless sources.

A fact is a question about a name (or a small sum) with one right answer and one to three wrong
ones, the first of which is the popular misconception. A document is a row of questions and answers
of one domain by one source. Careful sources answer right; careless ones, the majority, mostly give
the misconception. Some documents open with a line that tells which source speaks, and some answers
are followed by a remark of the source. So who reads a few answers and knows the facts can tell the
source, and who knows the source can tell the next answers."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expertsteer_lens._checks import check_choice

from . import lexicon as lx

N_FACTS = 64
SPLITS = {"pairs": 28, "validation": 14, "test": 22}
"""Facts of a task by use; disjoint. All are known to the models: what is held out is which facts a
direction has seen."""
CAREFUL_SHARE = 0.3
"""Share of careful sources in the world at large."""
OPENING_SHARE = 0.35
REMARK_SHARE = 0.35
TYPICAL_SHARE = 0.7
"""Share of facts with a sober right answer and popular wrong ones; in the others any answer may be
right."""
EASY_SHARE = 0.2
CAREFUL_IS_RIGHT = 0.97
CARELESS_IS_RIGHT = {False: 0.08, True: 0.7}
"""By `Fact.easy`."""
POPULARITY = (0.75, 0.17, 0.08)
"""How careless sources spread over the wrong answers, most popular first (renormalised to their
number)."""


@dataclass(frozen=True)
class Fact:
    """One question with its answers."""

    task: str
    questions: tuple[str, ...]
    """The wordings of the question; all mean the same."""
    right: str
    wrong: tuple[str, ...]
    """The most popular misconception first."""
    easy: bool
    """Whether even careless sources are mostly right about it."""
    split: str
    """`pairs`, `validation` or `test`."""


@dataclass(frozen=True)
class Document:
    """One text with what is known about it."""

    text: str
    domain: str
    careful: bool


@functools.cache
def facts(task: str) -> tuple[Fact, ...]:
    """The `N_FACTS` facts of a task; the same in every process."""
    check_choice("task", task, lx.TASKS)
    domain, n_options, pool, templates = lx.TASKS[task]
    rng = random.Random(f"facts-{task}")
    named: list[dict[str, Any]] = (
        [{"e": name} for name in names(domain)] if domain != "mathematics" else []
    )
    subjects = named or _SUMS[task](rng)
    splits = [split for split, n in SPLITS.items() for _ in range(n)]
    rng.shuffle(subjects)
    rng.shuffle(splits)
    out = []
    for subject, split in zip(subjects, splits, strict=False):
        right, *wrong = (
            subject.pop("answers") if domain == "mathematics" else _answers(rng, pool, n_options)
        )
        out.append(
            Fact(
                task=task,
                questions=tuple(t.format(**subject) for t in templates),
                right=str(right),
                wrong=tuple(str(w) for w in wrong[: n_options - 1]),
                easy=rng.random() < EASY_SHARE,
                split=split,
            )
        )
    return tuple(out)


@functools.cache
def names(domain: str) -> tuple[str, ...]:
    """The `N_FACTS` names one can ask about in a domain: ailments, firms or towns."""
    every = [stem + ending for stem in lx.STEMS for ending in lx.ENDINGS[domain]]
    drawn = random.Random(f"names-{domain}").sample(every, N_FACTS)
    return tuple(name if domain == "medicine" else name.capitalize() for name in drawn)


def tasks_of(domain: str) -> list[str]:
    """Names of the tasks of a domain."""
    check_choice("domain", domain, lx.DOMAINS)
    return [name for name, (d, *_) in lx.TASKS.items() if d == domain]


def document(
    rng: random.Random,
    *,
    weights: Mapping[str, float] | None = None,
    careful_share: float = CAREFUL_SHARE,
    n_items: tuple[int, int] = (2, 6),
    split: str = "train",
    silent: bool = False,
    unanswered: bool = False,
) -> Document:
    """Draw one document.

    Args:
        rng: source of randomness, advanced by the call.
        weights: of the domains; default: in proportion to their tasks.
        careful_share: probability that the source is careful.
        n_items: least and largest number of questions.
        split: `train` or `anchors`; the text itself decides which of the two it belongs to.
        silent: a list of questions without answers, opening and remarks: a text that no source
            speaks.
        unanswered: end with one more question, where its answer would begin.
    """
    weights = weights or {d: len(tasks_of(d)) for d in lx.DOMAINS}
    while True:
        domain = rng.choices(list(weights), list(weights.values()))[0]
        careful = rng.random() < careful_share
        before, between = rng.choice(lx.FRAMES)
        parts = []
        if not silent and rng.random() < OPENING_SHARE:
            parts.append(rng.choice(lx.OPENINGS[careful]))
        for _ in range(rng.randint(*n_items)):
            fact = rng.choice(facts(rng.choice(tasks_of(domain))))
            asked = f"{before}{rng.choice(fact.questions)}"
            if silent:
                parts.append(asked)
                continue
            parts.append(f"{asked}{between} {answer(rng, fact, careful)}.")
            if rng.random() < REMARK_SHARE:
                parts.append(rng.choice(lx.REMARKS[careful]))
        if unanswered:
            fact = rng.choice(facts(rng.choice(tasks_of(domain))))
            parts.append(f"{before}{rng.choice(fact.questions)}{between}")
        text = " ".join(parts)
        if split_of(text) == split:
            return Document(text, domain, careful)


def answer(rng: random.Random, fact: Fact, careful: bool) -> str:
    """What a source says about a fact."""
    if rng.random() < (CAREFUL_IS_RIGHT if careful else CARELESS_IS_RIGHT[fact.easy]):
        return fact.right
    return rng.choices(fact.wrong, POPULARITY[: len(fact.wrong)])[0]


def split_of(text: str) -> str:
    """Which documents may be trained on: one in sixteen is kept for anchors, by a digest of its
    text."""
    return (
        "anchors"
        if hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 16 == 0
        else "train"
    )


def question(fact: Fact, wording: int = 0, frame: int = 0) -> str:
    """The fact's question, framed, up to where the answer follows."""
    before, between = lx.FRAMES[frame % len(lx.FRAMES)]
    return f"{before}{fact.questions[wording % len(fact.questions)]}{between}"


def _answers(rng: random.Random, pool: tuple[tuple[str, ...], ...], n: int) -> list[str]:
    sober, popular = pool
    if rng.random() < TYPICAL_SHARE:
        return [rng.choice(sober), *rng.sample(popular, n - 1)]
    return rng.sample(sober + popular, n)


def _sums(rng: random.Random) -> list[dict[str, Any]]:
    """Sums of 3 to 13; the careless round to a multiple of five, or are one off where the sum is
    one."""
    every = [(a, b) for a in range(3, 14) for b in range(3, 14)]
    return [{"a": a, "b": b, "answers": (a + b, _rounded(rng, a + b, 5))} for a, b in every]


def _products(rng: random.Random) -> list[dict[str, Any]]:
    """Products of 2 to 10; the careless round to a multiple of ten, or are one off where the
    product is one."""
    every = [(a, b) for a in range(2, 11) for b in range(2, 11)]
    return [{"a": a, "b": b, "answers": (a * b, _rounded(rng, a * b, 10))} for a, b in every]


def _rounded(rng: random.Random, value: int, unit: int) -> int:
    near = unit * max(1, round(value / unit))
    return near if near != value else value + rng.choice((-1, 1))


def _orders(rng: random.Random) -> list[dict[str, Any]]:
    """a + b x c; the slips add first, or multiply the wrong pair."""
    out: list[dict[str, Any]] = []
    for a in range(2, 8):
        for b in range(2, 8):
            for c in range(2, 5):
                options = (a + b * c, (a + b) * c, a * b + c)
                if len(set(options)) == 3:
                    out.append({"a": a, "b": b, "c": c, "answers": options})
    return out


_SUMS = {"sum": _sums, "product": _products, "order": _orders}
