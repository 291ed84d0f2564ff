"""Prompts with the completions one wants, and those one does not: what steering is measured on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertsteer_lens._checks import check_list
from expertsteer_lens._html import repr_html
from expertsteer_lens.errors import DataError

from .chat import Chat, Text, check_texts, readable
from .multiple_choice import multiple_choice_items
from .parts import groups_of, split_groups
from .texts import parse_json, read_file, shortened, text_hash

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Behaviour:
    """Prompts, each with completions one wants (positive) and completions one does not (negative).

    The metric built from it is `m = log p(any positive completion) - log p(any negative
    completion)` in nats, per prompt. `positive` and `negative` are either one list shared by all
    prompts or one list per prompt (multiple choice). Completions are appended to the prompt as they
    are: give them their leading space. A prompt may be a chat (a list of messages, see `Chat`),
    whose assistant then says the completion.

    Raises:
        DataError: not lists of texts, as many lists of completions as prompts, or a completion that
            stands twice (its probability would count twice) or on both sides (it would count
            against itself).

    Example:
        >>> behaviour = Behaviour(["Now she was", "At last he was"], [" happy", " glad"], [" sad"])
        >>> behaviour
        Behaviour(2 prompts; + ' happy'; - ' sad')
        >>> behaviour.completions(1)
        ((' happy', ' glad'), (' sad',))
        >>> own = Behaviour(["2 + 2 =", "3 + 3 ="], [[" 4"], [" 6"]], [[" 5"], [" 7"]])
        >>> own.completions(1)
        ((' 6',), (' 7',))
    """

    prompts: tuple[Text, ...]
    positive: tuple[Any, ...]
    negative: tuple[Any, ...]

    def __post_init__(self) -> None:
        prompts = tuple(check_texts("prompts", self.prompts))
        object.__setattr__(self, "prompts", prompts)
        for name in ("positive", "negative"):
            value = check_list(name, getattr(self, name))
            if value and all(not isinstance(v, str) for v in value):
                if len(value) != len(prompts):
                    raise DataError(
                        f"{name} has completions for {len(value)} prompts, but there are "
                        f"{len(prompts)} prompts; "
                        "give one list of completions per prompt, or one shared list of texts."
                    )
                lists = tuple(
                    tuple(check_texts(f"{name}[{i}]", v, chats=False)) for i, v in enumerate(value)
                )
                object.__setattr__(self, name, lists)
            else:
                object.__setattr__(self, name, tuple(check_texts(name, value, chats=False)))
        shared = isinstance(self.positive[0], str) and isinstance(self.negative[0], str)
        for i in range(1 if shared else len(prompts)):
            _check_completions(*self.completions(i), "" if shared else f" of prompts[{i}]")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Behaviour:
        """From a dict with the keys "prompts", "positive" and "negative".

        Raises:
            DataError: a key is missing or unknown, or holds what a behaviour cannot.

        Example:
            >>> Behaviour.from_dict({"prompts": ["p"], "positive": [" a"], "negative": [" b"]})
            Behaviour(1 prompts; + ' a'; - ' b')
        """
        if not isinstance(data, Mapping):
            raise DataError(f"a behaviour must be a dict, got {type(data).__name__}.")
        known = ("prompts", "positive", "negative")
        for key in known:
            if key not in data:
                raise DataError(
                    f"a behaviour lacks {key!r}; it holds 'prompts', 'positive' and 'negative'."
                )
        unknown = [key for key in data if key not in known]
        if unknown:
            raise DataError(
                f"a behaviour holds an unknown {unknown[0]!r}; it holds 'prompts', 'positive' and "
                "'negative'."
            )
        return cls(**data)

    @classmethod
    def from_json(cls, path: str | Path) -> Behaviour:
        """From a JSON file that holds one object with "prompts", "positive" and "negative".

        Raises:
            DataError: the file is not UTF-8 text, not JSON, or not what `from_dict` takes (the
                message names the file).
        """
        hint = "; give one JSON object with lists 'prompts', 'positive' and 'negative'"
        data = parse_json(read_file(path), path, hint=hint)
        if not isinstance(data, dict):
            raise DataError(f"{path} must hold one JSON object, got {type(data).__name__}{hint}.")
        try:
            return cls.from_dict(data)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @classmethod
    def from_multiple_choice(
        cls,
        items: Iterable[Mapping[str, Any]],
        *,
        question: str = "question",
        choices: str = "choices",
        answer: str = "answer",
        template: str = "Question: {question}\nAnswer:",
        chat: bool = False,
    ) -> Behaviour:
        """Prompts from multiple-choice items: the right answer is the positive completion, every
        other a negative one.

        With `chat` the user asks the question and the assistant is to answer; `template` is not
        used."""
        rows = multiple_choice_items(items, question, choices, answer)
        return cls(
            tuple(
                Chat.ask(asked) if chat else template.format(question=asked) for asked, _, _ in rows
            ),
            tuple((" " + right,) for _, right, _ in rows),
            # An option that stands twice is one completion: its probability counts once.
            tuple(tuple(" " + w for w in dict.fromkeys(wrong)) for _, _, wrong in rows),
        )

    def completions(self, index: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Positive and negative completions of prompt `index`."""
        shared_p, shared_n = isinstance(self.positive[0], str), isinstance(self.negative[0], str)
        return (
            self.positive if shared_p else self.positive[index],
            self.negative if shared_n else self.negative[index],
        )

    def split(self, fraction: float = 0.5, *, seed: int = 0) -> tuple[Behaviour, Behaviour]:
        """(validation, test) parts that share no prompt; the first holds `fraction` of the distinct
        prompts. A prompt that comes twice is in one part, with all its completions.

        Raises:
            ArgumentError: a part would hold no prompt.
        """
        first, second = split_groups(groups_of(self.prompts), fraction, seed, "prompts", least=1)
        return self.select(first), self.select(second)

    def select(self, rows: Sequence[int]) -> Behaviour:
        """The prompts with the given indices, in that order."""

        def take(value: tuple[Any, ...]) -> tuple[Any, ...]:
            return value if isinstance(value[0], str) else tuple(value[i] for i in rows)

        return Behaviour(
            tuple(self.prompts[i] for i in rows), take(self.positive), take(self.negative)
        )

    def with_prefix(self, prefix: str) -> Behaviour:
        """The same behaviour with `prefix` in front of every prompt (of a chat: of its first
        question): the prompting baseline."""
        return Behaviour(tuple(prefix + p for p in self.prompts), self.positive, self.negative)

    @property
    def hash(self) -> str:
        """Digest of prompts and completions."""
        parts: list[Text] = list(self.prompts)
        for i in range(len(self)):
            for side in self.completions(i):
                parts.extend(side)
        return text_hash(parts)

    def __len__(self) -> int:
        return len(self.prompts)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a prompt, with its positive and its negative completions (tuples of texts)."""
        import pandas as pd

        rows = [(readable(p), *self.completions(i)) for i, p in enumerate(self.prompts)]
        return pd.DataFrame(rows, columns=["prompt", "positive", "negative"])

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        good, bad = self.completions(0)
        return f"Behaviour({len(self)} prompts; + {shortened(good[0])}; - {shortened(bad[0])})"


def _check_completions(positive: tuple[str, ...], negative: tuple[str, ...], where: str) -> None:
    for name, side in (("positive", positive), ("negative", negative)):
        repeated = [c for i, c in enumerate(side) if c in side[:i]]
        if repeated:
            raise DataError(
                f"{name}{where} holds {repeated[0]!r} twice, which would count its probability "
                "twice; remove one."
            )
    both = [c for c in positive if c in negative]
    if both:
        raise DataError(
            f"{both[0]!r} is both a positive and a negative completion{where}; remove it from one "
            "side."
        )
