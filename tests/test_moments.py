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
from expertsteer_lens.linalg.moments import Moments, RunningMoments

BLOCKS = [("a", "a"), ("b", "b"), ("b", "a")]


def rows(n: int, d: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    return (
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        + offset
    )


def running(d_a: int = 3, d_b: int = 2) -> RunningMoments:
    return RunningMoments({"a": d_a, "b": d_b}, BLOCKS)


def one_shot(a: torch.Tensor, b: torch.Tensor) -> Moments:
    return running(a.shape[1], b.shape[1]).update({"a": a, "b": b}).result()


def assert_same(left: Moments, right: Moments, tolerance: float = 1e-12) -> None:
    assert left.n == right.n
    for name in ("means", "covariances"):
        ours, theirs = getattr(left, name), getattr(right, name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=tolerance, atol=tolerance)


def test_moments_equal_the_textbook_formulas() -> None:
    a, b = rows(40, 5, 0), rows(40, 3, 1)
    got = one_shot(a, b)
    torch.testing.assert_close(got.means["a"], a.mean(0))
    torch.testing.assert_close(got.covariances["a", "a"], torch.cov(a.T, correction=0))
    joint = torch.cov(torch.cat([b, a], 1).T, correction=0)
    torch.testing.assert_close(got.covariances["b", "a"], joint[:3, 3:])
    torch.testing.assert_close(got.covariances["b", "b"], joint[:3, :3])
    assert (got.n, got.weight) == (40, 40.0)
    assert list(got.covariances) == BLOCKS


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 30), max_size=6),
    seed=st.integers(0, 10_000),
    weighted=st.booleans(),
)
def test_any_chunking_equals_a_single_pass(cuts: list[int], seed: int, weighted: bool) -> None:
    a, b = rows(30, 4, seed), rows(30, 2, seed + 1)
    weights = rows(30, 1, seed + 2)[:, 0].abs() if weighted else None
    whole = running(4, 2).update({"a": a, "b": b}, weights).result()
    parts = running(4, 2)
    for start, stop in itertools.pairwise([0, *sorted(cuts), 30]):
        part = None if weights is None else weights[start:stop]
        parts.update({"a": a[start:stop], "b": b[start:stop]}, part)
    assert_same(parts.result(), whole)


def test_a_weight_counts_a_row_that_often() -> None:
    a, b = rows(12, 3, 0, offset=5.0), rows(12, 2, 1)
    times = torch.tensor([0, 1, 2, 3] * 3)
    weighted = running()
    for part in torch.arange(12).split(5):
        weighted.update({"a": a[part], "b": b[part]}, times[part])
    got = weighted.result()
    repeated = one_shot(a.repeat_interleave(times, 0), b.repeat_interleave(times, 0))
    assert (got.n, got.weight, repeated.n) == (9, 18.0, 18)  # three rows of weight 0 are not rows
    for key, value in got.means.items():
        torch.testing.assert_close(value, repeated.means[key], rtol=1e-12, atol=1e-12)
    for key, value in got.covariances.items():
        torch.testing.assert_close(value, repeated.covariances[key], rtol=1e-12, atol=1e-12)
    nothing = running().update({"a": a, "b": b}, torch.zeros(12))
    assert nothing.n == 0


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(0, 9)),
    seed=st.integers(0, 10_000),
)
def test_merge_is_associative_and_commutative(sizes: tuple[int, int, int], seed: int) -> None:
    def part(i: int) -> RunningMoments:
        return running().update(
            {"a": rows(sizes[i], 3, seed + i), "b": rows(sizes[i], 2, seed + 10 + i)}
        )

    left = part(0).merge(part(1)).merge(part(2)).result()
    right = part(0).merge(part(1).merge(part(2))).result()
    swapped = part(2).merge(part(0)).merge(part(1)).result()
    assert_same(left, right)
    assert_same(left, swapped)


def test_merge_leaves_the_other_unchanged() -> None:
    a = running().update({"a": rows(5, 3, 0), "b": rows(5, 2, 1)})
    b = running().update({"a": rows(6, 3, 2), "b": rows(6, 2, 3)})
    before = b.result()
    a.merge(b)
    a.update({"a": rows(4, 3, 4), "b": rows(4, 2, 5)})
    assert_same(b.result(), before, tolerance=0.0)


