"""Mutual information from nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from expertsteer_lens.errors import DataError

from .base import Estimator
from .preparation import PreparedLayer

if TYPE_CHECKING:
    from .config import MIConfig


class KSG(Estimator):
    """Kraskov-Stoegbauer-Grassberger estimator 1 (2004), maximum norm, on a few whitened principal
    components.

    I = psi(k) + psi(n) - mean_r[psi(n_x(r) + 1) + psi(n_y(r) + 1)]. O(n^2) time and memory per
    pair. Saturates near log n, so strong dependence is squashed but keeps its order; may be
    slightly negative near independence."""

    defaults: ClassVar = {"n_components": 8, "n_neighbors": 5}

    def __init__(
        self,
        expert: Sequence[PreparedLayer],
        target: Sequence[PreparedLayer],
        config: MIConfig,
        folds: Sequence[Tensor],
    ) -> None:
        self.expert = [_distances(x.features).fill_diagonal_(float("inf")) for x in expert]
        self.target = [_distances(x.features) for x in target]
        self.n_neighbors = int(config.n_neighbors or self.defaults["n_neighbors"])

    @classmethod
    def check_rows(cls, n: int, config: MIConfig) -> None:
        """A row needs that many others."""
        neighbors = config.n_neighbors
        if neighbors is not None and n <= neighbors:
            raise DataError(
                f"mutual information with n_neighbors={neighbors} needs more than {neighbors} "
                f"samples, got {n}."
            )

    def observed(self) -> Tensor:
        """Estimate per pair."""
        return self._local([d.clone() for d in self.target]).mean(-1)

    def permuted(self, order: Tensor) -> Tensor:
        """One draw of the null."""
        return self._local([d[order][:, order] for d in self.target]).mean(-1)

    def bootstrap(self, weights: Tensor) -> Tensor:
        """Weighted mean of the local terms: a bootstrap of repeated rows would fool nearest
        neighbours."""
        local = self._local([d.clone() for d in self.target])
        return torch.einsum("bn,ijn->bij", weights, local) / weights.shape[1]

    def _local(self, target: list[Tensor]) -> Tensor:
        """The term of every row, `[L_E, L_T, n]`: the estimate is their mean. Writes infinity into
        the diagonals of `target`: no row is its own neighbour."""
        n = target[0].shape[0]
        for distances in target:
            distances.fill_diagonal_(float("inf"))
        constant = torch.digamma(torch.tensor([self.n_neighbors, n], dtype=torch.float64)).sum()
        out = []
        for x in self.expert:
            row = []
            for y in target:
                radius = torch.maximum(x, y).kthvalue(self.n_neighbors, dim=1, keepdim=True).values
                counts = torch.stack([(x < radius).sum(1), (y < radius).sum(1)]) + 1
                row.append(constant.to(x.device) - torch.digamma(counts.double()).sum(0))
            out.append(torch.stack(row))
        return torch.stack(out)


def _distances(z: Tensor) -> Tensor:
    """Maximum-norm distances `[n, n]`."""
    return torch.cdist(z, z, p=float("inf"))
