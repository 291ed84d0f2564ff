"""Paired states of tokens: what both models know after the same words of the same text.

The tokenizers cut a text differently, but many of their tokens end at the same character. One
state a text gives as many paired rows as there are texts, hopeless for a map between widths of
hundreds; token pairs give fifty times as many from the same texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertsteer_lens.align import PairedMoments
from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.data.chat import Text
from expertsteer_lens.hosts.side_by_side import OnTokens, read_common_tokens
from expertsteer_lens.hosts.token_ends import gives_offsets
from expertsteer_lens.learn.directions import mean_difference
from expertsteer_lens.pair.rules import allowed_targets

from .config import ExpertSteerConfig
from .experts import Experts
from .fit_data import PairKey, labels_of

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host


def why_not_tokens(experts: Experts, target: Host) -> str | None:
    """Why the maps of this fit cannot be fitted on token pairs; None if they can."""
    if not experts.gives_tokens:
        return (
            "the expert's states are given, and hold one state a text; read its tokens too: "
            "capture(..., tokens=True), fit(..., expert_tokens=)"
        )
    for side, host in (*(("expert", host) for host in experts.hosts), ("target", target)):
        if not gives_offsets(host.tokenizer):
            return f"the {side}'s tokenizer does not say which characters its tokens cover"
    return None


def candidate_pairs(
    config: ExpertSteerConfig,
    experts: Experts,
    expert_hook_names: Sequence[str],
    target_pair_states: ActivationStore,
    gradients: Mapping[str, Tensor],
) -> list[PairKey]:
    """The layer pairs whose maps are fitted on tokens: at most `config.pairing.n_layers` squared of
    each expert.

    Known before a single anchor is read. Target layers: where the target's own mean difference
    promises most, by the gradient of the behaviour. Expert layers: evenly over the middle half of
    its depth, which carries over better than its end; all of them where they are few.
    """
    c = config.pairing
    store, names_t = target_pair_states, list(target_pair_states)
    allowed, labels = [names_t[j] for j in allowed_targets(len(names_t), c)], labels_of(store)
    promise = {
        t: store.median_norm(t) * float(gradients[t] @ mean_difference(store[t], labels).double())
        for t in allowed
    }
    targets = sorted(promise, key=lambda t: -promise[t])[: c.n_layers]
    read = [
        experts.name_of(label, hook)
        for label, hooks in experts.split(expert_hook_names).items()
        for hook in in_the_middle(hooks, c.n_layers)
    ]
    if experts.tokens is not None:
        read = [hook for hook in expert_hook_names if hook in experts.tokens.states]
    return [(e, t) for e in read for t in names_t if t in targets]


def in_the_middle(hooks: list[str], n: int) -> list[str]:
    """So many evenly over the middle half; all where they are no more."""
    if len(hooks) <= n:
        return hooks
    middle = hooks[len(hooks) // 4 : -(-3 * len(hooks) // 4)]
    places = torch.linspace(0, len(middle) - 1, min(n, len(middle))).round().long()
    return [middle[i] for i in dict.fromkeys(places.tolist())]


class TokenPairs:
    """The pairs of tokens of some layer pairs, read batch after batch; nothing is kept of a batch
    but its moments (see `PairedMoments` for their size).

    Args:
        pairs: which maps will be fitted.
        experts: whose tokens are paired with the target's, from a single one on (any host object).
        config: number of folds, batch size.
        seed: of the folds.
    """

    def __init__(
        self, pairs: Sequence[PairKey], experts: Any, config: ExpertSteerConfig, seed: int
    ) -> None:
        self.pairs, self.experts = list(pairs), Experts.of(experts)
        self.config, self.seed = config, seed
        self._moments: PairedMoments | None = None

    @property
    def hook_names(self) -> list[list[str]]:
        """Where tokens of each expert and, last, of the target are read."""
        expert, target = (list(dict.fromkeys(names)) for names in zip(*self.pairs, strict=True))
        return [*self.experts.split(expert).values(), target]

    def taking(self, groups: Sequence[int]) -> OnTokens:
        """What takes the tokens of texts of these groups, which are never divided between the folds
        of the cross-validation."""

        def take(index: list[int], rows: list[dict[str, Tensor]], counts: Tensor) -> None:
            """Add the tokens of one batch."""
            expert, target = self.experts.join(rows[:-1]), rows[-1]
            if self._moments is None:
                self._moments = self._empty(
                    {name: rows.shape[1] for name, rows in expert.items()},
                    {name: rows.shape[1] for name, rows in target.items()},
                )
            own = torch.tensor([groups[i] for i in index])
            self._moments.update(expert, target, own.repeat_interleave(counts))

        return take

    def read(
        self,
        target: Host,
        texts: Sequence[Text],
        groups: Sequence[int],
        *,
        progress: bool | None,
    ) -> TokenPairs:
        """Run texts through all models, each up to its highest layer; returns self."""
        read_common_tokens(
            [*self.experts.hosts, target],
            texts,
            self.hook_names,
            self.taking(groups),
            stored=self.experts.tokens,
            batch_size=self.config.batch_size,
            progress=progress,
        )
        return self

    def take_over(self, moments: PairedMoments) -> None:
        """Begin with moments that were accumulated before."""
        self._moments, self.pairs = moments, list(moments.pairs)

    @property
    def moments(self) -> PairedMoments:
        """Of all tokens so far."""
        return self._empty(1, 1) if self._moments is None else self._moments

    def _empty(
        self, d_expert: int | dict[str, int], d_target: int | dict[str, int]
    ) -> PairedMoments:
        n_folds = self.config.aligner.n_folds
        return PairedMoments(
            self.pairs, d_expert=d_expert, d_target=d_target, n_folds=n_folds, seed=self.seed
        )