def test_a_taken_result_does_not_move() -> None:
    moments = running().update({"a": rows(5, 3, 0), "b": rows(5, 2, 1)})
    taken = moments.result()
    kept = {key: value.clone() for key, value in (taken.means | taken.covariances).items()}
    moments.update({"a": rows(5, 3, 2), "b": rows(5, 2, 3)})
    again = moments.result()
    again.covariances["a", "a"].mul_(0)
    again.means["a"].mul_(0)
    now = taken.means | taken.covariances
    assert all(torch.equal(now[key], kept[key]) for key in kept)
    assert moments.result().covariances["a", "a"].abs().sum() > 0
    assert moments.result().means["a"].abs().sum() > 0


def test_a_large_common_offset_does_not_cancel_digits() -> None:
    a, b = rows(200, 3, 0), rows(200, 2, 1)
    far = running()
    for start in range(0, 200, 20):
        part = slice(start, start + 20)
        far.update({"a": a[part] + 1e6, "b": b[part] - 1e6})
    near = one_shot(a, b)
    # 1e6 offsets leave 1e-10 absolute in float64 inputs; sum-of-squares formulas would lose 1e-4.
    torch.testing.assert_close(
        far.result().covariances["b", "a"], near.covariances["b", "a"], rtol=0, atol=1e-8
    )
    naive = ((a + 1e6).T @ (a + 1e6)) / 200 - torch.outer((a + 1e6).mean(0), (a + 1e6).mean(0))
    assert (naive - near.covariances["a", "a"]).abs().max() > 1e-6


def test_low_precision_rows_are_summed_in_float64_and_not_mutated() -> None:
    x = rows(50, 3, 0).to(torch.bfloat16)
    before = x.clone()
    got = RunningMoments({"x": 3}, [("x", "x")]).update({"x": x}).result()
    assert got.covariances["x", "x"].dtype == torch.float64
    torch.testing.assert_close(got.covariances["x", "x"], torch.cov(x.double().T, correction=0))
    assert torch.equal(x, before)


def test_bad_rows_are_refused_with_the_reason() -> None:
    moments = running()
    a, b = rows(5, 3, 0), rows(5, 2, 0)
    with pytest.raises(WidthError, match="a must have width 3, got 4"):
        moments.update({"a": rows(5, 4, 0), "b": b})
    with pytest.raises(DataError, match=r"paired row by row, got .*'a': 5, 'b': 6"):
        moments.update({"a": a, "b": rows(6, 2, 0)})
    with pytest.raises(DataError, match=r"must hold the variables \['a', 'b'\], got \['a'\]"):
        moments.update({"a": a})
    bad = a.clone()
    bad[2, 1] = torch.nan
    with pytest.raises(DataError, match=r"a holds NaN or Inf in 1 of 5 rows \(first: row 2\)"):
        moments.update({"a": bad, "b": b})
    with pytest.raises(DataError, match=r"one number per row: expected shape \(5,\), got \(4,\)"):
        moments.update({"a": a, "b": b}, torch.ones(4))
    with pytest.raises(DataError, match="weights must not be negative, got -1"):
        moments.update({"a": a, "b": b}, -torch.ones(5))
    with pytest.raises(DataError, match="weights holds NaN or Inf"):
        moments.update({"a": a, "b": b}, torch.full((5,), torch.inf))
    assert moments.n == 0
    with pytest.raises(DataError, match="moments of no rows"):
        moments.result()
    with pytest.raises(WidthError, match="merge needs equal variables and blocks"):
        moments.merge(running(3, 4))
    with pytest.raises(WidthError, match="the state is not of moments of the variables"):
        running(3, 2).restore(running(3, 4).state())
    with pytest.raises(ArgumentError, match="width of 'a'"):
        RunningMoments({"a": 0}, [])
    with pytest.raises(ArgumentError, match=r"blocks name 'c', .* \['a'\]"):
        RunningMoments({"a": 2}, [("a", "c")])
    with pytest.raises(DataError, match="anchors and states must be paired"):
        check_paired(rows(2, 3, 0), rows(3, 3, 0), "anchors", "states")


def test_reprs_state_count_and_widths() -> None:
    moments = running().update({"a": rows(5, 3, 0), "b": rows(5, 2, 1)})
    assert repr(moments) == "RunningMoments(n=5, widths={'a': 3, 'b': 2}, blocks=3)"
    assert repr(moments.result()) == "Moments(n=5, widths={'a': 3, 'b': 2}, blocks=3)"


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
