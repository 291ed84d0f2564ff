"""What steering does to a model, in nats: completions, neutral text, divergence, and gradients of
these.

All functions take a `Host` (see `expertsteer_lens.hosts`) and an optional plan, which is installed
for each batch and told where its prompts end: a behaviour's prompt is the prompt; a neutral text
counts as prompt up to its middle token and as continuation after it (this matters only for plans
whose positions ask for "prompt", "last_prompt" or "generated"). Interventions that are on the model
already stay in force, so these work inside `plan.hooks(model)` too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens.data.chat import Text
from expertsteer_lens.data.contrast import Behaviour
from expertsteer_lens.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host, TokenBatch
    from expertsteer_lens.steer.plan import SteeringPlan


def behaviour_metric(
    host: Host,
    behaviour: Behaviour,
    *,
    plan: SteeringPlan | None = None,
    batch_size: int | None = None,
) -> Float[Tensor, " n_prompts"]:
    """m = log p(any positive completion) - log p(any negative completion), nats, one number a
    prompt.

    The probability of a completion is the product over its tokens given prompt and preceding
    tokens; the two sums are log-sum-exps over the completions of each side. Where the tokenizer
    merges across the border, tokens from the first one that differs from the prompt's own count as
    completion."""
    with torch.no_grad():
        return torch.cat(
            [m.double().cpu() for m in _metric_batches(host, behaviour, batch_size, plan)]
        )


def choice_accuracy(
    host: Host,
    behaviour: Behaviour,
    *,
    plan: SteeringPlan | None = None,
    batch_size: int | None = None,
) -> Float[Tensor, " n_prompts"]:
    """1 where the likeliest completion is a positive one, else 0; one number a prompt (multiple
    choice by likelihood).

    Log-probabilities are summed over tokens and not normalised by length.
    """
    hits = []
    with torch.no_grad():
        for scores, owner, positive, rows in _score_batches(host, behaviour, batch_size, plan):
            for row in rows:
                mine = owner == row
                hits.append(float(positive[mine][scores[mine].argmax()]))
    return torch.tensor(hits, dtype=torch.float64)


def behaviour_and_accuracy(
    host: Host,
    behaviour: Behaviour,
    *,
    plan: SteeringPlan | None = None,
    batch_size: int | None = None,
) -> tuple[Float[Tensor, " n_prompts"], Float[Tensor, " n_prompts"]]:
    """`behaviour_metric` and `choice_accuracy` from one pass over the completions."""
    metric, hits = [], []
    with torch.no_grad():
        for scores, owner, positive, rows in _score_batches(host, behaviour, batch_size, plan):
            for row in rows:
                mine = owner == row
                good, bad = scores[mine & positive], scores[mine & ~positive]
                metric.append(float((good.logsumexp(0) - bad.logsumexp(0)).double()))
                hits.append(float(good.max() > bad.max()))
    return torch.tensor(metric, dtype=torch.float64), torch.tensor(hits, dtype=torch.float64)


def behaviour_gradient(
    host: Host,
    behaviour: Behaviour,
    hook_names: Sequence[str],
    *,
    batch_size: int = 128,
    progress: bool = False,
) -> dict[str, Float[Tensor, " d_model"]]:
    """Mean over prompts of the sum over token positions of dm/dh at each hook point.

    First-order effect of adding `delta` at every position: `gradient[hook] @ delta` nats
    (attribution patching). One forward and one backward pass per batch, whatever the number of hook
    points."""

    def objective() -> Iterator[Tensor]:
        for metric in _metric_batches(host, behaviour, batch_size, None, progress):
            yield metric.sum() / len(behaviour)

    return _gradients(host, hook_names, objective)


def readout_gradient(
    host: Host,
    texts: Sequence[Text],
    readout: Float[Tensor, " d_model"],
    hook_names: Sequence[str],
    *,
    batch_size: int = 128,
) -> dict[str, Float[Tensor, " d_model"]]:
    """As `behaviour_gradient`, for the metric "last-token state of the last layer, projected on
    `readout`".

    The metric used where no completions are given: `readout` is the target's own mean difference at
    its last layer."""
    last = host.hook_names()[-1]
    unit = readout / readout.norm()

    def objective() -> Iterator[Tensor]:
        for start in range(0, len(texts), batch_size):
            batch = host.tokenize(list(texts[start : start + batch_size]))
            seen: list[Tensor] = []
            with host.intervene({last: seen.append}):
                host.forward(batch)
            state = seen[0].float()
            lengths = batch.attention_mask.sum(1) - 1
            picked = state[
                torch.arange(state.shape[0], device=state.device), lengths.to(state.device)
            ]
            yield (picked @ unit.to(picked)).sum() / len(texts)

    return _gradients(host, hook_names, objective)


class NeutralTexts:
    """Texts on which steering should change nothing, with what the unsteered model says of them,
    measured once.

    Args:
        host: the target.
        texts: neutral texts.
        batch_size: texts per forward pass.
        cache_bytes: the unsteered log-probabilities are kept if they fit in this many bytes, else
            measured anew for each KL.
    """

    def __init__(
        self, host: Host, texts: Sequence[Text], *, batch_size: int = 32, cache_bytes: int = 2**28
    ) -> None:
        self.host, self.texts = host, list(texts)
        self._batches = [batch for batch, _ in _text_batches(host, self.texts, batch_size)]
        self._base: list[Tensor] | None = []
        self.n_tokens, nll, used = 0, 0.0, 0
        with torch.no_grad():
            for batch in self._batches:
                log_probs = host.forward(batch).float().log_softmax(-1)
                token_log_probs, valid = _picked(log_probs, batch)
                nll -= float((token_log_probs * valid).double().sum())
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
                with _steered(self.host, plan, _middles(batch)):
                    steered = self.host.forward(batch).float().log_softmax(-1)
                token_log_probs, valid = _picked(steered, batch)
                nll -= float((token_log_probs * valid).double().sum())
                if not kl:
                    continue
                base = (
                    self._base[i]
                    if self._base is not None
                    else self.host.forward(batch).float().log_softmax(-1)
                )
                mask = batch.attention_mask.to(steered)
                divergence += float((_kl(base, steered) * mask).double().sum())
                n_positions += int(mask.sum())
        return nll / max(1, self.n_tokens) - self.nll, divergence / n_positions if kl else None


def _kl(base: Tensor, steered: Tensor) -> Tensor:
    return (base.exp() * (base - steered)).sum(-1)


def neutral_nll(
    host: Host, texts: Sequence[Text], *, plan: SteeringPlan | None = None, batch_size: int = 32
) -> Float[Tensor, "n_texts 2"]:
    """Per text: summed negative log-likelihood in nats, and the number of predicted tokens.

    `x[:, 0].sum() / x[:, 1].sum()` is the mean NLL per token. The first token is never predicted.
    """
    rows = []
    with torch.no_grad():
        for batch, index in _text_batches(host, texts, batch_size):
            with _steered(host, plan, _middles(batch)):
                logits = host.forward(batch)
            token_log_probs, valid = _token_log_probs(logits, batch)
            nll = -(token_log_probs * valid).sum(1)
            rows.append(
                (index, torch.stack([nll.double().cpu(), valid.sum(1).double().cpu()], dim=1))
            )
    return _restore(rows)


def kl_per_token(
    host: Host, texts: Sequence[Text], plan: SteeringPlan, *, batch_size: int = 32
) -> Float[Tensor, "n_texts 2"]:
    """Per text: summed KL(unsteered || steered) of the next-token distribution in nats, and the
    number of positions."""
    rows = []
    with torch.no_grad():
        for batch, index in _text_batches(host, texts, batch_size):
            base = host.forward(batch).float().log_softmax(-1)
            with _steered(host, plan, _middles(batch)):
                steered = host.forward(batch).float().log_softmax(-1)
            kl = _kl(base, steered)
            mask = batch.attention_mask.to(kl)
            pair = torch.stack(
                [(kl * mask).sum(1).double().cpu(), mask.sum(1).double().cpu()], dim=1
            )
            rows.append((index, pair))
    return _restore(rows)


def repeated_trigrams(text: str) -> float:
    """Share of word trigrams of a text that occurred before in it, in [0, 1]; 0 for fewer than four
    words."""
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return 0.0 if len(grams) < 2 else 1.0 - len(set(grams)) / len(grams)


def _gradients(
    host: Host, hook_names: Sequence[str], objective: Callable[[], Iterator[Tensor]]
) -> dict[str, Float[Tensor, " d_model"]]:
    """d objective / d h summed over batch and positions; padding contributes nothing because
    nothing attends to it."""
    names = list(hook_names)
    totals: dict[str, Tensor] = {}
    live: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[Tensor], Tensor]:
        def fn(h: Tensor) -> Tensor:
            # A zero that requires grad makes the graph start here even if every parameter is
            # frozen.
            probe = torch.zeros_like(h, requires_grad=True)
            live[name] = probe
            return h + probe

        return fn

    with torch.enable_grad(), host.intervene({name: watch(name) for name in names}):
        for value in objective():
            probes = [live[name] for name in names]
            grads = torch.autograd.grad(value, probes, allow_unused=True)
            for name, grad in zip(names, grads, strict=True):
                if grad is None:
                    continue
                flat = grad.detach().double().reshape(-1, grad.shape[-1]).sum(0).cpu()
                totals[name] = totals.get(name, torch.zeros_like(flat)) + flat
    silent = [name for name in names if name not in totals]
    if silent:
        raise ArgumentError(
            f"the metric does not depend on hook {silent[0]!r}; steering there cannot act on it."
        )
    return totals


def _metric_batches(
    host: Host,
    behaviour: Behaviour,
    batch_size: int | None,
    plan: SteeringPlan | None,
    progress: bool = False,
) -> Iterator[Tensor]:
    for scores, owner, positive, rows in _score_batches(
        host, behaviour, batch_size, plan, progress
    ):
        values = []
        for row in rows:
            good, bad = scores[(owner == row) & positive], scores[(owner == row) & ~positive]
            values.append(good.logsumexp(0) - bad.logsumexp(0))
        yield torch.stack(values)


def default_batch(d_vocab: int) -> int:
    """Completions a pass that keep the logits small: 16 for large vocabularies, up to 128 for small
    ones."""
    return min(128, max(16, 2**21 // d_vocab))


def _score_batches(
    host: Host,
    behaviour: Behaviour,
    batch_size: int | None,
    plan: SteeringPlan | None,
    progress: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor, list[int]]]:
    """Yield (log p of each completion, prompt index of each, is it positive, prompt indices) for
    whole prompts at a time."""
    if batch_size is None:
        batch_size = default_batch(host.d_vocab)
    groups: list[list[int]] = [[]]
    count = 0
    for i in range(len(behaviour)):
        size = sum(len(side) for side in behaviour.completions(i))
        if groups[-1] and count + size > batch_size:
            groups.append([])
            count = 0
        groups[-1].append(i)
        count += size
    for rows in _progress(groups, "attribution", progress):
        entries = [
            (i, is_good, completion)
            for i in rows
            for is_good, side in zip((True, False), behaviour.completions(i), strict=True)
            for completion in side
        ]
        owner, positive = [i for i, _, _ in entries], [good for _, good, _ in entries]
        prompts = dict(
            zip(rows, _rows(host.tokenize([behaviour.prompts[i] for i in rows])), strict=True)
        )
        batch = host.tokenize([behaviour.prompts[i] + completion for i, _, completion in entries])
        starts = []
        for (i, _, completion), ids in zip(entries, _rows(batch), strict=True):
            starts.append(max(1, _common_prefix(prompts[i], ids)))
            if starts[-1] >= len(ids):
                raise DataError(
                    f"completion {completion!r} of prompt {i} adds no token; give it a text."
                )
        with _steered(host, plan, starts):
            token_log_probs, valid = _token_log_probs(host.forward(batch), batch)
        column = torch.arange(1, valid.shape[1] + 1, device=valid.device)
        counted = valid & (column[None] >= torch.tensor(starts, device=valid.device)[:, None])
        scores = torch.where(counted, token_log_probs, torch.zeros_like(token_log_probs)).sum(1)
        yield (
            scores,
            torch.tensor(owner, device=scores.device),
            torch.tensor(positive, device=scores.device),
            rows,
        )


def _token_log_probs(logits: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Log-probability of each token but the first given those before it, `[batch, pos - 1]`, and
    which of them are real."""
    return _picked(logits.float().log_softmax(-1), batch)


