"""The RFM recursion on rows held as inner products (n < d) or as themselves (d <= n).

Why it is exact. Every gradient is a combination of differences of training rows, so `G = C X` for
some coefficients C, and with `Phi = X X^T` the images of the rows in the next metric `M = G^T G`
are `X G^T = Phi C^T`: n x n. The next gradients are `G' = P G` with `P` from the images alone, so
`C' = P C`. X itself is needed again only for the final vector. When d <= n the same lines run with
coefficients over the coordinate axes (`G = C`, `Phi = X`), and G is replaced by the d x d triangle
of its QR factorisation, which has the same `G^T G`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from expertsteer_lens.errors import DataError, SolveError
from expertsteer_lens.linalg.kernels import (
    apply_gradient_operator,
    distances,
    distances_from_products,
    gradient_operator,
    kernel_values,
    solve_kernel_ridge,
)
from expertsteer_lens.linalg.row_space import inner_products, standardised


@dataclass(frozen=True, eq=False)
class Round:
    """One round: the predictor fitted in `metric`, and its gradients at the training rows."""

    number: int
    length: float
    """Kernel length in force."""
    alpha: Float[Tensor, " n"]
    metric: Float[Tensor, "k c"] | None
    """Coefficients of the metric's factor; None is the Euclidean metric of round 1."""
    gradients: Float[Tensor, "k c"]
    """Coefficients of G (or of a factor with the same `G^T G`)."""
    predictions: Float[Tensor, " m"]
    """At the fold's held-out rows."""


@dataclass(frozen=True, eq=False)
class Fold:
    """Training rows (first) and held-out rows, standardised, in the form the recursion needs."""

    rows: Float[Tensor, "n d"]
    """Raw training rows; used to return to width d when `dual`."""
    shift: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    dual: bool
    """Whether coefficients are over training rows (n < d) or over coordinate axes."""
    cross: Float[Tensor, "n_all c"]
    """`Phi`: inner products of all rows with the training rows when `dual`, else the standardised
    rows."""
    norms: Float[Tensor, " n_all"]
    """Squared norms of the standardised rows."""

    @property
    def n(self) -> int:
        """Number of training rows."""
        return self.rows.shape[0]

    def distances(
        self,
        cross: Float[Tensor, "m c"],
        norms: Float[Tensor, " m"],
        metric: Float[Tensor, "k c"] | None,
    ) -> Float[Tensor, "m n"]:
        """Distances to the training rows, of rows given as lines of `Phi`."""
        if metric is not None:
            return distances(cross @ metric.T, self.cross[: self.n] @ metric.T)
        if not self.dual:
            return distances(cross, self.cross[: self.n])
        return distances_from_products(cross, norms, self.norms[: self.n])

    def lift(self, coefficients: Float[Tensor, "k c"]) -> Float[Tensor, "k d"]:
        """Vectors of width d, in standardised coordinates, from their coefficients."""
        if not self.dual:
            return coefficients
        parts = self.columns()
        return torch.cat(
            [
                coefficients @ standardised(self.rows[:, p], self.shift[p], self.scale[p])
                for p in parts
            ],
            1,
        )

    def columns(self, *, chunk: int = 1024) -> list[slice]:
        """Column ranges that bound the size of standardised copies of the rows."""
        return [slice(start, start + chunk) for start in range(0, self.rows.shape[1], chunk)]

    def gradient_products(self, coefficients: Float[Tensor, "k c"]) -> Float[Tensor, "k k"]:
        """`G G^T`, whose eigenvalues are those of `G^T G`, and whose eigenvectors u give `G^T
        u`."""
        right = self.cross[: self.n] @ coefficients.T if self.dual else coefficients.T
        return coefficients @ right

    def largest_entry(self, coefficients: Float[Tensor, "k c"]) -> float:
        """`max(G^T G)`, which for a PSD matrix lies on the diagonal: the largest squared column
        norm of G.

        Products in float32: it is one scalar that sets a unit, and its relative error of 1e-6 moves
        nothing else."""
        if not self.dual:
            return float(coefficients.square().sum(0).max())
        size, best = coefficients.abs().max(), 0.0
        left = (coefficients / size).to(torch.float32)
        for part in self.columns():
            entries = left @ standardised(
                self.rows[:, part], self.shift[part], self.scale[part], torch.float32
            )
            best = max(best, float(torch.linalg.vector_norm(entries, dim=0).max()))
        return (best * float(size)) ** 2

    def predict(
        self, activations: Float[Tensor, "m d"], fitted: Round, kernel: str, *, chunk: int = 2048
    ) -> Float[Tensor, " m"]:
        """`sum_i alpha_i k(||x - x_i||)` at new raw rows, chunk by chunk."""
        out = []
        for part in activations.to(self.rows.device).split(chunk):
            moved = standardised(part, self.shift, self.scale)
            cross = (
                inner_products(part, self.rows, shift=self.shift, scale=self.scale)
                if self.dual
                else moved
            )
            distance = self.distances(cross, moved.square().sum(1), fitted.metric)
            out.append(kernel_values(distance, fitted.length, kernel=kernel) @ fitted.alpha)
        return torch.cat(out)


