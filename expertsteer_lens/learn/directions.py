"""Directions simpler than the RFM's: baselines and controls.

Each returns a unit float32 vector `[d]` in the coordinates of the activations, pointing towards
label 1 (or towards the expert, or nowhere for the random control). Sums are float64. None of them
says whether adding the vector changes behaviour."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from expertsteer_lens._checks import check_labels, check_matrix, check_number
from expertsteer_lens.errors import DataError
from expertsteer_lens.linalg.row_space import row_space


def mean_difference(
    activations: Float[Tensor, "n d"], labels: Shaped[Tensor, " n"]
) -> Float[Tensor, " d"]:
    """Mean of rows with label 1 minus mean of rows with label 0, to unit length (CAA, arXiv
    2312.06681).

    Raises:
        DataError: not finite, unequal lengths, one class only, or equal means.

    >>> rows = torch.tensor([[1.0, 5.0], [1.0, 7.0], [4.0, 9.0], [4.0, 11.0]])
    >>> mean_difference(rows, torch.tensor([0, 0, 1, 1])).round(decimals=2)
    tensor([0.6000, 0.8000])
    """
    rows, target = _check_rows(activations, labels)
    return _unit(
        _class_difference(rows, target),
        "the two class means are equal",
        size=float(rows.abs().max()),
    )


def pca_direction(
    activations: Float[Tensor, "n d"], labels: Shaped[Tensor, " n"], *, paired: bool = False
) -> Float[Tensor, " d"]:
    """First principal axis of the centred rows, or of the differences of pairs; sign by the class
    means.

    Args:
        activations: one row per prompt.
        labels: 1 = positive; only the sign (and the pairing) uses them.
        paired: take differences, the i-th row of label 1 minus the i-th row of label 0, as they are
            (RepE, arXiv 2310.01405, flips their signs at random, which has the same second moment).
            Not centred: the mean of the differences is what all pairs share.

    Raises:
        DataError: not finite, unequal lengths, one class only, classes of unequal size with
            `paired`, or no variation.

    >>> rows = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    >>> pca_direction(rows, torch.tensor([0, 1, 0, 1])).abs()
    tensor([1., 0.])
    """
    rows, target = _check_rows(activations, labels)
    difference = _class_difference(rows, target)
    if paired:
        positive, negative = rows[target == 1], rows[target == 0]
        if positive.shape[0] != negative.shape[0]:
            raise DataError(
                "labels must hold as many positives as negatives when paired=True, got "
                f"{positive.shape[0]} and "
                f"{negative.shape[0]}; row i of either class must be the same pair."
            )
        rows = positive - negative
    if not paired:
        _refuse_equal(rows)
        rows = rows - rows.mean(0)
    space = row_space(rows)
    axis = space.basis[:, 0] * space.singular_values[0]
    return _unit(
        axis if float(axis @ difference) >= 0.0 else -axis, "the members of every pair are equal"
    )


def logistic_probe(
    activations: Float[Tensor, "n d"], labels: Shaped[Tensor, " n"], *, regularisation: float = 1.0
) -> Float[Tensor, " d"]:
    """Weight vector of an L2-regularised logistic regression on rows centred and divided by one
    scalar.

    Args:
        activations: one row per prompt.
        labels: 1 = positive.
        regularisation: strength of the penalty `regularisation / 2 * ||w||^2` on the summed log
            loss, > 0; the scalar (root of the mean coordinate variance) makes it independent of the
            norm of the activations.

    Fitted in the row space, which gives the same solution (the penalty keeps w in the span of the
    rows) at O(n^2 d) when n < d. The weight is a gradient, as in `fit_rfm`; with one scalar it is
    also the displacement.

    Raises:
        DataError: not finite, unequal lengths, one class only, or rows that are all equal.
        ArgumentError: `regularisation` not positive.

    >>> rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> logistic_probe(rows, torch.tensor([0, 1, 0, 1])).round(decimals=3).abs()
    tensor([1., 0.])
    """
    from sklearn.linear_model import LogisticRegression

    check_number("regularisation", regularisation, low=0.0, low_open=True)
    rows, target = _check_rows(activations, labels)
    _refuse_equal(rows)
    centred = rows - rows.mean(0)
    space = row_space(centred / centred.square().mean().sqrt())
    probe = LogisticRegression(C=1.0 / regularisation, tol=1e-8, max_iter=10_000)
    probe.fit(space.coordinates.cpu().numpy(), target.cpu().numpy())
    weights = torch.from_numpy(probe.coef_).to(space.basis)
    return _unit(space.lift(weights)[0], "the probe's weights are zero")


def expert_minus_base(
    expert: Float[Tensor, "n d"], base: Float[Tensor, "m d"]
) -> Float[Tensor, " d"]:
    """Mean row of the expert minus mean row of its base model, read on the same texts (UNLOCK,
    arXiv 2604.06377).

    Needs no labels; the two must share a residual basis (a fine-tuned model and what it was tuned
    from).

    Raises:
        DataError: not finite, or equal means.
        WidthError: unequal widths.

    >>> expert_minus_base(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
    tensor([0.6000, 0.8000])
    """
    check_matrix("expert", expert)
    check_matrix("base", base, width=expert.shape[1])
    difference = expert.detach().mean(0, dtype=torch.float64) - base.detach().to(
        expert.device
    ).mean(0, dtype=torch.float64)
    return _unit(difference, "expert and base have the same mean", size=float(expert.abs().max()))


def random_direction(d: int, seed: int) -> Float[Tensor, " d"]:
    """A uniformly random unit vector: the floor every other direction must beat.

    Raises:
        ArgumentError: `d` or `seed` is not a (positive, non-negative) integer.

    >>> torch.equal(random_direction(3, seed=0), random_direction(3, seed=0))
    True
    """
    check_number("d", d, low=1, integer=True)
    check_number("seed", seed, low=0, integer=True)
    draw = torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return _unit(draw, "the draw is zero")


def _check_rows(activations: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    check_matrix("activations", activations)
    target = check_labels("labels", labels, activations.shape[0]).to(activations.device)
    return activations.detach().to(torch.float64), target


def _class_difference(rows: Tensor, target: Tensor) -> Tensor:
    return rows[target == 1].mean(0) - rows[target == 0].mean(0)


def _refuse_equal(rows: Tensor) -> None:
    if bool((rows == rows[0]).all()):
        raise DataError("activations must differ between rows, but all rows are equal.")


def _unit(vector: Tensor, why_zero: str, *, size: float = 0.0) -> Tensor:
    """To unit length in float32; refuses what is only the rounding of sums of numbers of the given
    size."""
    norm = float(vector.norm())
    if norm <= 1e-14 * size:
        raise DataError(f"no direction: {why_zero}.")
    return (vector / norm).to(torch.float32)
