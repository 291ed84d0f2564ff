"""Recursive Feature Machine: the direction along which a kernel classifier changes most.

Each round fits kernel ridge regression in a metric M, takes the gradients G of the predictor at its
own training points, and makes the average gradient outer product (AGOP) `G^T G / n`, normalised,
the next metric. The direction is the top eigenvector of the last AGOP. Source: Radhakrishnan et
al., Science 2024; for steering: arXiv 2502.03708.

Ours: no d x d matrix when n < d. Gradients are combinations of differences of rows, so with the
inner products of the rows computed once (O(n^2 d)) a round is three n x n products and a Cholesky
factorisation, and only the final vector returns to width d. Exact; see `recursion.py`. Everything
is float64: the kernel system's condition number reaches n / ridge, about 1e6, and float32 kernels
turned out not to be positive definite at ridge 1e-3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from expertsteer_lens._checks import check_groups, check_labels, check_matrix, check_number
from expertsteer_lens._html import repr_html
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.linalg.row_space import row_space, top_eigenpair

from .config import RFMConfig, RFMHistory, RFMRound, search_grid
from .predictor import KernelPredictor
from .recursion import Round
from .rows import Fold, RowGeometry
from .selection import FittedRound, label_offset, run_setting, search_settings, split_rows

__all__ = [
    "RFM",
    "ClassMedians",
    "KernelPredictor",
    "RFMConfig",
    "RFMHistory",
    "RFMRound",
    "fit_rfm",
]

_DEFAULT = RFMConfig()


class ClassMedians(NamedTuple):
    """Medians of the projections of training rows, by class."""

    negative: float
    positive: float


@dataclass(frozen=True, eq=False)
class RFM:
    """A fitted Recursive Feature Machine. What it does not prove: that adding the direction changes
    behaviour.

    >>> import torch
    >>> rows = torch.cat([torch.eye(8) - 2.0, torch.eye(8) + 2.0])
    >>> rfm = fit_rfm(rows, torch.arange(16) >= 8)
    >>> [round(x, 2) for x in rfm.direction.tolist()]  # all coordinates tell the classes apart
    [0.35, 0.35, 0.35, 0.35, 0.35, 0.35, 0.35, 0.35]
    >>> rfm.validation_auc
    1.0
    """

    direction: Float[Tensor, " d"]
    """Unit float32 vector, a *displacement* in the activations' own coordinates: what to add. The
    AGOP eigenvector v is a gradient, a covector in standardised coordinates `(x - mean) / sigma`;
    the step of the activations that moves the standardised row by v is `sigma * v` (not `v /
    sigma`, the gradient in raw coordinates). With "none" and "scale" all three are the same line.
    Sign: projections of training rows correlate positively (Pearson) with the labels."""
    eigenvalue_share: float
    """Top AGOP eigenvalue / trace, in (0, 1]: near 1, one direction explains the predictor."""
    validation_auc: float | None
    """AUC of the chosen setting and round on validation rows; None without validation. It chose the
    setting, so it is optimistic; and it measures reading, not steering."""
    median_projection: ClassMedians
    """Of `project(training rows)`: what a typical row of either class reads."""
    chosen: RFMRound
    """The line of `history` whose bandwidth, centring and round were kept."""
    history: RFMHistory
    config: RFMConfig
    seed: int
    predictor: KernelPredictor = field(repr=False)
    """The predictor of the chosen round, fitted on all training rows."""
    class_difference: Float[Tensor, " d"] = field(repr=False)
    """Mean training row of label 1 minus that of label 0: gives every direction its sign."""

    def project(self, activations: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        """Inner products of raw rows with `direction`, in float32 or the rows' wider dtype; larger
        means more positive.

        Raises:
            DataError, WidthError: not a finite floating matrix of width d.
        """
        check_matrix("activations", activations, width=self.direction.shape[0])
        dtype = torch.promote_types(activations.dtype, torch.float32)
        return activations.to(dtype) @ self.direction.to(activations.device, dtype)

    def predict(self, activations: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        """The kernel predictor at new rows, on the scale of 0/1 labels (not a probability, not
        clipped).

        Raises:
            DataError, WidthError: not a finite floating matrix of width d.
        """
        return self.predictor.predict(activations)

    @torch.no_grad()
    def top_directions(self, k: int) -> Float[Tensor, "k d"]:
        """The k leading AGOP eigenvectors as unit displacements, each signed as `direction`, which
        is the first.

        Orthogonal except with `standardise="coordinate"`, where the map back to raw coordinates is
        not a rotation.

        Raises:
            ArgumentError: k outside 1 .. rank of the AGOP.
        """
        vectors = row_space(self.predictor.gradient_factor()).basis.T
        check_number("k", k, low=1, high=vectors.shape[0], integer=True)
        scale, difference = self.predictor.scale, self.class_difference
        return torch.stack([_displacement(v, scale, difference) for v in vectors[:k]])

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        auc = "none" if self.validation_auc is None else f"{self.validation_auc:.3f}"
        return (
            f"RFM(n={self.predictor.n}, d={self.direction.shape[0]}, "
            f"bandwidth={self.chosen.bandwidth:g} "
            f"({self.config.bandwidth_unit}), center_gradients={self.chosen.center_gradients}, "
            f"round={self.chosen.round}, validation_auc={auc}, "
            f"eigenvalue_share={self.eigenvalue_share:.3f})"
        )


@torch.no_grad()
def fit_rfm(
    activations: Float[Tensor, "n d"],
    labels: Shaped[Tensor, " n"],
    config: RFMConfig = _DEFAULT,
    *,
    seed: int = 0,
    validation: tuple[Tensor, Tensor] | None = None,
    groups: Sequence[int] | Tensor | None = None,
) -> RFM:
    """Fit a Recursive Feature Machine and return the direction that separates label 1 from label 0.

    Round t: `alpha = (K + ridge I)^-1 y` with `K_ij = k(||x_i - x_j||_M)`, `||x - z||_M^2 = (x -
    z)^T M (x - z)`; G = gradients of `f(x) = sum_i alpha_i k(||x - x_i||_M)` at the training rows
    (self term 0); `M <- G^T G / normaliser`, M = I at first. With validation rows the setting and
    round of highest AUC are kept (ties: lower squared error, then the earlier); a setting found on
    an internal split is then fitted again on all rows, while with `validation` given the fit on
    `activations` is kept as it is.

    Args:
        activations: one row per prompt or token; any float dtype.
        labels: 1 = positive, towards which the direction points; 0/1, -1/+1 or bool.
        config: see `RFMConfig`.
        seed: of the validation split and of the eigenvector iteration's start.
        validation: `(activations, labels)` of further rows for choosing settings; they are never
            fitted.
        groups: integer per row, `[n]`: rows of one group (one text) are never on both sides of the
            validation split, or its AUC would be of rows that were fitted. Default: equal rows are
            a group.

    Cost: O(n^2 d) once, O(n^3) a round and setting; memory O(n d + n^2). With d <= n: O(n^3 + n^2
    d) a round.

    Raises:
        DataError: not finite, unequal lengths, one class, too few rows or groups for the split,
            all rows equal, groups that are not one integer a row.
        ArgumentError: a search asked for without validation rows; a seed outside [0, 2^32).
        WidthError: validation rows of another width.
        SolveError: the kernel system is singular at this ridge, or the gradients vanish at this
            bandwidth. In a search such settings are recorded in `history`, and it raises only if
            none is left.

    >>> import torch
    >>> noise = torch.randn(60, 100, generator=torch.Generator().manual_seed(0))
    >>> labels = torch.arange(60) % 2
    >>> planted = torch.zeros(100)
    >>> planted[7] = 1.0
    >>> rfm = fit_rfm(noise + 8.0 * labels[:, None] * planted, labels, seed=0)
    >>> bool(rfm.direction @ planted > 0.9)
    True
    >>> rfm.median_projection.negative < rfm.median_projection.positive
    True
    """
    check_number("seed", seed, low=0, high=2**32 - 1, integer=True)
    rows, target, n = _stack_rows(activations, labels, validation)
    geometry = RowGeometry.of(rows, n_fitted=n, standardise=config.standardise)
    everything = torch.arange(n, device=rows.device)
    history: list[RFMRound] = []
    settings = search_grid(config)

    # 1. Choose setting and round on rows that are not fitted, if there are any.
    chosen: FittedRound | None = None
    if validation is not None:
        held = torch.arange(n, rows.shape[0], device=rows.device)
        chosen = search_settings(geometry.fold(everything, held), target, config, history)
    elif config.validation_fraction > 0.0:
        own = _equal_rows(rows) if groups is None else check_groups("groups", groups, n)
        train, held = split_rows(target, config.validation_fraction, seed, own)
        labels_in_order = target[torch.cat([train, held])]
        chosen = search_settings(geometry.fold(train, held), labels_in_order, config, history)
    elif len(settings) > 1:
        raise ArgumentError(
            f"bandwidth={config.bandwidth!r} and center_gradients={config.center_gradients!r} ask "
            "for a search, which needs validation rows; pass validation=(rows, labels), set "
            "validation_fraction > 0, or give one value."
        )

    # 2. Fit the choice on all rows. Given validation rows were never part of them, so then the fit
    # that was chosen already is that.
    fold, kept = geometry.fold(everything), chosen
    if kept is None or validation is None:
        bandwidth, center = settings[0]
        n_rounds = config.n_rounds
        if chosen is not None:
            bandwidth, center = chosen.record.bandwidth, chosen.record.center_gradients
            n_rounds = chosen.record.round
        for kept in run_setting(fold, target[:n], config, bandwidth, center, n_rounds):
            history.append(kept.record)
    assert kept is not None  # n_rounds >= 1
    record = (chosen or kept).record
    return _result(fold, rows[:n], target[:n], kept.round, record, history, config, seed)


def _result(
    fold: Fold,
    rows: Tensor,
    target: Tensor,
    fitted: Round,
    record: RFMRound,
    history: list[RFMRound],
    config: RFMConfig,
    seed: int,
) -> RFM:
    """The top eigenvector of the AGOP of one round, as a displacement, with what is needed to
    predict."""
    means = [rows[target == label].mean(0, dtype=torch.float64) for label in (0.0, 1.0)]
    difference, training = means[1] - means[0], fold.training
    # The eigenvalues of G^T G are those of G G^T, and an eigenvector u of the latter gives G^T u.
    products = fold.gradient_products(fitted.gradients)
    eigenvalue, vector = top_eigenpair(products, seed=seed)
    gradient = training.lift(vector[None, :] @ fitted.gradients)[0]
    direction = _displacement(gradient, training.scale, difference)
    wide = torch.promote_types(rows.dtype, torch.float32)
    projections = rows.to(wide) @ direction.to(rows.dtype)
    return RFM(
        direction=direction,
        eigenvalue_share=min(1.0, eigenvalue / float(products.trace())),
        validation_auc=None if math.isnan(record.validation_auc) else record.validation_auc,
        median_projection=ClassMedians(
            *(float(projections[target == label].median()) for label in (0.0, 1.0))
        ),
        chosen=record,
        history=RFMHistory(history),
        config=config,
        seed=seed,
        predictor=KernelPredictor(
            support_rows=training.rows,
            mean=training.mean,
            scale=training.scale,
            coefficients=fitted.alpha,
            intercept=label_offset(config, target),
            kernel=config.kernel,
            length=fitted.length,
            metric=fitted.metric,
            gradients=fitted.gradients,
        ),
        class_difference=difference,
    )


def _displacement(vector: Tensor, scale: Tensor, class_difference: Tensor) -> Tensor:
    """Standardised covector -> unit raw displacement; positive on mean difference = positive
    Pearson correlation."""
    moved = vector.to(torch.float64) * scale.to(torch.float64)
    sign = 1.0 if float(moved @ class_difference) >= 0.0 else -1.0
    unit: Tensor = sign * moved / moved.norm()
    return unit.to(torch.float32)


def _equal_rows(rows: Tensor) -> Tensor:
    """A group for each row, the same for equal ones."""
    number: dict[bytes, int] = {}
    each = rows.cpu().numpy()
    return torch.tensor([number.setdefault(row.tobytes(), len(number)) for row in each])


def _stack_rows(
    activations: Tensor, labels: Tensor, validation: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, int]:
    """Rows to fit and, after them, rows to validate on; 0/1 labels of both; the number to fit."""
    check_matrix("activations", activations)
    n = activations.shape[0]
    rows = activations.detach().to(torch.promote_types(activations.dtype, torch.float32))
    target = check_labels("labels", labels, n).to(rows.device)
    if validation is None:
        return rows, target, n
    held = check_matrix("validation[0]", validation[0], width=rows.shape[1]).detach().to(rows)
    held_target = check_labels("validation[1]", validation[1], held.shape[0]).to(rows.device)
    return torch.cat([rows, held]), torch.cat([target, held_target]), n
