"""Baseline directions: what each returns, where it points, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, DataError, WidthError
from expertsteer_lens.learn.directions import (
    expert_minus_base,
    logistic_probe,
    mean_difference,
    pca_direction,
    random_direction,
)

LABELLED = [mean_difference, pca_direction, logistic_probe]


def planted(
    n: int = 60, d: int = 12, *, gap: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with noise of unit variance, classes `2 * gap` apart along one unit axis, and a large
    common offset."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.randn(d, generator=generator)
    axis = axis / axis.norm()
    labels = torch.arange(n) % 2
    rows = (
        torch.randn(n, d, generator=generator) + gap * (2.0 * labels[:, None] - 1.0) * axis + 50.0
    )
    return rows, labels, axis


@pytest.mark.parametrize("function", LABELLED)
@pytest.mark.parametrize("shape", [(60, 12), (40, 200)])
def test_planted_axis_is_found_with_its_sign(function, shape) -> None:
    rows, labels, axis = planted(*shape)
    found = function(rows, labels)
    assert found.dtype == torch.float32
    assert found.shape == (shape[1],)
    assert float(found.norm()) == pytest.approx(1.0, abs=1e-6)
    assert float(found @ axis) > 0.8
    # Swapping the labels turns every one of them round.
    torch.testing.assert_close(function(rows, 1 - labels), -found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("function", LABELLED)
def test_labels_may_be_bool_or_signs_and_rows_any_float(function) -> None:
    rows, labels, _ = planted()
    found = function(rows, labels)
    torch.testing.assert_close(function(rows, labels.bool()), found)
    torch.testing.assert_close(function(rows, 2.0 * labels - 1.0), found)
    torch.testing.assert_close(function(rows.double(), labels), found, atol=1e-4, rtol=0)
    assert function(rows.bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize("function", LABELLED)
def test_scaling_shifting_and_row_order_do_not_matter(function) -> None:
    rows, labels, _ = planted()
    found = function(rows, labels)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(function(rows[order], labels[order]), found, atol=1e-4, rtol=0)
    torch.testing.assert_close(function(7.0 * rows + 3.0, labels), found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("function", LABELLED)
def test_inputs_are_neither_changed_nor_aliased(function) -> None:
    rows, labels, _ = planted()
    before = rows.clone(), labels.clone()
    found = function(rows, labels)
    kept = found.clone()
    torch.testing.assert_close(rows, before[0], rtol=0, atol=0)
    torch.testing.assert_close(labels, before[1], rtol=0, atol=0)
    rows.zero_()
    torch.testing.assert_close(found, kept, rtol=0, atol=0)


@pytest.mark.parametrize("function", LABELLED)
def test_unusable_data_is_refused_by_name(function) -> None:
    rows, labels, _ = planted()
    bad = rows.clone()
    bad[7, 2] = float("nan")
    with pytest.raises(
        DataError, match=r"activations holds NaN or Inf in 1 of 60 rows \(first: row 7\)"
    ):
        function(bad, labels)
    with pytest.raises(DataError, match="labels must hold two classes"):
        function(rows, torch.ones(60))
    with pytest.raises(
        DataError, match=r"labels must have one label per row: expected shape \(60,\)"
    ):
        function(rows, labels[:-1])
    with pytest.raises(DataError, match="labels must be 0/1"):
        function(rows, torch.arange(60))
    with pytest.raises(DataError, match=r"no direction|must differ between rows"):
        function(torch.full((60, 12), 0.1), labels)


def test_mean_difference_is_the_difference_of_class_means() -> None:
    rows = torch.tensor([[1.0, 5.0], [3.0, 5.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    labels = torch.tensor([1, 1, 0, 0, 0])
    torch.testing.assert_close(mean_difference(rows, labels), torch.tensor([2.0, 3.0]) / 13.0**0.5)


def test_mean_difference_survives_an_offset_that_float32_sums_do_not() -> None:
    rows, labels, _ = planted(gap=1.0)
    rows = rows.double()
    shifted = (rows + 2.0**20).to(torch.float32)
    torch.testing.assert_close(
        mean_difference(shifted, labels),
        mean_difference(shifted.double() - 2.0**20, labels),
        atol=1e-6,
        rtol=0,
    )


def test_pca_direction_equals_scikit_learn_up_to_sign() -> None:
    from sklearn.decomposition import PCA

    rows, labels, _ = planted(30, 80)
    axis = torch.from_numpy(
        PCA(n_components=1, svd_solver="full").fit(rows.double().numpy()).components_[0]
    )
    assert abs(float(axis @ pca_direction(rows, labels).double())) == pytest.approx(
        1.0, abs=1e-6
    )  # float32 result


def test_paired_pca_sees_past_variation_that_pairs_share() -> None:
    # A topic common to both members of a pair varies most; the contrast is small but constant.
    generator = torch.Generator().manual_seed(3)
    topic, contrast = torch.eye(10)[0], torch.eye(10)[1]
    shared = 20.0 * torch.randn(40, 1, generator=generator) * topic + 0.1 * torch.randn(
        40, 10, generator=generator
    )
    rows = torch.cat([shared + contrast, shared - contrast])
    rows = rows + 0.1 * torch.randn(80, 10, generator=generator)
    labels = torch.cat([torch.ones(40), torch.zeros(40)])
    assert float(pca_direction(rows, labels, paired=True) @ contrast) > 0.99
    assert abs(float(pca_direction(rows, labels) @ contrast)) < 0.1


def test_paired_pca_refuses_classes_of_unequal_size() -> None:
    rows, labels, _ = planted()
    with pytest.raises(
        DataError, match="as many positives as negatives when paired=True, got 29 and 30"
    ):
        pca_direction(rows[:-1], labels[:-1], paired=True)


def test_paired_pca_refuses_pairs_without_difference() -> None:
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="no direction: the members of every pair are equal"):
        pca_direction(torch.cat([rows, rows]), torch.tensor([1] * 4 + [0] * 4), paired=True)


def test_logistic_probe_in_the_row_space_is_the_probe_in_full_width() -> None:
    from sklearn.linear_model import LogisticRegression

    rows, labels, _ = planted(30, 100, gap=0.5)
    centred = rows.double() - rows.double().mean(0)
    scaled = centred / centred.square().mean().sqrt()
    full = LogisticRegression(C=1.0 / 0.3, tol=1e-10, max_iter=10_000).fit(
        scaled.numpy(), labels.numpy()
    )
    weights = torch.from_numpy(full.coef_[0])
    found = logistic_probe(rows, labels, regularisation=0.3).double()
    assert float(found @ weights / weights.norm()) == pytest.approx(1.0, abs=1e-6)


def test_regularisation_of_the_probe_acts_and_is_checked() -> None:
    rows, labels, _ = planted(gap=0.5)
    weak, strong = (logistic_probe(rows, labels, regularisation=r) for r in (1e-3, 1e4))
    assert float(weak @ strong) < 0.99
    # In the limit of a strong penalty the weight is the gradient at zero: the mean difference.
    assert float(strong @ mean_difference(rows, labels)) > 0.9999
    with pytest.raises(
        ArgumentError, match=r"regularisation must be a number in \(0.0, inf\], got 0"
    ):
        logistic_probe(rows, labels, regularisation=0)


def test_expert_minus_base_is_the_difference_of_means_and_needs_no_labels() -> None:
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(20, 6, generator=generator)
    shift = torch.tensor([0.0, 0.0, 3.0, 0.0, -4.0, 0.0])
    torch.testing.assert_close(
        expert_minus_base(base + shift, base), shift / 5.0, atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        expert_minus_base(base, base + shift), -shift / 5.0, atol=1e-6, rtol=0
    )


def test_expert_minus_base_refuses_other_widths_and_equal_means() -> None:
    with pytest.raises(WidthError, match="base must have width 3, got 4"):
        expert_minus_base(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(DataError, match="no direction: expert and base have the same mean"):
        expert_minus_base(torch.full((2, 3), 0.1), torch.full((5, 3), 0.1))
    with pytest.raises(DataError, match="expert holds NaN or Inf"):
        expert_minus_base(torch.full((2, 3), float("inf")), torch.ones(5, 3))


def test_random_direction_is_unit_seeded_and_isotropic() -> None:
    first = random_direction(50, seed=1)
    assert float(first.norm()) == pytest.approx(1.0, abs=1e-6)
    state = torch.random.get_rng_state()
    assert torch.equal(first, random_direction(50, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert abs(float(first @ random_direction(50, seed=2))) < 0.5
    many = torch.stack([random_direction(3, seed=s) for s in range(2000)])
    torch.testing.assert_close(many.T @ many / 2000, torch.eye(3) / 3, atol=0.03, rtol=0)


def test_random_direction_refuses_what_is_not_a_width_or_a_seed() -> None:
    with pytest.raises(ArgumentError, match="d must be an integer"):
        random_direction(0, seed=0)
    with pytest.raises(ArgumentError, match="seed must be an integer"):
        random_direction(3, seed=-1)
