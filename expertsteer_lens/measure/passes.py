"""Parts of a measuring pass: batches of texts, and a plan that is told where its prompts end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from expertsteer_lens.data.chat import Text
from expertsteer_lens.hosts.batching import length_batches

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host, TokenBatch
    from expertsteer_lens.steer.plan import SteeringPlan


LOGITS_BYTES = 2**29
"""Most memory for the logits of one pass in float32 (512 MiB), where one text does not take more: a
vocabulary of 262,144 takes a MiB a token."""
MOST_TOKENS = 8192
"""Most tokens of such a pass, padding included."""


def text_batches(
    host: Host, texts: Sequence[Text], batch_size: int
) -> list[tuple[TokenBatch, list[int]]]:
    """Batches of similar length (less padding), each with the indices of its texts; passes whose
    logits all are read, within `LOGITS_BYTES`."""
    tokens = host.tokenize(list(texts))
    most = tokens_of_logits(host)
    batches = length_batches(tokens.lengths.tolist(), batch_size=batch_size, tokens_per_pass=most)
    return [(tokens.part(index), index) for index in batches]


def tokens_of_logits(host: Host) -> int:
    """Most tokens of a pass whose logits all are read."""
    return min(MOST_TOKENS, max(1, LOGITS_BYTES // (4 * host.d_vocab)))


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
