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
"""Default of `row_space`, on singular values: a Gram matrix in float64 resolves them down to about
sqrt(n * 2e-16) of the largest (3e-7 at n = 512); what lies below 1e-6 is rounding, and below the
resolution of float32 activations."""
EIGENVALUE_TOLERANCE = 1e-12
"""The same limit on eigenvalues of a covariance or Gram matrix, the squares of singular values."""


def smaller_gram(rows: Float[Tensor, "n d"]) -> Float[Tensor, "m m"]:
    """`X X^T` where `n < d`, else `X^T X`: m = min(n, d). Both have the same non-zero eigenvalues,
    the same trace and the same norm. In the dtype of `rows`; O(n d min(n, d)).

    >>> smaller_gram(torch.ones(2, 5)).shape, smaller_gram(torch.ones(5, 2)).shape
    (torch.Size([2, 2]), torch.Size([2, 2]))
    """
    return rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows


@dataclass(frozen=True, eq=False)
class GramAxes:
    """Eigenvalues and eigenvectors of the smaller Gram matrix of `X = U S V^T`."""

    values: Float[Tensor, " m"]
    """Squared singular values of X, descending; float64. Those that are only rounding are still
    here, and may be negative."""
    vectors: Float[Tensor, "m m"]
    """In columns: U where `of_rows`, else V; float64."""
    of_rows: bool
    """Whether `X X^T` was the smaller one."""


def gram_axes(rows: Float[Tensor, "n d"]) -> GramAxes:
    """Singular values of `X` and its singular vectors on the shorter side, as PCA needs them.

    The Gram matrix is summed in the dtype of `rows` and decomposed in float64. The side that is
    not given follows from `X = U S V^T`: `V = X^T U / S`, or `U = X V / S`.

    >>> rows = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    >>> axes = gram_axes(rows)
    >>> axes.values.tolist(), axes.of_rows
    ([9.0, 4.0], True)
    """
    values, vectors = torch.linalg.eigh(smaller_gram(rows).double())
    return GramAxes(values.flip(0), vectors.flip(1), rows.shape[0] < rows.shape[1])


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

    Example:
        >>> rows = torch.tensor([[1.0, 0.0, 1.0], [2.0, 0.0, 2.0]])
        >>> space = row_space(rows)
        >>> space
        RowSpace(n=2, d=3, rank=1, tolerance=1e-06)
        >>> torch.allclose(space.lift(space.coordinates), rows.double())
        True
    """
    check_matrix("rows", rows)
    check_number("tolerance", tolerance, low=0.0, high=1.0 - 1e-12)
    x = rows.detach().to(torch.float64)
    axes = gram_axes(x)
    singular = axes.values.clamp(min=0.0).sqrt()
    # At least one axis, so that shapes stay usable when every row is zero.
    rank = max(1, int((singular > tolerance * singular[0]).sum()))
    vectors = axes.vectors[:, :rank]
    if not axes.of_rows:
        basis = vectors
    elif float(singular[0]) > 0.0:
        # X^T U / S loses orthogonality for small S; one QR restores it and leaves well-conditioned
        # columns alone.
        basis, upper = torch.linalg.qr(x.T @ (vectors / singular[:rank]))
        basis = basis * upper.diagonal().sign()
    else:
        basis = torch.eye(x.shape[1], 1, dtype=x.dtype, device=x.device)
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
    RFM fit.

    >>> inner_products(torch.eye(2), torch.eye(2), shift=torch.zeros(2), scale=torch.ones(2))
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)
    """
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
    """`(rows - shift) / scale`, computed in `dtype`; never the memory of `rows`.

    >>> standardised(torch.tensor([[3.0, 5.0]]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 4.0]))
    tensor([[1., 1.]], dtype=torch.float64)
    """
    return (rows.to(dtype) - shift.to(dtype)).div_(scale.to(dtype))


def top_eigenpair(
    matrix: Float[Tensor, "n n"], *, seed: int = 0, tolerance: float = 1e-10, max_steps: int = 200
) -> tuple[float, Float[Tensor, " n"]]:
    """Largest eigenvalue and unit eigenvector of a symmetric positive semi-definite matrix.

    Lanczos with full reorthogonalisation, O(n^2) a step, from a seeded random start, until the
    residual `||A v - theta v||` is below `tolerance * theta` (or the rounding level of the dtype,
    if larger). When `max_steps` do not suffice (a cluster at the top) or the matrix is small, a
    full `eigh` gives the same pair in O(n^3). The sign of the vector is arbitrary.

    By hand, because `eigh` of all n axes would cost more than the rounds of an RFM, of which only
    the first axis is used, and `torch.lobpcg` draws its start from the global generator.

    >>> value, vector = top_eigenpair(torch.diag(torch.tensor([1.0, 5.0, 2.0])))
    >>> round(value, 6), [round(abs(float(v)), 6) for v in vector]
    (5.0, [0.0, 1.0, 0.0])
    """
    n = matrix.shape[0]
    if n > 2 * max_steps:
        resolved = max(tolerance, 8.0 * torch.finfo(matrix.dtype).eps)
        pair = _run_lanczos(matrix, seed, resolved, max_steps)
        if pair is not None:
            return pair
    values, vectors = torch.linalg.eigh(matrix)
    return float(values[-1]), vectors[:, -1].contiguous()


def _run_lanczos(
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
        # Twice: the second pass removes what rounding left of the first.
        for _ in range(2):
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
