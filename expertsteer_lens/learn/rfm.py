"""Recursive Feature Machine: the direction along which a kernel classifier changes most.

Each round fits kernel ridge regression in a metric M, takes the gradients G of the predictor at its
own training points, and makes the average gradient outer product (AGOP) `G^T G / n`, normalised,
the next metric. The direction is the top eigenvector of the last AGOP. Source: Radhakrishnan et
al., Science 2024; for steering: arXiv 2502.03708.

Ours: no d x d matrix when n < d. Gradients are combinations of differences of rows, so with the
inner products of the rows computed once (O(n^2 d)) a round is three n x n products and a Cholesky
factorisation, and only the final vector returns to width d. Exact; see `_recursion.py`. Everything
is float64: the kernel system's condition number reaches n / ridge, about 1e6, and float32 kernels
were found not to be positive definite at ridge 1e-3."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from expertsteer_lens._checks import check_labels, check_matrix, check_number
from expertsteer_lens.errors import ArgumentError, DataError, SolveError
from expertsteer_lens.linalg.row_space import row_space, top_eigenpair

from .config import RFMConfig, RFMHistory, RFMRound
from .recursion import Fold, Round, RowGeometry, Setting, run_rounds

__all__ = ["RFM", "ClassMedians", "RFMConfig", "RFMHistory", "RFMRound", "fit_rfm"]


_DEFAULT = RFMConfig()


class ClassMedians(NamedTuple):
    """Medians of the projections of training rows, by class."""

    negative: float
    positive: float


@dataclass(frozen=True, eq=False)
class RFM:
    """A fitted Recursive Feature Machine. What it does not prove: that adding the direction changes
    behaviour."""

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
    _fold: Fold = field(repr=False)
    _round: Round = field(repr=False)
    _offset: float = field(repr=False)
    _contrast: Tensor = field(repr=False)

    def project(self, activations: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        """Inner products of raw rows with `direction`, in float32 or the rows' wider dtype; larger
        means more positive.

        Raises:
            DataError, WidthError: not a finite floating matrix of width d.
        """
        check_matrix("activations", activations, width=self.direction.shape[0])
        dtype = torch.promote_types(activations.dtype, torch.float32)
        return activations.to(dtype) @ self.direction.to(activations.device, dtype)

    @torch.no_grad()
    def predict(self, activations: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        """The kernel predictor at new rows, on the scale of 0/1 labels (not a probability, not
        clipped).

        Raises:
            DataError, WidthError: not a finite floating matrix of width d.
        """
        check_matrix("activations", activations, width=self.direction.shape[0])
        return self._fold.predict(activations, self._round, self.config.kernel) + self._offset

    @torch.no_grad()
    def top_directions(self, k: int) -> Float[Tensor, "k d"]:
        """The k leading AGOP eigenvectors as unit displacements, each signed as `direction`, which
        is the first.

        Orthogonal except with `standardise="coordinate"`, where the map back to raw coordinates is
        not a rotation.

        Raises:
            ArgumentError: k outside 1 .. rank of the AGOP.
        """
        vectors = row_space(self._fold.lift(self._round.gradients)).basis.T
        check_number("k", k, low=1, high=vectors.shape[0], integer=True)
        return torch.stack(
            [_displacement(v, self._fold.scale, self._contrast) for v in vectors[:k]]
        )

    def __repr__(self) -> str:
        auc = "none" if self.validation_auc is None else f"{self.validation_auc:.3f}"
        return (
            f"RFM(n={self._fold.n}, d={self.direction.shape[0]}, "
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

    Cost: O(n^2 d) once, O(n^3) a round and setting; memory O(n d + n^2). With d <= n: O(n^3 + n^2
    d) a round.

    Raises:
        DataError: not finite, unequal lengths, one class, too few rows for the split, all rows
            equal.
        ArgumentError: a search asked for without validation rows; a seed outside [0, 2^32).
        WidthError: validation rows of another width.
        SolveError: the kernel system is singular at this ridge, or the gradients vanish at this
            bandwidth. In a search such settings are recorded in `history`, and it raises only if
            none is left.
    """
    check_number("seed", seed, low=0, high=2**32 - 1, integer=True)
    rows, target, n = _stack(activations, labels, validation)
    geometry = RowGeometry.of(rows, n_fitted=n, standardise=config.standardise)
    everything = torch.arange(n, device=rows.device)
    fold, records = geometry.fold(everything), list[RFMRound]()
    best: tuple[Round, RFMRound] | None = None
    if validation is not None:
        held = torch.arange(n, rows.shape[0], device=rows.device)
        best = _search(geometry.fold(everything, held), target, config, records)
    elif config.validation_fraction > 0.0:
        train, held = _split(target, config.validation_fraction, seed)
        best = _search(
            geometry.fold(train, held), target[torch.cat([train, held])], config, records
        )
    elif config.is_search:
        raise ArgumentError(
            f"bandwidth={config.bandwidth!r} and center_gradients={config.center_gradients!r} ask "
            "for a search, which "
            "needs validation rows; pass validation=(rows, labels), set validation_fraction > 0, "
            "or give one value."
        )
    chosen = best
    if chosen is None or validation is None:
        bandwidth, center, n_rounds = config.bandwidths[0], config.centerings[0], config.n_rounds
        if best is not None:
            bandwidth, center, n_rounds = best[1].bandwidth, best[1].center_gradients, best[1].round
        for chosen in _run(fold, target[:n], config, bandwidth, center, n_rounds):
            records.append(chosen[1])
    assert chosen is not None  # n_rounds >= 1
    return _result(
        fold, rows[:n], target[:n], chosen[0], (best or chosen)[1], records, config, seed
    )


