"""Similarity of geometries: debiased linear centred kernel alignment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from expertsteer_lens.errors import DataError

from .base import Estimator
from .preparation import PreparedLayer

if TYPE_CHECKING:
    from .config import MIConfig


class DebiasedCKA(Estimator):
    """Linear centred kernel alignment from the unbiased HSIC of Song et al. (2012): 0 on average
    for independent rows, 1 for equal geometries; a dimensionless score, not nats. O(n^2) per pair
    after one n x n Gram matrix per layer."""

    unit: ClassVar = "cka"
    quantity: ClassVar = "cka"

    def __init__(
        self,
        expert: Sequence[PreparedLayer],
        target: Sequence[PreparedLayer],
        config: MIConfig,
        folds: Sequence[Tensor],
    ) -> None:
        self.expert = torch.stack([_u_centred(_gram(layer.features)) for layer in expert])
        self.target = torch.stack([_u_centred(_gram(layer.features)) for layer in target])
        self.norms = [_norms(side) for side in (self.expert, self.target)]
        self.features = [layer.features for layer in target]

    @cached_property
    def target_grams(self) -> list[Tensor]:
        """Gram matrices as they are, diagonal included."""
        return [_gram(x) for x in self.features]

    @classmethod
    def check_rows(cls, n: int, config: MIConfig) -> None:
        """The unbiased HSIC divides by n - 3."""
        if n < 4:
            raise DataError(f"debiased CKA needs at least 4 samples, got {n}.")

    def observed(self) -> Tensor:
        """Estimate per pair."""
        return self._align(self.target, self.norms[1])

    def permuted(self, order: Tensor) -> Tensor:
        """One draw of the null."""
        if len(torch.unique(order)) == len(order):
            return self._align(self.target[:, order][:, :, order], self.norms[1])
        # A row and its repeat are two rows, whose inner product counts: centre again.
        target = torch.stack([_u_centred(gram[order][:, order]) for gram in self.target_grams])
        return self._align(target, _norms(target))

    def _align(self, target: Tensor, norms: Tensor) -> Tensor:
        return (self.expert.flatten(1) @ target.flatten(1).T) / (self.norms[0][:, None] * norms)

    def bootstrap(self, weights: Tensor) -> Tensor:
        """First order: every HSIC moves by twice the weighted mean of its row sums (it is a
        statistic of pairs of rows)."""
        shift = 2.0 * weights - 1.0
        rows_e = shift @ (self.expert * self.expert).sum(2).T
        rows_t = shift @ (self.target * self.target).sum(2).T
        cross = torch.stack([shift @ (e * self.target).sum(2).T for e in self.expert], dim=1)
        tiny = torch.finfo(cross.dtype).tiny
        return cross / (rows_e[:, :, None] * rows_t[:, None]).clamp(min=tiny).sqrt()


def _norms(grams: Tensor) -> Tensor:
    return (grams * grams).sum((1, 2)).sqrt()


def _gram(x: Tensor) -> Tensor:
    return (x @ x.T).double()


def _u_centred(gram: Tensor) -> Tensor:
    """Gram matrix without diagonal, centred so that inner products are unbiased HSIC up to a common
    factor. The diagonal of `gram` itself is set to 0."""
    gram = gram.fill_diagonal_(0.0)
    n = gram.shape[0]
    rows = gram.sum(1, keepdim=True) / (n - 2)
    out = gram - rows - rows.T + gram.sum() / ((n - 1) * (n - 2))
    return out.fill_diagonal_(0.0)
