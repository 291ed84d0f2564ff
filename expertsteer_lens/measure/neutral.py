"""What steering costs on neutral text: the rise of its negative log-likelihood, and the divergence
from the unsteered model.

A neutral text is one on which steering should change nothing. It counts as prompt up to its middle
token and as continuation after it, which matters only for plans whose positions ask for "prompt",
"last_prompt" or "generated".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens.data.chat import Text
from expertsteer_lens.errors import DataError
from expertsteer_lens.hosts import capture

from .passes import middles, steered, text_batches
from .stream_cache import StreamCache

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host, TokenBatch
    from expertsteer_lens.interventions.vector_edit import VectorEdit
    from expertsteer_lens.steer.plan import SteeringPlan


class NeutralTexts:
    """Texts on which steering should change nothing, with what the unsteered model says of them,
    measured once.

    Args:
        host: the target.
        texts: neutral texts.
        batch_size: most texts per forward pass; fewer where their logits would not fit in half a
            GiB.
        cache_bytes: where the KL is asked for, the unsteered log-probabilities of as many passes
            are kept as fit in this many bytes; the others are made anew for each plan, from the
            stream at the last layer where the host can.

    Raises:
        DataError: the unsteered model gives no finite probabilities on them.

    The stream below a steered layer is kept too (see `StreamCache`), so a coefficient costs the
    blocks above and the output head.
    """

    def __init__(
        self, host: Host, texts: Sequence[Text], *, batch_size: int = 32, cache_bytes: int = 2**30
    ) -> None:
        self.host, self.texts = host, list(texts)
        self._steered, self._unsteered = StreamCache(host), StreamCache(host)
        self._batches = [batch for batch, _ in text_batches(host, self.texts, batch_size)]
        self._base: dict[int, Tensor] = {}
        self._cache_bytes = cache_bytes
        self.n_positions = sum(int(batch.attention_mask.sum()) for batch in self._batches)
        """Tokens that predict something or end a text: where the divergence is taken."""
        self.n_tokens, nll = 0, 0.0
        with torch.no_grad():
            for batch in self._batches:
                log_probs = _log_probs(host, batch)
                nll -= float(_following(log_probs, batch).double().sum())
                self.n_tokens += int(batch.attention_mask[:, 1:].sum())
        self.nll = nll / max(1, self.n_tokens)
        """Mean NLL of the unsteered model, nats per token."""
        if not math.isfinite(self.nll):
            raise DataError(
                f"the mean NLL of the {len(self.texts)} neutral texts is {self.nll} without any "
                "steering; load the model in float32 (float16 overflows above 65504)."
            )
        self._norms: dict[str, float] = {}

    def median_norm(self, hook_name: str) -> float:
        """Of a token's activation in these texts, as `capture` reads it; measured once."""
        if hook_name not in self._norms:
            store = capture(self.host.model, self.texts, [hook_name], positions="all")
            self._norms[hook_name] = store.median_norm(hook_name)
        return self._norms[hook_name]

    def cost(self, plan: SteeringPlan, *, kl: bool = True) -> tuple[float, float | None]:
        """(rise of the mean NLL, mean KL(unsteered || steered)), nats per token; the second is None
        with `kl=False`."""
        nll = divergence = 0.0
        with torch.no_grad():
            for one, apart in self.sums(plan, kl=kl):
                nll += float(one)
                divergence += float(apart)
        return (
            nll / max(1, self.n_tokens) - self.nll,
            divergence / self.n_positions if kl else None,
        )

    def sums(
        self,
        plan: SteeringPlan,
        *,
        kl: bool,
        vector_edits: Sequence[VectorEdit] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batch by batch the summed NLL of its `n_tokens` and the summed KL at its `n_positions`
        (0 with `kl=False`), nats, float64; gradients are the caller's choice, and reach the
        parameters of `vector_edits` (see `PlanRun`)."""
        for i, batch in enumerate(self._batches):
            with self._steered.steered(batch, plan, middles(batch), vector_edits):
                log_probs = _log_probs(self.host, batch)
            nll = -_following(log_probs, batch).double().sum()
            divergence = torch.zeros_like(nll)
            if kl:
                divergence = _divergence(self._unsteered_log_probs(i), log_probs).sum()
            yield nll, divergence

    @torch.no_grad()
    def _unsteered_log_probs(self, i: int) -> Tensor:
        if i in self._base:
            return self._base[i]
        with self._unsteered.unsteered(self._batches[i]):
            log_probs = _log_probs(self.host, self._batches[i])
        kept = sum(rows.numel() for rows in self._base.values())
        if 4 * (kept + log_probs.numel()) <= self._cache_bytes:
            self._base[i] = log_probs
        return log_probs


def neutral_nll(
    host: Host, texts: Sequence[Text], *, plan: SteeringPlan | None = None, batch_size: int = 32
) -> Float[Tensor, "n_texts 2"]:
    """Per text: summed negative log-likelihood in nats, and the number of predicted tokens.

    `x[:, 0].sum() / x[:, 1].sum()` is the mean NLL per token. The first token is never predicted.
    """
    out = torch.zeros(len(texts), 2, dtype=torch.float64)
    with torch.no_grad():
        for batch, index in text_batches(host, texts, batch_size):
            with steered(host, plan, middles(batch)):
                picked = _following(_log_probs(host, batch), batch).double().cpu()
            row = batch.attention_mask[:, 1:].nonzero()[:, 0].cpu()
            nll = torch.zeros(len(index), dtype=torch.float64).index_add(0, row, -picked)
            out[index] = torch.stack([nll, batch.attention_mask[:, 1:].sum(1).double().cpu()], 1)
    return out


def _log_probs(host: Host, batch: TokenBatch) -> Tensor:
    """Of the whole vocabulary at every real token, `[n_tokens, d_vocab]`, text after text."""
    real = batch.attention_mask.bool()
    return host.logits_at(batch, real).float().log_softmax(-1)


def _following(log_probs: Tensor, batch: TokenBatch) -> Tensor:
    """Of these the log-probability of the token that follows, `[n]`; the last of a text has
    none."""
    real = batch.attention_mask.bool()
    has_next = torch.zeros_like(real)
    has_next[:, :-1] = real[:, 1:]
    ids = batch.input_ids[:, 1:][real[:, 1:]].to(log_probs.device)
    rows = has_next[real].nonzero()[:, 0].to(log_probs.device)
    return log_probs[rows, ids]


def _divergence(base: Tensor, steered_log_probs: Tensor) -> Tensor:
    """KL(unsteered || steered) of the next-token distribution at each position, nats, float64."""
    return (base.exp() * (base - steered_log_probs)).sum(-1).double()