def _result(
    fold: Fold,
    rows: Tensor,
    target: Tensor,
    fitted: Round,
    record: RFMRound,
    records: list[RFMRound],
    config: RFMConfig,
    seed: int,
) -> RFM:
    """The top eigenvector of the AGOP of one round, as a displacement, with what is needed to
    predict."""
    contrast = rows[target == 1].mean(0, dtype=torch.float64) - rows[target == 0].mean(
        0, dtype=torch.float64
    )
    products = fold.gradient_products(fitted.gradients)
    value, vector = top_eigenpair(products, seed=seed)
    direction = _displacement(
        fold.lift(vector[None, :] @ fitted.gradients)[0], fold.scale, contrast
    )
    projections = rows.to(torch.promote_types(rows.dtype, torch.float32)) @ direction.to(rows.dtype)
    return RFM(
        direction=direction,
        eigenvalue_share=min(1.0, value / float(products.trace())),
        validation_auc=None if math.isnan(record.validation_auc) else record.validation_auc,
        median_projection=ClassMedians(
            *(float(projections[target == c].median()) for c in (0.0, 1.0))
        ),
        chosen=record,
        history=RFMHistory(records),
        config=config,
        seed=seed,
        _fold=fold,
        _round=fitted,
        _offset=_offset(config, target),
        _contrast=contrast,
    )


def _displacement(vector: Tensor, scale: Tensor, contrast: Tensor) -> Tensor:
    """Standardised covector -> unit raw displacement; positive on mean difference = positive
    Pearson correlation."""
    moved = vector.to(torch.float64) * scale.to(torch.float64)
    sign = 1.0 if float(moved @ contrast) >= 0.0 else -1.0
    return (sign * moved / moved.norm()).to(torch.float32)


def _offset(config: RFMConfig, target: Tensor) -> float:
    """What is subtracted from 0/1 labels before the regression and added to predictions."""
    return float(target.mean()) if config.targets == "centred" else 0.0


def _stack(
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


def _split(target: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row indices to train and to validate on, stratified by label."""
    from sklearn.model_selection import train_test_split

    counts = [int((target == c).sum()) for c in (0.0, 1.0)]
    n_held = math.ceil(fraction * len(target))
    parts: list[list[int]] = []
    if n_held >= 2 and min(counts) >= 2:
        parts = train_test_split(
            list(range(len(target))),
            test_size=n_held,
            stratify=target.cpu().numpy(),
            random_state=seed,
        )
    if not parts or any(len(target[part].unique()) < 2 for part in parts):
        raise DataError(
            f"activations are too few for validation_fraction={fraction:g}: {counts[0]} negative "
            f"and {counts[1]} "
            "positive rows do not give both parts both classes; pass validation=(rows, labels), "
            "raise the fraction, or "
            "set it to 0 and give single values."
        )
    train, held = (torch.tensor(sorted(part), device=target.device) for part in parts)
    return train, held


def _search(
    fold: Fold, target: Tensor, config: RFMConfig, records: list[RFMRound]
) -> tuple[Round, RFMRound]:
    """The best round of the best setting on the fold's held-out rows; every round goes to
    `records`."""
    best: tuple[Round, RFMRound] | None = None
    failure: SolveError | None = None
    for bandwidth, center in itertools.product(config.bandwidths, config.centerings):
        reached = 0
        try:
            for fitted, record in _run(fold, target, config, bandwidth, center, config.n_rounds):
                records.append(record)
                reached = record.round
                if best is None or _score(record) > _score(best[1]):
                    best = fitted, record
        except SolveError as error:
            failure, nan = error, math.nan
            records.append(
                RFMRound("search", bandwidth, center, reached + 1, nan, nan, nan, nan, str(error))
            )
    if best is None:
        assert failure is not None  # there is at least one setting
        raise failure
    return best


def _score(record: RFMRound) -> tuple[float, float]:
    return record.validation_auc, -record.validation_error


def _run(
    fold: Fold, target: Tensor, config: RFMConfig, bandwidth: float, center: bool, n_rounds: int
) -> Iterator[tuple[Round, RFMRound]]:
    """Rounds of one setting with their lines of the history; `target` has training rows first,
    held-out rows after."""
    n, offset = fold.n, _offset(config, target[: fold.n])
    setting = Setting(
        kernel=config.kernel,
        bandwidth=bandwidth,
        relative=config.bandwidth_unit == "median_distance",
        ridge=config.ridge,
        n_rounds=n_rounds,
        center=center,
        normalise=config.normalise,
    )
    for fitted in run_rounds(fold, (target[:n] - offset).to(fold.cross.dtype), setting):
        # (K + ridge I) alpha = y, so the residual y - K alpha is ridge * alpha.
        train_error = float((config.ridge * fitted.alpha).square().mean())
        error = auc = math.nan
        if len(target) > n:
            error = float((fitted.predictions + offset - target[n:]).square().mean())
            auc = _auc(target[n:], fitted.predictions)
        stage = "fit" if len(target) == n else "search"
        yield (
            fitted,
            RFMRound(
                stage,
                bandwidth,
                center,
                fitted.number,
                fitted.length,
                train_error,
                error,
                auc,
                "ok",
            ),
        )


def _auc(labels: Tensor, scores: Tensor) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels.cpu().numpy(), scores.cpu().numpy()))
