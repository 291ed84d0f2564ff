"""Labelled pairs of texts: what a direction is learnt from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertsteer_lens._checks import check_list
from expertsteer_lens._html import repr_html
from expertsteer_lens.errors import DataError

from .behaviour import Behaviour as Behaviour
from .chat import Chat, Text, check_texts, readable
from .multiple_choice import multiple_choice_item as multiple_choice_item
from .multiple_choice import multiple_choice_items
from .parts import groups_of, split_groups
from .spans import Span, differing_spans
from .texts import lines_of, parse_json, shortened
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
        first, second = split_groups(self._groups(), fraction, seed, "pairs", least=2)
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
        return pd.DataFrame({name: [readable(t) for t in side] for name, side in sides.items()})

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        first = f"+ {shortened(self.positive[0])}; - {shortened(self.negative[0])}"
        return f"ContrastPairs({len(self)} pairs; {first})"
