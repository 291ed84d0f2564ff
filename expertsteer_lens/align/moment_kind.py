"""Kinds whose map is a closed form of second moments: cross-validate, refit on all anchors, and
express the map in the original coordinates. One such kind is one solver (`ridge.py`,
`procrustes.py`, `anchored.py`, `autoencoder.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expertsteer_lens.errors import ArgumentError

from .aligner import AffineMap, Aligner, AlignerQuality
from .fold_sums import (
    ExpertFold,
    ExpertLayer,
    FoldSums,
    PairFold,
    TargetLayer,
    cross_sums_from_rows,
    effective_rank,
    encode_error,
    expert_layer,
    pair_folds,
    reconstruction_error,
    sums_from_rows,
    target_layer,
)
from .kind import FitContext, Kind, check_rows

if TYPE_CHECKING:
    from .config import AlignerConfig

RIDGE_PATH = tuple(10.0 ** (-6.0 + 0.5 * i) for i in range(21))
"""Candidate ridges of the cross-validation, 1e-6 to 1e4 in half decades, in units of the mean
expert variance."""
DECODER_JITTER = 1e-8
"""Relative to the mean variance of the code: keeps the decoder finite where the code has (nearly)
constant directions."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One training set, and all that a solver may look at."""

    expert: ExpertFold
    pair: PairFold | None
    """None for kinds that use no target."""
    basis: Tensor
    """`[d_expert, r]` of the expert's row-space coordinates."""
    rank: int
    """Columns of the map wanted: as asked, at most the expert's axes in this training set."""
    ridge: float
    """In units of `expert.unit`; 0 for kinds without."""
    d_target: int
    config: AlignerConfig
    seed: int

    @property
    def paired(self) -> PairFold:
        """The pair's statistics, for kinds that use the target."""
        assert self.pair is not None
        return self.pair


Solution = tuple[Tensor, Tensor]
"""Encode `W [r_target, k]` and decode `D [k, r_target]` in the expert's eigenvectors of one
training set."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MomentKind(Kind):
    """A kind that is fitted from the anchors' second moments alone, so that streamed moments
    (`PairedMoments`) serve as well as rows."""

    solve: Callable[[Problem], Solution]
    largest_rank: Callable[[int, int], int]
    """(d_expert, d_target) to the largest rank the map can have."""
    ridge_axes: Callable[[int, int], int] | None = None
    """(rank, expert axes) to how many principal axes the regression term uses when its ridge is
    chosen; None: the kind has no ridge."""
    needs_target_axes: bool = False
    """Whether the solver uses the target's principal axes."""

    def prepare_expert(self, name: str, rows: Tensor, context: FitContext) -> ExpertLayer:
        """Diagonalise every training set of the layer."""
        return expert_layer(_sum_rows(name, rows, context))

    def prepare_target(self, name: str, rows: Tensor, context: FitContext) -> TargetLayer:
        """Sums of the layer, diagonalised where the solver needs it."""
        return target_layer(_sum_rows(name, rows, context), with_axes=self.needs_target_axes)

    def fit(
        self, expert: ExpertLayer, target: TargetLayer | None, d_target: int, context: FitContext
    ) -> Aligner:
        """The aligner of two layers whose rows are held."""
        cross = None if target is None else cross_sums_from_rows(expert.sums, target.sums)
        return self.fit_sums(expert, target, cross, d_target, context)

    def fit_sums(
        self,
        expert: ExpertLayer,
        target: TargetLayer | None,
        cross_sums: Tensor | None,
        d_target: int,
        context: FitContext,
    ) -> Aligner:
        """Cross-validate, refit on all anchors, and express the map in the original
        coordinates."""
        config = context.config
        rank = self._check_rank(config, expert.sums.d, d_target)
        pairs: tuple[PairFold, ...] = ()
        full_pair = None
        if target is not None and cross_sums is not None:
            pairs, full_pair = pair_folds(expert, target, cross_sums)
        ridge, fold_ridges, path = self._choose_ridge(expert, pairs, config, rank)

        def solve(fold: ExpertFold, pair: PairFold | None, its_ridge: float) -> Solution:
            """The map of one fold, of no higher rank than the fold has."""
            k = min(rank, fold.values.shape[0])
            basis, seed = expert.sums.basis, context.seed
            return self.solve(Problem(fold, pair, basis, k, its_ridge, d_target, config, seed))

        solved = [
            solve(fold, pairs[i] if pairs else None, fold_ridges[i])
            for i, fold in enumerate(expert.folds)
        ]
        folds = zip(solved, expert.folds, strict=True)
        lost = sum(reconstruction_error(w, d, fold) for (w, d), fold in folds)
        missed = sum(encode_error(solved[i][0], pair) for i, pair in enumerate(pairs))
        w, d = solve(expert.full, full_pair, ridge)
        quality = AlignerQuality(
            n_anchors=expert.sums.n,
            r2=float(1.0 - missed / sum(p.held_target for p in pairs)) if pairs else None,
            reconstruction_fvu=float(lost / sum(fold.held_trace for fold in expert.folds)),
            effective_rank=effective_rank(w, expert.full),
            n_components=min(w.shape[1], rank),
            ridge=None if self.ridge_axes is None else ridge,
            ridge_path=path,
        )
        encoder, decoder = _express_maps(w, d, expert, target, d_target)
        return Aligner(encoder, decoder, quality, config, context.seed)

    def _check_rank(self, config: AlignerConfig, d_expert: int, d_target: int) -> int:
        limit = self.largest_rank(d_expert, d_target)
        if config.n_components is not None and config.n_components > limit:
            raise ArgumentError(
                f"n_components={config.n_components} exceeds {limit}, the largest rank of "
                f"kind={config.kind!r} between d_expert={d_expert} and d_target={d_target}."
            )
        return limit if config.n_components is None else config.n_components

    def _choose_ridge(
        self, expert: ExpertLayer, pairs: Sequence[PairFold], config: AlignerConfig, rank: int
    ) -> tuple[float, list[float], tuple[tuple[float, float], ...] | None]:
        """The ridge of the final fit, the ridge of each fold (chosen on the other folds), and the
        path.

        A fold's own errors take no part in the choice of the ridge it is scored with, so the R^2
        reported is out of fold in the ridge too."""
        if self.ridge_axes is None or config.ridge is not None:
            ridge = float(config.ridge or 0.0)
            return ridge, [ridge] * expert.sums.n_folds, None
        k = self.ridge_axes(rank, expert.folds[0].values.shape[0])
        path = torch.tensor(RIDGE_PATH, dtype=torch.float64, device=pairs[0].cross.device)
        errors = torch.stack([ridge_path_errors(p, path, k) for p in pairs])
        others = errors.sum(0) - errors
        r2 = 1.0 - errors.sum(0) / torch.stack([p.held_target for p in pairs]).sum()
        return (
            RIDGE_PATH[int(errors.sum(0).argmin())],
            [RIDGE_PATH[int(i)] for i in others.argmin(dim=1)],
            tuple(zip(RIDGE_PATH, r2.tolist(), strict=True)),
        )


