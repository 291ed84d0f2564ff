"""Completions of a behaviour, made ready once and scored under many plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.errors import DataError
from expertsteer_lens.hosts.parts import TokenBatch, pad_right

from .stream_cache import CACHE_BYTES, StreamCache

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host
    from expertsteer_lens.interventions.vector_edit import VectorEdit
    from expertsteer_lens.steer.plan import SteeringPlan


@dataclass(frozen=True, eq=False)
class CompletionRows:
    """Completions with their prompts as ids, a row for each completion."""

    owner: list[int]
    """Index of the prompt, by row."""
    positive: list[bool]
    ids: list[list[int]]
    starts: list[int]
    """First token of the completion, by row: where the tokenizer merges across the border, the
    first one that differs from the prompt's own."""

    @classmethod
    def of(cls, host: Host, behaviour: Behaviour, prompts: Sequence[int]) -> CompletionRows:
        """The completions of some prompts.

        Raises:
            DataError: a completion adds no token to its prompt.
        """
        entries = [
            (i, good, completion)
            for i in prompts
            for good, side in zip((True, False), behaviour.completions(i), strict=True)
            for completion in side
        ]
        alone = _rows(host.tokenize([behaviour.prompts[i] for i in prompts]))
        prompt_ids = dict(zip(prompts, alone, strict=True))
        rows = _rows(host.tokenize([behaviour.prompts[i] + text for i, _, text in entries]))
        starts = []
        for (i, _, completion), row in zip(entries, rows, strict=True):
            starts.append(max(1, _common_prefix(prompt_ids[i], row)))
            if starts[-1] >= len(row):
                raise DataError(
                    f"completion {completion!r} of prompt {i} adds no token; give it a text."
                )
        return cls([i for i, _, _ in entries], [good for _, good, _ in entries], rows, starts)

    def batch(self, host: Host, index: list[int]) -> CompletionBatch:
        """Some rows, ready for a pass."""
        tokens = pad_right([self.ids[i] for i in index], host.pad_id).to(host.device)
        starts = [self.starts[i] for i in index]
        column = torch.arange(tokens.input_ids.shape[1])[None]
        first = torch.tensor(starts)[:, None] - 1
        last = torch.tensor([len(self.ids[i]) for i in index])[:, None] - 2
        return CompletionBatch(tokens, index, starts, (column >= first) & (column <= last))


