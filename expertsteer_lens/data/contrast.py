"""What one steers towards: labelled pairs of texts, and prompts with preferred and dispreferred
completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertsteer_lens._checks import check_list, check_number
from expertsteer_lens._html import repr_html
from expertsteer_lens.errors import ArgumentError, DataError

from .chat import Chat, Text, check_texts
from .multiple_choice import multiple_choice_item as multiple_choice_item
from .multiple_choice import multiple_choice_items
from .parts import groups_of, rows_of
from .spans import Span, differing_spans
from .texts import lines_of, parse_json, read_file
from .texts import text_hash as text_hash

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class ContrastPairs:
    """Texts that show a behaviour (positive, label 1) and texts that do not (negative, label 0),
    paired by index.

    The steering direction points from negative to positive. A text may be a chat: a list of
    messages, see `Chat`.

    Raises:
        DataError: not two lists of as many texts, an empty list, or a pair of equal texts.

    Example:
        >>> pairs = ContrastPairs.from_lists(["It was warm.", "She laughed."],
        ...                                  ["It was cold.", "She cried."])
        >>> pairs.texts
        ['It was warm.', 'It was cold.', 'She laughed.', 'She cried.']
        >>> pairs.labels.tolist()
        [1.0, 0.0, 1.0, 0.0]
    """

    positive: tuple[Text, ...]
    negative: tuple[Text, ...]

    def __post_init__(self) -> None:
        positive = check_texts("positive", self.positive)
        negative = check_texts("negative", self.negative)
        if len(positive) != len(negative):
            raise DataError(
                f"positive and negative must pair up: got {len(positive)} positive and "
                f"{len(negative)} negative texts; "
                "drop the surplus or repeat texts on purpose."
            )
        same = [i for i, (p, n) in enumerate(zip(positive, negative, strict=True)) if p == n]
        if same:
            raise DataError(
                f"pair {same[0]} has the same text on both sides ({len(same)} such pairs); remove "
                "them."
            )
        object.__setattr__(self, "positive", tuple(positive))
        object.__setattr__(self, "negative", tuple(negative))

    @classmethod
    def from_lists(cls, positive: Sequence[Any], negative: Sequence[Any]) -> ContrastPairs:
        """Pairs from two lists of the same length, of texts or of chats (lists of messages)."""
        return cls(
            tuple(check_texts("positive", positive)), tuple(check_texts("negative", negative))
        )

    @classmethod
    def from_jsonl(
        cls, path: str | Path, *, positive: str = "positive", negative: str = "negative"
    ) -> ContrastPairs:
        """Pairs from a JSON-lines file with one object a line; `positive` and `negative` name its
        fields.

        Raises:
            DataError: the file is not UTF-8 text or holds no pair, or a line is not JSON or lacks a
                field (the message names the line, from 1).
        """
        rows = []
        for number, line in lines_of(path):
            row = parse_json(line, path, line=number, hint="; give one JSON object a line")
            rows.append((number, row))
        for number, row in rows:
            for name in (positive, negative):
                if not isinstance(row, dict) or name not in row:
                    keys = sorted(row) if isinstance(row, dict) else type(row).__name__
                    raise DataError(
                        f"{path}, line {number}: no field {name!r} (it has {keys}); rename it in "
                        "the file, or in Python name yours: positive=, negative=."
                    )
        if not rows:
            raise DataError(
                f"{path} holds no pair; give one JSON object a line, with {positive!r} and "
                f"{negative!r}."
            )
        return cls.from_lists([r[positive] for _, r in rows], [r[negative] for _, r in rows])

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        *,
        positive: str = "positive",
        negative: str = "negative",
        text: str | None = None,
        label: str | None = None,
    ) -> ContrastPairs:
        """Pairs from a `datasets.Dataset` (or any iterable of dicts).

        Either two text columns (`positive`, `negative`), or one `text` column with a 0/1 `label`
        column, whose rows are then paired in order; both classes must have the same number of rows.
        """
        rows = check_list("dataset", dataset, of="rows")
        needed = [positive, negative] if text is None else [text, label or "label"]
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise DataError(f"dataset row {i} must be a dict, got {type(row).__name__}.")
            missing = [name for name in needed if name not in row]
            if missing:
                raise DataError(
                    f"dataset row {i} has no column {missing[0]!r}; its columns are {sorted(row)}."
                )
        if text is None:
            return cls.from_lists([r[positive] for r in rows], [r[negative] for r in rows])
        column = label or "label"
        sides: dict[int, list[Any]] = {0: [], 1: []}
        for i, row in enumerate(rows):
            try:
                sides[int(row[column])].append(row[text])
            except (TypeError, ValueError, KeyError) as error:
                raise DataError(
                    f"column {column!r} must hold 0/1 labels, got {row[column]!r} in row {i}."
                ) from error
        return cls.from_lists(sides[1], sides[0])

    @classmethod
    def from_multiple_choice(
        cls,
        items: Iterable[Mapping[str, Any]],
        *,
        question: str = "question",
        choices: str = "choices",
        answer: str = "answer",
        template: str = "Question: {question}\nAnswer: {choice}",
        chat: bool = False,
        seed: int = 0,
    ) -> ContrastPairs:
        """One pair an item: the question with its right answer, and with one wrong answer drawn by
        `seed`.

        `choices` is a list or a dict of options; `answer` an index into the list, a key of the
        dict, or the text itself. With `chat` the user asks the question and the assistant gives the
        answer; `template` is not used."""
        rows = multiple_choice_items(items, question, choices, answer)
        generator = torch.Generator().manual_seed(seed)
        positive: list[Text] = []
        negative: list[Text] = []
        for asked, right, wrong in rows:
            pick = wrong[int(torch.randint(len(wrong), (1,), generator=generator))]
            for side, choice in ((positive, right), (negative, pick)):
                side.append(
                    Chat.ask(asked, choice)
                    if chat
                    else template.format(question=asked, choice=choice)
                )
        return cls.from_lists(positive, negative)

    @property
    def answer_spans(self) -> list[Span]:
        """Where the answer of each of `texts` is, in characters of its content: the last message of
        a chat, the part in which two plain texts of a pair differ (see `differing_spans`)."""
        both = [differing_spans(p, n) for p, n in zip(self.positive, self.negative, strict=True)]
        return [span for pair in both for span in pair]

    @property
    def texts(self) -> list[Text]:
        """All texts, pair after pair: positive 0, negative 0, positive 1, ..."""
        return [t for pair in zip(self.positive, self.negative, strict=True) for t in pair]

    @property
    def labels(self) -> Tensor:
        """Labels of `texts`, shape `[2 n_pairs]`: 1, 0, 1, 0, ..."""
        return torch.tensor([1.0, 0.0]).repeat(len(self.positive))

    @property
    def hash(self) -> str:
        """Digest of the texts, stored with every result."""
        return text_hash(self.texts)

    def split(self, fraction: float = 0.5, *, seed: int = 0) -> tuple[ContrastPairs, ContrastPairs]:
        """Two parts that share no text; the first holds `fraction` of the pairs. Pairs are never
        torn apart, and pairs with a text in common stay together (they count as one).

        Raises:
            ArgumentError: a part would hold fewer than 2 pairs without a text in common.
        """
        first, second = _split(self._groups(), fraction, seed, "pairs", least=2)
        return self._take(first), self._take(second)

    def _groups(self) -> list[int]:
        """The group of each pair; pairs that are linked by texts in common share one."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        texts = groups_of(self.texts)
        n = max(texts) + 1
        links = coo_array(([1] * len(self), (texts[::2], texts[1::2])), shape=(n, n))
        _, part = connected_components(links, directed=False)
        return [int(part[i]) for i in texts[::2]]

    def _take(self, rows: Sequence[int]) -> ContrastPairs:
        return ContrastPairs(
            tuple(self.positive[i] for i in rows), tuple(self.negative[i] for i in rows)
        )

    def __len__(self) -> int:
        return len(self.positive)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a pair: its positive and its negative text.

        Example:
            >>> ContrastPairs.from_lists(["It was warm."], ["It was cold."]).to_pandas().shape
            (1, 2)
        """
        import pandas as pd

        sides = {"positive": self.positive, "negative": self.negative}
        return pd.DataFrame({name: [_readable(t) for t in side] for name, side in sides.items()})

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        first = f"+ {_short(self.positive[0])}; - {_short(self.negative[0])}"
        return f"ContrastPairs({len(self)} pairs; {first})"


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
        first, second = _split(groups_of(self.prompts), fraction, seed, "prompts", least=1)
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

        rows = [(_readable(p), *self.completions(i)) for i, p in enumerate(self.prompts)]
        return pd.DataFrame(rows, columns=["prompt", "positive", "negative"])

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        good, bad = self.completions(0)
        return f"Behaviour({len(self)} prompts; + {_short(good[0])}; - {_short(bad[0])})"


def _readable(text: Text) -> str:
    """A text for a table; a chat with who says what."""
    if isinstance(text, str):
        return text
    return "\n".join(f"{role}: {said}" for role, said in text.messages)


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


def _split(
    groups: Sequence[int], fraction: float, seed: int, what: str, least: int
) -> tuple[list[int], list[int]]:
    """Rows of the two parts; a group (numbered from 0) is never divided."""
    check_number("fraction", fraction, low=0.0, high=1.0)
    n = max(groups) + 1
    what = what if n == len(groups) else f"distinct {what} ({len(groups)} in all)"
    cut = round(n * fraction)
    if cut < least or n - cut < least:
        raise ArgumentError(
            f"fraction={fraction} of {n} {what} leaves a part with fewer than {least}; give more "
            f"{what.split(' (')[0]}."
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(rows_of(groups, order[:cut])), sorted(rows_of(groups, order[cut:]))


def _short(text: Text, width: int = 40) -> str:
    text = str(text)
    return repr(text if len(text) <= width else text[: width - 1] + "…")
