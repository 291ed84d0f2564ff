"""Which expert layer steers which target layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_choice, check_finite, check_number
from expertsteer_lens.errors import ArgumentError, WidthError

if TYPE_CHECKING:
    import pandas

RULES = ("attribution", "min_mi", "max_mi", "depth", "random")


@dataclass(frozen=True, kw_only=True)
class PairingConfig:
    """How layer pairs are chosen."""

    rule: str = "attribution"
    """"attribution": largest predicted effect on the behaviour (ours). "min_mi": lowest mutual
    information (the paper's). "max_mi": highest. "depth": closest relative depth. "random": drawn
    by the seed (a control)."""
    n_pairs: int = 1
    """How many pairs, each with its own target layer (expert layers may repeat). The paper's number
    is unknown."""
    n_candidates: int = 32
    """For "attribution": pairs kept after ranking by the mapped mean difference; RFM is fitted on
    these, then re-ranked."""
    min_auc: float = 0.6
    """For "attribution": pairs whose RFM separates its held-out texts with a smaller AUC are chosen
    only if no other is left; a direction that the expert does not have can still point along the
    target's gradient by chance."""
    skip_first: int = 1
    """Target layers left out at the bottom: additions there are reprocessed by every later
    block."""
    skip_last: int = 1
    """Target layers left out at the top: additions there act almost directly on the output
    words."""

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, RULES)
        check_number("n_pairs", self.n_pairs, low=1, integer=True)
        check_number("n_candidates", self.n_candidates, low=1, integer=True)
        check_number("min_auc", self.min_auc, low=0.0, high=1.0)
        check_number("skip_first", self.skip_first, low=0, integer=True)
        check_number("skip_last", self.skip_last, low=0, integer=True)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


@dataclass(frozen=True)
class LayerPair:
    """One expert hook point and the target hook point its direction is written to."""

    expert: str
    target: str
    score: float
    """The rule's score: nats of predicted effect ("attribution"), nats of MI, or minus the depth
    difference."""


@dataclass(frozen=True, eq=False)
class LayerPairs(Sequence[LayerPair]):
    """The chosen pairs, best first, with the score of every pair that was allowed."""

    pairs: tuple[LayerPair, ...]
    rule: str
    scores: Float[Tensor, "n_expert n_target"]
    """Score of each pair; NaN where the rule did not look (skipped layers)."""
    expert_hook_names: tuple[str, ...]
    target_hook_names: tuple[str, ...]

    def __getitem__(self, index: Any) -> Any:
        return self.pairs[index]

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[LayerPair]:
        return iter(self.pairs)

    def keys(self) -> list[tuple[str, str]]:
        """(expert hook name, target hook name) of each chosen pair."""
        return [(p.expert, p.target) for p in self.pairs]

    def to_pandas(self) -> pandas.DataFrame:
        """Every pair with its score and whether it was chosen, best first."""
        import pandas as pd

        chosen = set(self.keys())
        rows = [
            {
                "expert": e,
                "target": t,
                "score": float(self.scores[i, j]),
                "chosen": (e, t) in chosen,
            }
            for i, e in enumerate(self.expert_hook_names)
            for j, t in enumerate(self.target_hook_names)
            if not torch.isnan(self.scores[i, j])
        ]
        order = self.rule == "min_mi"
        return pd.DataFrame(rows).sort_values("score", ascending=order, ignore_index=True)

    def __repr__(self) -> str:
        shown = ", ".join(f"{p.expert} → {p.target} ({p.score:+.3f})" for p in self.pairs[:4])
        return f"LayerPairs(rule={self.rule!r}: {shown}{', …' if len(self.pairs) > 4 else ''})"


def allowed_targets(n_target: int, config: PairingConfig) -> list[int]:
    """Indices of the target layers the rule may choose.

    Raises:
        ArgumentError: nothing is left after skipping.
    """
    rows = list(range(config.skip_first, n_target - config.skip_last))
    if not rows:
        raise ArgumentError(
            f"skip_first={config.skip_first} and skip_last={config.skip_last} leave none of "
            f"{n_target} target layers; "
            "lower them in PairingConfig."
        )
    return rows


def select_layer_pairs(
    expert_hook_names: Sequence[str],
    target_hook_names: Sequence[str],
    config: PairingConfig | None = None,
    *,
    scores: Float[Tensor, "n_expert n_target"] | None = None,
    seed: int = 0,
) -> LayerPairs:
    """Choose `n_pairs` pairs with distinct target layers.

    Args:
        expert_hook_names: expert hook points, in order of depth.
        target_hook_names: target hook points, in order of depth.
        config: the rule and how many.
        scores: for "attribution" the predicted effects (NaN = not a candidate), for
            "min_mi"/"max_mi" the MI matrix in nats; not used by "depth" and "random".
        seed: of the rule "random".

    Greedy: the best remaining pair whose target layer is still free. Ties go to the shallower
    layers."""
    config = config or PairingConfig()
    n_expert, n_target = len(expert_hook_names), len(target_hook_names)
    if config.rule in ("attribution", "min_mi", "max_mi"):
        if scores is None:
            raise ArgumentError(
                f"rule={config.rule!r} needs scores: pass the matrix of {_needs(config.rule)}."
            )
        if scores.shape != (n_expert, n_target):
            raise WidthError(
                f"scores must have shape {(n_expert, n_target)}, got {tuple(scores.shape)}."
            )
        table = scores.detach().double().clone()
        if config.rule != "attribution":
            check_finite("scores", table)
    elif config.rule == "depth":
        depth_e = (
            torch.linspace(0, 1, n_expert, dtype=torch.float64) if n_expert > 1 else torch.zeros(1)
        )
        depth_t = (
            torch.linspace(0, 1, n_target, dtype=torch.float64) if n_target > 1 else torch.zeros(1)
        )
        table = -(depth_e[:, None] - depth_t[None, :]).abs().double()
    else:
        table = torch.rand(
            n_expert, n_target, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
    allowed = torch.zeros(n_target, dtype=torch.bool)
    allowed[allowed_targets(n_target, config)] = True
    table[:, ~allowed] = torch.nan
    if config.n_pairs > int(allowed.sum()):
        raise ArgumentError(
            f"n_pairs={config.n_pairs} needs as many target layers, but {int(allowed.sum())} are "
            "allowed."
        )
    pairs = _greedy(-table if config.rule == "min_mi" else table, config.n_pairs)
    chosen = tuple(
        LayerPair(expert_hook_names[i], target_hook_names[j], float(table[i, j])) for i, j in pairs
    )
    return LayerPairs(
        chosen, config.rule, table, tuple(expert_hook_names), tuple(target_hook_names)
    )


def _greedy(table: Tensor, n_pairs: int) -> list[tuple[int, int]]:
    left = torch.where(torch.isnan(table), torch.full_like(table, -torch.inf), table)
    out: list[tuple[int, int]] = []
    for _ in range(n_pairs):
        best = int(left.argmax())
        i, j = divmod(best, left.shape[1])
        if left[i, j] == -torch.inf:
            raise ArgumentError(
                f"only {len(out)} pairs have a score, fewer than n_pairs={n_pairs}; raise "
                "n_candidates."
            )
        out.append((i, j))
        left[:, j] = -torch.inf
    return out


def _needs(rule: str) -> str:
    return (
        "predicted effects" if rule == "attribution" else "mutual information (LayerPairMI.matrix)"
    )
