"""Places in a text that do not depend on a tokenizer: characters of its content.

The *content* of a plain text is the text. The content of a chat is what its messages say, one after
the other, without the words that a template puts around them. Two models may show and cut a text
differently, but its content is the same for both, so a character of the content is a place that
both can be asked about. A *span* is a half-open range `(start, end)` of characters of the content.
"""

from __future__ import annotations

from collections.abc import Sequence

from expertsteer_lens.errors import DataError

from .chat import Chat, Text

Span = tuple[int, int]


def content(text: Text) -> str:
    """What a text says, without what a chat template adds.

    Example:
        >>> content(Chat.ask("Why?", "Because."))
        'Why?Because.'
    """
    return "".join(said for _, said in text.messages) if isinstance(text, Chat) else text


def answer_span(text: Text) -> Span:
    """The answer in a text: the last message of a chat if it is the assistant's, else everything.

    Example:
        >>> answer_span(Chat.ask("Why?", "Because."))
        (4, 12)
        >>> answer_span("Because.")
        (0, 8)
    """
    whole = len(content(text))
    if isinstance(text, Chat) and text.messages[-1][0] == "assistant":
        return whole - len(text.messages[-1][1]), whole
    return 0, whole


def differing_spans(positive: Text, negative: Text) -> tuple[Span, Span]:
    """Where the two texts of a contrast pair differ, in the content of each.

    Chats that end with the assistant's message: that message. Otherwise the part from the first
    word that differs to the last word that differs; the whole texts where nothing is left of one
    of them (one begins or ends with the other), or where they are equal.

    Example:
        >>> differing_spans("The film was a joy to watch.", "The film was a pain to watch.")
        ((15, 18), (15, 19))
    """
    ends = [isinstance(t, Chat) and t.messages[-1][0] == "assistant" for t in (positive, negative)]
    if all(ends):
        return answer_span(positive), answer_span(negative)
    a, b = content(positive), content(negative)
    start = _shared_words(a, b)
    tail = _shared_words(a[start:][::-1], b[start:][::-1])
    spans = (start, len(a) - tail), (start, len(b) - tail)
    if any(
        end - begin <= 0 or not s[begin:end].strip()
        for (begin, end), s in zip(spans, (a, b), strict=True)
    ):
        return (0, len(a)), (0, len(b))
    return spans


def check_spans(spans: Sequence[Span], texts: Sequence[Text]) -> list[Span]:
    """The spans as tuples, one per text, each inside the content of its text.

    Raises:
        DataError: another number of spans than texts, or a span that is empty or outside.
    """
    if len(spans) != len(texts):
        raise DataError(
            f"spans must hold one (start, end) per text: expected {len(texts)}, got {len(spans)}."
        )
    out = []
    for i, (span, text) in enumerate(zip(spans, texts, strict=True)):
        size = len(content(text))
        start, end = (int(x) for x in span)
        if not 0 <= start < end <= size:
            raise DataError(
                f"spans[{i}] is ({start}, {end}), which is empty or outside of the {size} "
                "characters of its text; a span is (start, end) with start < end."
            )
        out.append((start, end))
    return out


def _shared_words(a: str, b: str) -> int:
    """Length of the longest common beginning that does not cut a word in either."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    while n > 0 and not a[n - 1].isspace() and not (n == len(a) and n == len(b)):
        n -= 1
    return n
