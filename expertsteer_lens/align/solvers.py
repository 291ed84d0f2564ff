"""Closed forms of the affine aligners, in coordinates where each side is as small as its anchors
allow.

Each side is centred, optionally scaled, and reduced to its row space (`r <= min(n, d)`), which
loses nothing: a ridge or PCA solution always lies in the span of the anchors. Second moments are
kept fold by fold, so every training set is a difference of sums, and the expert side of every fold
is diagonalised once for all target layers and all ridges.

Symbols: `e`, `U` eigenvalues and eigenvectors of the expert covariance of the training folds;
encode matrices `W` are `[r_target, k]` and decode matrices `D` `[k, r_target]`, in the leading `k`
columns of `U`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertsteer_lens.errors import DataError
from expertsteer_lens.linalg.moments import Moments
from expertsteer_lens.linalg.row_space import row_space

RIDGE_PATH = tuple(10.0 ** (-6.0 + 0.5 * i) for i in range(21))
"""Candidate ridges of the cross-validation, 1e-6 to 1e4 in half decades, in units of the mean
expert variance."""
RANK_TOLERANCE = 1e-12
"""Eigenvalues below this fraction of the largest are rounding of a null direction (float64 resolves
about 1e-15 * d)."""
DECODER_JITTER = 1e-8
"""Relative to the mean variance of the code: keeps the decoder finite where the code has (nearly)
constant directions."""


@dataclass(frozen=True, eq=False)
class Side:
    """Anchor sums of one hook point, fold by fold, about its overall mean and in its row-space
    coordinates."""

    mean: Tensor
    """`[d]`, original units."""
    scale: Tensor
    """`[d]`; ones unless standardised."""
    basis: Tensor
    """`[d, r]`, orthonormal columns: coordinates = (h - mean) / scale @ basis."""
    counts: Tensor
    """`[K]` rows per fold."""
    sums: Tensor
    """`[K, r]` sum of the coordinates of each fold."""
    total: Tensor
    """`[r, r]` sum of outer products of all rows."""
    squares: tuple[Tensor, ...] | None = None
    """`[r, r]` sum of outer products of each fold; None where `rows` are held, from which it is
    cheap."""
    rows: tuple[Tensor, ...] | None = None
    """Coordinates by fold, `[n_k, r]`; None when only moments were given."""
    axes: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Eigenvalues and eigenvectors of training covariances already computed, by fold."""

    @property
    def d(self) -> int:
        """Original width."""
        return self.mean.shape[0]

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

    def square(self, fold: int) -> Tensor:
        """Sum of outer products of the rows of `fold`, `[r, r]`."""
        if self.rows is not None:
            return self.rows[fold].T @ self.rows[fold]
        assert self.squares is not None
        return self.squares[fold]

    def training_axes(self, fold: int | None) -> tuple[Tensor, Tensor]:
        """Eigenvalues (descending, null directions removed) and eigenvectors of the training
        covariance, kept."""
        if fold not in self.axes:
            values, vectors = torch.linalg.eigh(self.training(fold)[2])
            keep = values > RANK_TOLERANCE * values[-1]
            self.axes[fold] = values[keep].flip(0), vectors[:, keep].flip(1)
        return self.axes[fold]

    def held_out(self, fold: int, mean: Tensor) -> Tensor:
        """Sum over the rows of `fold` of outer products about `mean`, `[r, r]`."""
        cross = torch.outer(self.sums[fold], mean)
        return self.square(fold) - cross - cross.T + self.counts[fold] * torch.outer(mean, mean)


def side_from_rows(name: str, rows: Tensor, folds: Sequence[Tensor], standardise: bool) -> Side:
    """Reduce anchor rows `[n, d]`; `folds` are disjoint index tensors covering all rows.

    Mean, scale and row space use all rows of this one model: marginal steps, blind to the pairing
    that is validated."""
    x = rows.detach().to(torch.float64)
    mean = x.mean(0)
    centred = x - mean
    scale = coordinate_scale(centred.square().mean(0), standardise)
    space = row_space(centred / scale)
    if not float(space.singular_values[0]) > 0.0:
        raise DataError(
            f"{name} is the same in every row, so nothing can be fitted to it; look at the texts "
            "and positions."
        )
    parts = tuple(space.coordinates[f] for f in folds)
    return Side(
        mean,
        scale,
        space.basis,
        torch.tensor([p.shape[0] for p in parts], dtype=torch.float64, device=x.device),
        torch.stack([p.sum(0) for p in parts]),
        space.coordinates.T @ space.coordinates,
        rows=parts,
    )


