"""Streaming means and covariances of several variables whose rows belong together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Real
from torch import Tensor

from expertsteer_lens._checks import check_finite, check_matrix, check_number
from expertsteer_lens.errors import ArgumentError, DataError, WidthError

Block = tuple[str, str]
"""Two variables whose covariance is wanted; a variable twice for its own covariance."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Means and covariances, float64; covariances are about the mean and divide by the total
    weight (`n`, not `n - 1`, where rows have no weights)."""

    n: int
    """Rows seen (those of weight 0 do not count)."""
    weight: float
    """Sum of their weights; `n` without weights."""
    means: dict[str, Tensor]
    """`[d]` per variable."""
    covariances: dict[Block, Tensor]
    """`[d_a, d_b]` per block (a, b): `E[(x_a - m_a)(x_b - m_b)^T]`."""

    def __repr__(self) -> str:
        widths = {name: mean.shape[0] for name, mean in self.means.items()}
        return f"Moments(n={self.n}, widths={widths}, blocks={len(self.covariances)})"


class RunningMoments:
    """Accumulates `Moments` batch by batch; any chunking and any order of batches gives the same
    result.

    Updates and merges use the pairwise formula of Chan, Golub and LeVeque (1979), with weights:
    scatter matrices are kept about the running mean, so a large common offset does not cancel
    digits. float64; memory 8 bytes times the sum of `d_a * d_b` over the blocks.

    Args:
        widths: the variables, and how wide the rows of each are.
        blocks: pairs of variables whose covariance is kept.
        device: where the sums are kept, and where rows are sent to be added.

    Raises:
        ArgumentError: a width below 1, or a block of unknown variables.

    Example:
        >>> running = RunningMoments({"x": 2}, [("x", "x")])
        >>> for chunk in torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]]).split(1):
        ...     _ = running.update({"x": chunk})
        >>> moments = running.result()
        >>> moments.n, moments.means["x"].tolist()
        (3, [2.0, 2.0])
        >>> moments.covariances["x", "x"]
        tensor([[2.6667, 2.0000],
                [2.0000, 2.0000]], dtype=torch.float64)
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        blocks: Iterable[Block],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, width in widths.items():
            check_number(f"width of {name!r}", width, low=1, integer=True)
        self.widths = dict(widths)
        self.blocks = tuple(dict.fromkeys(blocks))
        unknown = [name for block in self.blocks for name in block if name not in self.widths]
        if unknown:
            raise ArgumentError(
                f"blocks name {unknown[0]!r}, which is none of the variables {list(self.widths)}."
            )
        self._n, self._weight = 0, 0.0
        zeros = torch.zeros((), dtype=torch.float64, device=device)
        self._means = {name: zeros.new_zeros(width) for name, width in self.widths.items()}
        self._scatters = {
            (a, b): zeros.new_zeros(self.widths[a], self.widths[b]) for a, b in self.blocks
        }

    @property
    def n(self) -> int:
        """Rows seen so far; those of weight 0 do not count."""
        return self._n

    def update(
        self, rows: Mapping[str, Tensor], weights: Real[Tensor, " n"] | None = None
    ) -> RunningMoments:
        """Add rows that belong together (row `i` of every variable); returns self. Zero rows are
        allowed.

        Args:
            rows: `[n, d]` per variable, all of them.
            weights: of each row, `>= 0`; a row of weight 2 counts as that row twice. None = 1.

        Raises:
            DataError: a variable is missing or not known, NaN or Inf, unequal numbers of rows,
                negative weights.
            WidthError: a width other than the declared one.
        """
        if rows.keys() != self.widths.keys():
            raise DataError(f"rows must hold the variables {list(self.widths)}, got {list(rows)}.")
        counts = {}
        for name, width in self.widths.items():
            check_matrix(name, rows[name], width=width, min_rows=0)
            counts[name] = rows[name].shape[0]
        if len(set(counts.values())) > 1:
            raise DataError(f"rows must be paired row by row, got these numbers of rows: {counts}.")
        n = next(iter(counts.values()), 0)
        device = next(iter(self._means.values())).device
        wide = {name: x.detach().to(device=device, dtype=torch.float64) for name, x in rows.items()}
        if weights is not None:
            weights = check_weights(weights, n).to(device)
            used = weights > 0
            if not bool(used.all()):
                wide, weights = {name: x[used] for name, x in wide.items()}, weights[used]
                n = int(used.sum())
        if n:
            self._add_batch(n, wide, weights)
        return self

    def _add_batch(self, n: int, rows: dict[str, Tensor], weights: Tensor | None) -> None:
        if weights is None:
            total = float(n)
            means = {name: x.mean(0) for name, x in rows.items()}
        else:
            total = float(weights.sum())
            means = {name: weights @ x / total for name, x in rows.items()}
        shifts = self._move_means(n, total, means)
        centred = {name: x - means[name] for name, x in rows.items()}
        for (a, b), scatter in self._scatters.items():
            left = centred[a] if weights is None else weights[:, None] * centred[a]
            scatter.addmm_(left.T, centred[b])
            scatter.addr_(shifts[a], shifts[b])

    def _move_means(self, n: int, weight: float, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Count rows of these means in; returns the vectors whose outer products the scatters gain.

        The scatter about the common mean is the sum of both scatters about their own means plus
        `w1 w2 / (w1 + w2)` times the outer product of the difference of the means."""
        total = self._weight + weight
        factor = (self._weight * weight / total) ** 0.5
        shifts = {}
        for name, mean in means.items():
            delta = mean - self._means[name]
            self._means[name] = self._means[name] + delta * (weight / total)
            shifts[name] = delta * factor
        self._n, self._weight = self._n + n, total
        return shifts

    def merge(self, other: RunningMoments) -> RunningMoments:
        """Add everything `other` has seen; returns self and leaves `other` as it is.

        Raises:
            WidthError: `other` has other variables, widths or blocks.
        """
        if (self.widths, set(self.blocks)) != (other.widths, set(other.blocks)):
            raise WidthError(
                f"merge needs equal variables and blocks: this has {self.widths}, the other has "
                f"{other.widths}."
            )
        if other._n:
            shifts = self._move_means(other._n, other._weight, other._means)
            for (a, b), scatter in self._scatters.items():
                scatter.add_(other._scatters[a, b]).addr_(shifts[a], shifts[b])
        return self

    def result(self) -> Moments:
        """The moments so far; later updates do not move them.

        Raises:
            DataError: no row was seen.
        """
        if self._n == 0:
            raise DataError("moments of no rows: call update with at least one row first.")
        return Moments(
            self._n,
            self._weight,
            {name: mean.clone() for name, mean in self._means.items()},
            {block: scatter / self._weight for block, scatter in self._scatters.items()},
        )

    @property
    def weight(self) -> float:
        """Sum of the weights seen so far; `n` without weights."""
        return self._weight

    def mean(self, name: str) -> Tensor:
        """`[d]`, of one variable."""
        return self._means[name].clone()

    def covariance(self, a: str, b: str) -> Tensor:
        """One of `result().covariances`, made without the others."""
        return self._scatters[a, b] / self._weight

    def state(self) -> dict[str, Any]:
        """Everything that was accumulated, for a file; `restore` takes it up again."""
        return {
            "n": self._n,
            "weight": self._weight,
            "means": dict(self._means),
            "scatters": dict(self._scatters),
        }

    def restore(self, state: Mapping[str, Any]) -> RunningMoments:
        """Go on from a `state` of moments with these variables and blocks; returns self.

        Raises:
            WidthError: it is of other variables, widths or blocks.
        """
        means, scatters = state["means"], state["scatters"]
        shapes = {name: (width,) for name, width in self.widths.items()}
        if {k: tuple(v.shape) for k, v in means.items()} != shapes or (
            {k: tuple(v.shape) for k, v in scatters.items()}
            != {k: tuple(v.shape) for k, v in self._scatters.items()}
        ):
            raise WidthError(f"the state is not of moments of the variables {self.widths}.")
        self._n, self._weight = int(state["n"]), float(state["weight"])
        self._means = {name: value.double().clone() for name, value in means.items()}
        self._scatters = {block: value.double().clone() for block, value in scatters.items()}
        return self

    def __repr__(self) -> str:
        return f"RunningMoments(n={self._n}, widths={self.widths}, blocks={len(self.blocks)})"


def check_weights(weights: Tensor, n: int) -> Tensor:
    """Return weights of rows in float64 if there are `n`, finite and not negative.

    Raises:
        DataError: they are not.

    >>> check_weights(torch.tensor([1, 0]), 2)
    tensor([1., 0.], dtype=torch.float64)
    """
    weights = torch.as_tensor(weights).detach()
    if weights.shape != (n,):
        raise DataError(
            f"weights must have one number per row: expected shape ({n},), got "
            f"{tuple(weights.shape)}."
        )
    weights = weights.to(torch.float64)
    check_finite("weights", weights)
    if bool((weights < 0).any()):
        raise DataError(f"weights must not be negative, got {float(weights.min()):g}.")
    return weights