def _picked(log_probs: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    ids = batch.input_ids.to(log_probs.device)
    picked = log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return picked, batch.attention_mask[:, 1:].bool().to(log_probs.device)


def _text_batches(
    host: Host, texts: Sequence[Text], batch_size: int
) -> Iterator[tuple[TokenBatch, list[int]]]:
    """Batches of similar length (less padding), each with the indices of its texts."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        yield host.tokenize([texts[i] for i in index]), index


def _restore(rows: list[tuple[list[int], Tensor]]) -> Tensor:
    index = torch.tensor([i for part, _ in rows for i in part])
    values = torch.cat([v for _, v in rows])
    out = torch.empty_like(values)
    out[index] = values
    return out


def _rows(batch: TokenBatch) -> list[list[int]]:
    """The real ids of each row."""
    pairs = zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True)
    return [[i for i, real in zip(ids, mask, strict=True) if real] for ids, mask in pairs]


def _common_prefix(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def _progress(items: Sequence[Any], label: str, show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(items, desc=label, leave=False) if show else items


def _steered(
    host: Host, plan: SteeringPlan | None, prompt_lengths: Sequence[int]
) -> AbstractContextManager[Any]:
    return (
        nullcontext()
        if plan is None
        else plan.hooks(host.model, prompt_lengths=list(prompt_lengths))
    )


def _middles(batch: TokenBatch) -> list[int]:
    return [max(1, n // 2) for n in batch.lengths.tolist()]
