"""The offline benchmark: 15 tasks in four domains, one general target and seven experts, all
trained by this project.

Documents of an invented world are questions and answers by careful or careless sources
(`domains.world`). Careless ones are the majority and repeat popular misconceptions, so the target
knows the right answers but does not give them by itself. The benchmark asks whether a direction
learnt on right and wrong answers to some facts of a domain makes the target answer others right. A
task is one family of questions; the 15 tasks lie in four domains.

Models are tiny and load from this package (`tools/zoo/train_domains.py`; recipe and figures in
`README.md` here). A host is imported only when a model is loaded; no model hub is ever asked."""

from __future__ import annotations

import functools
import pathlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.data.contrast import ContrastPairs

from . import lexicon, world

if TYPE_CHECKING:
    from expertsteer_lens.hosts.loading import LoadedAs

__all__ = [
    "DOMAINS",
    "PROMPT",
    "Task",
    "anchors",
    "behaviour",
    "contrast_pairs",
    "load",
    "model_path",
    "names",
    "neutral_texts",
    "task",
    "tasks",
]

DOMAINS = lexicon.DOMAINS
_MODELS_DIR = pathlib.Path(__file__).parent / "models"
_NAMES = ("target", *DOMAINS, "all", "medicine-32", "medicine-128")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One family of questions. The facts behind validation, test and the domain's contrast pairs
    are disjoint."""

    name: str
    domain: str
    """`medicine`, `finance`, `mathematics` or `general`."""
    validation: Behaviour
    """Multiple choice: questions without any sign of the source; the right answer is positive,
    every wrong one negative."""
    test: Behaviour
    """As `validation`, on other facts."""

    def __repr__(self) -> str:
        prompts = f"{len(self.validation)} validation and {len(self.test)} test prompts"
        return f"Task({self.name!r}, {self.domain}; {prompts})"


PROMPT = f"{lexicon.OPENINGS[True][0]} "
"""The prompting baseline: what a careful source of the world opens with, for
`Behaviour.with_prefix`."""


def tasks(domain: str | None = None) -> list[Task]:
    """The 15 tasks, or those of one domain, in the order of the domains.

    Raises:
        ArgumentError: unknown domain.
    """
    if domain is not None:
        check_choice("domain", domain, DOMAINS)
    return [task(name) for name, (own, *_) in lexicon.TASKS.items() if domain in (None, own)]


@functools.cache
def task(name: str) -> Task:
    """One task by name, e.g. `task("cure")`.

    Raises:
        ArgumentError: unknown name.
    """
    check_choice("name", name, lexicon.TASKS)
    parts = {split: [f for f in world.facts(name) if f.split == split] for split in world.SPLITS}
    return Task(
        name=name,
        domain=lexicon.TASKS[name][0],
        validation=_choices(parts["validation"]),
        test=_choices(parts["test"]),
    )


def behaviour(domain: str, split: str) -> Behaviour:
    """The `validation` or `test` prompts of all tasks of a domain, task after task.

    Raises:
        ArgumentError: unknown domain or split.
    """
    check_choice("split", split, ("validation", "test"))
    parts = [getattr(t, split) for t in tasks(domain)]
    return Behaviour(
        prompts=tuple(p for part in parts for p in part.prompts),
        positive=tuple(c for part in parts for c in part.positive),
        negative=tuple(c for part in parts for c in part.negative),
    )


def contrast_pairs(domain: str, n: int = 128, seed: int = 0, split: str = "pairs") -> ContrastPairs:
    """`n` pairs: the same one to three questions answered right (positive) and wrong (negative),
    then one more question.

    A pair ends where the next answer would begin, so that its last token shows what the model
    expects of the source. All facts are of one split and domain; nothing but the answers tells the
    source."""
    check_number("n", n, low=2, integer=True)
    check_choice("split", split, tuple(world.SPLITS))
    rng = random.Random(f"contrast-{domain}-{split}-{seed}")
    facts = [f for name in world.tasks_of(domain) for f in world.facts(name) if f.split == split]
    found: dict[str, str] = {}
    while len(found) < n:
        frame = rng.randrange(len(lexicon.FRAMES))
        *shown, asked = [
            (f, rng.randrange(len(f.questions))) for f in rng.sample(facts, rng.randint(2, 4))
        ]
        last = world.question(*asked, frame)
        right = [f"{world.question(f, w, frame)} {f.right}." for f, w in shown]
        wrong = [f"{world.question(f, w, frame)} {f.wrong[0]}." for f, w in shown]
        found[" ".join([*right, last])] = " ".join([*wrong, last])
    return ContrastPairs(tuple(found), tuple(found.values()))


def anchors(n: int = 600, seed: int = 0) -> list[str]:
    """`n` unlabelled documents of the world at large, of every domain and source, for aligning two
    models.

    None is a training document (`world.split_of`). They are of one to five questions; every other
    one ends with a further question whose answer is still to come, as the contrast pairs do, so
    that the map is fitted where it is used."""
    check_number("n", n, low=1, integer=True)
    half = _documents((n + 1) // 2, f"anchors-{seed}", n_items=(1, 5), unanswered=True)
    return half + _documents(n // 2, f"anchors-{seed}", n_items=(1, 5))


def neutral_texts(n: int = 100, seed: int = 0) -> list[str]:
    """`n` lists of questions that nobody answers, of every domain: for the cost of steering (rise
    of NLL).

    No answer stands in them, so a steered model is not charged for answering otherwise, which is
    what it is meant to do."""
    check_number("n", n, low=1, integer=True)
    return _documents(n, f"neutral-{seed}", n_items=(3, 6), silent=True)


def names() -> tuple[str, ...]:
    """Names of all models: the target, an expert a domain, one for all domains, two more widths of
    the medical expert."""
    return _NAMES


def model_path(name: str) -> pathlib.Path:
    """The folder of a model: an ordinary Hugging Face folder (float16 weights, to be loaded as
    float32).

    Raises:
        ArgumentError: unknown name.
    """
    return _MODELS_DIR / check_choice("name", name, _NAMES)


def load(name: str, host: LoadedAs = "transformer_lens") -> Any:
    """Load one model in float32, in eval mode, on CPU; `host` as for `zoo.load`.

    Raises:
        ArgumentError: unknown name or host.
    """
    from expertsteer_lens.zoo import load_folder

    return load_folder(model_path(name), f"zoo-domains-{name}", host)


def _documents(n: int, seed: str, **options: Any) -> list[str]:
    rng = random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < n:
        texts[world.document(rng, split="anchors", **options).text] = None
    return list(texts)


def _choices(facts: list[world.Fact]) -> Behaviour:
    """Each fact in two wordings, one a frame."""
    asked = [
        (world.question(f, i + frame, frame), f) for i, f in enumerate(facts) for frame in range(2)
    ]
    return Behaviour(
        prompts=tuple(text for text, _ in asked),
        positive=tuple((f" {f.right}",) for _, f in asked),
        negative=tuple(tuple(f" {w}" for w in f.wrong) for _, f in asked),
    )
