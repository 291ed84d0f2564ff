"""How much likelier an instruction makes a text: labels from a sentence, without a labelled text.

What one would write into the prompt to get the wanted texts says, of texts that are there already,
which are the wanted ones: a model that follows the instruction finds them likelier with it than
without. Nothing is asked of the model but to read, so models that answer no question can do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_number
from expertsteer_lens._progress import progress_bar
from expertsteer_lens.data.chat import Chat, Text, check_texts
from expertsteer_lens.data.spans import Span, answer_span, check_spans
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.hosts.batching import length_batches
from expertsteer_lens.hosts.reading import read_tokens
from expertsteer_lens.measure.passes import tokens_of_logits

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host


@torch.no_grad()
def likelier_under(
    model: object,
    instruction: str,
    texts: Sequence[Text],
    *,
    against: str | None = None,
    spans: Sequence[Span] | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Float[Tensor, " n"]:
    """Log-probability of each text with the instruction minus that without, nats per token.

    A chat gets the instruction as its system message (in front of the one it has), or in front of
    what the user says first where the model's template shows no system message; a plain text gets
    it as a line above.

    Args:
        model: any host object with a fast tokenizer.
        instruction: what one would write to get the wanted texts, for instance "You are an expert
            in immunology.".
        texts: what is scored: of a chat its last message if that is the assistant's, given
            everything before; a plain text as a whole.
        against: the instruction that the other reading has instead of none, for instance "You are
            no expert.".
        spans: the part of each text's content that is scored; default: its answer.
        batch_size: most texts a pass; fewer where their logits would not fit in half a GiB.
        progress: show a bar.

    Raises:
        ArgumentError: an instruction without text.
        DataError: no texts, spans that do not fit them, a text of one token with nothing before it,
            or log-probabilities that are not finite.
        HostError: the tokenizer does not say which characters its tokens cover.

    Example:
        >>> from expertsteer_lens import zoo
        >>> _, target = zoo.load_pair()
        >>> sad, happy = likelier_under(target, "She was sad.", ["He felt sad.", "He felt happy."])
        >>> bool(sad > happy)
        True
    """
    for name, given in (("instruction", instruction), ("against", against)):
        optional = name == "against" and given is None
        if not optional and (not isinstance(given, str) or not given.strip()):
            raise ArgumentError(f"{name} must be a text that says something, got {given!r}.")
    with_it, without = (
        log_probs_under(model, words, texts, spans=spans, batch_size=batch_size, progress=progress)
        for words in (instruction, against)
    )
    return (with_it - without).float()


@torch.no_grad()
def log_probs_under(
    model: object,
    instruction: str | None,
    texts: Sequence[Text],
    *,
    spans: Sequence[Span] | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Float[Tensor, " n"]:
    """Log-probability of each text behind an instruction, nats per token, float64; None: behind
    none. Arguments and errors are those of `likelier_under`, which is the difference of two."""
    given = check_texts("texts", texts)
    check_number("batch_size", batch_size, low=1, integer=True)
    host = as_host(model)
    host.check_ready()
    of = [answer_span(text) for text in given] if spans is None else check_spans(spans, given)
    shown = _instructed(host, instruction, given, of)
    scores = _log_probs(host, *shown, batch_size=batch_size, progress=progress)
    if not bool(scores.isfinite().all()):
        i = int((~scores.isfinite()).nonzero()[0])
        raise DataError(
            f"the log-probability of texts[{i}] is not finite; load the model in float32."
        )
    return scores


def _instructed(
    host: Host, instruction: str | None, texts: Sequence[Text], spans: Sequence[Span]
) -> tuple[list[Text], list[Span]]:
    """The texts behind the instruction, and where the spans are then."""
    if instruction is None:
        return list(texts), list(spans)
    out: list[Text] = []
    moved: list[Span] = []
    for text, (start, end) in zip(texts, spans, strict=True):
        shown, n = _one_instructed(host, instruction, text)
        out.append(shown)
        moved.append((start + n, end + n))
    return out, moved


def _one_instructed(host: Host, instruction: str, text: Text) -> tuple[Text, int]:
    """One text behind the instruction, and how many characters of content that puts in front."""
    if isinstance(text, str):
        return f"{instruction}\n{text}", len(instruction) + 1
    role, content = text.messages[0]
    front, rest = instruction, text.messages
    if role == "system":
        front, rest = f"{instruction}\n\n", text.messages[1:]
    system = front + (content if role == "system" else "")
    chat = Chat((("system", system), *rest), text.template)
    if _shows(host, chat, instruction):
        return chat, len(front)
    return f"{instruction}\n" + text, len(instruction) + 1


def _shows(host: Host, chat: Chat, instruction: str) -> bool:
    """Whether the model's template shows the system message: some refuse it, some leave it out."""
    try:
        return instruction.strip() in chat.render(host.tokenizer)
    except DataError:
        return False


def _log_probs(
    host: Host, texts: list[Text], spans: list[Span], *, batch_size: int, progress: bool | None
) -> Float[Tensor, " n"]:
    """Mean log-probability of the tokens in each span, nats, float64."""
    tokens = host.tokenize(texts)
    chosen = read_tokens(host, texts, tokens, "answer", spans).clone()
    chosen[:, 0] = False  # nothing predicts the first token
    counts = chosen.sum(1).cpu()
    if not bool(counts.all()):
        i = int((counts == 0).nonzero()[0])
        raise DataError(
            f"texts[{i}] has one token and nothing before it, so no probability; leave it out."
        )
    sums = torch.zeros(len(texts), dtype=torch.float64)
    batches = length_batches(
        tokens.lengths.tolist(), batch_size=batch_size, tokens_per_pass=tokens_of_logits(host)
    )
    cost = f"{len(texts)} texts"
    for index in progress_bar(batches, "read", progress=progress, unit="batch", cost=cost):
        batch = tokens.part(index)
        wanted = chosen[index, : batch.input_ids.shape[1]]
        where = torch.zeros_like(wanted)
        where[:, :-1] = wanted[:, 1:]
        logits = host.logits_at(batch, where).float()
        following = batch.input_ids[wanted].to(logits.device)
        picked = logits.gather(-1, following[:, None])[:, 0] - logits.logsumexp(-1)
        row = wanted.nonzero()[:, 0].cpu()
        sums[index] = torch.zeros(len(index), dtype=torch.float64).index_add(
            0, row, picked.double().cpu()
        )
    return sums / counts