@dataclass(frozen=True, eq=False)
class RowGeometry:
    """All rows of a fit, standardised; inner products computed once and shared by every split and
    setting."""

    rows: Float[Tensor, "n d"]
    shift: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    dual: bool
    products: Float[Tensor, "n c"]
    """Inner products of all rows when `dual`, else the standardised rows."""

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"], *, n_fitted: int, standardise: str) -> RowGeometry:
        """Standardise by the first `n_fitted` rows (labels unseen) and take inner products.

        Rows are always centred: distances and gradients do not see it, rounding does. O(n^2 d) when
        n < d.

        Raises:
            DataError: the fitted rows are all equal.
        """
        fitted = rows[:n_fitted]
        if bool((fitted == fitted[0]).all()):
            raise DataError("activations must differ between rows, but all rows are equal.")
        shift = fitted.mean(0, dtype=torch.float64)
        scale = (
            _column_deviation(fitted, shift)
            if standardise == "coordinate"
            else torch.ones_like(shift)
        )
        dual = rows.shape[0] < rows.shape[1]
        products = (
            inner_products(rows, rows, shift=shift, scale=scale)
            if dual
            else standardised(rows, shift, scale)
        )
        if (
            standardise == "scale"
        ):  # the mean variance is the trace of the products: no further pass over the rows
            size = (
                products.diagonal()[:n_fitted].sum() if dual else products[:n_fitted].square().sum()
            )
            scalar = (size / fitted.numel()).sqrt()
            products, scale = products.div_(scalar**2 if dual else scalar), scale * scalar
        return cls(rows, shift, scale, dual, products)

    def fold(self, train: Int[Tensor, " n"], held: Int[Tensor, " m"] | None = None) -> Fold:
        """The rows `train` to fit and `held` to predict."""
        order = train if held is None else torch.cat([train, held])
        norms = self.products.diagonal() if self.dual else self.products.square().sum(1)
        cross = self.products[order][:, train] if self.dual else self.products[order]
        return Fold(self.rows[train], self.shift, self.scale, self.dual, cross, norms[order])


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one run of the recursion needs to know."""

    kernel: str
    bandwidth: float
    relative: bool
    """Whether bandwidth is in units of the round's median training distance."""
    ridge: float
    n_rounds: int
    center: bool
    normalise: str


def run_rounds(fold: Fold, targets: Float[Tensor, " n"], setting: Setting) -> Iterator[Round]:
    """Yield the rounds one by one.

    Raises:
        SolveError: singular kernel system, vanishing gradients, or a median distance of 0 when
            `relative`.
    """
    images: Tensor | None = None
    metric: Tensor | None = None
    for number in range(1, setting.n_rounds + 1):
        done = _one_round(fold, targets, setting, number, images, metric)
        yield done
        if number < setting.n_rounds:
            images = fold.cross @ done.gradients.T
            scale = _normaliser(fold, done.gradients, images, setting.normalise) ** -0.5
            metric, images = done.gradients * scale, images.mul_(scale)


