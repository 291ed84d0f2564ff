"""Streaming cross-moments of paired expert and target rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_matrix, check_number, check_paired
from expertsteer_lens.errors import DataError, WidthError


@dataclass(frozen=True, eq=False)
class Moments:
    """Means and covariances of paired rows, float64; covariances are about the mean and divide by
    `n` (not `n - 1`).

    The target fields are None when only expert rows were seen.
    """

    n: int
    """Number of paired rows."""
    mean_expert: Float[Tensor, " d_expert"]
    C_EE: Float[Tensor, "d_expert d_expert"]
    mean_target: Float[Tensor, " d_target"] | None = None
    C_TE: Float[Tensor, "d_target d_expert"] | None = None
    """Cross-covariance, target coordinates in rows: `E[(t - m_T)(h - m_E)^T]`."""
    C_TT: Float[Tensor, "d_target d_target"] | None = None

    def __post_init__(self) -> None:
        for name in ("mean_expert", "C_EE", "mean_target", "C_TE", "C_TT"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, value.detach().clone().contiguous())

    @property
    def d_expert(self) -> int:
        """Width of the expert rows."""
        return self.mean_expert.shape[0]

    @property
    def d_target(self) -> int | None:
        """Width of the target rows; None if there were none."""
        return None if self.mean_target is None else self.mean_target.shape[0]

    def __repr__(self) -> str:
        return f"Moments(n={self.n}, d_expert={self.d_expert}, d_target={self.d_target})"


class RunningMoments:
    """Accumulates `Moments` batch by batch; any chunking and any order of batches gives the same
    result.

    Updates and merges use the pairwise formula of Chan, Golub and LeVeque (1979): scatter matrices
    are kept about the running mean, so a large common offset does not cancel digits. float64,
    memory O((d_expert + d_target)^2)."""

    def __init__(self, d_expert: int, d_target: int | None = None) -> None:
        check_number("d_expert", d_expert, low=1, integer=True)
        if d_target is not None:
            check_number("d_target", d_target, low=1, integer=True)
        self.d_expert = d_expert
        self.d_target = d_target
        width = d_expert + (d_target or 0)
        self._n = 0
        self._mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)

    @property
    def n(self) -> int:
        """Rows seen so far."""
        return self._n

    def update(
        self, expert: Float[Tensor, "n d_expert"], target: Float[Tensor, "n d_target"] | None = None
    ) -> RunningMoments:
        """Add paired rows (row `i` of both belongs to the same text); returns self. Zero rows are
        allowed.

        Raises:
            DataError: NaN or Inf, unequal rows, or a target where none was declared (or the
                reverse).
            WidthError: a width other than the declared one.
        """
        rows = [check_matrix("expert", expert, width=self.d_expert, min_rows=0)]
        if (target is None) != (self.d_target is None):
            need = "no target" if self.d_target is None else f"a target of width {self.d_target}"
            raise DataError(
                f"target: these moments were declared with {need}; got "
                f"{'none' if target is None else 'one'}."
            )
        if target is not None:
            rows.append(check_matrix("target", target, width=self.d_target, min_rows=0))
            check_paired(expert, target)
        if expert.shape[0]:
            joint = torch.cat(
                [r.detach().to(device=self._mean.device, dtype=torch.float64) for r in rows], dim=1
            )
            mean = joint.mean(0)
            centred = joint - mean
            self._absorb(joint.shape[0], mean, centred.T @ centred)
        return self

    def merge(self, other: RunningMoments) -> RunningMoments:
        """Add everything `other` has seen; returns self and leaves `other` as it is.

        Raises:
            WidthError: `other` has other widths.
        """
        if (self.d_expert, self.d_target) != (other.d_expert, other.d_target):
            raise WidthError(
                f"merge needs equal widths: this has d_expert={self.d_expert}, "
                f"d_target={self.d_target}, "
                f"other has d_expert={other.d_expert}, d_target={other.d_target}."
            )
        if other._n:
            self._absorb(other._n, other._mean, other._scatter)
        return self

    def result(self) -> Moments:
        """The moments so far; cloned, so later updates do not move them.

        Raises:
            DataError: no row was seen.
        """
        if self._n == 0:
            raise DataError("moments of no rows: call update with at least one row first.")
        d, cov = self.d_expert, self._scatter / self._n
        if self.d_target is None:
            return Moments(self._n, self._mean, cov)
        return Moments(
            self._n, self._mean[:d], cov[:d, :d], self._mean[d:], cov[d:, :d], cov[d:, d:]
        )

    def _absorb(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        total = self._n + n
        delta = mean - self._mean
        self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self._n * n / total)
        self._mean = self._mean + delta * (n / total)
        self._n = total

    def __repr__(self) -> str:
        return f"RunningMoments(n={self._n}, d_expert={self.d_expert}, d_target={self.d_target})"


def merge_all(parts: Sequence[RunningMoments]) -> RunningMoments:
    """A new `RunningMoments` holding everything in `parts` (none of which changes).

    Raises:
        DataError: `parts` is empty.
        WidthError: widths differ.
    """
    if not parts:
        raise DataError("merge_all needs at least one RunningMoments, got none.")
    total = RunningMoments(parts[0].d_expert, parts[0].d_target)
    for part in parts:
        total.merge(part)
    return total
