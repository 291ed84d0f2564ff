"""What steering costs on neutral text: the rise of its negative log-likelihood, and the divergence
from the unsteered model.

A neutral text is one on which steering should change nothing. It counts as prompt up to its middle
token and as continuation after it, which matters only for plans whose positions ask for "prompt",
"last_prompt" or "generated".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens.data.chat import Text

from .passes import middles, pick_tokens, steered, text_batches, token_log_probs
from .stream_cache import StreamCache

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host, TokenBatch
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
        n_positions = 0
        with torch.no_grad():
            for i, batch in enumerate(self._batches):
                with self._steered.steered(batch, plan, middles(batch)):
                    log_probs = self.host.forward(batch).float().log_softmax(-1)
                picked, valid = pick_tokens(log_probs, batch)
                nll -= float((picked * valid).double().sum())
                if not kl:
                    continue
                base = self._base[i] if self._base is not None else self._base_anew(batch)
                mask = batch.attention_mask.to(log_probs)
                divergence += float((_divergence(base, log_probs) * mask).double().sum())
                n_positions += int(mask.sum())
        return nll / max(1, self.n_tokens) - self.nll, divergence / n_positions if kl else None

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
