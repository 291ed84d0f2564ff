"""What steering costs on neutral text: the rise of its negative log-likelihood, and the divergence
from the unsteered model.

A neutral text is one on which steering should change nothing. It counts as prompt up to its middle
token and as continuation after it, which matters only for plans whose positions ask for "prompt",
"last_prompt" or "generated".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens.data.chat import Text

from .passes import middles, pick_tokens, steered, text_batches, token_log_probs
from .stream_cache import StreamCache

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host, TokenBatch
    from expertsteer_lens.interventions.edits import VectorEdit
    from expertsteer_lens.steer.plan import SteeringPlan


class NeutralTexts:
    """Texts on which steering should change nothing, with what the unsteered model says of them,
    measured once.

    Args:
        host: the target.
        texts: neutral texts.
        batch_size: texts per forward pass.
        cache_bytes: the unsteered log-probabilities are kept if they fit in this many bytes, else
            made anew for each KL, from the stream at the last layer where the host can.

    The stream below a steered layer is kept too (see `StreamCache`), so a coefficient costs the
    blocks above and the output head.
    """

    def __init__(
        self, host: Host, texts: Sequence[Text], *, batch_size: int = 32, cache_bytes: int = 2**28
    ) -> None:
        self.host, self.texts = host, list(texts)
        self._steered, self._unsteered = StreamCache(host), StreamCache(host)
        self._batches = [batch for batch, _ in text_batches(host, self.texts, batch_size)]
        self._base: list[Tensor] | None = []
        self.n_positions = sum(int(batch.attention_mask.sum()) for batch in self._batches)
        """Tokens that predict something or end a text: where the divergence is taken."""
        self.n_tokens, nll, used = 0, 0.0, 0
        with torch.no_grad():
            for batch in self._batches:
                log_probs = host.forward(batch).float().log_softmax(-1)
                picked, valid = pick_tokens(log_probs, batch)
                nll -= float((picked * valid).double().sum())
                self.n_tokens += int(valid.sum())
                used += log_probs.numel() * 4
                if used > cache_bytes:
                    self._base = None
                if self._base is not None:
                    self._base.append(log_probs)
        self.nll = nll / max(1, self.n_tokens)
        """Mean NLL of the unsteered model, nats per token."""

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
                log_probs = self.host.forward(batch).float().log_softmax(-1)
            picked, valid = pick_tokens(log_probs, batch)
            nll = -(picked * valid).double().sum()
            divergence = torch.zeros_like(nll)
            if kl:
                base = self._base[i] if self._base is not None else self._base_anew(batch)
                mask = batch.attention_mask.to(log_probs)
                divergence = (_divergence(base, log_probs) * mask).double().sum()
            yield nll, divergence

    @torch.no_grad()
    def _base_anew(self, batch: TokenBatch) -> Tensor:
        with self._unsteered.unsteered(batch):
            return self.host.forward(batch).float().log_softmax(-1)


def neutral_nll(
    host: Host, texts: Sequence[Text], *, plan: SteeringPlan | None = None, batch_size: int = 32
) -> Float[Tensor, "n_texts 2"]:
    """Per text: summed negative log-likelihood in nats, and the number of predicted tokens.

    `x[:, 0].sum() / x[:, 1].sum()` is the mean NLL per token. The first token is never predicted.
    """
    rows = []
    with torch.no_grad():
        for batch, index in text_batches(host, texts, batch_size):
            with steered(host, plan, middles(batch)):
                logits = host.forward(batch)
            picked, valid = token_log_probs(logits, batch)
            nll = -(picked * valid).sum(1)
            rows.append(
                (index, torch.stack([nll.double().cpu(), valid.sum(1).double().cpu()], dim=1))
            )
    return _restore(rows)


def _restore(rows: list[tuple[list[int], Tensor]]) -> Tensor:
    index = torch.tensor([i for part, _ in rows for i in part])
    values = torch.cat([v for _, v in rows])
    out = torch.empty_like(values)
    out[index] = values
    return out


def _divergence(base: Tensor, steered_log_probs: Tensor) -> Tensor:
    """KL(unsteered || steered) of the next-token distribution at each position, nats."""
    return (base.exp() * (base - steered_log_probs)).sum(-1)
