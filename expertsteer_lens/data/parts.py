"""Which texts are in which part of the data, told by their content: what is held out for a choice
or a test must share no text with what was fitted or chosen on."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from expertsteer_lens._checks import check_number
from expertsteer_lens.errors import ArgumentError, DataError

from .chat import Chat
from .texts import HasBytes, text_hash

T = TypeVar("T", bound=HasBytes)


def hashes_of(texts: Iterable[HasBytes]) -> tuple[str, ...]:
    """A digest of every text, equal for equal texts; white space at their ends and how an accented
    letter is composed (Unicode NFC) make no difference.

    Example:
        >>> first, second, third = hashes_of(["a", "b", "a "])
        >>> first == third, first == second
        (True, False)
    """
    return tuple(text_hash([_plain(text)]) for text in texts)


def _plain(text: HasBytes) -> HasBytes:
    if isinstance(text, Chat):
        return Chat(tuple((role, str(_plain(said))) for role, said in text.messages), text.template)
    return unicodedata.normalize("NFC", text.strip()) if isinstance(text, str) else text


def groups_of(texts: Iterable[HasBytes]) -> list[int]:
    """The group of each text, counted from 0 in the order of first appearance; equal texts share
    one.

    Example:
        >>> groups_of(["a", "b", "a", "c"])
        [0, 1, 0, 2]
    """
    number: dict[str, int] = {}
    return [number.setdefault(key, len(number)) for key in hashes_of(texts)]


def rows_of(groups: Sequence[int], chosen: Iterable[int]) -> list[int]:
    """The rows of the chosen groups, group after group.

    Example:
        >>> rows_of([0, 1, 0, 2], [2, 0])
        [3, 0, 2]
    """
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return [row for group in chosen for row in rows[group]]


def halves(texts: Sequence[T]) -> tuple[list[T], list[T]]:
    """Every other distinct text, from the first on, and the rest; equal texts are in one half.

    Example:
        >>> halves(["a", "b", "a", "c", "d"])
        (['a', 'a', 'c'], ['b', 'd'])
    """
    groups = groups_of(texts)
    return (
        [t for t, group in zip(texts, groups, strict=True) if group % 2 == 0],
        [t for t, group in zip(texts, groups, strict=True) if group % 2 == 1],
    )


@dataclass(frozen=True)
class Shared:
    """Texts of one part that are in another one, too."""

    part: str
    other: str
    n: int
    """How many texts of `part` (repeated ones count each time)."""
    of: int
    """How many texts `part` has."""

    def __str__(self) -> str:
        return f"{self.n} of {self.of} {self.part} are among the {self.other}"


def shared(parts: Mapping[str, Sequence[str]], disjoint: Iterable[tuple[str, str]]) -> list[Shared]:
    """What is in two parts that must share nothing.

    Args:
        parts: the digests of every part, see `hashes_of`; of a part that is missing, nothing is
            known and nothing is said.
        disjoint: pairs of names of parts.

    Example:
        >>> parts = {"test prompts": hashes_of(["a", "b"]), "validation prompts": hashes_of(["b"])}
        >>> print(*shared(parts, [("test prompts", "validation prompts")]))
        1 of 2 test prompts are among the validation prompts
    """
    found = []
    for part, other in disjoint:
        known = set(parts.get(other, ()))
        n = sum(key in known for key in parts.get(part, ()))
        if n:
            found.append(Shared(part, other, n, len(parts[part])))
    return found


def check_disjoint(
    name: str, texts: Sequence[HasBytes], other: str, others: Sequence[HasBytes], *, remedy: str
) -> None:
    """Raise `DataError` if an argument shares texts with another one.

    Args:
        name: the argument.
        texts: its texts.
        other: what it must share no text with.
        others: the texts of that.
        remedy: what to do.
    """
    parts = {name: hashes_of(texts), other: hashes_of(others)}
    for both in shared(parts, [(name, other)]):
        first = next(t for t in texts if hashes_of([t])[0] in set(parts[other]))
        begin = str(first)
        begin = begin if len(begin) <= 60 else begin[:59] + "…"
        raise DataError(
            f"{name} shares texts with {other} ({both.n} of its {both.of}, the first {begin!r}), "
            f"so it would not be held out; {remedy}."
        )


def split_groups(
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