@dataclass(frozen=True, eq=False)
class CompletionBatch:
    """Completions with their prompts, for one pass."""

    tokens: TokenBatch
    index: list[int]
    """Which completions these rows are."""
    starts: list[int]
    """First token of the completion, by row."""
    where: Bool[Tensor, "batch pos"]
    """Positions whose next token belongs to the completion: where logits are read."""

    def log_probs(self, logits: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
        """Of the tokens of the completions, nats, float32 on the device of the logits at
        `where`."""
        following = self.tokens.input_ids[:, 1:].cpu()[self.where[:, :-1]].to(logits.device)
        return logits.float().log_softmax(-1).gather(-1, following[:, None])[:, 0]

    @property
    def row(self) -> Tensor:
        """The row of each of these tokens."""
        return self.where.nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class CompletionScores:
    """Log-probabilities of every completion of a behaviour under one plan."""

    total: Float[Tensor, " n_completions"]
    """Sum over the tokens of the completion, nats."""
    n_tokens: Float[Tensor, " n_completions"]
    owner: Tensor
    """Index of the prompt of each completion."""
    positive: Bool[Tensor, " n_completions"]

    @property
    def per_token(self) -> Float[Tensor, " n_completions"]:
        """Mean over the tokens of the completion, nats per token."""
        return self.total / self.n_tokens

    def log_odds(self) -> Float[Tensor, " n_prompts"]:
        """log p(any positive completion) - log p(any negative), nats; see `behaviour_metric`."""
        return torch.stack(
            [good.logsumexp(0) - bad.logsumexp(0) for good, bad in self._sides(self.total)]
        )

    def margin_per_token(self) -> Float[Tensor, " n_prompts"]:
        """Mean over positive completions of nats per token, minus that over negative ones.

        For completions of real length: a sum over tens of tokens swings by tens of nats with
        their length, and so does what random directions reach.
        """
        return torch.stack([good.mean() - bad.mean() for good, bad in self._sides(self.per_token)])

    def correct(self, *, per_token: bool = False) -> Float[Tensor, " n_prompts"]:
        """1 where the likeliest completion (by sum, or per token) is a positive one; ties are 0."""
        values = self.per_token if per_token else self.total
        return torch.stack([(g.max() > b.max()).double() for g, b in self._sides(values)])

    def _sides(self, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        n = int(self.owner.max()) + 1
        mine = [self.owner == i for i in range(n)]
        return [(values[m & self.positive], values[m & ~self.positive]) for m in mine]


class Completions:
    """The completions of a behaviour as batches of tokens, for scoring under many plans.

    Tokenised once, in batches of similar length. Where the host can run from a layer, the unsteered
    stream below the steered layer is kept for as long as the same layer is asked for, so a further
    plan costs only the blocks above; and the output head is applied only where a completion's next
    token is read. The numbers are those of full passes, up to the rounding of the output head.

    Args:
        host: the target.
        behaviour: prompts with completions.
        max_tokens: tokens in a batch, padding included.
        cache_bytes: most memory for kept streams; what does not fit is computed anew.

    Raises:
        DataError: a completion adds no token to its prompt.

    Cost: with B the share of blocks above the steered layer and H the share of the output head, a
    plan costs about B + H of a pass over prompts and completions, and one pass per change of layer.
    """

    def __init__(
        self,
        host: Host,
        behaviour: Behaviour,
        *,
        max_tokens: int = 2048,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.host, self.behaviour = host, behaviour
        self._cache = StreamCache(host, cache_bytes)
        rows = CompletionRows.of(host, behaviour, range(len(behaviour)))
        self.owner, self.positive = torch.tensor(rows.owner), torch.tensor(rows.positive)
        groups = _group_by_length([len(row) for row in rows.ids], max_tokens)
        self.batches = [rows.batch(host, index) for index in groups]

    @torch.no_grad()
    def scores(self, plan: SteeringPlan | None = None) -> CompletionScores:
        """Log-probabilities under the plan (None: unsteered)."""
        total = torch.zeros(len(self.owner), dtype=torch.float64)
        counts = torch.zeros(len(self.owner), dtype=torch.float64)
        for batch in self.batches:
            total[batch.index] = self.totals(batch, plan)
            counts[batch.index] = torch.bincount(batch.row, minlength=len(batch.index)).double()
        return CompletionScores(total, counts, self.owner, self.positive)

    def totals(
        self,
        batch: CompletionBatch,
        plan: SteeringPlan | None,
        vector_edits: Sequence[VectorEdit] | None = None,
    ) -> Float[Tensor, " rows"]:
        """Log-probability of each completion of a batch, float64 on the CPU; gradients are the
        caller's choice, and reach the parameters of `vector_edits` (see `PlanRun`)."""
        tokens = batch.tokens
        with self._cache.steered(tokens, plan, torch.tensor(batch.starts), vector_edits):
            logits = self.host.logits_at(tokens, batch.where)
        zeros = torch.zeros(len(batch.index), dtype=torch.float64)
        return zeros.index_add(0, batch.row, batch.log_probs(logits).double().cpu())


def _group_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in groups of similar length, each of at most `max_tokens` with its padding."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not groups or (len(groups[-1]) + 1) * lengths[i] > max_tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


def _rows(batch: TokenBatch) -> list[list[int]]:
    """The real ids of each row."""
    pairs = zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True)
    return [[i for i, real in zip(ids, mask, strict=True) if real] for ids, mask in pairs]


def _common_prefix(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
