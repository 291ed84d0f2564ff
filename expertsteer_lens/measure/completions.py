"""What steering does to the choice between completions, in nats.

A behaviour's prompt is the prompt to a plan that asks for "prompt", "last_prompt" or "generated"
tokens. Interventions that are on the model already stay in force, so these work inside
`plan.hooks(model)` too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._progress import progress_bar
from expertsteer_lens.data.behaviour import Behaviour

from .passes import steered
from .prepared import CompletionRows

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host
    from expertsteer_lens.steer.plan import SteeringPlan


class Sides(NamedTuple):
    """Log-probabilities of one prompt's completions, nats, each side `[n_completions]`."""

    positive: Tensor
    negative: Tensor


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
    return behaviour_and_accuracy(host, behaviour, plan=plan, batch_size=batch_size)[0]


def choice_accuracy(
    host: Host,
    behaviour: Behaviour,
    *,
    plan: SteeringPlan | None = None,
    batch_size: int | None = None,
) -> Float[Tensor, " n_prompts"]:
    """1 where the likeliest completion is a positive one, else 0; one number a prompt (multiple
    choice by likelihood).

    Log-probabilities are summed over tokens and not normalised by length. A tie between the best of
    both sides is no right answer: 0.
    """
    return behaviour_and_accuracy(host, behaviour, plan=plan, batch_size=batch_size)[1]


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
        for batch in score_batches(host, behaviour, batch_size, plan):
            for sides in batch:
                metric.append(float(metric_of(*sides).double()))
                hits.append(float(sides.positive.max() > sides.negative.max()))
    return torch.tensor(metric, dtype=torch.float64), torch.tensor(hits, dtype=torch.float64)


def metric_of(positive: Tensor, negative: Tensor) -> Tensor:
    """m of one prompt from the log-probabilities of its completions, a scalar in nats.

    Example:
        >>> float(metric_of(torch.tensor([0.5]).log(), torch.tensor([0.25]).log()).exp())
        2.0
    """
    return positive.logsumexp(0) - negative.logsumexp(0)


def repeated_trigrams(text: str) -> float:
    """Share of word trigrams of a text that occurred before in it, in [0, 1]; 0 for fewer than four
    words."""
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return 0.0 if len(grams) < 2 else 1.0 - len(set(grams)) / len(grams)


def default_batch(d_vocab: int) -> int:
    """Completions a pass that keep the logits small: 16 for large vocabularies, up to 128 for small
    ones."""
    return min(128, max(16, 2**21 // d_vocab))


def score_batches(
    host: Host,
    behaviour: Behaviour,
    batch_size: int | None,
    plan: SteeringPlan | None,
    progress: bool | None = False,
) -> Iterator[list[Sides]]:
    """The completions' log-probabilities prompt by prompt, a list for every pass; a prompt is never
    divided."""
    if batch_size is None:
        batch_size = default_batch(host.d_vocab)
    groups = _group_prompts(behaviour, batch_size)
    cost = f"{len(behaviour)} prompts with their completions, forwards and backwards"
    for prompts in progress_bar(groups, "attribution", progress=progress, unit="batch", cost=cost):
        yield _score_prompts(host, behaviour, prompts, plan)


def _group_prompts(behaviour: Behaviour, batch_size: int) -> list[list[int]]:
    """Prompts that go through the model together: at most `batch_size` completions, or one
    prompt."""
    groups: list[list[int]] = [[]]
    count = 0
    for i in range(len(behaviour)):
        size = sum(len(side) for side in behaviour.completions(i))
        if groups[-1] and count + size > batch_size:
            groups.append([])
            count = 0
        groups[-1].append(i)
        count += size
    return groups


def _score_prompts(
    host: Host, behaviour: Behaviour, prompts: Sequence[int], plan: SteeringPlan | None
) -> list[Sides]:
    """One pass over all completions of some prompts."""
    rows = CompletionRows.of(host, behaviour, prompts)
    batch = rows.batch(host, list(range(len(rows.ids))))
    with steered(host, plan, batch.starts):
        logits = host.logits_at(batch.tokens, batch.where)
    log_probs = batch.log_probs(logits)
    scores = log_probs.new_zeros(len(rows.ids)).index_add(
        0, batch.row.to(log_probs.device), log_probs
    )
    owner, good = (
        torch.tensor(values, device=scores.device) for values in (rows.owner, rows.positive)
    )
    return [Sides(scores[(owner == i) & good], scores[(owner == i) & ~good]) for i in prompts]
