"""What a model answers when it is asked about texts: labels without a single labelled text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_number
from expertsteer_lens._progress import progress_bar
from expertsteer_lens.data.chat import Chat, Text, check_texts
from expertsteer_lens.data.spans import Span, answer_span, check_spans, content
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.hosts import as_host

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host, TokenBatch

ANSWERS = ("Yes", "No")


@torch.no_grad()
def ask_about(
    model: object,
    question: str,
    texts: Sequence[Text],
    *,
    answers: tuple[str, str] = ANSWERS,
    spans: Sequence[Span] | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Float[Tensor, " n"]:
    """log p(answers[0]) - log p(answers[1]) when the model is asked about each text, nats.

    A chat model is asked in its template, any other as plain text that ends with "Answer:"; of each
    answer the first token that tells the two apart is read.

    Args:
        model: any host object with a tokenizer.
        question: what is asked of every text, for instance "Is this text about chess?". Where it
            holds `{text}`, the text stands there; else the text is put in front and "Answer Yes or
            No." behind.
        texts: what is asked about: of a chat its last message if that is the assistant's.
        answers: the wanted answer and the other.
        spans: the part of each text's content that is shown; default: its answer.
        batch_size: texts a pass.
        progress: show a bar.

    Raises:
        ArgumentError: an empty question, other than two answers, or answers that begin with the
            same token.
        DataError: no texts, spans that do not fit them, or logits that are not finite.

    Example:
        >>> from expertsteer_lens import zoo
        >>> _, target = zoo.load_pair()
        >>> about = ask_about(target, "{text}", ["I felt", "He was"], answers=(" glad", " sad"))
        >>> about.shape
        torch.Size([2])
    """
    given = check_texts("texts", texts)
    check_number("batch_size", batch_size, low=1, integer=True)
    if not isinstance(question, str) or not question.strip():
        raise ArgumentError(f"question must be a text that asks something, got {question!r}.")
    if len(answers) != 2 or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ArgumentError(f"answers must be two words, the wanted one first, got {answers!r}.")
    host = as_host(model)
    spans = [answer_span(text) for text in given] if spans is None else check_spans(spans, given)
    asked = [
        _asked(host, question, content(text)[start:end], answers)
        for text, (start, end) in zip(given, spans, strict=True)
    ]
    tokens = _answer_tokens(host, asked[0], answers)
    scores = torch.zeros(len(asked), dtype=torch.float64)
    order = sorted(range(len(asked)), key=lambda i: len(content(asked[i])))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    cost = f"{len(asked)} texts, one question each"
    for index in progress_bar(batches, "asked", progress=progress, unit="batch", cost=cost):
        batch = host.tokenize([asked[i] for i in index])
        log_probs = host.logits_at(batch, _last(batch)).double().log_softmax(-1).cpu()
        scores[index] = log_probs[:, tokens[0]] - log_probs[:, tokens[1]]
    if not bool(scores.isfinite().all()):
        i = int((~scores.isfinite()).nonzero()[0])
        raise DataError(f"the model's answer about texts[{i}] is not finite; load it in float32.")
    return scores.float()


def _asked(host: Host, question: str, text: str, answers: tuple[str, str]) -> Text:
    """The question about one text, as this model is shown it."""
    if "{text}" in question:
        return _shown(host, question.replace("{text}", text), "")
    return _shown(
        host, f"Text: {text}\n{question.strip()} Answer {answers[0]} or {answers[1]}.", "\nAnswer:"
    )


def _shown(host: Host, question: str, end: str) -> Text:
    if getattr(host.tokenizer, "chat_template", None):
        return Chat.ask(question)
    return question + end


def _answer_tokens(host: Host, asked: Text, answers: tuple[str, str]) -> tuple[int, int]:
    """The first tokens in which the two answers differ, if they are the first of both."""
    lead = "" if isinstance(asked, Chat) or answers[0].startswith(" ") else " "
    rows = host.tokenize([asked, *(asked + (lead + answer) for answer in answers)])
    ids = [
        [i for i, real in zip(row, mask, strict=True) if real]
        for row, mask in zip(rows.input_ids.tolist(), rows.attention_mask.tolist(), strict=True)
    ]
    n = len(ids[0])
    first, second = (row[n : n + 1] for row in ids[1:])
    if not first or not second or first == second or ids[1][:n] != ids[0] or ids[2][:n] != ids[0]:
        raise ArgumentError(
            f"answers={answers!r} cannot be told apart by their first token in this model's "
            "vocabulary; choose two words that begin differently."
        )
    return first[0], second[0]


def _last(batch: TokenBatch) -> Tensor:
    """The last real token of each row."""
    mask = batch.attention_mask.bool()
    column = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = torch.where(mask, column, -1).max(1, keepdim=True).values
    return column == last
