"""Paired states of tokens: what both models know after the same words of the same text.

The two tokenizers cut a text differently, but many of their tokens end at the same character. One
state a text gives as many paired rows as there are texts, hopeless for a map between widths of
hundreds; token pairs give fifty times as many from the same texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expertsteer_lens._progress import progress_bar
from expertsteer_lens.align import PairedMoments
from expertsteer_lens.data.chat import Text
from expertsteer_lens.hosts.token_ends import NO_END, gives_offsets, token_ends
from expertsteer_lens.learn.directions import mean_difference
from expertsteer_lens.pair.rules import allowed_targets

from .config import ExpertSteerConfig
from .fit_data import FitData, PairKey, labels_of

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host


def why_not_tokens(expert: object, target: Host) -> str | None:
    """Why the maps of this fit cannot be fitted on token pairs; None if they can."""
    tokenizer = getattr(expert, "tokenizer", None)
    if tokenizer is None and not hasattr(expert, "read"):
        return "the expert's states are given, and hold one state a text"
    for side, it in (("expert", tokenizer), ("target", target.tokenizer)):
        if not gives_offsets(it):
            return f"the {side}'s tokenizer does not say which characters its tokens cover"
    return None


def candidate_pairs(
    config: ExpertSteerConfig, data: FitData, gradients: Mapping[str, Tensor]
) -> list[PairKey]:
    """The layer pairs whose maps are fitted on tokens: at most `config.pairing.n_layers` squared.

    Target layers: where the target's own mean difference promises most, by the gradient of the
    behaviour. Expert layers: evenly over the middle half of its depth, which carries over better
    than its end; all of them where they are few.
    """
    c = config.pairing
    names_e, names_t = list(data.expert_pair_states), list(data.target_pair_states)
    allowed = [names_t[j] for j in allowed_targets(len(names_t), c)]
    store, labels = data.target_pair_states, labels_of(data.target_pair_states)
    promise = {
        t: store.median_norm(t) * float(gradients[t] @ mean_difference(store[t], labels).double())
        for t in allowed
    }
    targets = sorted(promise, key=lambda t: -promise[t])[: c.n_layers]
    experts = names_e
    if len(names_e) > c.n_layers:
        middle = names_e[len(names_e) // 4 : -(-3 * len(names_e) // 4)]
        places = torch.linspace(0, len(middle) - 1, min(c.n_layers, len(middle))).round().long()
        experts = [middle[i] for i in dict.fromkeys(places.tolist())]
    return [(e, t) for e in experts for t in names_t if t in targets]


@torch.no_grad()
def pair_tokens(
    expert: Host,
    target: Host,
    texts: Sequence[Text],
    groups: Sequence[int],
    pairs: Sequence[PairKey],
    config: ExpertSteerConfig,
    seed: int,
    *,
    progress: bool | None,
) -> PairedMoments:
    """Run the texts through both models and accumulate the moments of their token pairs.

    A pair are the last tokens of the two models that end at one character of the text's content.
    Nothing is kept of a batch but its moments (see `PairedMoments` for their size).

    Args:
        expert: reads the texts up to the highest expert layer of `pairs`.
        target: the same.
        texts: unlabelled.
        groups: for each text the group that its tokens belong to: groups are never divided between
            the folds of the cross-validation.
        pairs: which maps will be fitted.
        config: batch size and number of folds.
        seed: of the folds.
        progress: show a progress bar.
    """
    hooks_e, hooks_t = (list(dict.fromkeys(key[i] for key in pairs)) for i in (0, 1))
    moments: PairedMoments | None = None
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    cost = f"{len(texts)} texts through both models, every token of them"
    for index in progress_bar(batches, "token pairs", progress=progress, unit="batch", cost=cost):
        part = [texts[i] for i in index]
        batch_e, batch_t = expert.tokenize(part), target.tokenize(part)
        ends_e, ends_t = token_ends(expert, part, batch_e), token_ends(target, part, batch_t)
        both_e, both_t = _common(ends_e, ends_t), _common(ends_t, ends_e)
        if not bool(both_e.any()):
            continue
        # Ends grow along a row, so the chosen tokens of both models come in the same order.
        rows_e = expert.read(batch_e, hooks_e, "all", both_e.to(batch_e.input_ids.device))
        rows_t = target.read(batch_t, hooks_t, "all", both_t.to(batch_t.input_ids.device))
        if moments is None:
            moments = PairedMoments(
                pairs,
                d_expert={h: x.shape[1] for h, x in rows_e.items()},
                d_target={h: x.shape[1] for h, x in rows_t.items()},
                n_folds=config.aligner.n_folds,
                seed=seed,
            )
        own = torch.tensor([groups[i] for i in index])
        moments.update(rows_e, rows_t, own.repeat_interleave(both_e.sum(1)))
    if moments is None:
        return PairedMoments(pairs, d_expert=1, d_target=1, n_folds=config.aligner.n_folds)
    return moments


def _common(ends: Tensor, others: Tensor) -> Tensor:
    """Which of the ends are also among the others', row by row."""
    same = (ends[:, :, None] == others[:, None, :]).any(dim=2)
    return same & (ends != NO_END)
