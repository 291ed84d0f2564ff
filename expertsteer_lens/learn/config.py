"""Configuration of `fit_rfm` and the records of its rounds."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens._html import repr_html
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.linalg.kernels import KernelName

if TYPE_CHECKING:
    import pandas as pd

BandwidthUnit = Literal["median_distance", "absolute"]
Normaliser = Literal["trace", "max", "none"]
Standardisation = Literal["none", "scale", "coordinate"]
Targets = Literal["centred", "zero_one"]

_CHOICES: dict[str, Any] = {
    "kernel": KernelName,
    "bandwidth_unit": BandwidthUnit,
    "normalise": Normaliser,
    "standardise": Standardisation,
    "targets": Targets,
}
"""Fields of `RFMConfig` with a fixed set of values."""


@dataclass(frozen=True, kw_only=True)
class RFMConfig:
    """Settings of `fit_rfm`. A tuple in `bandwidth` or `center_gradients` is searched on validation
    rows by AUC.

    Raises:
        ArgumentError: a value outside its range, or a `normalise` that could have no effect.

    >>> RFMConfig(bandwidth=2.0).n_rounds
    5
    """

    kernel: KernelName = "laplace"
    """"laplace", exp(-t/L) (the method's), or "gaussian", exp(-t^2/(2 L^2))."""
    bandwidth: float | tuple[float, ...] = (0.5, 1.0, 2.0)
    """Length L of the kernel, > 0, in units of `bandwidth_unit`; a tuple is searched."""
    bandwidth_unit: BandwidthUnit = "median_distance"
    """"median_distance": L = bandwidth times the median distance between training rows, taken anew
    in each round's metric, so that no kernel saturates whatever the norms (`normalise` would cancel
    and must stay "trace"). "absolute": L = bandwidth in standardised units, the same number in
    every round, as in the reference code."""
    ridge: float = 1e-3
    """Added to the kernel's diagonal, >= 0 (the kernel's own diagonal is 1)."""
    n_rounds: int = 5
    """Rounds of predictor and AGOP, >= 1; with validation rows the best of them is kept."""
    center_gradients: bool | tuple[bool, ...] = False
    """Whether the mean gradient is subtracted before the outer product; a tuple is searched. The
    reference code searches both. Not centring is our default: on two small story models the
    uncentred direction steered as well or better, and where reading is perfect the AUC cannot tell
    the two apart."""
    normalise: Normaliser = "trace"
    """What the AGOP is divided by to make the next metric: "trace" (rotation-invariant), "max" (its
    largest entry, depends on the basis; as xRFM) or "none". Acts only with
    bandwidth_unit="absolute"."""
    standardise: Standardisation = "scale"
    """"none"; "scale": one scalar, so that coordinates have mean variance 1 and rotations commute
    with the fit (the
    default: a residual stream has no preferred basis, and gradient and displacement are then the
    same line); "coordinate": each coordinate to unit variance, which privileges the basis. See
    `RFM.direction` for the way back."""
    targets: Targets = "centred"
    """What is regressed: "centred", label minus mean label (swapping the labels flips the
    direction), or "zero_one", the labels themselves without intercept, as in the reference code."""
    validation_fraction: float = 0.2
    """Share of rows, in [0, 0.5], held out for choosing setting and round, stratified by label;
    what was chosen is then fitted on all rows. 0: no validation, the last round is kept. Not used
    when `fit_rfm` is given validation rows."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), get_args(choices))
        for name in ("bandwidth", "center_gradients"):  # JSON has lists only
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        for value in _as_tuple(self.bandwidth):
            check_number("bandwidth", value, low=0.0, low_open=True)
        centrings = _as_tuple(self.center_gradients)
        if not search_grid(self) or not all(isinstance(value, bool) for value in centrings):
            raise ArgumentError(
                "bandwidth must be a number or a non-empty tuple of numbers, and center_gradients "
                "a bool or a non-empty tuple of bools; got "
                f"{self.bandwidth!r} and {self.center_gradients!r}."
            )
        check_number("ridge", self.ridge, low=0.0)
        check_number("n_rounds", self.n_rounds, low=1, integer=True)
        check_number("validation_fraction", self.validation_fraction, low=0.0, high=0.5)
        if self.bandwidth_unit == "median_distance" and self.normalise != "trace":
            raise ArgumentError(
                f"normalise={self.normalise!r} has no effect with "
                "bandwidth_unit='median_distance', which rescales "
                "every round; leave it at 'trace', or use bandwidth_unit='absolute'."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)

    @classmethod
    def reference(cls) -> RFMConfig:
        """The settings of the reference code of arXiv 2502.03708: raw states, bandwidths {1, 10,
        100}, ridge 1e-3.

        What still differs: our AGOP is that of the best predictor itself, where the reference takes
        the metric that predictor was fitted in, one round behind; and a setting found on an
        internal split is fitted again on all rows (give `validation` to `fit_rfm` to avoid it)."""
        return cls(
            bandwidth=(1.0, 10.0, 100.0),
            bandwidth_unit="absolute",
            center_gradients=(True, False),
            normalise="max",
            standardise="none",
            targets="zero_one",
        )


def search_grid(config: RFMConfig) -> list[tuple[float, bool]]:
    """Every `(bandwidth, center_gradients)` that the settings ask for, in the order tried."""
    return list(itertools.product(_as_tuple(config.bandwidth), _as_tuple(config.center_gradients)))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


class RFMRound(NamedTuple):
    """One line of the history."""

    stage: str
    """"search" (training rows fitted, scored on validation rows) or "fit" (all rows, the setting
    kept)."""
    bandwidth: float
    center_gradients: bool
    round: int
    """1-based."""
    length: float
    """The kernel's length in force, in the unit of distances in this round's metric; NaN if the
    setting failed."""
    train_error: float
    """Mean squared error on the rows fitted, of labels on a 0-1 scale."""
    validation_error: float
    """The same on validation rows; NaN without."""
    validation_auc: float
    """Area under the ROC curve of the predictor on validation rows; NaN without."""
    status: str
    """"ok", or why the setting stopped at this round."""


class RFMHistory(tuple[RFMRound, ...]):
    """Every round that was run, in order."""

    __slots__ = ()

    def to_pandas(self) -> pd.DataFrame:
        """One line per round; columns as in `RFMRound`."""
        import pandas as pd

        return pd.DataFrame(list(self), columns=list(RFMRound._fields))

    _repr_html_ = repr_html
