"""Rows of activations in the form the RFM recursion needs: inner products when there are fewer rows
than coordinates, else the standardised rows themselves.

Every vector of the recursion (a gradient, a line of a metric's factor) lies in the span of the
training rows, so it can be written as *coefficients* in one of two ways:

- `n < d` ("dual"): over the training rows. Only inner products of rows are then ever needed, each
  row is represented by its products with the training rows, and width d returns once, for the
  final vector.
- `d <= n`: over the coordinate axes. Each row is represented by itself, standardised.

The letter c stands for the number of coefficients: n in the first case, d in the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from expertsteer_lens.errors import DataError
from expertsteer_lens.linalg.kernels import distances, distances_from_products
from expertsteer_lens.linalg.row_space import inner_products, standardised

from .config import Standardisation


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """Raw training rows with their standardisation `(x - mean) / scale`."""

    rows: Float[Tensor, "n d"]
    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    dual: bool
    """Whether coefficients are over the rows (n < d) or over the coordinate axes."""

    def represent(self, activations: Float[Tensor, "m d"]) -> Float[Tensor, "m c"]:
        """Raw rows as the recursion sees them, in float64."""
        if self.dual:
            return inner_products(activations, self.rows, shift=self.mean, scale=self.scale)
        return standardised(activations, self.mean, self.scale)

    def lift(self, coefficients: Float[Tensor, "k c"]) -> Float[Tensor, "k d"]:
        """Vectors of width d, in standardised coordinates, from their coefficients."""
        if not self.dual:
            return coefficients
        blocks = [coefficients @ self._standardised_columns(part) for part in self._columns()]
        return torch.cat(blocks, 1)

    def largest_agop_entry(self, coefficients: Float[Tensor, "k c"]) -> float:
        """`max(G^T G)`, which for a PSD matrix lies on the diagonal: the largest squared column
        norm of G.

        Products in float32: it is one scalar that sets a unit, and its relative error of 1e-6 moves
        nothing else."""
        if not self.dual:
            return float(coefficients.square().sum(0).max())
        size, largest = coefficients.abs().max(), 0.0
        left = (coefficients / size).to(torch.float32)
        for part in self._columns():
            entries = left @ self._standardised_columns(part, torch.float32)
            largest = max(largest, float(torch.linalg.vector_norm(entries, dim=0).max()))
        return (largest * float(size)) ** 2

    def _columns(self, *, chunk: int = 1024) -> list[slice]:
        """Column ranges that bound the size of standardised copies of the rows."""
        return [slice(start, start + chunk) for start in range(0, self.rows.shape[1], chunk)]

    def _standardised_columns(self, part: slice, dtype: torch.dtype = torch.float64) -> Tensor:
        return standardised(self.rows[:, part], self.mean[part], self.scale[part], dtype)


@dataclass(frozen=True, eq=False)
class Fold:
    """Training rows to fit, and held-out rows to predict, as the recursion sees them."""

    training: TrainingRows
    represented: Float[Tensor, "n_all c"]
    """`TrainingRows.represent` of all rows: training rows first, held-out rows after."""
    squared_norms: Float[Tensor, " n_all"]
    """Of the standardised rows."""

    @property
    def n(self) -> int:
        """Number of training rows."""
        return self.training.rows.shape[0]

    def euclidean_distances(self) -> Float[Tensor, "n_all n"]:
        """Distances of all rows to the training rows, before there is a metric."""
        if not self.training.dual:
            return distances(self.represented, self.represented[: self.n])
        return distances_from_products(
            self.represented, self.squared_norms, self.squared_norms[: self.n]
        )

    def gradient_products(self, gradients: Float[Tensor, "k c"]) -> Float[Tensor, "k k"]:
        """`G G^T`, whose eigenvalues are those of `G^T G`, and whose eigenvectors u give `G^T
        u`."""
        dual = self.training.dual
        right = self.represented[: self.n] @ gradients.T if dual else gradients.T
        return gradients @ right


@dataclass(frozen=True, eq=False)
class RowGeometry:
    """All rows of a fit; inner products are computed once and shared by every split and setting."""

    all_rows: TrainingRows
    represented: Float[Tensor, "n c"]

    @classmethod
    def of(
        cls, rows: Float[Tensor, "n d"], *, n_fitted: int, standardise: Standardisation
    ) -> RowGeometry:
        """Standardise by the first `n_fitted` rows (labels unseen) and take inner products.

        Rows are always centred: distances and gradients do not see it, rounding does. O(n^2 d) when
        n < d.

        Raises:
            DataError: the fitted rows are all equal.
        """
        fitted = rows[:n_fitted]
        if bool((fitted == fitted[0]).all()):
            raise DataError("activations must differ between rows, but all rows are equal.")
        mean = fitted.mean(0, dtype=torch.float64)
        by_column = standardise == "coordinate"
        scale = _column_deviation(fitted, mean) if by_column else torch.ones_like(mean)
        dual = rows.shape[0] < rows.shape[1]
        represented = TrainingRows(rows, mean, scale, dual).represent(rows)
        if standardise == "scale":
            # The mean variance is the trace of the products: no further pass over the rows.
            variances = represented.diagonal() if dual else represented.square()
            size = (variances[:n_fitted].sum() / fitted.numel()).sqrt()
            represented, scale = represented.div_(size**2 if dual else size), scale * size
        return cls(TrainingRows(rows, mean, scale, dual), represented)

    def fold(self, train: Int[Tensor, " n"], held: Int[Tensor, " m"] | None = None) -> Fold:
        """The rows `train` to fit and `held` to predict."""
        everything = self.all_rows
        order = train if held is None else torch.cat([train, held])
        if everything.dual:
            norms, represented = self.represented.diagonal(), self.represented[order][:, train]
        else:
            norms, represented = self.represented.square().sum(1), self.represented[order]
        training = TrainingRows(
            everything.rows[train], everything.mean, everything.scale, everything.dual
        )
        return Fold(training, represented, norms[order])


def _column_deviation(
    rows: Float[Tensor, "n d"], mean: Float[Tensor, " d"], *, chunk: int = 512
) -> Float[Tensor, " d"]:
    """Standard deviation of each column, in float64 over chunks of columns; 1 for a constant
    column."""
    parts = []
    for start in range(0, rows.shape[1], chunk):
        block = rows[:, start : start + chunk]
        spread = (block.to(torch.float64) - mean[start : start + chunk]).square().mean(0).sqrt()
        parts.append(spread.masked_fill((block == block[0]).all(0), 1.0))
    return torch.cat(parts)
