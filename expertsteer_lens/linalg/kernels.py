"""Kernel regression in a learnt metric, from distances alone.

A predictor is `f(x) = sum_i alpha_i k(||F(x - x_i)||)`, with a metric given by a factor `F` (`M =
F^T F`; without one, Euclidean). Everything here takes the *images* `z = F x`, so that no d x d
matrix is needed: distances are those of the images, and the gradient at `x_j` is `F^T p_j` with
`p_j = sum_i w_ji (z_j - z_i)` from `gradient_operator`. All functions are pure, keep the dtype
(float32 or float64) and the device, and may be called on chunks of query rows."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens.errors import SolveError

KernelName = Literal["laplace", "gaussian"]
KERNELS: tuple[str, ...] = get_args(KernelName)


def distances_from_products(
    products: Float[Tensor, "m n"], left: Float[Tensor, " m"], right: Float[Tensor, " n"]
) -> Float[Tensor, "m n"]:
    """Distances from inner products and squared norms; what is only rounding is exactly 0.

    `|x|^2 + |z|^2 - 2 x.z` of equal rows is a rounding residue of about machine epsilon times the
    squared norms. Left in, its root would be a distance of 1e-8 whose gradient weight 1/distance is
    noise; so values up to 64 epsilon of `|x|^2` become 0. Centre the rows first: the residue grows
    with the norms.

    >>> rows, norms = torch.tensor([[0.0], [3.0]]), torch.tensor([0.0, 9.0])
    >>> distances_from_products(rows @ rows.T, norms, norms).tolist()
    [[0.0, 3.0], [3.0, 0.0]]
    """
    squared = torch.add(right, products, alpha=-2.0).add_(left[:, None])
    floor = (64.0 * torch.finfo(products.dtype).eps * left)[:, None]
    return squared.masked_fill_(squared <= floor, 0.0).sqrt_()


def distances(rows: Float[Tensor, "m k"], others: Float[Tensor, "n k"]) -> Float[Tensor, "m n"]:
    """Euclidean distances between rows, one matrix product; equal rows are at exactly 0 (see
    above).

    >>> distances(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[5.0, 0.0]]
    """
    return distances_from_products(rows @ others.T, rows.square().sum(1), others.square().sum(1))


def kernel_values(
    distance: Float[Tensor, "m n"], bandwidth: float, *, kernel: KernelName | str = "laplace"
) -> Float[Tensor, "m n"]:
    """`exp(-t / L)` (laplace) or `exp(-t^2 / (2 L^2))` (gaussian) of distances t; bandwidth L in
    the unit of t.

    Raises:
        ArgumentError: unknown kernel, or a bandwidth that is not positive.

    >>> kernel_values(torch.tensor([[0.0]]), 2.0)
    tensor([[1.]])
    """
    check_choice("kernel", kernel, KERNELS)
    check_number("bandwidth", bandwidth, low=0.0, low_open=True)
    scaled = distance * (-1.0 / bandwidth)
    return scaled.exp_() if kernel == "laplace" else scaled.square_().mul_(-0.5).exp_()


def solve_kernel_ridge(
    kernel_matrix: Float[Tensor, "n n"], targets: Float[Tensor, " n"], ridge: float
) -> Float[Tensor, " n"]:
    """Dual coefficients `alpha = (K + ridge I)^-1 y` by Cholesky in float64 (cost n^3/3), returned
    in the dtype of K.

    float64 even for float32 kernels: at ridge 1e-3 the condition number reaches n/ridge, about 1e6.

    Raises:
        SolveError: the system is not positive definite, or singular to working precision. The ridge
            is never changed.

    >>> solve_kernel_ridge(torch.eye(2), torch.tensor([1.0, 2.0]), 1.0)
    tensor([0.5000, 1.0000])
    """
    system = kernel_matrix.to(torch.float64, copy=True)
    system.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(system)
    floor = system.shape[0] * torch.finfo(system.dtype).eps * float(system.diagonal().max())
    if int(info) != 0 or float(factor.diagonal().min()) ** 2 <= floor:
        raise SolveError(
            f"kernel system is not positive definite at ridge={ridge:g}; raise ridge, or remove "
            "duplicate rows. Nothing was changed for you."
        )
    return torch.cholesky_solve(targets.to(torch.float64)[:, None], factor)[:, 0].to(
        kernel_matrix.dtype
    )


def gradient_operator(
    distance: Float[Tensor, "m n"],
    values: Float[Tensor, "m n"],
    alpha: Float[Tensor, " n"],
    bandwidth: float,
    *,
    kernel: KernelName | str = "laplace",
) -> Float[Tensor, "m n"]:
    """Weights `w_ji = alpha_i k'(t_ji) / t_ji`, so that the gradient at query j is `sum_i w_ji (z_j
    - z_i)`.

    Laplace: `-alpha_i exp(-t/L) / (L t)`, and 0 at `t = 0`, where the kernel has a cusp and every
    direction is a subgradient of equal size: the mean over directions is 0 (same choice as xRFM).
    Gaussian: `-alpha_i k / L^2`.

    >>> distance = torch.tensor([[0.0, 1.0]])
    >>> values = kernel_values(distance, 1.0, kernel="gaussian")
    >>> gradient_operator(distance, values, torch.tensor([2.0, 0.0]), 1.0, kernel="gaussian")
    tensor([[-2., -0.]])
    """
    if kernel == "gaussian":
        return values * (alpha / -(bandwidth**2))
    return torch.div(values, distance).mul_(alpha / -bandwidth).masked_fill_(distance == 0.0, 0.0)


def apply_gradient_operator(
    weights: Float[Tensor, "m n"], at: Float[Tensor, "m k"], centres: Float[Tensor, "n k"]
) -> Float[Tensor, "m k"]:
    """`p_j = sum_i w_ji (z_j - z_i)` without forming differences: O(m n k).

    >>> at, centres = torch.tensor([[1.0]]), torch.tensor([[0.0], [4.0]])
    >>> apply_gradient_operator(torch.tensor([[2.0, 1.0]]), at, centres)
    tensor([[-1.]])
    """
    return torch.addmm(at * weights.sum(1, keepdim=True), weights, centres, alpha=-1.0)
