"""What a direction says in the target's own words, where the steering goes, and whether more
anchors would help: results with `.to_pandas()` and `.plot()`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_number
from expertsteer_lens._html import repr_html
from expertsteer_lens.align import fit_aligner
from expertsteer_lens.data.chat import Text, check_texts
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.hosts import as_host

if TYPE_CHECKING:
    import pandas

    from expertsteer_lens.hosts import Host, TokenBatch
    from expertsteer_lens.pipeline.fitted import ExpertSteering
    from expertsteer_lens.steer.plan import SteeringPlan


@dataclass(frozen=True, eq=False)
class DirectionWords:
    """The tokens whose logits a direction raises most, beside those of a random direction.

    What it does not show: what the blocks between the steered layer and the output make of it.
    """

    hook_name: str
    tokens: tuple[str, ...]
    """Raised most first."""
    logits: Float[Tensor, " k"]
    """Change of their logits against the mean over the vocabulary."""
    random_tokens: tuple[str, ...]
    random_logits: Float[Tensor, " k"]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a rank."""
        import pandas as pd

        return pd.DataFrame(
            {
                "token": self.tokens,
                "logit": self.logits.tolist(),
                "random_token": self.random_tokens,
                "random_logit": self.random_logits.tolist(),
            }
        )

    def plot(self) -> Any:
        """Two bar charts on one axis (a plotly Figure)."""
        from .step_plots import plot_words

        return plot_words(self)

    _repr_html_ = repr_html


@dataclass(frozen=True, eq=False)
class SteeringPath:
    """How a steered difference travels up the layers, at the last token of each prompt."""

    hook_names: tuple[str, ...]
    norm: Float[Tensor, " n_layers"]
    """Mean over prompts of |steered - unsteered| / |unsteered|."""
    attribution: Float[Tensor, " n_layers"] | None
    """Change of mean logit(positive) - mean logit(negative) if the difference of that layer were
    added to the last layer, through the model's own final norm and unembedding; None without
    tokens."""

    def to_pandas(self) -> pandas.DataFrame:
        """One row a layer."""
        import pandas as pd

        frame = pd.DataFrame({"hook_name": self.hook_names, "norm": self.norm.tolist()})
        if self.attribution is not None:
            frame["attribution"] = self.attribution.tolist()
        return frame

    def plot(self) -> Any:
        """Both against the layer (a plotly Figure)."""
        from .step_plots import plot_path

        return plot_path(self)

    _repr_html_ = repr_html