def coordinate_scale(variance: Tensor, standardise: bool) -> Tensor:
    """Standard deviation per coordinate, 1 where a coordinate is constant or where nothing is to be
    scaled."""
    if not standardise:
        return torch.ones_like(variance)
    return torch.where(
        variance > RANK_TOLERANCE * variance.max(), variance, torch.ones_like(variance)
    ).sqrt()


def sides_from_moments(
    folds: Sequence[Moments], standardise: bool
) -> tuple[Side, Side | None, Tensor | None]:
    """Expert side, target side and cross sums `[K, r_target, r_expert]` from the moments of each
    fold."""
    counts = torch.tensor(
        [float(m.n) for m in folds], dtype=torch.float64, device=folds[0].C_EE.device
    )
    expert, offsets_e = _moment_side(
        "expert", counts, [m.mean_expert for m in folds], [m.C_EE for m in folds], standardise
    )
    means_t = [m.mean_target for m in folds if m.mean_target is not None]
    squares_t = [m.C_TT for m in folds if m.C_TT is not None]
    crosses = [m.C_TE for m in folds if m.C_TE is not None]
    if not crosses:
        return expert, None, None
    target, offsets_t = _moment_side("target", counts, means_t, squares_t, standardise)
    raw = torch.stack(
        [
            n * (c + torch.outer(t, e))
            for n, c, t, e in zip(counts, crosses, offsets_t, offsets_e, strict=True)
        ]
    )
    left, right = target.basis / target.scale[:, None], expert.basis / expert.scale[:, None]
    return expert, target, left.T @ raw @ right


def _moment_side(
    name: str, counts: Tensor, means: list[Tensor], covariances: list[Tensor], standardise: bool
) -> tuple[Side, Tensor]:
    stacked = torch.stack(means)
    mean = (counts[:, None] * stacked).sum(0) / counts.sum()
    offsets = stacked - mean
    squares = counts[:, None, None] * (
        torch.stack(covariances) + offsets[:, :, None] * offsets[:, None, :]
    )
    scale = coordinate_scale(squares.sum(0).diagonal() / counts.sum(), standardise)
    squares = squares / (scale[:, None] * scale)
    values, vectors = torch.linalg.eigh(squares.sum(0))
    if not float(values[-1]) > 0.0:
        raise DataError(
            f"{name} is the same in every row, so nothing can be fitted to it; look at the texts "
            "and positions."
        )
    basis = vectors[:, values > RANK_TOLERANCE * values[-1]].flip(1).contiguous()
    sums = counts[:, None] * (offsets / scale) @ basis
    reduced = basis.T @ squares @ basis
    return Side(mean, scale, basis, counts, sums, reduced.sum(0), squares=tuple(reduced)), offsets


@dataclass(frozen=True, eq=False)
class ExpertSplit:
    """The expert side of one training set, diagonalised, and the held-out rows in the same axes."""

    n: Tensor
    mean: Tensor
    """`[r]` training mean."""
    values: Tensor
    """`[r]` eigenvalues of the training covariance, descending, null directions removed."""
    vectors: Tensor
    """`[r0, r]` eigenvectors in columns."""
    unit: Tensor
    """Mean variance per original coordinate: what a relative ridge multiplies."""
    held: Tensor
    """`[r, r]` held-out outer products about the training mean, in the eigenvectors; the training
    scatter if no fold."""
    held_trace: Tensor
    """Held-out sum of squares about the training mean, null directions included."""


def expert_split(side: Side, fold: int | None) -> ExpertSplit:
    """Diagonalise the training covariance of all folds but `fold` (None: all folds, held-out =
    training rows)."""
    n, mean, covariance = side.training(fold)
    values, vectors = side.training_axes(fold)
    held = covariance * n if fold is None else side.held_out(fold, mean)
    unit = covariance.diagonal().sum() / side.d
    return ExpertSplit(
        n, mean, values, vectors, unit, vectors.T @ held @ vectors, held.diagonal().sum()
    )