def _one_round(
    fold: Fold,
    targets: Tensor,
    setting: Setting,
    number: int,
    images: Tensor | None,
    metric: Tensor | None,
) -> Round:
    """Fit the predictor in the metric (Euclidean when None) and take its gradients; `images` are
    those of all rows."""
    n = fold.n
    distance = (
        fold.distances(fold.cross, fold.norms, None)
        if images is None
        else distances(images, images[:n])
    )
    length = setting.bandwidth * (_median_distance(distance[:n]) if setting.relative else 1.0)
    values = kernel_values(distance, length, kernel=setting.kernel)
    alpha = solve_kernel_ridge(values[:n], targets, setting.ridge)
    predictions = values[n:] @ alpha
    weights = gradient_operator(distance[:n], values[:n], alpha, length, kernel=setting.kernel)
    gradients = _gradient_coefficients(fold, weights, images, metric)
    if setting.center:
        gradients = gradients - gradients.mean(0)
    if gradients.shape[0] > gradients.shape[1]:
        gradients = torch.linalg.qr(gradients, mode="r").R
    if (
        float(torch.linalg.vector_norm(gradients, ord=math.inf))
        < torch.finfo(gradients.dtype).tiny ** 0.5
    ):
        raise SolveError(
            f"gradients vanish in round {number} at bandwidth={setting.bandwidth:g}: the kernel is "
            "diagonal at this "
            f"length ({length:.3g}) against a median distance of "
            f"{_median_distance(distance[:n]):.3g}; raise bandwidth."
        )
    return Round(number, length, alpha, metric, gradients, predictions)


def _gradient_coefficients(
    fold: Fold, weights: Tensor, images: Tensor | None, metric: Tensor | None
) -> Tensor:
    """Coefficients of the gradients `sum_i w_ji M (x_j - x_i)`: P C, with M = I before the first
    metric."""
    if images is not None and metric is not None:
        return apply_gradient_operator(weights, images[: fold.n], images[: fold.n]) @ metric
    if fold.dual:
        return torch.neg(weights).diagonal_scatter(weights.sum(1) - weights.diagonal())
    return apply_gradient_operator(weights, fold.cross[: fold.n], fold.cross[: fold.n])


def _normaliser(fold: Fold, gradients: Tensor, images: Tensor, normalise: str) -> float:
    """What `G^T G` is divided by; "none" leaves the average over the n gradients."""
    if normalise == "max":
        return fold.largest_entry(gradients)
    if normalise == "none":
        return float(fold.n)
    return float((gradients * images[: fold.n].T).sum() if fold.dual else gradients.square().sum())


def _median_distance(distance: Float[Tensor, "n n"]) -> float:
    """Median over pairs of different rows."""
    n = distance.shape[0]
    pairs = torch.triu_indices(n, n, offset=1, device=distance.device)
    median = float(distance[pairs[0], pairs[1]].median())
    if median == 0.0:
        raise SolveError(
            "the median distance between rows is 0 (more than half of the pairs are duplicates, or "
            "the metric has "
            "collapsed); remove duplicates or use bandwidth_unit='absolute'."
        )
    return median


def _column_deviation(
    rows: Float[Tensor, "n d"], shift: Float[Tensor, " d"], *, chunk: int = 512
) -> Tensor:
    """Standard deviation of each column, in float64 over chunks of columns; 1 for a constant
    column."""
    parts = []
    for start in range(0, rows.shape[1], chunk):
        block = rows[:, start : start + chunk]
        spread = (block.to(torch.float64) - shift[start : start + chunk]).square().mean(0).sqrt()
        parts.append(spread.masked_fill((block == block[0]).all(0), 1.0))
    return torch.cat(parts)
