"""The rounds of the RFM, exactly, without a matrix of size d x d when n < d.

One round, in the plain form of the papers, has a metric M (the identity at first):

1. Fit kernel ridge regression with distances `||x - z||_M`: `alpha = (K + ridge I)^-1 y`.
2. Take the gradients G (n x d) of the predictor at its own training rows.
3. The next metric is the average gradient outer product (AGOP) `G^T G`, divided by a scalar.

Why it can be done without d. A metric `M = F^T F` enters only through the *images* `z = F x` of the
rows. Every gradient is a combination of differences of training rows, so `G = C X` for some
coefficients C, and the images of the rows in the next metric are `X G^T = (X X^T) C^T`: products of
n x n matrices. With the images Z of this round, the next gradients are `P G`, where row j of P
combines differences `z_j - z_i`; so the next coefficients are `P C`. X itself is needed again only
for the final vector. When d <= n the same lines run with coefficients over the coordinate axes, and
G is replaced by the d x d triangle of its QR factorisation, which has the same `G^T G`. See
`rows.py` for the two representations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens.errors import SolveError
from expertsteer_lens.linalg.kernels import (
    KernelName,
    apply_gradient_operator,
    distances,
    gradient_operator,
    kernel_values,
    solve_kernel_ridge,
)

from .config import Normaliser
from .rows import Fold


@dataclass(frozen=True, eq=False)
class Round:
    """One round: the predictor fitted in `metric`, and its gradients at the training rows."""

    number: int
    """1-based."""
    length: float
    """Kernel length in force."""
    alpha: Float[Tensor, " n"]
    """Dual coefficients of the regression."""
    metric: Float[Tensor, "k c"] | None
    """Coefficients of the metric's factor F; None is the Euclidean metric of round 1."""
    gradients: Float[Tensor, "j c"]
    """Coefficients of G, or of a factor with the same `G^T G`."""
    predictions: Float[Tensor, " m"]
    """At the fold's held-out rows."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one run of the recursion needs to know."""

    kernel: KernelName
    bandwidth: float
    relative: bool
    """Whether bandwidth is in units of the round's median training distance."""
    ridge: float
    n_rounds: int
    center: bool
    normalise: Normaliser


def run_rounds(fold: Fold, targets: Float[Tensor, " n"], setting: Setting) -> Iterator[Round]:
    """Yield the rounds one by one.

    Raises:
        SolveError: singular kernel system, vanishing gradients, or a median distance of 0 when
            `relative`.
    """
    images: Tensor | None = None  # of all rows, in the metric of the round
    metric: Tensor | None = None
    for number in range(1, setting.n_rounds + 1):
        fitted = _fit_round(fold, targets, setting, number, images, metric)
        yield fitted
        if number < setting.n_rounds:
            # The factor of the next metric is G itself, divided by the root of the normaliser.
            images = fold.represented @ fitted.gradients.T
            scale = _normaliser(fold, fitted.gradients, images, setting.normalise) ** -0.5
            metric, images = fitted.gradients * scale, images.mul_(scale)


def _fit_round(
    fold: Fold,
    targets: Tensor,
    setting: Setting,
    number: int,
    images: Tensor | None,
    metric: Tensor | None,
) -> Round:
    """Fit the predictor in the metric (Euclidean when None) and take its gradients; `images` are
    those of all rows."""
    n, kernel = fold.n, setting.kernel
    distance = fold.euclidean_distances() if images is None else distances(images, images[:n])
    # The gradients shrink or grow the metric from round to round. A length relative to the median
    # distance follows it, so that no kernel becomes constant or diagonal for that reason alone.
    length = setting.bandwidth * (_median_distance(distance[:n]) if setting.relative else 1.0)
    values = kernel_values(distance, length, kernel=kernel)
    alpha = solve_kernel_ridge(values[:n], targets, setting.ridge)
    weights = gradient_operator(distance[:n], values[:n], alpha, length, kernel=kernel)
    gradients = _gradient_coefficients(fold, weights, images, metric)
    if setting.center:
        gradients = gradients - gradients.mean(0)
    if gradients.shape[0] > gradients.shape[1]:
        gradients = torch.linalg.qr(gradients, mode="r").R
    _check_gradients(gradients, number, setting.bandwidth, length, distance[:n])
    return Round(number, length, alpha, metric, gradients, predictions=values[n:] @ alpha)


def _gradient_coefficients(
    fold: Fold, weights: Tensor, images: Tensor | None, metric: Tensor | None
) -> Tensor:
    """Coefficients of the gradients `sum_i w_ji M (x_j - x_i)`, with M = I in round 1."""
    represented = fold.represented[: fold.n]
    if images is not None and metric is not None:
        # M (x_j - x_i) = F^T (z_j - z_i): differences of images, in the factor's coefficients.
        return apply_gradient_operator(weights, images[: fold.n], images[: fold.n]) @ metric
    if fold.training.dual:
        # Over the rows themselves: -w_ji for row i, and the sum of the others for row j.
        return torch.neg(weights).diagonal_scatter(weights.sum(1) - weights.diagonal())
    return apply_gradient_operator(weights, represented, represented)


def _check_gradients(
    gradients: Tensor, number: int, bandwidth: float, length: float, distance: Tensor
) -> None:
    """Raise `SolveError` if the gradients are too small for their squares to be numbers."""
    largest = float(torch.linalg.vector_norm(gradients, ord=math.inf))
    if largest < torch.finfo(gradients.dtype).tiny ** 0.5:
        raise SolveError(
            f"gradients vanish in round {number} at bandwidth={bandwidth:g}: the kernel is "
            f"diagonal at this length ({length:.3g}) against a median distance of "
            f"{_median_distance(distance):.3g}; raise bandwidth."
        )


def _normaliser(fold: Fold, gradients: Tensor, images: Tensor, normalise: Normaliser) -> float:
    """What `G^T G` is divided by; "none" leaves the average over the n gradients."""
    if normalise == "max":
        return fold.training.largest_agop_entry(gradients)
    if normalise == "none":
        return float(fold.n)
    if fold.training.dual:  # trace(G^T G) = sum of C * (X X^T C^T)^T
        return float((gradients * images[: fold.n].T).sum())
    return float(gradients.square().sum())


def _median_distance(distance: Float[Tensor, "n n"]) -> float:
    """Median over pairs of different rows."""
    n = distance.shape[0]
    pairs = torch.triu_indices(n, n, offset=1, device=distance.device)
    median = float(distance[pairs[0], pairs[1]].median())
    if median == 0.0:
        raise SolveError(
            "the median distance between rows is 0 (more than half of the pairs are duplicates, or "
            "the metric has collapsed); remove duplicates or use bandwidth_unit='absolute'."
        )
    return median
