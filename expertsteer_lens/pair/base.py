"""What an estimator of the dependence between layers is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

from expertsteer_lens._checks import Scalar

from .preparation import PreparedLayer

if TYPE_CHECKING:
    from .config import MIConfig

CORRELATION_CAP = 1e-6
"""Squared correlations count as at most 1 minus this, so an identical pair reads 6.9 nats a
component instead of infinity."""


class Estimator(Protocol):
    """One number per layer pair, for all pairs at once: built from the features of all layers, then
    asked for the estimate, for draws of its null, and for its bootstrap.

    Subclass it, and give the class a name with `register_estimator`. Rows of all layers belong
    together: row `r` of every expert and target layer is the same text (or token).
    """

    unit: ClassVar[str] = "nats"
    """Unit of the number, as figures show it."""
    quantity: ClassVar[str] = "mutual_information"
    """Name of the number: its column in `LayerPairMI.to_pandas`."""
    defaults: ClassVar[Mapping[str, int | float]] = {}
    """Settings of `MIConfig` that mean something here, with their defaults: "n_components",
    "n_folds", "shrinkage", "n_neighbors". With "n_components" the layers arrive as that many
    whitened principal components, without it as standardised rows of full width."""
    options: ClassVar[Mapping[str, Scalar]] = {}
    """Settings of its own, beside those of `MIConfig`, with their defaults; read in `__init__` with
    `config.option(name)`."""
    lowest: ClassVar[float | None] = None
    """Smallest value that the estimate can take, where there is one: intervals end there."""

    def __init__(
        self,
        expert: Sequence[PreparedLayer],
        target: Sequence[PreparedLayer],
        config: MIConfig,
        folds: Sequence[Tensor],
    ) -> None:
        """From prepared layers of both models.

        Args:
            expert: one per expert layer, `features` of shape `[n, k]`.
            target: one per target layer, the same rows and (for components) the same k.
            config: the settings; those named in `defaults` have values.
            folds: row indices of `config.n_folds` disjoint parts; a single part of all rows where
                "n_folds" is not among the settings.
        """

    @classmethod
    def check_rows(cls, n: int, config: MIConfig) -> None:
        """Raise `DataError` if `n` rows are too few."""

    def observed(self) -> Tensor:
        """Estimate per pair, `[L_E, L_T]`."""
        ...

    def permuted(self, order: Tensor) -> Tensor:
        """The same statistic with the target's rows taken in `order`, `[n]`: one draw of the null,
        `[L_E, L_T]`. A permutation, unless groups of rows differ in size: then some rows repeat."""
        ...

    def bootstrap(self, weights: Tensor) -> Tensor:
        """The statistic under row weights `[B, n]` (each row sums to n), `[B, L_E, L_T]`."""
        ...
