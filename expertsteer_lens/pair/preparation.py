"""One layer made ready for an estimator: clipped, centred, standardised, whitened.

Every step looks at one layer of one model at a time, and none depends on the order of rows, so none
can bring dependence between the models into the score or move the permutation null."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.linalg.clipping import clip_massive

if TYPE_CHECKING:
    from .config import MIConfig


@dataclass(frozen=True, eq=False)
class PreparedLayer:
    """One layer ready for an estimator."""

    label: str
    """How messages call it."""
    features: Tensor
    """`[n, k]` leading principal components, each of mean square 1 over the rows; or `[n, d]`
    clipped, centred, standardised rows for an estimator that takes no components."""
    variances: Tensor
    """`[k]` variance of each component before whitening."""
    rank: int
    """Components whose variance can be told from 0."""
    clipped: dict[str, Any]
    """What was clipped; empty if nothing was."""

    def leading(self, k: int) -> PreparedLayer:
        """With the first `k` components only."""
        return replace(self, features=self.features[:, :k], variances=self.variances[:k])


def prepare_layer(
    label: str, rows: Tensor, config: MIConfig, default_k: float | None
) -> PreparedLayer:
    """Clip, centre, standardise and (unless `default_k` is None) whiten one layer; float64
    for float64 input and float32 otherwise.

    Raises:
        DataError: the layer is the same in every row.
        ArgumentError: it has fewer components than `config.n_components`.
    """
    x = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    clipped: dict[str, Any] = {}
    if config.clip is not None:
        result = clip_massive(x, config.clip)
        clipped = dict(result.summary()) if result.coordinates else {}
        x = result.rows
    x = x - x.mean(0)
    scale = x.square().mean(0).sqrt()
    if not float(scale.max()) > 0.0:
        raise DataError(f"{label} is the same in every row; look at the texts and positions.")
    if config.standardise:
        x = x / torch.where(scale > 0, scale, torch.ones_like(scale))
    n, d = x.shape
    if default_k is None:
        return PreparedLayer(label, x, scale, d, clipped)
    asked = config.n_components
    # A quarter of the rows at most: with more components than that the null of every estimator
    # here is wide, and "cca" has too few rows per direction in its training folds.
    pca = principal_scores(x, min(int(default_k), max(1, n // 4)) if asked is None else asked)
    if asked is not None and pca.rank < asked:
        raise ArgumentError(
            f"n_components={asked} exceeds the rank {pca.rank} of {label} ({n} rows, width {d}); "
            "lower it."
        )
    return PreparedLayer(label, pca.scores, pca.variances, pca.rank, clipped)


@dataclass(frozen=True, eq=False)
class PrincipalScores:
    """Leading principal components of one layer's rows, each of mean square 1 over the rows."""

    scores: Tensor
    """`[n, k]`, float64."""
    variances: Tensor
    """`[k]` variance of each component before scaling."""
    rank: int
    """Components whose variance exceeds 1e-10 of the largest (float32 inputs resolve about
    that)."""


def principal_scores(rows: Tensor, k: int) -> PrincipalScores:
    """PCA of centred rows `[n, d]` through the smaller Gram matrix, which is summed in the dtype of
    `rows`; O(n d min(n, d))."""
    n, d = rows.shape
    if n <= d:
        values, vectors = torch.linalg.eigh((rows @ rows.T).double())
    else:
        values, vectors = torch.linalg.eigh((rows.T @ rows).double())
    rank = int((values > 1e-10 * values[-1].clamp(min=torch.finfo(values.dtype).tiny)).sum())
    k = min(k, rank)
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]  # eigh sorts ascending
    unit = vectors if n <= d else rows.double() @ vectors / values.sqrt()
    return PrincipalScores((unit * n**0.5).contiguous(), values / n, rank)
