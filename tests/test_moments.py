"""Laws of the streaming moments and of the clipping helper."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertsteer_lens._checks import check_paired
from expertsteer_lens.errors import ArgumentError, DataError, WidthError
from expertsteer_lens.linalg.clipping import ClippedRows, clip_massive
from expertsteer_lens.linalg.moments import Moments, RunningMoments, merge_all

FIELDS = ("mean_expert", "mean_target", "C_EE", "C_TE", "C_TT")


def rows(n: int, d: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    return (
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        + offset
    )


def one_shot(expert: torch.Tensor, target: torch.Tensor) -> Moments:
    return RunningMoments(expert.shape[1], target.shape[1]).update(expert, target).result()


def assert_same(a: Moments, b: Moments, tolerance: float = 1e-12) -> None:
    assert a.n == b.n
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance
        )


def test_moments_equal_the_textbook_formulas() -> None:
    e, t = rows(40, 5, 0), rows(40, 3, 1)
    got = one_shot(e, t)
    torch.testing.assert_close(got.mean_expert, e.mean(0))
    torch.testing.assert_close(got.C_EE, torch.cov(e.T, correction=0))
    joint = torch.cov(torch.cat([t, e], 1).T, correction=0)
    torch.testing.assert_close(got.C_TE, joint[:3, 3:])
    torch.testing.assert_close(got.C_TT, joint[:3, :3])
    assert (got.n, got.d_expert, got.d_target) == (40, 5, 3)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=6), seed=st.integers(0, 10_000))
def test_any_chunking_equals_a_single_pass(cuts: list[int], seed: int) -> None:
    e, t = rows(30, 4, seed), rows(30, 2, seed + 1)
    edges = [0, *sorted(cuts), 30]
    running = RunningMoments(4, 2)
    for start, stop in itertools.pairwise(edges):
        running.update(e[start:stop], t[start:stop])
    assert_same(running.result(), one_shot(e, t))


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(0, 9)),
    seed=st.integers(0, 10_000),
)
def test_merge_is_associative_and_commutative(sizes: tuple[int, int, int], seed: int) -> None:
    def part(i: int) -> RunningMoments:
        return RunningMoments(3, 2).update(
            rows(sizes[i], 3, seed + i), rows(sizes[i], 2, seed + 10 + i)
        )

    left = part(0).merge(part(1)).merge(part(2)).result()
    right = part(0).merge(part(1).merge(part(2))).result()
    swapped = part(2).merge(part(0)).merge(part(1)).result()
    assert_same(left, right)
    assert_same(left, swapped)
    assert_same(merge_all([part(0), part(1), part(2)]).result(), left)


def test_merge_leaves_the_other_unchanged() -> None:
    a = RunningMoments(3, 2).update(rows(5, 3, 0), rows(5, 2, 1))
    b = RunningMoments(3, 2).update(rows(6, 3, 2), rows(6, 2, 3))
    before = b.result()
    a.merge(b)
    a.update(rows(4, 3, 4), rows(4, 2, 5))
    assert_same(b.result(), before, tolerance=0.0)


def test_a_taken_result_does_not_move() -> None:
    running = RunningMoments(3, 2).update(rows(5, 3, 0), rows(5, 2, 1))
    taken = running.result()
    kept = {name: getattr(taken, name).clone() for name in FIELDS}
    running.update(rows(5, 3, 2), rows(5, 2, 3))
    taken_again = running.result()
    taken_again.C_EE.mul_(0)
    assert all(torch.equal(getattr(taken, name), kept[name]) for name in FIELDS)
    assert running.result().C_EE.abs().sum() > 0


def test_a_large_common_offset_does_not_cancel_digits() -> None:
    e, t = rows(200, 3, 0), rows(200, 2, 1)
    far = RunningMoments(3, 2)
    for start in range(0, 200, 20):
        far.update(e[start : start + 20] + 1e6, t[start : start + 20] - 1e6)
    near = one_shot(e, t)
    # 1e6 offsets leave 1e-10 absolute in float64 inputs; sum-of-squares formulas would lose 1e-4.
    torch.testing.assert_close(far.result().C_TE, near.C_TE, rtol=0, atol=1e-8)
    naive = ((e + 1e6).T @ (e + 1e6)) / 200 - torch.outer((e + 1e6).mean(0), (e + 1e6).mean(0))
    assert (naive - near.C_EE).abs().max() > 1e-6


def test_expert_only_moments_have_no_target_fields() -> None:
    got = RunningMoments(3).update(rows(5, 3, 0)).result()
    assert got.C_TE is None
    assert got.mean_target is None
    assert got.d_target is None
    torch.testing.assert_close(got.C_EE, torch.cov(rows(5, 3, 0).T, correction=0))


def test_low_precision_rows_are_summed_in_float64_and_not_mutated() -> None:
    e = rows(50, 3, 0).to(torch.bfloat16)
    before = e.clone()
    got = RunningMoments(3).update(e).result()
    assert got.C_EE.dtype == torch.float64
    torch.testing.assert_close(got.C_EE, torch.cov(e.double().T, correction=0))
    assert torch.equal(e, before)


def test_bad_rows_are_refused_with_the_reason() -> None:
    running = RunningMoments(3, 2)
    with pytest.raises(WidthError, match="expert must have width 3, got 4"):
        running.update(rows(5, 4, 0), rows(5, 2, 0))
    with pytest.raises(DataError, match=r"paired row by row .* got 5 and 6 rows"):
        running.update(rows(5, 3, 0), rows(6, 2, 0))
    with pytest.raises(DataError, match="declared with a target of width 2; got none"):
        running.update(rows(5, 3, 0))
    with pytest.raises(DataError, match="declared with no target; got one"):
        RunningMoments(3).update(rows(5, 3, 0), rows(5, 2, 0))
    bad = rows(5, 3, 0)
    bad[2, 1] = torch.nan
    with pytest.raises(DataError, match=r"NaN or Inf in 1 of 5 rows \(first: row 2\)"):
        running.update(bad, rows(5, 2, 0))
    assert running.n == 0
    with pytest.raises(DataError, match="moments of no rows"):
        running.result()
    with pytest.raises(WidthError, match="merge needs equal widths"):
        running.merge(RunningMoments(3, 4))
    with pytest.raises(ArgumentError, match="d_expert"):
        RunningMoments(0)
    with pytest.raises(ArgumentError, match="d_target"):
        RunningMoments(3, 0)
    with pytest.raises(DataError, match="at least one RunningMoments"):
        merge_all([])
    with pytest.raises(DataError, match="anchors and states must be paired"):
        check_paired(rows(2, 3, 0), rows(3, 3, 0), "anchors", "states")


def test_reprs_state_count_and_widths() -> None:
    running = RunningMoments(3, 2).update(rows(5, 3, 0), rows(5, 2, 1))
    assert repr(running) == "RunningMoments(n=5, d_expert=3, d_target=2)"
    assert repr(running.result()) == "Moments(n=5, d_expert=3, d_target=2)"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_clipping_touches_the_massive_entries_only(dtype: torch.dtype) -> None:
    x = rows(200, 6, 0).to(dtype)
    x[3, 4] = 900.0
    x[7, 4] = -900.0
    before = x.clone()
    got = clip_massive(x, 8.0)
    assert torch.equal(x, before)
    assert got.coordinates == [4]
    assert got.n_clipped.tolist() == [0, 0, 0, 0, 2, 0]
    assert got.summary() == {"n_entries": 2, "n_coordinates": 1, "coordinates": [4]}
    assert got.rows[3, 4] == got.upper[4] < 20
    assert got.rows[7, 4] == got.lower[4] > -20
    untouched = torch.ones_like(x, dtype=torch.bool)
    untouched[[3, 7], 4] = False
    assert torch.equal(got.rows[untouched], x[untouched])
    assert got.rows.dtype == dtype
    assert "2 entries in 1 coordinates" in repr(got)


def test_clipping_limits_are_median_plus_minus_robust_deviations() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0]], dtype=torch.float64)
    got = clip_massive(x, 2.0)  # median 2, MAD 1
    torch.testing.assert_close(got.upper, torch.tensor([2 + 2 * 1.4826], dtype=torch.float64))
    torch.testing.assert_close(got.rows[4, 0], got.upper[0])


def test_a_smaller_threshold_clips_more_and_bad_thresholds_are_refused() -> None:
    x = rows(500, 4, 0)
    assert clip_massive(x, 1.0).n_clipped.sum() > clip_massive(x, 2.0).n_clipped.sum() > 0
    assert clip_massive(x, 20.0).n_clipped.sum() == 0
    with pytest.raises(ArgumentError, match="threshold"):
        clip_massive(x, 0.0)


def test_a_coordinate_without_spread_is_left_alone() -> None:
    x = torch.zeros(9, 1, dtype=torch.float64)
    x[0] = 50.0
    got = clip_massive(x, 3.0)
    assert isinstance(got, ClippedRows)
    assert torch.equal(got.rows, x)
    assert got.coordinates == []
