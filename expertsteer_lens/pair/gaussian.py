"""Gaussian mutual information in closed form, with its bias removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from expertsteer_lens.errors import DataError

from .base import CORRELATION_CAP, Estimator
from .preparation import PreparedLayer

if TYPE_CHECKING:
    from .config import MIConfig


class GaussianMI(Estimator):
    """Gaussian mutual information of the principal components, in sample, with the exact bias
    removed.

    I = -1/2 log det(1 - M^T M) - 1/2 sum_i [psi((n-1-i)/2) - psi((n-1-k-i)/2)], M the
    cross-correlation of whitened components. For Gaussian rows the expectation of the first term
    exceeds the truth by exactly the second (expected log determinants of Wishart matrices),
    whatever the truth. Unbiased, so values may be negative near independence. The bias term counts
    every row as new information: rows that repeat one another (tokens of one text) leave the
    estimate above 0 at independence, and so is its null."""

    defaults: ClassVar = {"n_components": 32}

    def __init__(
        self,
        expert: Sequence[PreparedLayer],
        target: Sequence[PreparedLayer],
        config: MIConfig,
        folds: Sequence[Tensor],
    ) -> None:
        self.expert, self.target = (
            torch.stack([layer.features for layer in side]) for side in (expert, target)
        )
        n, (k_e, k_t) = self.expert.shape[1], (self.expert.shape[2], self.target.shape[2])
        i = torch.arange(k_t, dtype=torch.float64)
        self.bias = 0.5 * float(
            (torch.digamma((n - 1 - i) / 2) - torch.digamma((n - 1 - k_e - i) / 2)).sum()
        )

    @classmethod
    def check_rows(cls, n: int, config: MIConfig) -> None:
        """The bias term exists from 2 k + 2 rows on."""
        k = config.n_components or 1
        if n <= 2 * k + 1:
            raise DataError(
                f"mutual information with n_components={k} needs more than {2 * k + 1} samples, "
                f"got {n}."
            )

    def observed(self) -> Tensor:
        """Estimate per pair."""
        return self._estimate(self.target)

    def permuted(self, order: Tensor) -> Tensor:
        """One draw of the null."""
        target = self.target[:, order]
        if len(torch.unique(order)) < len(order):  # rows that repeat are not white any more
            target = _whiten(target)
        return self._estimate(target)

    def _estimate(self, target: Tensor) -> Tensor:
        cross = self._cross_correlate(target)
        inner = cross.mT @ cross
        eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
        log_det: Tensor = torch.linalg.slogdet((1.0 + CORRELATION_CAP) * eye - inner).logabsdet
        return -0.5 * log_det - self.bias

    def _cross_correlate(self, target: Tensor) -> Tensor:
        """M of every pair, `[L_E, L_T, k_E, k_T]`, from a single matrix product."""
        n, k_e, k_t = self.expert.shape[1], self.expert.shape[2], target.shape[2]
        flat = rearrange(self.expert, "l n k -> (l k) n") @ rearrange(target, "l n k -> n (l k)")
        return rearrange(flat, "(le ke) (lt kt) -> le lt ke kt", ke=k_e, kt=k_t) / n

    def bootstrap(self, weights: Tensor) -> Tensor:
        """First order: estimate plus the weighted mean of each row's influence, 1/2 (x'x + y'y - z'
        C^-1 z), z = (x, y)."""
        left, rho, right = torch.linalg.svd(self._cross_correlate(self.target), full_matrices=False)
        rho = rho.clamp(max=(1.0 - CORRELATION_CAP) ** 0.5)[:, :, None]
        out = []
        for i, z in enumerate(self.expert):
            # In canonical coordinates C is made of 2 x 2 blocks; their inverses are written out.
            u, v = z @ left[i], self.target @ right[i].mT
            both = (u.square() + v.square() - 2.0 * rho[i] * u * v) / (1.0 - rho[i].square())
            influence = 0.5 * (u.square() + v.square() - both).sum(-1)
            out.append(weights @ influence.T / weights.shape[1])
        return self.observed() + torch.stack(out, dim=1)


def _whiten(scores: Tensor) -> Tensor:
    """Centre `[L, n, k]` and turn it into components of mean square 1, or 0 where the rows span
    fewer."""
    centred = scores - scores.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(centred.mT @ centred / centred.shape[1])
    tiny = 1e-10 * values[:, -1:].clamp(min=torch.finfo(values.dtype).tiny)
    scale = torch.where(values > tiny, values.clamp(min=tiny).rsqrt(), 0.0)
    white: Tensor = centred @ vectors * scale[:, None]
    return white
