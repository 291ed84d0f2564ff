"""Where each token of a text ends, in characters of the text's content, whatever the tokenizer.

Two tokenizers cut a text differently, but many of their tokens end at the same character. The
states of two such tokens say what both models know after the same words: they are a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from expertsteer_lens.data.capture_plan import TOKEN_ENDS as TOKEN_ENDS
from expertsteer_lens.data.chat import Chat, Text
from expertsteer_lens.data.spans import Span

if TYPE_CHECKING:
    from .base import Host
    from .parts import TokenBatch

NO_END = -1
"""Stands for tokens of the template, specials, padding, and tokens that end inside a character."""


def gives_offsets(tokenizer: Any) -> bool:
    """Whether the tokenizer can say which characters a token covers (the fast ones can)."""
    return bool(getattr(tokenizer, "is_fast", False))


def token_ends(host: Host, texts: Sequence[Text], batch: TokenBatch) -> Int[Tensor, "batch pos"]:
    """The character of its text's content at which each token ends; -1 where there is none.

    Args:
        host: a model whose tokenizer gives offsets.
        texts: the texts of the batch.
        batch: `host.tokenize(texts)`.

    Returns:
        One number per token. A token that holds only part of a character has none but for the last
        of them, so no end occurs twice in a row. All are -1 in the row of a chat whose messages
        cannot be found in what the template made of them.
    """
    ends = torch.full(batch.input_ids.shape, NO_END, dtype=torch.long)
    for i, (text, n) in enumerate(zip(texts, batch.lengths.tolist(), strict=True)):
        shown = text.render(host.tokenizer) if isinstance(text, Chat) else text
        encoded = host.tokenizer(shown, add_special_tokens=False, return_offsets_mapping=True)
        row = _ends_in_content(encoded["offset_mapping"], _content_places(text, shown))
        ends[i, n - len(row) : n] = torch.tensor(row, dtype=torch.long)  # BOS may stand in front
    return ends


def common_ends(
    ends: Int[Tensor, "batch pos"], others: Int[Tensor, "batch other_pos"]
) -> Bool[Tensor, "batch pos"]:
    """Which of the ends are also among the others', row by row."""
    same = (ends[:, :, None] == others[:, None, :]).any(dim=2)
    return same & (ends != NO_END)


def tokens_in(ends: Int[Tensor, "batch pos"], spans: Sequence[Span]) -> Tensor:
    """Which tokens end inside the span of their row: `[batch, pos]`, bool."""
    start, end = torch.tensor([list(s) for s in spans]).T
    inside: Tensor = (ends > start[:, None]) & (ends <= end[:, None])
    return inside


def _content_places(text: Text, shown: str) -> list[tuple[int, int, int]] | None:
    """Where the messages stand in the text shown: (first character, end, first of the content).

    None if one of them is not there: the template rewrites it.
    """
    if not isinstance(text, Chat):
        return [(0, len(shown), 0)]
    places, after, begin = [], 0, 0
    for _, said in text.messages:
        wanted, shift = said, 0
        at = shown.find(said, after)
        if at < 0:  # many templates take off the spaces around a message
            wanted, shift = said.strip(), len(said) - len(said.lstrip())
            at = shown.find(wanted, after)
        if at < 0:
            return None
        places.append((at, at + len(wanted), begin + shift))
        after, begin = at + len(wanted), begin + len(said)
    return places


def _ends_in_content(
    offsets: Sequence[tuple[int, int]], places: list[tuple[int, int, int]] | None
) -> list[int]:
    """For each token the end in the content, or -1."""
    out: list[int] = []
    for start, end in offsets:
        found = NO_END
        for first, last, begin in places or ():
            if start < end and first < end <= last:
                found = begin + end - first
        if found != NO_END and out and out[-1] == found:
            out[-1] = NO_END  # bytes of one character: only the last token has read all of it
        out.append(found)
    return out
