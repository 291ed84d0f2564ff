"""Configuration of `fit_rfm` and the records of its rounds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.linalg.kernels import KERNELS

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class RFMConfig:
    """Settings of `fit_rfm`. A tuple in `bandwidth` or `center_gradients` is searched on validation
    rows by AUC."""

    kernel: str = "laplace"
    """"laplace", exp(-t/L) (the method's), or "gaussian", exp(-t^2/(2 L^2))."""
    bandwidth: float | tuple[float, ...] = (0.5, 1.0, 2.0)
    """Length L of the kernel, > 0, in units of `bandwidth_unit`; a tuple is searched."""
    bandwidth_unit: str = "median_distance"
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
    normalise: str = "trace"
    """What the AGOP is divided by to make the next metric: "trace" (rotation-invariant), "max" (its
    largest entry, depends on the basis; as xRFM) or "none". Acts only with
    bandwidth_unit="absolute"."""
    standardise: str = "scale"
    """"none"; "scale": one scalar, so that coordinates have mean variance 1 and rotations commute
    with the fit (the
    default: a residual stream has no preferred basis, and gradient and displacement are then the
    same line); "coordinate": each coordinate to unit variance, which privileges the basis. See
    `RFM.direction` for the way back."""
    targets: str = "centred"
    """What is regressed: "centred", label minus mean label (swapping the labels flips the
    direction), or "zero_one", the labels themselves without intercept, as in the reference code."""
    validation_fraction: float = 0.2
    """Share of rows, in [0, 0.5], held out for choosing setting and round, stratified by label;
    what was chosen is then fitted on all rows. 0: no validation, the last round is kept. Not used
    when `fit_rfm` is given validation rows."""

    def __post_init__(self) -> None:
        check_choice("kernel", self.kernel, KERNELS)
        check_choice("bandwidth_unit", self.bandwidth_unit, ("absolute", "median_distance"))
        check_choice("normalise", self.normalise, ("trace", "max", "none"))
        check_choice("standardise", self.standardise, ("none", "scale", "coordinate"))
        check_choice("targets", self.targets, ("centred", "zero_one"))
        for name in ("bandwidth", "center_gradients"):  # JSON has lists only
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        for value in self.bandwidths:
            check_number("bandwidth", value, low=0.0, low_open=True)
        if (
            not self.bandwidths
            or not self.centerings
            or not all(isinstance(c, bool) for c in self.centerings)
        ):
            raise ArgumentError(
                "bandwidth must be a number or a non-empty tuple of numbers, and center_gradients "
                "a bool or a "
                f"non-empty tuple of bools; got {self.bandwidth!r} and {self.center_gradients!r}."
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

    @property
    def bandwidths(self) -> tuple[float, ...]:
        """`bandwidth` as a tuple."""
        return self.bandwidth if isinstance(self.bandwidth, tuple) else (self.bandwidth,)

    @property
    def centerings(self) -> tuple[bool, ...]:
        """`center_gradients` as a tuple."""
        return (
            self.center_gradients
            if isinstance(self.center_gradients, tuple)
            else (self.center_gradients,)
        )

    @property
    def is_search(self) -> bool:
        """Whether more than one setting is asked for."""
        return len(self.bandwidths) * len(self.centerings) > 1

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
