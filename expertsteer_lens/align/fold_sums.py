"""Anchors split into folds: the sums of every fold, and every training set as a difference of sums.

Each side of an aligner is centred, optionally scaled, and reduced to its row space (`r <= min(n,
d)`), which loses nothing: a ridge or PCA solution always lies in the span of the anchors. Second
moments are kept fold by fold, so every training set is a difference of sums, and the expert side of
every fold is diagonalised once for all target layers and all ridges.

Data goes one way: rows or streamed moments -> `FoldSums` (one layer) -> `ExpertLayer` or
`TargetLayer` (every training set of it) -> `PairFold` (one training set of a layer pair).

Symbols: `e`, `U` eigenvalues and eigenvectors of the expert covariance of the training folds;
encode matrices `W` are `[r_target, k]` and decode matrices `D` `[k, r_target]`, in the leading `k`
columns of `U`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens.errors import DataError
from expertsteer_lens.linalg.row_space import EIGENVALUE_TOLERANCE, row_space

# --- one layer


@dataclass(frozen=True, eq=False)
class FoldSums:
    """Anchor sums of one hook point, fold by fold, about its overall mean and in its row-space
    coordinates."""

    n: int
    """Rows of all folds."""
    mean: Float[Tensor, " d"]
    """Original units."""
    scale: Float[Tensor, " d"]
    """Ones unless standardised."""
    basis: Float[Tensor, "d r"]
    """Orthonormal columns: coordinates = (h - mean) / scale @ basis."""
    counts: Float[Tensor, " n_folds"]
    """Rows per fold (their total weight, where rows are weighted)."""
    sums: Float[Tensor, "n_folds r"]
    """Sum of the coordinates of each fold."""
    total: Float[Tensor, "r r"]
    """Sum of outer products of all rows."""
    squares: tuple[Tensor, ...] | None = None
    """`[r, r]` sum of outer products of each fold; None where `rows` are held, from which it is
    cheap."""
    rows: tuple[Tensor, ...] | None = None
    """Coordinates by fold, `[n_k, r]`; None when only moments were given."""

    @property
    def d(self) -> int:
        """Original width."""
        return self.mean.shape[0]

    @property
    def n_folds(self) -> int:
        """Number of folds."""
        return self.counts.shape[0]

    def training(self, fold: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Number of rows, mean `[r]` and covariance `[r, r]` of all folds but `fold` (None: of
        all)."""
        n, total, square = self.counts.sum(), self.sums.sum(0), self.total
        if fold is not None:
            n, total, square = (
                n - self.counts[fold],
                total - self.sums[fold],
                square - self.square(fold),
            )
        mean = total / n
        return n, mean, square / n - torch.outer(mean, mean)

    def square(self, fold: int) -> Float[Tensor, "r r"]:
        """Sum of outer products of the rows of `fold`."""
        if self.rows is not None:
            return self.rows[fold].T @ self.rows[fold]
        assert self.squares is not None
        return self.squares[fold]

    def held_out(self, fold: int, mean: Float[Tensor, " r"]) -> Float[Tensor, "r r"]:
        """Sum over the rows of `fold` of outer products about `mean`."""
        cross = torch.outer(self.sums[fold], mean)
        return self.square(fold) - cross - cross.T + self.counts[fold] * torch.outer(mean, mean)


def sums_from_rows(name: str, rows: Tensor, folds: Sequence[Tensor], standardise: bool) -> FoldSums:
    """Reduce anchor rows `[n, d]`; `folds` are disjoint index tensors covering all rows.

    Mean, scale and row space use all rows of this one model: marginal steps, blind to the pairing
    that is validated.

    Raises:
        DataError: all rows are equal.
    """
    x = rows.detach().to(torch.float64)
    mean = x.mean(0)
    centred = x - mean
    scale = coordinate_scale(centred.square().mean(0), standardise)
    space = row_space(centred / scale)
    _check_not_constant(name, space.singular_values[0])
    parts = tuple(space.coordinates[f] for f in folds)
    return FoldSums(
        x.shape[0],
        mean,
        scale,
        space.basis,
        torch.tensor([p.shape[0] for p in parts], dtype=torch.float64, device=x.device),
        torch.stack([p.sum(0) for p in parts]),
        space.coordinates.T @ space.coordinates,
        rows=parts,
    )