@dataclass(frozen=True, eq=False)
class AnchorCurve:
    """Held-out R² of one map, fitted on growing parts of the anchors."""

    pair: tuple[str, str]
    n_anchors: tuple[int, ...]
    r2: Float[Tensor, " n_sizes"]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a size."""
        import pandas as pd

        return pd.DataFrame({"n_anchors": self.n_anchors, "r2": self.r2.tolist()})

    def plot(self) -> Any:
        """R² against the number of anchors (a plotly Figure)."""
        from .step_plots import plot_anchor_curve

        return plot_anchor_curve(self)

    _repr_html_ = repr_html


@torch.no_grad()
def direction_words(
    plan: SteeringPlan,
    model: Any,
    prompts: Sequence[Text],
    *,
    hook_name: str | None = None,
    k: int = 12,
    seed: int = 0,
) -> DirectionWords:
    """Top tokens of a plan's vector: its delta is added to the last layer's residual at the last
    token of each prompt, and the change of the logits, through the target's own final norm and
    unembedding, is averaged.

    Args:
        plan: holds the vector.
        model: the target.
        prompts: where the logits are looked at.
        hook_name: which vector; default: the first.
        k: tokens shown.
        seed: of the random direction of the same length.

    Raises:
        ArgumentError: the plan has no vector there.
    """
    check_number("k", k, low=1, integer=True)
    vectors = [v for v in plan.vectors if hook_name in (None, v.hook_name)]
    if not vectors:
        known = [v.hook_name for v in plan.vectors]
        raise ArgumentError(f"hook_name={hook_name!r} is not steered by this plan: {known}.")
    host, vector = as_host(model), vectors[0]
    batch = host.tokenize(check_texts("prompts", prompts))
    other = plan.with_random_directions(seed=seed).vectors[plan.vectors.index(vector)]
    base = _last_logits(host, batch)
    found = []
    for delta in (vector.delta, other.delta):
        change = (_last_logits(host, batch, delta) - base).mean(0)
        change = change - change.mean()
        top = change.topk(min(k, len(change)))
        found.append((tuple(host.tokenizer.decode([i]) for i in top.indices.tolist()), top.values))
    return DirectionWords(vector.hook_name, *found[0], *found[1])


@torch.no_grad()
def steering_path(
    plan: SteeringPlan,
    model: Any,
    prompts: Sequence[Text],
    *,
    positive: Sequence[str] = (),
    negative: Sequence[str] = (),
) -> SteeringPath:
    """Where the steered difference grows or fades on its way to the output.

    Args:
        plan: the plan.
        model: the target.
        prompts: read at their last tokens.
        positive: completions whose first tokens count as positive.
        negative: and as negative; both or neither.

    Raises:
        ArgumentError: one of the two only.
    """
    if bool(positive) != bool(negative):
        raise ArgumentError("give positive and negative, or neither.")
    host = as_host(model)
    batch = host.tokenize(check_texts("prompts", prompts))
    names = host.hook_names()
    before = host.read(batch, names, "last", None, None)
    with plan.hooks(host.model):
        after = host.read(batch, names, "last", None, None)
    change = {name: after[name] - before[name] for name in names}
    norm = torch.stack([(change[n].norm(dim=-1) / before[n].norm(dim=-1)).mean() for n in names])
    attribution = None
    if positive:
        base = _last_logits(host, batch)
        sides = [_first_tokens(host, side) for side in (positive, negative)]
        rows = [_last_logits(host, batch, change[name]) - base for name in names]
        attribution = torch.stack(
            [(r[:, sides[0]].mean(1) - r[:, sides[1]].mean(1)).mean() for r in rows]
        )
    return SteeringPath(tuple(names), norm, attribution)


def anchor_curve(
    fit: ExpertSteering,
    *,
    pair: tuple[str, str] | None = None,
    sizes: Sequence[int] | None = None,
) -> AnchorCurve:
    """R² of a map against the number of anchors: where it still rises at its end, more anchors
    would help.

    Fitted on one state a text, with the fit's own aligner settings; no model is run.

    Args:
        fit: what holds the states.
        pair: (expert hook, target hook); default: the best pair chosen.
        sizes: numbers of anchors; default: five, doubling, up to all.

    Raises:
        ArgumentError: the kind of aligner has no target in its fit, so no R².
    """
    e, t = pair or fit.layer_pairs.keys()[0]
    expert, target = fit.data.expert_anchor_states[e], fit.data.target_anchor_states[t]
    n = expert.shape[0]
    sizes = sorted({max(8, n // 2**i) for i in range(5)}) if sizes is None else sorted(sizes)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(fit.seed))
    values = []
    for size in sizes:
        check_number("sizes", size, low=4, high=n, integer=True)
        rows = order[:size]
        aligner = fit_aligner(expert[rows], target[rows], fit.config.aligner, seed=fit.seed)
        if aligner.quality.r2 is None:
            raise ArgumentError(
                f"aligner kind {fit.config.aligner.kind!r} is fitted without the target, so it has "
                "no R²; use a kind that is tied to it, e.g. 'ridge'."
            )
        values.append(aligner.quality.r2)
    return AnchorCurve((e, t), tuple(sizes), torch.tensor(values))


def _last_logits(host: Host, batch: TokenBatch, delta: Tensor | None = None) -> Tensor:
    """Logits `[n, vocabulary]` at the last tokens, `delta` (`[d]` or `[n, d]`) added to the last
    layer there."""
    rows, last = torch.arange(len(batch)), batch.lengths.cpu() - 1
    where = torch.zeros(tuple(batch.input_ids.shape), dtype=torch.bool)
    where[rows, last] = True
    name = host.hook_names()[-1]

    def fn(x: Tensor) -> Tensor | None:
        if delta is None:
            return None
        out = x.clone()
        out[rows, last] += delta.to(x)
        return out

    _ = host.basis
    with host.intervene({name: fn}):
        return host.logits_at(batch, where.to(batch.input_ids.device)).float().cpu()


def _first_tokens(host: Host, completions: Sequence[str]) -> list[int]:
    rows = [host.tokenizer(c, add_special_tokens=False)["input_ids"] for c in completions]
    return sorted({row[0] for row in rows if row})
