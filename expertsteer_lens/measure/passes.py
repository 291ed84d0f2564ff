"""Parts of a measuring pass: log-probabilities of tokens, batches of texts, and a plan that is told
where its prompts end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from expertsteer_lens.data.chat import Text

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host, TokenBatch
    from expertsteer_lens.steer.plan import SteeringPlan


def token_log_probs(logits: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Log-probability of each token but the first given those before it, `[batch, pos - 1]`, and
    which of them are real."""
    return pick_tokens(logits.float().log_softmax(-1), batch)


def pick_tokens(log_probs: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """The same from log-probabilities of the whole vocabulary, `[batch, pos, d_vocab]`."""
    ids = batch.input_ids.to(log_probs.device)
    picked = log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return picked, batch.attention_mask[:, 1:].bool().to(log_probs.device)


def text_batches(
    host: Host, texts: Sequence[Text], batch_size: int
) -> Iterator[tuple[TokenBatch, list[int]]]:
    """Batches of similar length (less padding), each with the indices of its texts."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        yield host.tokenize([texts[i] for i in index]), index


def steered(
    host: Host, plan: SteeringPlan | None, prompt_lengths: Sequence[int]
) -> AbstractContextManager[Any]:
    """The block in which the plan acts; without a plan, a block in which nothing happens."""
    if plan is None:
        return nullcontext()
    return plan.hooks(host.model, prompt_lengths=list(prompt_lengths))


def middles(batch: TokenBatch) -> list[int]:
    """Where a neutral text stops counting as prompt: its middle token."""
    return [max(1, n // 2) for n in batch.lengths.tolist()]