def sums_from_moments(
    name: str,
    n: int,
    counts: Float[Tensor, " n_folds"],
    means: Float[Tensor, "n_folds d"],
    covariances: Sequence[Tensor],
    standardise: bool,
) -> FoldSums:
    """The same from the total weight, mean and covariance `[d, d]` of each fold; never more than a
    few matrices of that size at once beside the ones given.

    Raises:
        DataError: all rows are equal.
    """
    mean = (counts[:, None] * means).sum(0) / counts.sum()
    offsets = means - mean
    # Copies: a view of the diagonal would keep the whole matrix.
    variances = torch.stack([c.diagonal().clone() for c in covariances]) + offsets.square()
    scale = coordinate_scale((counts[:, None] * variances).sum(0) / counts.sum(), standardise)

    def square(fold: int) -> Tensor:
        """Sum of outer products `[d, d]` of the fold's rows, in units of `scale`."""
        about_mean = covariances[fold] + torch.outer(offsets[fold], offsets[fold])
        return counts[fold] * about_mean / (scale[:, None] * scale)

    total = square(0)
    for fold in range(1, len(covariances)):
        total += square(fold)
    values, vectors = principal_axes(total)
    _check_not_constant(name, values[0])
    basis = vectors.contiguous()
    squares = tuple(basis.T @ square(fold) @ basis for fold in range(len(covariances)))
    sums = counts[:, None] * (offsets / scale) @ basis
    return FoldSums(
        n, mean, scale, basis, counts, sums, torch.stack(squares).sum(0), squares=squares
    )


def coordinate_scale(variance: Float[Tensor, " d"], standardise: bool) -> Float[Tensor, " d"]:
    """Standard deviation per coordinate, 1 where a coordinate is constant or where nothing is to be
    scaled.

    >>> coordinate_scale(torch.tensor([4.0, 0.0]), standardise=True)
    tensor([2., 1.])
    """
    if not standardise:
        return torch.ones_like(variance)
    return torch.where(
        variance > EIGENVALUE_TOLERANCE * variance.max(), variance, torch.ones_like(variance)
    ).sqrt()


def principal_axes(
    covariance: Float[Tensor, "d d"],
) -> tuple[Float[Tensor, " r"], Float[Tensor, "d r"]]:
    """Eigenvalues (descending) and eigenvectors, null directions removed; at least one of each, so
    that shapes stay usable when everything is constant."""
    values, vectors = torch.linalg.eigh(covariance)
    keep = values > EIGENVALUE_TOLERANCE * values[-1]
    keep[-1] = True
    return values[keep].flip(0), vectors[:, keep].flip(1)


def _check_not_constant(name: str, largest: Tensor) -> None:
    if not float(largest) > 0.0:
        raise DataError(
            f"{name} is the same in every row, so nothing can be fitted to it; look at the texts "
            "and positions."
        )


# --- every training set of one layer


@dataclass(frozen=True, eq=False)
class ExpertFold:
    """The expert side of one training set, diagonalised, and the held-out rows in the same axes."""

    n: Tensor
    mean: Float[Tensor, " r0"]
    """Training mean."""
    values: Float[Tensor, " r"]
    """Eigenvalues of the training covariance, descending, null directions removed."""
    vectors: Float[Tensor, "r0 r"]
    """Eigenvectors in columns."""
    unit: Float[Tensor, ""]
    """Mean variance per original coordinate: what a relative ridge multiplies."""
    held: Float[Tensor, "r r"]
    """Held-out outer products about the training mean, in the eigenvectors; the training scatter
    if no fold."""
    held_trace: Float[Tensor, ""]
    """Held-out sum of squares about the training mean, null directions included."""


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """One expert layer, diagonalised on every training set: shared among all target layers."""

    sums: FoldSums
    folds: tuple[ExpertFold, ...]
    full: ExpertFold
    """All anchors."""
    axes: Float[Tensor, "d r"]
    """Principal axes of all anchors in the (scaled) original coordinates."""


def expert_layer(sums: FoldSums) -> ExpertLayer:
    """Diagonalise every training covariance of the expert."""
    folds = tuple(_expert_fold(sums, fold) for fold in range(sums.n_folds))
    full = _expert_fold(sums, None)
    return ExpertLayer(sums, folds, full, sums.basis @ full.vectors)


def _expert_fold(sums: FoldSums, fold: int | None) -> ExpertFold:
    """All folds but `fold` (None: all folds, held-out = training rows)."""
    n, mean, covariance = sums.training(fold)
    values, vectors = principal_axes(covariance)
    held = covariance * n if fold is None else sums.held_out(fold, mean)
    unit = covariance.diagonal().sum() / sums.d
    return ExpertFold(
        n, mean, values, vectors, unit, vectors.T @ held @ vectors, held.diagonal().sum()
    )


@dataclass(frozen=True, eq=False)
class TargetLayer:
    """One target layer: shared among all expert layers."""

    sums: FoldSums
    fold_axes: tuple[Tensor, ...] | None
    """`[r0, r]` principal axes of each training set; None for kinds that need none."""
    full_axes: Tensor | None
    """The same of all anchors."""


def target_layer(sums: FoldSums, *, with_axes: bool) -> TargetLayer:
    """A target layer, diagonalised if `with_axes`."""
    if not with_axes:
        return TargetLayer(sums, None, None)
    axes = [principal_axes(sums.training(fold)[2])[1] for fold in range(sums.n_folds)]
    return TargetLayer(sums, tuple(axes), principal_axes(sums.training(None)[2])[1])


