"""Configuration and result of the layer-pair scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens.data.activations import layer_of
from expertsteer_lens.errors import ArgumentError

if TYPE_CHECKING:
    import pandas

_APPLIES = {
    "n_components": ("cca", "gaussian", "ksg"),
    "n_folds": ("cca",),
    "shrinkage": ("cca",),
    "n_neighbors": ("ksg",),
}
DEFAULT_COMPONENTS = {"cca": 32, "gaussian": 32, "ksg": 8}
DEFAULT_FOLDS, DEFAULT_SHRINKAGE, DEFAULT_NEIGHBORS = 3, 0.1, 5


@dataclass(frozen=True, kw_only=True)
class MIConfig:
    """Estimator and its settings. A field that means nothing for the estimator must stay None."""

    estimator: str = "cca"
    """"cca": cross-fitted canonical correlations (conservative). "gaussian": Gaussian mutual
    information in closed form, bias removed exactly (fastest; ours). "ksg": nearest neighbours.
    "cka": debiased linear CKA, dimensionless."""
    n_components: int | None = None
    """Principal components per layer, >= 1. None = 32 ("ksg": 8), or fewer where rank or n // 4 is
    smaller."""
    n_folds: int | None = None
    """"cca": disjoint folds, >= 2. None = 3: tells dependence from independence as well as 5, in 60
    % of the time; more folds train directions on more rows and read closer to the truth from
    below."""
    n_permutations: int = 100
    """Draws of the null, >= 0; the smallest p-value is 1 / (n_permutations + 1)."""
    n_bootstrap: int = 200
    """Row resamples behind the interval, >= 2."""
    shrinkage: float | None = None
    """"cca": in [0, 1); share of the mean variance mixed into each component's when whitening, so
    that weak components count less. None = 0.1."""
    clip: float | None = 8.0
    """Clip every coordinate beyond this many robust standard deviations (> 0) from its median
    before anything else; what was clipped is in the result. None = no clipping."""
    standardise: bool = True
    """Scale every coordinate to unit variance before PCA, so that no massive coordinate is the
    first component."""
    n_neighbors: int | None = None
    """"ksg": neighbours, >= 1. None = 5."""
    confidence: float = 0.95
    """Of the interval, in (0, 1)."""

    def __post_init__(self) -> None:
        check_choice("estimator", self.estimator, ("cca", "gaussian", "ksg", "cka"))
        check_number("n_permutations", self.n_permutations, low=0, integer=True)
        check_number("n_bootstrap", self.n_bootstrap, low=2, integer=True)
        check_number("confidence", self.confidence, low=0.0, high=1.0 - 1e-9, low_open=True)
        for name, low in (("n_components", 1), ("n_folds", 2), ("n_neighbors", 1)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=low, integer=True)
        if self.shrinkage is not None:
            check_number("shrinkage", self.shrinkage, low=0.0, high=1.0 - 1e-9)
        if self.clip is not None:
            check_number("clip", self.clip, low=0.0, low_open=True)
        if not isinstance(self.standardise, bool):
            raise ArgumentError(f"standardise must be a bool, got {self.standardise!r}.")
        for name, estimators in _APPLIES.items():
            value = getattr(self, name)
            if value is not None and self.estimator not in estimators:
                raise ArgumentError(
                    f"{name}={value!r} has no effect for estimator={self.estimator!r} (it applies "
                    "to "
                    f"{', '.join(estimators)}); leave it at None."
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class LayerPairMI:
    """Scores of all layer pairs with a permutation null and intervals; rows are expert layers,
    columns target layers."""

    matrix: Float[Tensor, "n_expert n_target"]
    """The estimate, in `unit`."""
    interval: Float[Tensor, "n_expert n_target 2"]
    """Bootstrap interval over rows (texts) with everything fitted kept as it is: principal
    components, directions, folds. It covers the choice of texts in the evaluation, not refitting,
    and not the downward bias of "cca" (directions from few texts find less than there is)."""
    null: Float[Tensor, "n_permutations n_expert n_target"]
    """The estimate with the target's rows permuted: what this estimator reads at independence."""
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

    def __post_init__(self) -> None:
        for name in ("matrix", "interval", "null"):
            object.__setattr__(self, name, getattr(self, name).detach().clone().contiguous())

    @property
    def unit(self) -> str:
        """ "nats", or "cka" for the dimensionless score."""
        return "cka" if self.config.estimator == "cka" else "nats"

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

    def separated(self, pairs: Sequence[tuple[str, str]]) -> bool:
        """Whether the intervals of `pairs` lie entirely below, or entirely above, those of all
        other pairs.

        False means that the choice of these pairs over the next best is within the noise of the
        texts used.

        Raises:
            ArgumentError: no pair, an unknown hook name, or no pair left to compare with.
        """
        chosen = torch.zeros_like(self.matrix, dtype=torch.bool)
        for e, t in pairs:
            if e not in self.expert_hook_names or t not in self.target_hook_names:
                raise ArgumentError(
                    f"pairs holds {(e, t)!r}, which is not a pair of this result; see "
                    "expert_hook_names."
                )
            chosen[self.expert_hook_names.index(e), self.target_hook_names.index(t)] = True
        if not chosen.any() or chosen.all():
            raise ArgumentError(
                f"pairs must leave some pairs in and some out: got {int(chosen.sum())} of "
                f"{chosen.numel()}."
            )
        low, high = self.interval.unbind(-1)
        below = high[chosen].max() < low[~chosen].min()
        return bool(below or low[chosen].min() > high[~chosen].max())

    def to_pandas(self) -> pandas.DataFrame:
        """One row per pair, expert-major."""
        import pandas as pd

        names = [(e, t) for e in self.expert_hook_names for t in self.target_hook_names]
        frame = pd.DataFrame(names, columns=["expert_hook_name", "target_hook_name"])
        frame["expert_layer"] = [_layer(e) for e, _ in names]
        frame["target_layer"] = [_layer(t) for _, t in names]
        columns = {
            "mutual_information" if self.unit == "nats" else "cka": self.matrix,
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
        from expertsteer_lens.show.plots import plot_layer_pair_mi

        return plot_layer_pair_mi(self, **kwargs)

    def __repr__(self) -> str:
        low, high = self.argmin(), self.argmax()
        null = f"null {float(self.null_mean.mean()):.3f}" if len(self.null) else "no null"
        return (
            f"LayerPairMI({self.config.estimator}, {len(self.expert_hook_names)} x "
            f"{len(self.target_hook_names)} layers, "
            f"n_samples={self.n_samples}, {null} {self.unit}; lowest "
            f"{float(self.matrix.min()):.3f} at {low[0]} / {low[1]}, "
            f"highest {float(self.matrix.max()):.3f} at {high[0]} / {high[1]})"
        )


def _layer(hook_name: str) -> int | None:
    try:
        return layer_of(hook_name)
    except ArgumentError:
        return None
