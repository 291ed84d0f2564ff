"""Aligners from streamed moments are those fitted on the rows; groups are never split."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import Tensor

from expertsteer_lens.align import (
    KINDS,
    AlignerConfig,
    MomentKind,
    PairedMoments,
    fit_aligner,
    fit_aligner_grid,
    fit_aligner_grid_from_moments,
)
from expertsteer_lens.align.folds import draw_folds, fold_of_groups
from expertsteer_lens.errors import ArgumentError, DataError, HookNameError, WidthError

FROM_MOMENTS = [name for name, kind in KINDS.items() if isinstance(kind, MomentKind)]
WIDTHS = {"expert": {"e0": 7, "e1": 12}, "target": {"t0": 5, "t1": 8}}
PAIRS = list(itertools.product(WIDTHS["expert"], WIDTHS["target"]))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(n_texts: int = 30) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """States of 1 to 5 tokens of each text; tokens of a text are alike."""
    lengths = torch.arange(n_texts) % 5 + 1
    groups = torch.arange(n_texts).repeat_interleave(lengths)
    n = len(groups)
    hidden = normal(n_texts, 6, seed=0)[groups] + 0.3 * normal(n, 6, seed=1)

    def states(widths: dict[str, int], seed: int) -> dict[str, Tensor]:
        return {
            name: hidden @ normal(6, d, seed=seed + i) + 0.5 * normal(n, d, seed=seed + 9 + i) + 4.0
            for i, (name, d) in enumerate(widths.items())
        }

    return states(WIDTHS["expert"], 10), states(WIDTHS["target"], 40), groups


def stream(
    expert: dict[str, Tensor],
    target: dict[str, Tensor],
    groups: Tensor,
    weights: Tensor | None = None,
    *,
    cuts: list[int] | None = None,
    **arguments: int,
) -> PairedMoments:
    moments = PairedMoments(
        PAIRS, d_expert=WIDTHS["expert"], d_target=WIDTHS["target"], **arguments
    )
    edges = [0, *(sorted(cuts) if cuts else range(13, len(groups), 13)), len(groups)]
    for start, stop in itertools.pairwise(edges):
        part = slice(start, stop)
        moments.update(
            {name: x[part] for name, x in expert.items()},
            {name: x[part] for name, x in target.items()},
            groups[part],
            None if weights is None else weights[part],
        )
    return moments


# --- folds of groups


def test_the_fold_of_a_group_does_not_depend_on_what_it_comes_with() -> None:
    groups = torch.arange(200)
    folds = fold_of_groups(groups, 5, seed=3)
    for part in groups.split(7):
        assert torch.equal(fold_of_groups(part, 5, seed=3), folds[part])
    assert torch.equal(fold_of_groups(groups.flip(0), 5, seed=3), folds.flip(0))
    assert not torch.equal(fold_of_groups(groups, 5, seed=4), folds)


@settings(max_examples=30, deadline=None)
@given(n_groups=st.integers(1, 60), n_folds=st.integers(2, 9), seed=st.integers(0, 1000))
def test_groups_without_gaps_fall_evenly_into_folds(n_groups: int, n_folds: int, seed: int) -> None:
    counts = fold_of_groups(torch.arange(n_groups), n_folds, seed).bincount(minlength=n_folds)
    assert counts.sum() == n_groups
    assert counts.max() - counts.min() <= 1


def test_rows_of_a_group_are_never_on_both_sides_of_a_fold() -> None:
    _, _, groups = tokens()
    folds = draw_folds(len(groups), 4, seed=1, groups=groups)
    assert torch.equal(torch.cat(folds).sort().values, torch.arange(len(groups)))
    held = [set(groups[fold].tolist()) for fold in folds]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(held, 2))


def test_held_out_r2_with_groups_is_that_of_held_out_texts() -> None:
    expert, target, groups = tokens()
    e, t = expert["e1"], target["t1"]
    got = fit_aligner(e, t, AlignerConfig(ridge=0.1, n_folds=3), seed=2, groups=groups)
    errors = total = 0.0
    for fold in range(3):
        held = fold_of_groups(groups, 3, 2) == fold
        train = ~held
        penalty = 0.1 * e[train].var(0, correction=0).mean() * train.sum()
        model = Ridge(alpha=float(penalty)).fit(e[train].numpy(), t[train].numpy())
        errors += float((t[held] - torch.from_numpy(model.predict(e[held].numpy()))).square().sum())
        total += float((t[held] - t[train].mean(0)).square().sum())
    assert got.quality.r2 == pytest.approx(1.0 - errors / total, abs=1e-9)


def test_without_groups_tokens_of_one_text_make_the_r2_look_too_good() -> None:
    texts = torch.arange(20).repeat_interleave(5)
    e, t = (normal(20, 30, seed=s)[texts] + 0.01 * normal(100, 30, seed=s + 5) for s in (0, 1))
    blind, fair = fit_aligner(e, t).quality.r2, fit_aligner(e, t, groups=texts).quality.r2
    assert blind is not None
    assert fair is not None
    assert blind > 0.9  # the two models share nothing: 20 texts are learnt by heart
    assert fair < 0.05


@pytest.mark.parametrize("kind", FROM_MOMENTS)
def test_a_grid_with_groups_equals_single_fits(kind: str) -> None:
    expert, target, groups = tokens()
    config = AlignerConfig(kind=kind, n_folds=3)
    grid = fit_aligner_grid(expert, target, config, seed=2, groups=groups)
    for (e, t), got in grid.items():
        alone = fit_aligner(expert[e], target[t], config, seed=2, groups=groups)
        assert torch.equal(got.encoder.weight, alone.encoder.weight)
        assert got.quality == alone.quality


def test_bad_groups_are_refused_with_the_reason() -> None:
    e, t = normal(20, 3, seed=0), normal(20, 3, seed=1)
    for groups in (torch.arange(19), torch.arange(20).float(), torch.ones(20, dtype=torch.bool)):
        with pytest.raises(DataError, match=r"one integer per row .* expected shape \(20,\), got"):
            fit_aligner(e, t, groups=groups)
        with pytest.raises(DataError, match="one integer per row"):
            fit_aligner(e, t, AlignerConfig(kind="identity"), groups=groups)
    with pytest.raises(DataError, match=r"no group falls into fold \d of 5; number the groups 0"):
        fit_aligner(e, t, groups=torch.arange(20) % 4)


# --- moments


@pytest.mark.parametrize("kind", FROM_MOMENTS)
@pytest.mark.parametrize("n_texts", [7, 40])  # fewer rows than the width of a layer, and more
@pytest.mark.parametrize(
    "fields", [{}, {"standardise": True}, {"n_components": 4}], ids=["plain", "standard", "rank"]
)
def test_streamed_moments_give_the_aligners_of_the_rows(
    kind: str, n_texts: int, fields: dict
) -> None:
    expert, target, groups = tokens(n_texts)
    if n_texts == 7:
        expert = {name: x[:11] for name, x in expert.items()}
        target, groups = {name: x[:11] for name, x in target.items()}, groups[:11]
    config = AlignerConfig(kind=kind, n_folds=3, **fields)
    moments = stream(expert, target, groups, n_folds=3, seed=5)
    streamed = fit_aligner_grid_from_moments(moments, config)
    held = fit_aligner_grid(expert, target, config, seed=5, groups=groups)
    assert list(streamed) == list(held) == PAIRS
    for pair, got in streamed.items():
        expected = held[pair]
        assert got.quality.n_anchors == expected.quality.n_anchors
        assert got.quality.n_components == expected.quality.n_components
        assert got.quality.ridge == expected.quality.ridge
        for name in ("r2", "reconstruction_fvu", "effective_rank"):
            value = getattr(expected.quality, name)
            assert getattr(got.quality, name) == (value and pytest.approx(value, rel=1e-8)), name
        # Weights are stored in float32, so two that agree to 1e-8 may still be a rounding apart.
        for x, y in ((got.encoder, expected.encoder), (got.decoder, expected.decoder)):
            largest = float(y.weight.abs().max())
            torch.testing.assert_close(x.weight, y.weight, rtol=1e-6, atol=1e-6 * largest)
            torch.testing.assert_close(x.bias, y.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FROM_MOMENTS)
def test_solutions_from_moments_agree_to_1e_8_before_they_are_stored(kind, monkeypatch) -> None:
    from expertsteer_lens.align import moment_kind

    kept: list[Tensor] = []
    real = moment_kind.AffineMap
    monkeypatch.setattr(
        moment_kind,
        "AffineMap",
        lambda factors, bias: kept.append((factors, bias)) or real(factors, bias),
    )
    expert, target, groups = tokens()
    config = AlignerConfig(kind=kind, n_folds=3)
    fit_aligner_grid_from_moments(stream(expert, target, groups, n_folds=3, seed=5), config)
    streamed, kept[:] = list(kept), []
    fit_aligner_grid(expert, target, config, seed=5, groups=groups)
    assert len(streamed) == len(kept) >= 4
    for (factors, bias), (expected_factors, expected_bias) in zip(streamed, kept, strict=True):
        products = []
        for parts in (factors, expected_factors):
            products.append(torch.linalg.multi_dot(parts) if len(parts) > 1 else parts[0])
        got, expected = products
        assert float((got - expected).norm()) <= 1e-8 * float(expected.norm())
        assert float((bias - expected_bias).norm()) <= 1e-8 * max(1.0, float(bias.norm()))


@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(0, 90), max_size=6), seed=st.integers(0, 99))
def test_any_chunking_gives_the_same_moments(cuts: list[int], seed: int) -> None:
    expert, target, groups = tokens()
    one = stream(expert, target, groups, seed=seed).folds()
    other = stream(expert, target, groups, cuts=cuts or [1], seed=seed).folds()
    for a, b in zip(one, other, strict=True):
        assert a.n == b.n
        for block, value in a.covariances.items():
            torch.testing.assert_close(value, b.covariances[block], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", FROM_MOMENTS)
def test_a_weight_counts_a_token_that_often(kind: str) -> None:
    expert, target, groups = tokens()
    times = torch.arange(len(groups)) % 3 + 1
    config = AlignerConfig(kind=kind)
    weighted = fit_aligner_grid_from_moments(stream(expert, target, groups, times.double()), config)
    repeated = fit_aligner_grid(
        {name: x.repeat_interleave(times, 0) for name, x in expert.items()},
        {name: x.repeat_interleave(times, 0) for name, x in target.items()},
        config,
        groups=groups.repeat_interleave(times),
    )
    plain = fit_aligner_grid_from_moments(stream(expert, target, groups), config)
    for pair, got in weighted.items():
        expected = repeated[pair].quality
        assert got.quality.n_anchors == len(groups)
        assert got.quality.ridge == expected.ridge
        for name in ("r2", "reconstruction_fvu", "effective_rank"):
            value = getattr(expected, name)
            assert getattr(got.quality, name) == (value and pytest.approx(value, rel=1e-8)), name
        assert got.quality.reconstruction_fvu != plain[pair].quality.reconstruction_fvu


def test_only_ratios_of_weights_matter() -> None:
    expert, target, groups = tokens()
    weights = 1.0 / groups.bincount()[groups].double()
    one, other = (
        fit_aligner_grid_from_moments(stream(expert, target, groups, w))
        for w in (weights, 1000.0 * weights)
    )
    for pair, got in one.items():
        assert got.quality.r2 == pytest.approx(other[pair].quality.r2, rel=1e-10)


def test_merged_moments_are_those_of_all_rows() -> None:
    expert, target, groups = tokens()
    half = int((groups == 15).nonzero()[0])
    parts = [
        stream(
            {name: x[part] for name, x in expert.items()},
            {name: x[part] for name, x in target.items()},
            groups[part],
        )
        for part in (slice(0, half), slice(half, None))
    ]
    merged, whole = parts[0].merge(parts[1]).folds(), stream(expert, target, groups).folds()
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a.covariances, b.covariances, rtol=1e-11, atol=1e-11)
    with pytest.raises(ArgumentError, match="merge needs the same folds"):
        parts[0].merge(stream(expert, target, groups, seed=1))


def test_memory_is_the_stated_formula_whatever_the_number_of_rows() -> None:
    expert, target, groups = tokens()
    moments = PairedMoments(
        PAIRS[:3], d_expert=WIDTHS["expert"], d_target=WIDTHS["target"], n_folds=4
    )
    moments.update(expert, target, groups)
    squares = sum(d * d for widths in WIDTHS.values() for d in widths.values())
    crosses = sum(WIDTHS["expert"][e] * WIDTHS["target"][t] for e, t in PAIRS[:3])
    kept = [s for fold in moments._folds for s in fold._scatters.values()]
    assert sum(s.numel() * s.element_size() for s in kept) == 8 * 4 * (squares + crosses)


def test_the_seed_may_draw_another_gauge_on_the_same_folds_and_pairs_may_be_chosen() -> None:
    expert, target, groups = tokens()
    moments = stream(expert, target, groups, seed=3)
    config = AlignerConfig(kind="autoencoder", n_components=3)
    first = fit_aligner_grid_from_moments(moments, config)
    other = fit_aligner_grid_from_moments(moments, config, seed=4, pairs=PAIRS[1:2])
    assert list(other) == PAIRS[1:2]
    pair = PAIRS[1]
    assert (first[pair].seed, other[pair].seed) == (3, 4)
    lost = [grid[pair].quality.reconstruction_fvu for grid in (first, other)]
    assert lost[0] == pytest.approx(lost[1], rel=1e-9)
    assert not torch.allclose(first[pair].encoder.weight, other[pair].encoder.weight, atol=0.1)


def test_one_width_for_all_layers_and_passing_layers_by() -> None:
    expert, target, groups = tokens()
    moments = PairedMoments([("e0", "t0")], d_expert=7, d_target=5)
    moments.update(expert, target, groups)
    assert repr(moments) == f"PairedMoments(n={len(groups)}, n_folds=5, pairs=1, seed=0)"
    assert list(fit_aligner_grid_from_moments(moments)) == [("e0", "t0")]


def test_bad_input_of_moments_is_refused_with_the_reason() -> None:
    expert, target, groups = tokens()
    moments = stream(expert, target, groups)
    with pytest.raises(ArgumentError, match="kind='identity' is fitted on rows, not on moments"):
        fit_aligner_grid_from_moments(moments, AlignerConfig(kind="identity"))
    with pytest.raises(ArgumentError, match="n_folds=3, but the moments were accumulated in 5"):
        fit_aligner_grid_from_moments(moments, AlignerConfig(n_folds=3))
    with pytest.raises(HookNameError, match="an accumulated pair"):
        fit_aligner_grid_from_moments(moments, pairs=[("e0", "t9")])
    with pytest.raises(HookNameError, match=r"'e1' is not on this model \(the expert states\)"):
        moments.update({"e0": expert["e0"]}, target, groups)
    with pytest.raises(DataError, match="must be paired row by row"):
        moments.update(expert, {name: x[:-1] for name, x in target.items()}, groups)
    with pytest.raises(DataError, match="groups must be one integer per row"):
        moments.update(expert, target, groups[:-1])
    with pytest.raises(DataError, match="weights must not be negative"):
        moments.update(expert, target, groups, -torch.ones(len(groups)))
    with pytest.raises(WidthError, match=r"expert\['e0'\] must have width 7, got 12"):
        moments.update({"e0": expert["e1"], "e1": expert["e1"]}, target, groups)
    assert moments.n == len(groups)
    with pytest.raises(ArgumentError, match="pairs must name at least one"):
        PairedMoments([], d_expert=1, d_target=1)
    with pytest.raises(ArgumentError, match="d_expert says no width for 'e1'"):
        PairedMoments(PAIRS, d_expert={"e0": 7}, d_target=5)
    with pytest.raises(ArgumentError, match="d_target must be an integer"):
        PairedMoments(PAIRS, d_expert=7, d_target=0)
    with pytest.raises(ArgumentError, match="n_folds must be an integer"):
        PairedMoments(PAIRS, d_expert=7, d_target=5, n_folds=1)
    with pytest.raises(DataError, match="needs at least 10 anchors"):
        fit_aligner_grid_from_moments(PairedMoments(PAIRS, d_expert=7, d_target=5))
    gaps = PairedMoments([("e0", "t0")], d_expert=7, d_target=5)
    gaps.update(expert, target, torch.zeros_like(groups))
    with pytest.raises(DataError, match="no group falls into fold"):
        fit_aligner_grid_from_moments(gaps)
    flat = PairedMoments([("e0", "t0")], d_expert=7, d_target=5)
    flat.update({"e0": torch.ones(len(groups), 7)}, target, groups)
    with pytest.raises(DataError, match=r"expert\['e0'\] is the same in every row"):
        fit_aligner_grid_from_moments(flat)