@dataclass(frozen=True, eq=False)
class PairSplit:
    """One training set of one (expert, target) pair in the expert's eigenvectors."""

    expert: ExpertSplit
    target: Side
    fold: int | None
    cross: Tensor
    """`[r_target, r]` training cross-covariance C_TE U."""
    held_cross: Tensor
    """`[r_target, r]` held-out cross sums about the training means."""
    held_target: Tensor
    """Held-out sum of squares of the target about its training mean (scalar)."""
    target_variance: Tensor
    """Trace of the training covariance of the target (scalar)."""


def pair_split(
    expert: ExpertSplit, experts: Side, target: Side, cross_sums: Tensor, fold: int | None
) -> PairSplit:
    """Cross statistics of all folds but `fold`, and of `fold` about the training means."""
    n, mean, covariance = target.training(fold)
    variance = covariance.diagonal().sum()
    total = cross_sums.sum(0)
    if fold is None:
        cross = total @ expert.vectors / n
        return PairSplit(expert, target, None, cross, cross * n, variance * n, variance)
    train, held = total - cross_sums[fold], cross_sums[fold]
    cross = train / n - torch.outer(mean, expert.mean)
    held = (
        held
        - torch.outer(target.sums[fold], expert.mean)
        - torch.outer(mean, experts.sums[fold])
        + target.counts[fold] * torch.outer(mean, expert.mean)
    )
    held_target = target.held_out(fold, mean).diagonal().sum()
    return PairSplit(
        expert, target, fold, cross @ expert.vectors, held @ expert.vectors, held_target, variance
    )


def ridge_path_errors(split: PairSplit, ridges: Tensor, k: int) -> Tensor:
    """Held-out sum of squared errors `[n_ridges]` of `W = C_TE U (e + ridge)^-1` for every ridge at
    once, O(r_target k^2).

    With s = 1 / (e + ridge): SSE = ||T||^2 - 2 s . diag(A^T H) + s^T (G * A^T A) s, where A is the
    training and H the held-out cross term and G the held-out expert scatter."""
    e, a = split.expert.values[:k], split.cross[:, :k]
    s = 1.0 / (e + ridges[:, None] * split.expert.unit)
    linear = (a * split.held_cross[:, :k]).sum(0)
    quadratic = split.expert.held[:k, :k] * (a.T @ a)
    return split.held_target - 2.0 * s @ linear + ((s @ quadratic) * s).sum(1)


def solve_ridge(split: PairSplit, ridge: float, k: int) -> tuple[Tensor, Tensor]:
    """Principal-component ridge regression of the target on the expert, and the decoder that suits
    it."""
    w = split.cross[:, :k] / (split.expert.values[:k] + ridge * split.expert.unit)
    return w, best_decoder(w, split, ridge)


def solve_anchored(
    split: PairSplit, ridge: float, k: int, anchor_weight: float
) -> tuple[Tensor, Tensor]:
    """Global minimum over (W, D) of `||h - D W h||^2 / tr C_EE + anchor_weight ||W h - t||^2 / tr
    C_TT`, W of rank k.

    With S^2 = e + ridge, B = C_TE S^-1 and w = anchor_weight tr C_EE / tr C_TT, the optimal W given
    its row space P (a projector of rank k in whitened coordinates) is B P S^-1, and the objective
    is a constant minus tr(P (S^2 + w B^T B)): P is the top-k eigenspace of S^2 + w B^T B. No
    iteration. w -> 0 gives PCA, with the target deciding only the basis; w -> infinity gives
    (reduced-rank) ridge regression. If B P has rank below k (the target explains fewer axes), the
    minimum is only approached, by codes of vanishing size; B P S^-1 is then the solution without
    those."""
    e = split.expert.values + ridge * split.expert.unit
    b = split.cross / e.sqrt()
    if k < e.shape[0]:
        w = anchor_weight * split.expert.values.sum() / split.target_variance
        vectors = torch.linalg.eigh(torch.diag(e) + w * (b.T @ b)).eigenvectors[:, -k:]
        b = (b @ vectors) @ vectors.T
    encode = b / e.sqrt()
    return encode, best_decoder(encode, split, ridge)