def ridge_path_errors(pair: PairFold, ridges: Tensor, k: int) -> Tensor:
    """Held-out sum of squared errors `[n_ridges]` of `W = C_TE U (e + ridge)^-1` for every ridge at
    once, O(r_target k^2).

    With s = 1 / (e + ridge): SSE = ||T||^2 - 2 s . diag(A^T H) + s^T (G * A^T A) s, where A is the
    training and H the held-out cross term and G the held-out expert scatter."""
    e, a = pair.expert.values[:k], pair.cross[:, :k]
    s = 1.0 / (e + ridges[:, None] * pair.expert.unit)
    linear = (a * pair.held_cross[:, :k]).sum(0)
    quadratic = pair.expert.held[:k, :k] * (a.T @ a)
    return pair.held_target - 2.0 * s @ linear + ((s @ quadratic) * s).sum(1)


def best_decoder(w: Tensor, expert: ExpertFold, ridge: float) -> Tensor:
    """The decoder of least reconstruction error given `W`: `S^2 W^T (W S^2 W^T)^-1`, with S^2 = e +
    ridge."""
    weighted = w * (expert.values[: w.shape[1]] + ridge * expert.unit)
    code = weighted @ w.T
    jitter = DECODER_JITTER * code.diagonal().mean()
    eye = torch.eye(code.shape[0], dtype=w.dtype, device=w.device)
    decoder: Tensor = torch.linalg.solve(code + jitter * eye, weighted).T
    return decoder


def _sum_rows(name: str, rows: Tensor, context: FitContext) -> FoldSums:
    check_rows(name, rows, context)
    return sums_from_rows(name, rows, context.folds, context.config.standardise)


def _express_maps(
    w: Tensor, d: Tensor, expert: ExpertLayer, target: TargetLayer | None, d_target: int
) -> tuple[AffineMap, AffineMap]:
    """Undo eigenvectors, row space and scaling; keep two thin factors where they are smaller than
    the matrix."""
    e, k = expert.sums, w.shape[1]
    axes = expert.axes[:, :k]
    right, back = axes.T / e.scale, e.scale[:, None] * axes
    if target is None:
        left, forth, mean = w, d, torch.zeros(d_target, dtype=w.dtype, device=w.device)
    else:
        t = target.sums
        left, forth, mean = t.scale[:, None] * (t.basis @ w), d @ (t.basis.T / t.scale), t.mean
    thin = k * (e.d + d_target) < e.d * d_target
    encoder = AffineMap((left, right) if thin else (left @ right,), mean - left @ (right @ e.mean))
    decoder = AffineMap((back, forth) if thin else (back @ forth,), e.mean - back @ (forth @ mean))
    return encoder, decoder