# --- one training set of a layer pair


@dataclass(frozen=True, eq=False)
class PairFold:
    """One training set of one (expert, target) pair in the expert's eigenvectors."""

    expert: ExpertFold
    cross: Float[Tensor, "r_target r"]
    """Training cross-covariance C_TE U."""
    held_cross: Float[Tensor, "r_target r"]
    """Held-out cross sums about the training means."""
    held_target: Float[Tensor, ""]
    """Held-out sum of squares of the target about its training mean."""
    target_variance: Float[Tensor, ""]
    """Trace of the training covariance of the target."""
    target_axes: Float[Tensor, "r_target r_axes"] | None
    """Principal axes of the target's training rows, where the kind needs them."""


def cross_sums_from_rows(expert: FoldSums, target: FoldSums) -> Float[Tensor, "n_folds r_t r_e"]:
    """Sum over the rows of each fold of target times expert coordinates."""
    assert expert.rows is not None
    assert target.rows is not None
    return torch.stack([t.T @ e for t, e in zip(target.rows, expert.rows, strict=True)])


def cross_sums_from_moments(
    expert: FoldSums,
    target: FoldSums,
    expert_means: Float[Tensor, "n_folds d_e"],
    target_means: Float[Tensor, "n_folds d_t"],
    covariances: Sequence[Tensor],
) -> Float[Tensor, "n_folds r_t r_e"]:
    """The same from the means and the cross-covariance `[d_t, d_e]` of each fold."""
    left, right = target.basis / target.scale[:, None], expert.basis / expert.scale[:, None]
    out = []
    for fold, covariance in enumerate(covariances):
        t, e = target_means[fold] - target.mean, expert_means[fold] - expert.mean
        out.append(left.T @ (expert.counts[fold] * (covariance + torch.outer(t, e))) @ right)
    return torch.stack(out)


def pair_folds(
    expert: ExpertLayer, target: TargetLayer, cross_sums: Float[Tensor, "n_folds r_t r_e"]
) -> tuple[tuple[PairFold, ...], PairFold]:
    """Cross statistics of every training set with its held-out fold, and of all anchors."""
    folds = tuple(
        _pair_fold(expert, target, cross_sums, fold) for fold in range(expert.sums.n_folds)
    )
    n, _, covariance = target.sums.training(None)
    variance = covariance.diagonal().sum()
    cross = cross_sums.sum(0) @ expert.full.vectors / n
    full = PairFold(expert.full, cross, cross * n, variance * n, variance, target.full_axes)
    return folds, full


def _pair_fold(
    layer: ExpertLayer, target_layer: TargetLayer, cross_sums: Tensor, fold: int
) -> PairFold:
    """All folds but `fold`, and `fold` about the training means."""
    expert, target = layer.folds[fold], target_layer.sums
    n, mean, covariance = target.training(fold)
    held = cross_sums[fold]
    cross = (cross_sums.sum(0) - held) / n - torch.outer(mean, expert.mean)
    held = (
        held
        - torch.outer(target.sums[fold], expert.mean)
        - torch.outer(mean, layer.sums.sums[fold])
        + target.counts[fold] * torch.outer(mean, expert.mean)
    )
    return PairFold(
        expert,
        cross @ expert.vectors,
        held @ expert.vectors,
        target.held_out(fold, mean).diagonal().sum(),
        covariance.diagonal().sum(),
        None if target_layer.fold_axes is None else target_layer.fold_axes[fold],
    )


# --- what a solution leaves over


def encode_error(w: Float[Tensor, "r_target k"], pair: PairFold) -> Float[Tensor, ""]:
    """Held-out sum of squared errors of `W h` against the target."""
    k = w.shape[1]
    fitted = ((w @ pair.expert.held[:k, :k]) * w).sum()
    return pair.held_target - 2.0 * (w * pair.held_cross[:, :k]).sum() + fitted


def reconstruction_error(
    w: Float[Tensor, "r_target k"], d: Float[Tensor, "k r_target"], expert: ExpertFold
) -> Float[Tensor, ""]:
    """Held-out sum of squares of `h - D W h`."""
    k = w.shape[1]
    composed, scatter = d @ w, expert.held[:k, :k]
    return (
        expert.held_trace
        - 2.0 * (composed * scatter).sum()
        + ((composed @ scatter) * composed).sum()
    )


def effective_rank(w: Float[Tensor, "r_target k"], expert: ExpertFold) -> float:
    """Participation ratio `tr(K)^2 / tr(K^2)` of the code covariance `K = W C_EE W^T`: about how
    many axes the code uses."""
    code = (w * expert.values[: w.shape[1]]) @ w.T
    return float(code.diagonal().sum() ** 2 / code.square().sum())