def solve_procrustes(split: PairSplit, k: int) -> tuple[Tensor, Tensor]:
    """One rotation and one scale between the leading k principal components of both sides
    (Schönemann 1966)."""
    axes = split.target.training_axes(split.fold)[1]
    k = min(k, split.expert.values.shape[0], axes.shape[1])
    q = axes[:, :k]
    left, sigma, right = torch.linalg.svd(q.T @ split.cross[:, :k])
    scale = sigma.sum() / split.expert.values[:k].sum()
    rotation = q @ left @ right
    return scale * rotation, rotation.T / scale


def best_decoder(w: Tensor, split: PairSplit, ridge: float) -> Tensor:
    """The decoder of least reconstruction error given `W`: `S^2 W^T (W S^2 W^T)^-1`, with S^2 = e +
    ridge."""
    weighted = w * (split.expert.values[: w.shape[1]] + ridge * split.expert.unit)
    code = weighted @ w.T
    jitter = DECODER_JITTER * code.diagonal().mean()
    return torch.linalg.solve(
        code + jitter * torch.eye(code.shape[0], dtype=w.dtype, device=w.device), weighted
    ).T


def encode_error(w: Tensor, split: PairSplit) -> Tensor:
    """Held-out sum of squared errors of `W h` against the target."""
    k = w.shape[1]
    fitted = ((w @ split.expert.held[:k, :k]) * w).sum()
    return split.held_target - 2.0 * (w * split.held_cross[:, :k]).sum() + fitted


def reconstruction_error(w: Tensor, d: Tensor, expert: ExpertSplit) -> Tensor:
    """Held-out sum of squares of `h - D W h`."""
    k = w.shape[1]
    composed, scatter = d @ w, expert.held[:k, :k]
    return (
        expert.held_trace
        - 2.0 * (composed * scatter).sum()
        + ((composed @ scatter) * composed).sum()
    )


def cross_sums(experts: Side, target: Side) -> Tensor:
    """Sum over the rows of each fold of target times expert coordinates, `[K, r_target, r_expert]`;
    needs rows."""
    assert experts.rows is not None
    assert target.rows is not None
    return torch.stack([t.T @ e for t, e in zip(target.rows, experts.rows, strict=True)])


def effective_rank(w: Tensor, expert: ExpertSplit) -> float:
    """Participation ratio `tr(K)^2 / tr(K^2)` of the code covariance `K = W C_EE W^T`: about how
    many axes the code uses."""
    code = (w * expert.values[: w.shape[1]]) @ w.T
    return float(code.diagonal().sum() ** 2 / code.square().sum())


def signs(axes: Tensor) -> Tensor:
    """`[k]`, ±1: what makes the largest entry of each column positive, so that a gauge is the
    seed's and not the processor's."""
    return axes.gather(0, axes.abs().argmax(0, keepdim=True))[0].sign()


def random_isometry(d_target: int, k: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """`[d_target, k]` with orthonormal columns, uniform (Haar): the arbitrary basis of a
    reconstruction-only encoder."""
    q, r = torch.linalg.qr(torch.randn(d_target, k, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).to(like)


def train_autoencoder(
    expert: ExpertSplit,
    basis: Tensor,
    d_target: int,
    k: int,
    n_steps: int,
    learning_rate: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Train a linear auto-encoder by Adam on the full-batch reconstruction loss, float32, learning
    rate decayed to 0.

    The loss depends on the anchors only through their covariance, so it is computed on a square
    root of it in the original coordinates (Adam is not rotation-invariant). Bottleneck `k` columns
    inside `d_target`."""
    axes = basis @ expert.vectors
    factor = (expert.values.sqrt()[:, None] * axes.T / expert.unit.sqrt()).to(torch.float32)
    total, d = factor.square().sum(), factor.shape[1]
    start = [torch.randn(s, generator=generator) / s[1] ** 0.5 for s in ((k, d), (d, k))]
    w, v = (p.to(factor.device).requires_grad_() for p in start)
    optimiser = torch.optim.Adam([w, v], lr=learning_rate)
    with torch.enable_grad():
        for step in range(n_steps):
            optimiser.param_groups[0]["lr"] = learning_rate * (1.0 - step / n_steps)
            optimiser.zero_grad()
            ((factor - factor @ w.T @ v.T).square().sum() / total).backward()
            optimiser.step()
    place = torch.eye(d_target, k, dtype=torch.float64, device=basis.device)
    return place @ (w.detach().double() @ axes), (axes.T @ v.detach().double()) @ place.T
