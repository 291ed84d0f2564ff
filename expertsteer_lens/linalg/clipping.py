"""Clipping of massive coordinates, of which transformers have a few."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from expertsteer_lens._checks import check_matrix, check_number

MAD_TO_SD = 1.4826
"""Median absolute deviation times this is the standard deviation, for Gaussian values."""


@dataclass(frozen=True, eq=False)
class ClippedRows:
    """Rows with outlying entries pulled in, and the record of what was clipped."""

    rows: Float[Tensor, "n d"]
    lower: Float[Tensor, " d"]
    """Smallest value allowed per coordinate (-inf where the coordinate was not clipped by rule)."""
    upper: Float[Tensor, " d"]
    n_clipped: Int[Tensor, " d"]
    """Entries changed, per coordinate."""

    @property
    def coordinates(self) -> list[int]:
        """Coordinates in which at least one entry was changed."""
        return self.n_clipped.nonzero()[:, 0].tolist()

    def summary(self) -> dict[str, int | list[int]]:
        """JSON-able record: number of entries changed, number of coordinates, and the (first 32)
        coordinates."""
        where = self.coordinates
        return {
            "n_entries": int(self.n_clipped.sum()),
            "n_coordinates": len(where),
            "coordinates": where[:32],
        }

    def __repr__(self) -> str:
        n, d = self.rows.shape
        where = (
            f"{int(self.n_clipped.sum())} entries in {len(self.coordinates)} coordinates clipped"
        )
        return f"ClippedRows(n={n}, d={d}, {where})"


def clip_massive(rows: Float[Tensor, "n d"], threshold: float = 8.0) -> ClippedRows:
    """Clip every coordinate to `median +- threshold * 1.4826 * MAD` over the rows, each coordinate
    by its own limits.

    Transformers have a few residual coordinates with rare activations hundreds of times the usual;
    a covariance sees little else. In robust standard deviations a Gaussian value beyond the default
    8 has probability 1e-15, so ordinary rows are untouched. A coordinate whose MAD is 0 (more than
    half of its entries equal) has no scale and stays as is.

    Args:
        rows: `[n, d]`; not changed.
        threshold: in robust standard deviations, > 0.

    Source: chosen by us (the paper says nothing about massive coordinates). Cost O(nd log n), in
    the dtype of `rows`.

    Raises:
        DataError: not a finite floating matrix.
        ArgumentError: `threshold` not positive.
    """
    check_matrix("rows", rows, min_rows=1)
    check_number("threshold", threshold, low=0.0, low_open=True)
    x = rows.detach().T.contiguous()
    median = _row_medians(x)
    deviation = (x - median[:, None]).abs()
    spread = _row_medians(deviation) * (MAD_TO_SD * threshold)
    spread = torch.where(spread > 0, spread, torch.full_like(spread, torch.inf))
    n_clipped = (deviation > spread[:, None]).sum(dim=1)
    lower, upper = median - spread, median + spread
    clipped = rows.detach().clone()
    where = n_clipped.nonzero()[:, 0]
    clipped[:, where] = torch.minimum(torch.maximum(clipped[:, where], lower[where]), upper[where])
    return ClippedRows(clipped, lower, upper, n_clipped)


def _row_medians(x: Tensor) -> Tensor:
    """Lower median of each row. numpy's partition is about ten times faster than torch's median on
    a CPU."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        middle = (x.shape[1] - 1) // 2
        return torch.from_numpy(np.partition(x.numpy(), middle, axis=1)[:, middle].copy())
    return x.median(dim=1).values
