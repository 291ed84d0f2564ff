"""Which expert layer steers which target layer: rules that score every layer pair, and the choice
of the best-scored pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_choice, check_finite, check_number
from expertsteer_lens._html import repr_html
from expertsteer_lens._tables import register
from expertsteer_lens._upward import upward
from expertsteer_lens.errors import ArgumentError, WidthError

if TYPE_CHECKING:
    import pandas

Needs = Literal["effects", "mi", "nothing"]
"""What a rule is given as scores: predicted effects on the behaviour (NaN = not a candidate),
mutual information, or None."""
ScoreFunction = Callable[[Tensor | None, tuple[int, int], int], Tensor]
"""(scores given, (n_expert, n_target), seed) -> score of each pair, `[n_expert, n_target]`; NaN
where a pair may not be chosen."""
_NEEDED = {"effects": "predicted effects", "mi": "mutual information (LayerPairMI.matrix)"}


@dataclass(frozen=True, kw_only=True)
class PairingRule:
    """A rule: how it scores layer pairs, and what it has to be given for that."""

    score: ScoreFunction
    needs: Needs = "nothing"
    lowest_first: bool = False
    """The lowest score is the best one."""
    score_name: str | None = None
    """What figures call the score."""
    signed: bool = False
    """Zero has a meaning (no effect), so figures show it in white."""


RuleName = Literal["attribution", "min_mi", "max_mi", "depth", "random"]
"""The rules of this package."""
RULES: dict[str, PairingRule] = {}
"""Name in `PairingConfig.rule`, and the rule."""

_F = TypeVar("_F", bound=ScoreFunction)


def register_rule(
    name: str,
    *,
    needs: Needs = "nothing",
    lowest_first: bool = False,
    score_name: str | None = None,
    signed: bool = False,
) -> Callable[[_F], _F]:
    """Function decorator: make a rule available as `PairingConfig(rule=name)`; see `ScoreFunction`
    for what the function takes and returns, `PairingRule` for the settings.

    Raises:
        ArgumentError: the name is taken, or `needs` is unknown.

    Example:
        >>> import torch
        >>> from expertsteer_lens.pair import RULES, PairingConfig, register_rule
        >>> from expertsteer_lens.pair import select_layer_pairs
        >>> @register_rule("late_expert")
        ... def late_expert(scores, shape, seed):
        ...     "The deeper the expert's layer the better."
        ...     n_expert, n_target = shape
        ...     return torch.arange(n_expert)[:, None].repeat(1, n_target)
        >>> config = PairingConfig(rule="late_expert")
        >>> select_layer_pairs(["e.0.out", "e.1.out"], ["t.0.out", "t.1.out", "t.2.out"], config)
        LayerPairs(rule='late_expert': e.1.out → t.1.out (+1.000))
        >>> del RULES["late_expert"]
    """
    check_choice("needs", needs, ("effects", "mi", "nothing"))

    def add(score: _F) -> _F:
        rule = PairingRule(
            score=score,
            needs=needs,
            lowest_first=lowest_first,
            score_name=score_name,
            signed=signed,
        )
        register(RULES, name, rule, what="a rule", made_by=score)
        return score

    return add


def find_rule(name: str) -> PairingRule:
    """The rule of this name.

    Raises:
        ArgumentError: there is none (the message names the closest).
    """
    return RULES[check_choice("rule", name, RULES)]


@register_rule("min_mi", needs="mi", lowest_first=True)
@register_rule("max_mi", needs="mi")
@register_rule(
    "attribution",
    needs="effects",
    score_name="predicted effect on the behaviour per unit coefficient, nats",
    signed=True,
)
def score_as_given(scores: Tensor | None, shape: tuple[int, int], seed: int) -> Tensor:
    """The score is the matrix that the rule was given."""
    assert scores is not None
    return scores


@register_rule("depth")
def score_by_depth(scores: Tensor | None, shape: tuple[int, int], seed: int) -> Tensor:
    """Minus the difference of relative depths, from 0 (first layer) to 1 (last)."""
    expert, target = (torch.linspace(0, 1, n, dtype=torch.float64) for n in shape)
    return -(expert[:, None] - target).abs()


@register_rule("random")
def score_at_random(scores: Tensor | None, shape: tuple[int, int], seed: int) -> Tensor:
    """Uniform numbers drawn by the seed."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class PairingConfig:
    """How layer pairs are chosen.

    >>> PairingConfig(rule="max_mi", n_pairs=2).rule
    'max_mi'
    """

    rule: RuleName | str = "attribution"
    """"attribution": largest predicted effect on the behaviour (ours). "min_mi": lowest mutual
    information (the paper's). "max_mi": highest. "depth": closest relative depth. "random": drawn
    by the seed (a control). Or a name of `register_rule`."""
    n_pairs: int = 1
    """How many pairs, each with its own target layer (expert layers may repeat). The paper's number
    is unknown."""
    n_candidates: int = 32
    """For rules that need effects: pairs kept after ranking by the mapped mean difference; RFM is
    fitted on these, then re-ranked."""
    n_layers: int = 4
    """For rules that need effects, where maps are fitted on token pairs: so many layers of either
    model are considered, which makes `n_layers ** 2` maps; the moments of their token pairs take
    `8 n_folds n_layers (d_e^2 + d_t^2 + n_layers d_e d_t)` bytes."""
    min_auc: float = 0.6
    """For rules that need effects: pairs whose RFM separates its held-out texts with a smaller AUC
    are chosen only if no other is left; a direction that the expert does not have can still point
    along the target's gradient by chance."""
    skip_first: int = 1
    """Target layers left out at the bottom: additions there are reprocessed by every later
    block."""
    skip_last: int = 1
    """Target layers left out at the top: additions there act almost directly on the output
    words."""

    def __post_init__(self) -> None:
        find_rule(self.rule)
        check_number("n_pairs", self.n_pairs, low=1, integer=True)
        check_number("n_candidates", self.n_candidates, low=1, integer=True)
        check_number("n_layers", self.n_layers, low=1, integer=True)
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
        ascending = find_rule(self.rule).lowest_first
        return pd.DataFrame(rows).sort_values("score", ascending=ascending, ignore_index=True)

    def plot(self) -> Any:
        """Heat map of the scores with the chosen pairs outlined (a plotly Figure)."""
        return upward("plot_layer_pairs")(self)

    _repr_html_ = repr_html

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
    layers.

    Raises:
        ArgumentError: scores are missing, or too few pairs can be chosen.
        WidthError: scores do not have one row per expert and one column per target hook point.
        DataError: scores of mutual information hold NaN or Inf.

    Example:
        >>> mi = torch.tensor([[0.1, 0.9, 0.3, 0.2], [0.0, 0.2, 0.7, 0.4]])
        >>> targets = ["t.0.out", "t.1.out", "t.2.out", "t.3.out"]
        >>> config = PairingConfig(rule="max_mi", n_pairs=2)
        >>> select_layer_pairs(["e.0.out", "e.1.out"], targets, config, scores=mi)
        LayerPairs(rule='max_mi': e.0.out → t.1.out (+0.900), e.1.out → t.2.out (+0.700))
    """
    config = config or PairingConfig()
    rule = find_rule(config.rule)
    shape = len(expert_hook_names), len(target_hook_names)
    if rule.needs != "nothing":
        if scores is None:
            raise ArgumentError(
                f"rule={config.rule!r} needs scores: pass the matrix of {_NEEDED[rule.needs]}."
            )
        if scores.shape != shape:
            raise WidthError(f"scores must have shape {shape}, got {tuple(scores.shape)}.")
        if rule.needs == "mi":
            check_finite("scores", scores)
    table = rule.score(scores, shape, seed).detach().double().clone()
    if table.shape != shape:
        raise WidthError(
            f"the rule {config.rule!r} must give scores of shape {shape}, got {tuple(table.shape)}."
        )
    allowed = torch.zeros(shape[1], dtype=torch.bool)
    allowed[allowed_targets(shape[1], config)] = True
    table[:, ~allowed] = torch.nan
    if config.n_pairs > int(allowed.sum()):
        raise ArgumentError(
            f"n_pairs={config.n_pairs} needs as many target layers, but {int(allowed.sum())} are "
            "allowed."
        )
    pairs = _choose_greedily(-table if rule.lowest_first else table, config.n_pairs)
    chosen = tuple(
        LayerPair(expert_hook_names[i], target_hook_names[j], float(table[i, j])) for i, j in pairs
    )
    return LayerPairs(
        chosen, config.rule, table, tuple(expert_hook_names), tuple(target_hook_names)
    )


def _choose_greedily(table: Tensor, n_pairs: int) -> list[tuple[int, int]]:
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
