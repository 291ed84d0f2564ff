"""Slow and obvious forms of what `linalg.kernels` computes in pieces."""

from __future__ import annotations

from torch import Tensor

from expertsteer_lens._checks import check_matrix
from expertsteer_lens.linalg.kernels import (
    apply_gradient_operator,
    distances,
    gradient_operator,
    kernel_values,
)


def predictor_gradients(
    at: Tensor,
    centres: Tensor,
    alpha: Tensor,
    bandwidth: float,
    *,
    factor: Tensor | None = None,
    kernel: str = "laplace",
) -> Tensor:
    """Gradients of `f(x) = sum_i alpha_i k(||F(x - x_i)||)` at the rows of `at`, in the coordinates
    of x.

    The plain d-space form; `fit_rfm` uses the pieces.
    """
    check_matrix("at", at)
    check_matrix("centres", centres, width=at.shape[1])
    z_at, z_centres = (at, centres) if factor is None else (at @ factor.T, centres @ factor.T)
    distance = distances(z_at, z_centres)
    values = kernel_values(distance, bandwidth, kernel=kernel)
    weights = gradient_operator(distance, values, alpha, bandwidth, kernel=kernel)
    gradients = apply_gradient_operator(weights, z_at, z_centres)
    return gradients if factor is None else gradients @ factor
