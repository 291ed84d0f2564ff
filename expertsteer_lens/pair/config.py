"""Settings of the layer-pair scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from expertsteer_lens._checks import Scalar, check_number, complete_options, find_option
from expertsteer_lens.errors import ArgumentError

from .estimators import ESTIMATORS, EstimatorName, find_estimator

_FILLED = ("n_folds", "shrinkage", "n_neighbors")
"""Settings that get the estimator's default when they are None."""


@dataclass(frozen=True, kw_only=True)
class MIConfig:
    """Estimator and its settings.

    A setting that is left at None gets the estimator's default, and is None in the end only where
    it means nothing for the estimator.

    Raises:
        ArgumentError: a value out of range, or one that the estimator has no use for (which
            settings apply is `Estimator.defaults`).

    Example:
        >>> MIConfig().n_folds, MIConfig().n_neighbors
        (3, None)
        >>> MIConfig(estimator="ksg").n_neighbors
        5
        >>> MIConfig(estimator="ksg", n_folds=5)
        Traceback (most recent call last):
            ...
        expertsteer_lens.errors.ArgumentError: n_folds=5 has no effect for estimator='ksg' (it \
applies to cca); leave it at None.
    """

    estimator: EstimatorName | str = "cca"
    """"cca": cross-fitted canonical correlations (conservative). "gaussian": Gaussian mutual
    information in closed form, bias removed exactly (fastest; ours). "ksg": nearest neighbours.
    "cka": debiased linear CKA, dimensionless. Or a name of `register_estimator`."""
    n_components: int | None = None
    """Principal components per layer, >= 1. None = as many as the layer of lowest rank and a
    quarter of the rows allow, at most 32 ("ksg": 8); the result says how many that were."""
    n_folds: int | None = None
    """"cca": disjoint folds, >= 2. Default 3: tells dependence from independence as well as 5, in
    60 % of the time; more folds train directions on more rows and read closer to the truth from
    below."""
    n_permutations: int = 100
    """Draws of the null, >= 0; the smallest p-value is 1 / (n_permutations + 1)."""
    n_bootstrap: int = 200
    """Resamples of rows (or groups) behind the interval, >= 2."""
    shrinkage: float | None = None
    """"cca": in [0, 1); share of the mean variance mixed into each component's when whitening, so
    that weak components count less. Default 0.1."""
    clip: float | None = 8.0
    """Clip every coordinate beyond this many robust standard deviations (> 0) from its median
    before anything else; what was clipped is in the result. None = no clipping."""
    standardise: bool = True
    """Scale every coordinate to unit variance before PCA, so that no massive coordinate is the
    first component."""
    n_neighbors: int | None = None
    """"ksg": neighbours, >= 1. Default 5."""
    confidence: float = 0.95
    """Of the interval, in (0, 1)."""
    options: Mapping[str, Scalar] | tuple[tuple[str, Scalar], ...] = ()
    """Settings of a registered estimator, given as a dict of numbers, texts and booleans. Kept as
    sorted pairs, the estimator's defaults included; read them with `option`."""

    def __post_init__(self) -> None:
        estimator = find_estimator(self.estimator)
        defaults = estimator.defaults
        options = complete_options(self.options, estimator.options, f"estimator={self.estimator!r}")
        object.__setattr__(self, "options", options)
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
        for name in ("n_components", *_FILLED):
            value = getattr(self, name)
            if name in defaults:
                if value is None and name in _FILLED:
                    object.__setattr__(self, name, defaults[name])
            elif value is not None:
                self._drop_idle(name, value)

    def _drop_idle(self, name: str, value: float) -> None:
        """Set a setting that means nothing here back to None if it is what another estimator fills
        in (this is then a copy of such a configuration with the estimator changed); else refuse."""
        users = {key: e.defaults[name] for key, e in ESTIMATORS.items() if name in e.defaults}
        if name not in _FILLED or value not in users.values():
            raise ArgumentError(
                f"{name}={value!r} has no effect for estimator={self.estimator!r} (it applies to "
                f"{', '.join(users)}); leave it at None."
            )
        object.__setattr__(self, name, None)

    def option(self, name: str) -> Any:
        """The value of one of the estimator's own options.

        Raises:
            ArgumentError: the estimator has no such option.
        """
        return find_option(self.options, name, f"estimator={self.estimator!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)
