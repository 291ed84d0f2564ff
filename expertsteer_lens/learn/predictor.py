"""The kernel predictor that an RFM ends with, as plain arrays and settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_choice, check_matrix, check_number
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.linalg.kernels import (
    KernelName,
    distances,
    distances_from_products,
    kernel_values,
)

from .rows import TrainingRows


@dataclass(frozen=True, eq=False, kw_only=True)
class KernelPredictor:
    """Kernel ridge regression in the metric that the rounds of an RFM arrived at:
    `f(x) = intercept + sum_i coefficients[i] k(||x - x_i||_M)`, with rows standardised as
    `(x - mean) / scale` and `M = F^T F`.

    F and the gradients G have width c: their lines are vectors of standardised coordinates (c = d),
    or, where there were fewer rows than coordinates, combinations of the n standardised support
    rows (c = n). This is all that a saved RFM holds of its predictor, under these names.

    Raises:
        ArgumentError: shapes that do not belong together, an unknown kernel, or a length that is
            not positive.

    >>> import torch
    >>> from expertsteer_lens.learn import RFMConfig, fit_rfm
    >>> rows = torch.eye(4).repeat(5, 1) + 0.1 * torch.arange(20.0)[:, None] / 20
    >>> rfm = fit_rfm(rows, torch.arange(20) % 4 == 0, RFMConfig(n_rounds=2))
    >>> rfm.predictor.predict(torch.eye(4)).round(decimals=1).abs().tolist()
    [1.0, 0.0, 0.0, 0.0]
    """

    support_rows: Float[Tensor, "n d"] = field(repr=False)
    """The rows it was fitted on, raw."""
    mean: Float[Tensor, " d"] = field(repr=False)
    """Subtracted from every row."""
    scale: Float[Tensor, " d"] = field(repr=False)
    """Every centred row is divided by it; the same number in every coordinate unless
    `RFMConfig.standardise` is "coordinate"."""
    coefficients: Float[Tensor, " n"] = field(repr=False)
    """Dual coefficients, one per support row."""
    intercept: float
    """Mean of the 0/1 labels, or 0 with `RFMConfig.targets="zero_one"`."""
    kernel: KernelName
    length: float
    """Of the kernel, in the unit of distances in the metric; > 0."""
    metric: Float[Tensor, "k c"] | None = field(repr=False)
    """F; None is the Euclidean metric of a single round."""
    gradients: Float[Tensor, "j c"] = field(repr=False)
    """G with `G^T G / n` = AGOP of this predictor at its support rows (before any normaliser)."""

    def __post_init__(self) -> None:
        check_choice("kernel", self.kernel, get_args(KernelName))
        check_number("length", self.length, low=0.0, low_open=True)
        check_number("intercept", self.intercept)
        check_matrix("support_rows", self.support_rows)
        n, d = self.support_rows.shape
        width = d if self.gradients.ndim < 2 or self.gradients.shape[1] != n else n
        expected: dict[str, tuple[int, ...]] = {"mean": (d,), "scale": (d,), "coefficients": (n,)}
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                self._refuse_shape(name, str(shape))
        for name in ("gradients", "metric"):
            value = getattr(self, name)
            if value is not None and (value.ndim != 2 or value.shape[1] != width):
                self._refuse_shape(name, f"(any, {width})")

    def _refuse_shape(self, name: str, expected: str) -> None:
        raise ArgumentError(
            f"{name} must have shape {expected} with support_rows of shape "
            f"{tuple(self.support_rows.shape)}, got {tuple(getattr(self, name).shape)}."
        )

    @property
    def n(self) -> int:
        """Number of support rows."""
        return self.support_rows.shape[0]

    @torch.no_grad()
    def predict(
        self, activations: Float[Tensor, "m d"], *, chunk: int = 2048
    ) -> Float[Tensor, " m"]:
        """`f` at raw rows, in float64, on the scale of 0/1 labels (not a probability, not clipped).

        Args:
            activations: any float dtype.
            chunk: rows taken at a time; bounds the memory, never changes the result by more than
                rounding.

        Raises:
            DataError, WidthError: not a finite floating matrix of width d.
        """
        check_matrix("activations", activations, width=self.mean.shape[0])
        parts = []
        for part in torch.split(activations.to(self.support_rows.device), chunk):
            values = kernel_values(self._distances(part), self.length, kernel=self.kernel)
            parts.append(values @ self.coefficients)
        return torch.cat(parts) + self.intercept

    @torch.no_grad()
    def gradient_factor(self) -> Float[Tensor, "j d"]:
        """`gradients` as vectors of width d in standardised coordinates; forms j x d numbers."""
        return self._training.lift(self.gradients)

    @property
    def _training(self) -> TrainingRows:
        # Both widths are possible only where n == d, and then coefficients are over coordinates.
        dual = self.gradients.shape[1] != self.mean.shape[0]
        return TrainingRows(self.support_rows, self.mean, self.scale, dual)

    @cached_property
    def _support(self) -> Tensor:
        """The support rows as the distances need them: their images in the metric, or themselves.

        Kept, since for products of n rows it costs as much as n predictions."""
        represented = self._training.represent(self.support_rows)
        return represented if self.metric is None else represented @ self.metric.T

    def _distances(self, activations: Float[Tensor, "m d"]) -> Float[Tensor, "m n"]:
        represented = self._training.represent(activations)
        if self.metric is not None:
            return distances(represented @ self.metric.T, self._support)
        if not self._training.dual:
            return distances(represented, self._support)
        plain = TrainingRows(self.support_rows, self.mean, self.scale, dual=False)
        norms = plain.represent(activations).square().sum(1)
        return distances_from_products(represented, norms, self._support.diagonal())
