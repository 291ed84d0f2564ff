"""Result of the layer-pair scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._html import repr_html
from expertsteer_lens._upward import upward
from expertsteer_lens.data.activations import layer_or_none

from .config import MIConfig
from .estimators import find_estimator

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class LayerPairMI:
    """Scores of all layer pairs with a permutation null and intervals; rows are expert layers,
    columns target layers."""

    matrix: Float[Tensor, "n_expert n_target"]
    """The estimate, in `unit`."""
    interval: Float[Tensor, "n_expert n_target 2"]
    """Bootstrap interval over rows (over groups, if they were given) with everything fitted kept as
    it is: principal components, directions, folds. It covers the choice of texts in the evaluation,
    not refitting, and not the downward bias of "cca" (directions from few texts find less than
    there is)."""
    null: Float[Tensor, "n_permutations n_expert n_target"]
    """The estimate with the target's rows (or groups) permuted: what this estimator reads at
    independence."""
    expert_hook_names: tuple[str, ...]
    target_hook_names: tuple[str, ...]
    n_samples: int
    """Paired rows."""
    n_components: int | None
    """Principal components used per layer; None for "cka"."""
    clipped: Mapping[str, Mapping[str, Any]]
    """"expert" and "target": hook name to how many entries of which coordinates were clipped;
    untouched hooks left out."""
    config: MIConfig
    seed: int
    n_groups: int | None = None
    """Groups of rows (texts) that folds, null and interval kept together; None if every row was
    taken as independent."""

    def __post_init__(self) -> None:
        for name in ("matrix", "interval", "null"):
            object.__setattr__(self, name, getattr(self, name).detach().clone().contiguous())

    @property
    def unit(self) -> str:
        """Of the scores: "nats", or what the estimator says ("cka": the dimensionless score)."""
        return find_estimator(self.config.estimator).unit

    @property
    def null_mean(self) -> Float[Tensor, "n_expert n_target"]:
        """Mean of the null per pair; NaN without permutations."""
        return self.null.mean(0)

    @property
    def null_sd(self) -> Float[Tensor, "n_expert n_target"]:
        """Standard deviation of the null per pair; NaN with fewer than two permutations."""
        return self.null.std(0) if len(self.null) > 1 else torch.full_like(self.matrix, torch.nan)

    @property
    def z_scores(self) -> Float[Tensor, "n_expert n_target"]:
        """Estimate minus null mean, in null standard deviations."""
        return (self.matrix - self.null_mean) / self.null_sd

    @property
    def p_values(self) -> Float[Tensor, "n_expert n_target"]:
        """One-sided permutation p-values per pair, (1 + #{null >= estimate}) / (1 +
        n_permutations); not corrected for the number of pairs."""
        return (1.0 + (self.null >= self.matrix).sum(0)) / (1.0 + len(self.null))

    def argmin(self) -> tuple[str, str]:
        """(expert hook name, target hook name) of the lowest score: the paper's choice."""
        return self._names(int(self.matrix.argmin()))

    def argmax(self) -> tuple[str, str]:
        """(expert hook name, target hook name) of the highest score."""
        return self._names(int(self.matrix.argmax()))

    def _names(self, flat: int) -> tuple[str, str]:
        row, column = divmod(flat, len(self.target_hook_names))
        return self.expert_hook_names[row], self.target_hook_names[column]

    def to_pandas(self) -> pandas.DataFrame:
        """One row per pair, expert-major."""
        import pandas as pd

        names = [(e, t) for e in self.expert_hook_names for t in self.target_hook_names]
        frame = pd.DataFrame(names, columns=["expert_hook_name", "target_hook_name"])
        frame["expert_layer"] = [layer_or_none(e) for e, _ in names]
        frame["target_layer"] = [layer_or_none(t) for _, t in names]
        columns = {
            find_estimator(self.config.estimator).quantity: self.matrix,
            "low": self.interval[..., 0],
            "high": self.interval[..., 1],
            "null_mean": self.null_mean,
            "null_sd": self.null_sd,
            "z_score": self.z_scores,
            "p_value": self.p_values,
        }
        return frame.assign(
            **{name: value.flatten().cpu().numpy() for name, value in columns.items()}
        )

    def plot(self, **kwargs: Any) -> Any:
        """Heat map (a plotly Figure); arguments go to `plots.plot_layer_pair_mi`."""
        return upward("plot_layer_pair_mi")(self, **kwargs)

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        low, high = self.argmin(), self.argmax()
        grouped = "" if self.n_groups is None else f" in {self.n_groups} groups"
        null = f"null {float(self.null_mean.mean()):.3f}" if len(self.null) else "no null"
        return (
            f"LayerPairMI({self.config.estimator}, {len(self.expert_hook_names)} x "
            f"{len(self.target_hook_names)} layers, "
            f"n_samples={self.n_samples}{grouped}, {null} {self.unit}; lowest "
            f"{float(self.matrix.min()):.3f} at {low[0]} / {low[1]}, "
            f"highest {float(self.matrix.max()):.3f} at {high[0]} / {high[1]})"
        )
