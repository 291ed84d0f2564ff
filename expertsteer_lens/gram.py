"""Row-space coordinates: the same geometry as `d_model`-wide rows in `r = rank <= min(n, d)` numbers per row.

With `X = U S V^T` every inner product, distance and covariance of the rows of `X` is that of `Y = X V = U S`, and a vector
found there maps back by `V`. The smaller of the two Gram matrices gives the basis: `X X^T` (n x n) when `n < d`, `X^T X`
(d x d) when `d <= n`. Cost O(n d min(n, d)); nothing of size d x d when `n < d`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ._checks import check_matrix, check_number

RANK_TOLERANCE = 1e-6
"""Default of `row_space`: a Gram matrix in float64 resolves singular values down to about sqrt(n * 2e-16) of the largest,
3e-7 at n = 512; what lies below 1e-6 is rounding, and is also below the resolution of float32 activations."""


@dataclass(frozen=True, eq=False)
class RowSpace:
    """Orthonormal coordinates for the span of the rows of one matrix.

    `coordinates = X @ basis` and `coordinates @ basis.T = X` up to the stated tolerance. Columns are principal axes,
    largest singular value first (of the matrix as given: centre it first to get principal components).
    """

    coordinates: Float[Tensor, "n r"]
    """The rows of X in the basis; float64."""
    basis: Float[Tensor, "d r"]
    """Orthonormal columns V; float64."""
    singular_values: Float[Tensor, " r"]
    """Of X, descending."""
    tolerance: float
    """Axes whose singular value is at most this fraction of the largest were left out."""

    @property
    def rank(self) -> int:
        """Number of axes kept."""
        return self.basis.shape[1]

    def reduce(self, rows: Float[Tensor, "m d"]) -> Float[Tensor, "m r"]:
        """Coordinates of other rows; the part outside the row space is dropped."""
        check_matrix("rows", rows, width=self.basis.shape[0])
        return rows.to(self.basis) @ self.basis

    def lift(self, coordinates: Float[Tensor, "m r"]) -> Float[Tensor, "m d"]:
        """Rows of width d from coordinates: the map back, an isometry."""
        check_matrix("coordinates", coordinates, width=self.rank)
        return coordinates.to(self.basis) @ self.basis.T

    def __repr__(self) -> str:
        n, d = self.coordinates.shape[0], self.basis.shape[0]
        return f"RowSpace(n={n}, d={d}, rank={self.rank}, tolerance={self.tolerance:g})"


def row_space(rows: Float[Tensor, "n d"], *, tolerance: float = RANK_TOLERANCE) -> RowSpace:
    """Reduce `rows` to coordinates in their own span, in float64.

    Args:
        rows: `[n, d]`; not centred here.
        tolerance: axes with singular value `<= tolerance * largest` are left out; at least one axis is kept. The rows are
            reproduced to within `tolerance * largest singular value` in spectral norm.

    Raises:
        DataError: not a finite floating matrix.
        ArgumentError: `tolerance` outside [0, 1).
    """
    check_matrix("rows", rows)
    check_number("tolerance", tolerance, low=0.0, high=1.0 - 1e-12)
    x = rows.detach().to(torch.float64)
    n, d = x.shape
    wide = n < d
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    values, vectors = values.flip(0), vectors.flip(1)
    singular = values.clamp(min=0.0).sqrt()
    # Zero rows only: keep one axis so that shapes stay usable.
    rank = max(1, int((singular > tolerance * singular[0]).sum()))
    if not wide:
        basis = vectors[:, :rank]
    elif float(singular[0]) > 0.0:
        # X^T U / S loses orthogonality for small S; one QR restores it and leaves well-conditioned columns alone.
        basis, upper = torch.linalg.qr(x.T @ (vectors[:, :rank] / singular[:rank]))
        basis = basis * upper.diagonal().sign()
    else:
        basis = torch.eye(d, 1, dtype=x.dtype, device=x.device)
    coordinates = x @ basis
    return RowSpace(coordinates.contiguous(), basis.contiguous(), singular[:rank].clone(), tolerance)


def gram_matrix(
    rows: Float[Tensor, "m d"], others: Float[Tensor, "n d"], *, dtype: torch.dtype = torch.float64, chunk: int = 4096
) -> Float[Tensor, "m n"]:
    """Inner products `rows @ others.T` summed in `dtype`, over column chunks so that no widened copy of the rows is made."""
    out = torch.zeros(rows.shape[0], others.shape[0], dtype=dtype, device=rows.device)
    step = max(1, math.ceil(chunk / 4))
    for start in range(0, rows.shape[1], step):
        out.addmm_(rows[:, start : start + step].to(dtype), others[:, start : start + step].to(dtype).T)
    return out
