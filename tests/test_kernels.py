"""Kernels, gradients and n x n forms against autograd, scikit-learn and plain linear algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_reference import predictor_gradients
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, DataError, SolveError, WidthError
from expertsteer_lens.linalg.kernels import (
    apply_gradient_operator,
    distances,
    gradient_operator,
    kernel_values,
    solve_kernel_ridge,
)
from expertsteer_lens.linalg.row_space import (
    gram_axes,
    inner_products,
    row_space,
    smaller_gram,
    standardised,
    top_eigenpair,
)

KERNELS = ["laplace", "gaussian"]
few = settings(max_examples=20, deadline=None)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_predictor(
    x: Tensor, centres: Tensor, alpha: Tensor, bandwidth: float, factor: Tensor, kernel: str
) -> Tensor:
    """f(x) written out with differences, for autograd; shares nothing with the code under test."""
    moved = (x[:, None, :] - centres[None, :, :]) @ factor.T
    squared = moved.square().sum(-1)
    values = (
        torch.exp(-squared.sqrt() / bandwidth)
        if kernel == "laplace"
        else torch.exp(-squared / (2 * bandwidth**2))
    )
    return values @ alpha


@given(seed=st.integers(0, 10_000), n=st.integers(1, 12), k=st.integers(1, 6))
@few
def test_distances_equal_those_of_differences(seed: int, n: int, k: int) -> None:
    left, right = draw(n, k, seed=seed), draw(7, k, seed=seed + 1)
    expected = (left[:, None] - right[None]).norm(dim=-1)
    torch.testing.assert_close(distances(left, right), expected, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_are_at_distance_exactly_zero(dtype) -> None:
    rows = draw(40, 30).to(dtype)
    rows[5] = rows[3]
    found = distances(rows, rows)
    assert found.dtype == dtype
    assert float(found.diagonal().abs().max()) == 0.0
    assert float(found[3, 5]) == float(found[5, 3]) == 0.0
    others = found + 10.0 * torch.eye(40, dtype=dtype)
    others[3, 5] = others[5, 3] = 10.0
    assert float(others.min()) > 1.0


@pytest.mark.parametrize("kernel", KERNELS)
@given(seed=st.integers(0, 10_000), bandwidth=st.floats(0.2, 5.0))
@few
def test_kernel_matrices_are_symmetric_positive_semidefinite_with_unit_diagonal(
    kernel, seed, bandwidth
) -> None:
    rows = draw(15, 4, seed=seed)
    values = kernel_values(distances(rows, rows), bandwidth, kernel=kernel)
    torch.testing.assert_close(values, values.T)
    torch.testing.assert_close(
        values.diagonal(), torch.ones(15, dtype=torch.float64), rtol=0, atol=0
    )
    assert float(torch.linalg.eigvalsh(values)[0]) > -1e-10


def test_kernel_values_are_the_stated_formulas() -> None:
    distance = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    one, two = torch.tensor(-0.5).double().exp(), torch.tensor(-0.125).double().exp()
    torch.testing.assert_close(kernel_values(distance, 4.0)[0, 1], one)
    torch.testing.assert_close(kernel_values(distance, 4.0, kernel="gaussian")[0, 1], two)
    assert distance.tolist() == [[0.0, 2.0]]


def test_kernels_refuse_unknown_names_and_bandwidths() -> None:
    distance = torch.zeros(1, 1)
    with pytest.raises(
        ArgumentError, match=r"kernel must be one of .*, got 'laplac'; closest: 'laplace'"
    ):
        kernel_values(distance, 1.0, kernel="laplac")
    with pytest.raises(ArgumentError, match=r"bandwidth must be a number in \(0.0, inf\], got 0"):
        kernel_values(distance, 0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("wide", [True, False])
def test_gradients_at_new_points_equal_autograd(kernel, wide) -> None:
    at, centres, alpha = draw(5, 6, seed=1).requires_grad_(), draw(9, 6, seed=2), draw(9, seed=3)
    factor = draw(8 if wide else 3, 6, seed=4)
    (expected,) = torch.autograd.grad(
        plain_predictor(at, centres, alpha, 1.7, factor, kernel).sum(), at
    )
    found = predictor_gradients(at.detach(), centres, alpha, 1.7, factor=factor, kernel=kernel)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_at_the_centres_leave_out_the_point_itself(kernel) -> None:
    centres, alpha, factor = draw(9, 6, seed=2), draw(9, seed=3), draw(6, 6, seed=4)
    found = predictor_gradients(centres, centres, alpha, 1.7, factor=factor, kernel=kernel)
    for j in range(9):
        rest = torch.arange(9) != j
        at = centres[j : j + 1].clone().requires_grad_()
        value = plain_predictor(at, centres[rest], alpha[rest], 1.7, factor, kernel)
        (expected,) = torch.autograd.grad(value.sum(), at)
        torch.testing.assert_close(found[j : j + 1], expected)


def test_duplicate_rows_give_finite_gradients_equal_to_those_without_the_pair() -> None:
    centres, alpha = draw(6, 3, seed=5), draw(6, seed=6)
    centres[1] = centres[0]
    found = predictor_gradients(centres, centres, alpha, 1.0)
    assert bool(torch.isfinite(found).all())
    expected = predictor_gradients(centres[:1], centres[2:], alpha[2:], 1.0)
    torch.testing.assert_close(found[:2], expected.expand(2, 3))


def test_gradients_of_one_centre_are_the_closed_form() -> None:
    # f(x) = 2 exp(-|x|/3) in one dimension: slope -(2/3) exp(-|x|/3) sign(x).
    at = torch.tensor([[-1.5], [3.0]], dtype=torch.float64)
    found = predictor_gradients(at, torch.zeros(1, 1).double(), torch.tensor([2.0]).double(), 3.0)
    slope = -(2.0 / 3.0) * torch.exp(-at.abs() / 3.0) * at.sign()
    torch.testing.assert_close(found, slope)


@given(chunk=st.integers(1, 7))
@few
def test_gradients_and_predictions_may_be_taken_in_chunks_of_query_rows(chunk: int) -> None:
    at, centres, alpha = draw(7, 4), draw(5, 4, seed=1), draw(5, seed=2)
    whole = predictor_gradients(at, centres, alpha, 0.8)
    parts = [
        predictor_gradients(at[i : i + chunk], centres, alpha, 0.8) for i in range(0, 7, chunk)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_gradient_operator_form_equals_the_sum_over_differences() -> None:
    at, centres, alpha = draw(4, 3), draw(6, 3, seed=1), draw(6, seed=2)
    distance = distances(at, centres)
    weights = gradient_operator(distance, kernel_values(distance, 2.0), alpha, 2.0)
    expected = (weights[:, :, None] * (at[:, None] - centres[None])).sum(1)
    torch.testing.assert_close(apply_gradient_operator(weights, at, centres), expected)


def test_gradients_keep_float32_and_inputs() -> None:
    at, alpha = draw(4, 3).float(), draw(4).float()
    before = at.clone()
    assert predictor_gradients(at, at, alpha, 1.0).dtype == torch.float32
    assert torch.equal(at, before)


def test_gradients_refuse_bad_rows() -> None:
    with pytest.raises(DataError, match=r"at holds NaN or Inf in 1 of 2 rows \(first: row 1\)"):
        predictor_gradients(
            torch.tensor([[0.0], [float("nan")]]), torch.zeros(1, 1), torch.ones(1), 1.0
        )
    with pytest.raises(WidthError, match="centres must have width 2, got 3"):
        predictor_gradients(torch.zeros(1, 2), torch.zeros(1, 3), torch.ones(1), 1.0)


def test_dual_coefficients_equal_scikit_learn_kernel_ridge() -> None:
    from sklearn.kernel_ridge import KernelRidge

    rows, targets = draw(30, 5), draw(30, seed=9)
    matrix = kernel_values(distances(rows, rows), 2.0)
    expected = (
        KernelRidge(alpha=1e-3, kernel="precomputed")
        .fit(matrix.numpy(), targets.numpy())
        .dual_coef_
    )
    kept = matrix.clone()
    torch.testing.assert_close(
        solve_kernel_ridge(matrix, targets, 1e-3), torch.from_numpy(expected), rtol=1e-9, atol=1e-9
    )
    assert torch.equal(matrix, kept)


def test_singular_systems_raise_and_the_ridge_is_not_touched() -> None:
    matrix = torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(
        SolveError,
        match=r"not positive definite at ridge=0; raise ridge.*Nothing was changed for you",
    ):
        solve_kernel_ridge(matrix, torch.ones(3).double(), 0.0)
    # A pivot that is positive only by rounding is refused too.
    nearly = matrix + torch.diag(torch.tensor([0.0, 1e-16, 3e-16], dtype=torch.float64))
    with pytest.raises(SolveError, match="not positive definite"):
        solve_kernel_ridge(nearly, torch.ones(3).double(), 1e-16)
    torch.testing.assert_close(
        solve_kernel_ridge(matrix, torch.ones(3).double(), 1.0), torch.full((3,), 0.25).double()
    )


# -- row space and other n x n forms


@given(seed=st.integers(0, 10_000), n=st.integers(1, 12), d=st.integers(1, 12))
@few
def test_row_space_reproduces_rows_and_their_inner_products(seed: int, n: int, d: int) -> None:
    rows = draw(n, d, seed=seed)
    space = row_space(rows)
    torch.testing.assert_close(space.lift(space.coordinates), rows, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        space.coordinates @ space.coordinates.T, rows @ rows.T, atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(rows @ space.basis, space.coordinates)
    torch.testing.assert_close(
        space.basis.T @ space.basis, torch.eye(space.rank).double(), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(
        space.coordinates.norm(dim=0), space.singular_values, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(("n", "d"), [(20, 50), (50, 20)])
def test_row_space_finds_the_rank_and_the_principal_axes(n, d) -> None:
    rows = draw(n, 4) @ draw(4, d, seed=1)
    space = row_space(rows.float())
    assert space.rank == 4
    assert repr(space) == f"RowSpace(n={n}, d={d}, rank=4, tolerance=1e-06)"
    _, singular, basis = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(space.singular_values, singular[:4], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        (basis[:4] @ space.basis).abs(), torch.eye(4).double(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(("n", "d"), [(4, 9), (9, 4), (5, 5)])
def test_gram_axes_are_the_singular_vectors_of_the_shorter_side(n, d) -> None:
    rows = draw(n, d)
    left, singular, right = torch.linalg.svd(rows, full_matrices=False)
    axes = gram_axes(rows.float())
    assert axes.of_rows == (n < d)
    assert axes.values.dtype == axes.vectors.dtype == torch.float64
    torch.testing.assert_close(axes.values, singular.square(), atol=1e-4, rtol=1e-5)
    same = (axes.vectors.T @ (left if n < d else right.T)).abs()
    torch.testing.assert_close(same, torch.eye(min(n, d)).double(), atol=1e-4, rtol=0)
    gram = smaller_gram(rows)
    assert gram.shape == (min(n, d), min(n, d))
    assert float(gram.trace()) == pytest.approx(float((rows @ rows.T).trace()))


def test_row_space_tolerance_drops_small_axes() -> None:
    rows = torch.diag(torch.tensor([1.0, 1e-2, 1e-4])).double()
    assert [row_space(rows, tolerance=t).rank for t in (1e-5, 1e-3, 0.1)] == [3, 2, 1]
    with pytest.raises(ArgumentError, match="tolerance must be a number in"):
        row_space(rows, tolerance=1.0)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_row_space_of_zero_rows_has_one_axis_of_size_zero(shape) -> None:
    space = row_space(torch.zeros(shape))
    assert space.coordinates.shape == (shape[0], 1)
    assert float(space.singular_values[0]) == 0.0
    assert float(space.basis.norm()) == pytest.approx(1.0)


def test_row_space_results_do_not_alias_the_rows_and_refuse_other_widths() -> None:
    rows = draw(3, 4)
    space = row_space(rows)
    kept = space.coordinates.clone()
    rows.zero_()
    assert torch.equal(space.coordinates, kept)
    with pytest.raises(WidthError, match="coordinates must have width 3, got 4"):
        space.lift(torch.zeros(1, 4))
    with pytest.raises(DataError, match="rows holds NaN or Inf"):
        row_space(torch.full((2, 2), float("nan")))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_inner_products_in_chunks_equal_those_of_standardised_rows(chunk) -> None:
    rows, others = draw(4, 10).float(), draw(3, 10, seed=1).float()
    shift, scale = draw(10, seed=2), draw(10, seed=3).abs() + 0.5
    kept = rows.clone()
    expected = ((rows.double() - shift) / scale) @ ((others.double() - shift) / scale).T
    torch.testing.assert_close(
        inner_products(rows, others, shift=shift, scale=scale, chunk=chunk), expected
    )
    torch.testing.assert_close(standardised(rows, shift, scale), (rows.double() - shift) / scale)
    assert torch.equal(rows, kept)


@pytest.mark.parametrize("n", [5, 450])
def test_top_eigenpair_equals_the_full_decomposition(n) -> None:
    factor = draw(n, n) * torch.linspace(0.1, 2.0, n).double()
    matrix = factor.T @ factor
    values, vectors = torch.linalg.eigh(matrix)
    value, vector = top_eigenpair(matrix)
    assert value == pytest.approx(float(values[-1]), rel=1e-9)
    assert abs(float(vector @ vectors[:, -1])) == pytest.approx(1.0, abs=1e-9)
    assert float((matrix @ vector - value * vector).norm()) <= 1e-8 * value


def test_top_eigenpair_of_low_rank_matrices_stops_early_and_is_seeded() -> None:
    left = draw(600, 2)
    matrix = left @ torch.diag(torch.tensor([4.0, 1.0]).double()) @ left.T
    value, vector = top_eigenpair(matrix, seed=3)
    assert value == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-10)
    assert torch.equal(vector, top_eigenpair(matrix, seed=3)[1])


def test_top_eigenpair_falls_back_to_the_full_decomposition_on_a_cluster() -> None:
    # Eigenvalues 1 and 1 - 1e-9 on top of a dense spectrum: a few steps cannot separate them.
    values = torch.tensor(
        [*torch.linspace(0.0, 0.999, 118).tolist(), 1.0 - 1e-9, 1.0], dtype=torch.float64
    )
    basis, _ = torch.linalg.qr(draw(120, 120))
    matrix = (basis * values) @ basis.T
    value, vector = top_eigenpair((matrix + matrix.T) / 2, max_steps=20)
    assert value == pytest.approx(1.0, abs=1e-12)
    assert abs(float(vector @ basis[:, -1])) == pytest.approx(1.0, abs=1e-6)
