"""n x n forms: the geometry of wide rows from their inner products, without matrices of size d x d.

With `X = U S V^T` every inner product, distance and covariance of the rows of `X` is that of `Y = X
V = U S`, and a vector found there maps back by `V`. The smaller of two Gram matrices gives the
basis: `X X^T` (n x n) when `n < d`, `X^T X` (d x d) when `d <= n`. Cost O(n d min(n, d))."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_matrix, check_number

RANK_TOLERANCE = 1e-6
"""Default of `row_space`: a Gram matrix in float64 resolves singular values down to about sqrt(n *
2e-16) of the largest (3e-7 at n = 512); what lies below 1e-6 is rounding, and below the resolution
of float32 activations."""


@dataclass(frozen=True, eq=False)
class RowSpace:
    """Orthonormal coordinates for the span of the rows of one matrix.

    `coordinates = X @ basis` and `coordinates @ basis.T = X` up to the stated tolerance. Columns
    are principal axes, largest singular value first (of the matrix as given: centre it first to get
    principal components)."""

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
        """Coordinates of other rows; the part outside the row space is dropped.

        Raises:
            DataError, WidthError: not a finite floating matrix of width d.
        """
        check_matrix("rows", rows, width=self.basis.shape[0])
        return rows.to(self.basis) @ self.basis

    def lift(self, coordinates: Float[Tensor, "m r"]) -> Float[Tensor, "m d"]:
        """Rows of width d from coordinates: the map back, an isometry.

        Raises:
            DataError, WidthError: not a finite floating matrix of width r.
        """
        check_matrix("coordinates", coordinates, width=self.rank)
        return coordinates.to(self.basis) @ self.basis.T

    def __repr__(self) -> str:
        n, d = self.coordinates.shape[0], self.basis.shape[0]
        return f"RowSpace(n={n}, d={d}, rank={self.rank}, tolerance={self.tolerance:g})"


def row_space(rows: Float[Tensor, "n d"], *, tolerance: float = RANK_TOLERANCE) -> RowSpace:
    """Reduce `rows` to coordinates in their own span, in float64.

    Args:
        rows: `[n, d]`; not centred here.
        tolerance: axes with singular value `<= tolerance * largest` are left out; at least one axis
            is kept. The rows are reproduced to within `tolerance * largest singular value` in
            spectral norm.

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
    # At least one axis, so that shapes stay usable when every row is zero.
    rank = max(1, int((singular > tolerance * singular[0]).sum()))
    if not wide:
        basis = vectors[:, :rank]
    elif float(singular[0]) > 0.0:
        # X^T U / S loses orthogonality for small S; one QR restores it and leaves well-conditioned
        # columns alone.
        basis, upper = torch.linalg.qr(x.T @ (vectors[:, :rank] / singular[:rank]))
        basis = basis * upper.diagonal().sign()
    else:
        basis = torch.eye(d, 1, dtype=x.dtype, device=x.device)
    return RowSpace(
        (x @ basis).contiguous(), basis.contiguous(), singular[:rank].clone(), tolerance
    )


def inner_products(
    rows: Float[Tensor, "m d"],
    others: Float[Tensor, "n d"],
    *,
    shift: Float[Tensor, " d"],
    scale: Float[Tensor, " d"],
    chunk: int = 512,
) -> Float[Tensor, "m n"]:
    """`((rows - shift) / scale) @ ((others - shift) / scale).T`, in float64 over chunks of columns.

    Chunks, because a widened and shifted copy of the activations would be the largest tensor of an
    RFM fit."""
    out = torch.zeros(rows.shape[0], others.shape[0], dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], chunk):
        part = slice(start, start + chunk)
        left = standardised(rows[:, part], shift[part], scale[part])
        right = left if others is rows else standardised(others[:, part], shift[part], scale[part])
        out.addmm_(left, right.T)
    return out


def standardised(
    rows: Float[Tensor, "m d"],
    shift: Float[Tensor, " d"],
    scale: Float[Tensor, " d"],
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "m d"]:
    """`(rows - shift) / scale`, computed in `dtype`; never the memory of `rows`."""
    return (rows.to(dtype) - shift.to(dtype)).div_(scale.to(dtype))


def top_eigenpair(
    matrix: Float[Tensor, "n n"], *, seed: int = 0, tolerance: float = 1e-10, max_steps: int = 200
) -> tuple[float, Float[Tensor, " n"]]:
    """Largest eigenvalue and unit eigenvector of a symmetric positive semi-definite matrix.

    Lanczos with full reorthogonalisation, O(n^2) a step, from a seeded random start, until the
    residual `||A v - theta v||` is below `tolerance * theta` (or the rounding level of the dtype,
    if larger). When `max_steps` do not suffice (a cluster at the top) or the matrix is small, a
    full `eigh` gives the same pair in O(n^3). The sign of the vector is arbitrary."""
    n = matrix.shape[0]
    if n > 2 * max_steps:
        found = _lanczos(
            matrix, seed, max(tolerance, 8.0 * torch.finfo(matrix.dtype).eps), max_steps
        )
        if found is not None:
            return found
    values, vectors = torch.linalg.eigh(matrix)
    return float(values[-1]), vectors[:, -1].contiguous()


def _lanczos(
    matrix: Tensor, seed: int, tolerance: float, max_steps: int
) -> tuple[float, Tensor] | None:
    """The pair of `top_eigenpair`, or None when `max_steps` steps did not reach the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[0], generator=generator, dtype=torch.float64).to(matrix)
    basis = matrix.new_zeros(max_steps, matrix.shape[0])
    basis[0] = start / start.norm()
    small = torch.zeros(max_steps, max_steps, dtype=torch.float64)
    for step in range(max_steps):
        image = matrix @ basis[step]
        known = basis[: step + 1]
        small[step, step] = torch.dot(image, basis[step])
        for _ in range(
            2
        ):  # once is not enough: the second pass removes what rounding left of the first
            image = image - known.T @ (known @ image)
        norm = float(image.norm())
        done = norm <= torch.finfo(matrix.dtype).eps * float(small[0, 0].abs())
        if done or step % 8 == 7:
            values, vectors = torch.linalg.eigh(small[: step + 1, : step + 1])
            if done or norm * abs(float(vectors[-1, -1])) <= tolerance * float(values[-1]):
                vector = known.T @ vectors[:, -1].to(matrix)
                return float(values[-1]), vector / vector.norm()
        if step + 1 < max_steps:
            basis[step + 1] = image / norm
            small[step, step + 1] = small[step + 1, step] = norm
    return None
