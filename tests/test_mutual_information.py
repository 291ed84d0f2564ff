"""Closed forms, laws, references and calibration of the layer-pair scores."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_selection import mutual_info_regression
from torch import Tensor

from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.pair import ESTIMATORS as TABLE
from expertsteer_lens.pair import Estimator, register_estimator
from expertsteer_lens.pair.base import CORRELATION_CAP
from expertsteer_lens.pair.cca import nats_of
from expertsteer_lens.pair.mutual_information import (
    LayerPairMI,
    MIConfig,
    _interval,
    layer_pair_mi,
)
from expertsteer_lens.pair.parallel import parallel_map
from expertsteer_lens.pair.preparation import principal_scores
from expertsteer_lens.pair.resampling import draw_resamples

ESTIMATORS = ("cca", "gaussian", "ksg", "cka")
NATS = ("cca", "gaussian", "ksg")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n: int, rho: list[float], seed: int) -> tuple[Tensor, Tensor, float]:
    """Gaussian rows with canonical correlations `rho`, and their mutual information in nats."""
    r = torch.tensor(rho, dtype=torch.float64)
    x = normal(n, len(rho), seed=seed)
    y = r * x + (1 - r.square()).sqrt() * normal(n, len(rho), seed=seed + 1000)
    return x, y, float(-0.5 * torch.log1p(-r.square()).sum())


def quick(estimator: str = "cca", **fields: Any) -> MIConfig:
    return MIConfig(
        estimator=estimator, **{"n_permutations": 0, "n_bootstrap": 20, "clip": None, **fields}
    )


def score(x: Tensor, y: Tensor, config: MIConfig, seed: int = 0) -> float:
    return float(layer_pair_mi([x], [y], config, seed=seed).matrix)


# --- closed forms and references
# -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "tolerance"), [("cca", 0.05), ("gaussian", 0.05), ("ksg", 0.08)]
)
@pytest.mark.parametrize("rho", [[0.0], [0.5], [0.9], [0.8, 0.4]])
def test_gaussian_rows_read_their_mutual_information(
    estimator: str, tolerance: float, rho: list[float]
) -> None:
    x, y, truth = correlated(2000, rho, seed=0)
    config = quick(estimator, n_components=len(rho), standardise=False)
    assert score(x, y, config) == pytest.approx(truth, abs=tolerance)


def test_gaussian_estimator_is_unbiased_where_the_plain_one_is_far_off() -> None:
    values, plain = [], []
    rho = [0.6, 0.3] + [0.0] * 18
    for seed in range(40):
        x, y, truth = correlated(120, rho, seed=seed)
        values.append(score(x, y, quick("gaussian", n_components=20)))
        zx, zy = (principal_scores(z - z.mean(0), 20).scores for z in (x, y))
        cross = zx.T @ zy / 120
        plain.append(
            float(-0.5 * torch.logdet(torch.eye(20, dtype=torch.float64) - cross.T @ cross))
        )
    got = torch.tensor(values)
    standard_error = float(got.std()) / math.sqrt(40)
    assert abs(float(got.mean()) - truth) < 3 * standard_error
    assert sum(plain) / 40 > truth + 1.5


def test_cca_is_conservative_and_far_closer_to_zero_than_in_sample() -> None:
    x, y = normal(400, 32, seed=0), normal(400, 32, seed=1)
    assert 0.0 <= score(x, y, quick(n_components=32)) < 0.1
    x, y, truth = correlated(400, [0.8] * 4 + [0.0] * 12, seed=2)
    assert 0.5 * truth < score(x, y, quick(n_components=16)) < truth


def test_ksg_in_one_dimension_equals_sklearn() -> None:
    for seed, rho in enumerate([0.0, 0.6, 0.95]):
        x, y, _ = correlated(300, [rho], seed=seed)
        got = score(x, y, quick("ksg", n_components=1, n_neighbors=3))
        reference = mutual_info_regression(
            x.numpy(), y[:, 0].numpy(), n_neighbors=3, random_state=0
        )[0]
        # sklearn adds noise of 1e-10 to break ties and clamps at 0.
        assert max(got, 0.0) == pytest.approx(float(reference), abs=1e-4)


def test_ksg_sees_dependence_that_no_correlation_sees() -> None:
    x = normal(500, 1, seed=0)
    y = x.square() + 0.1 * normal(500, 1, seed=1)
    assert score(x, y, quick("ksg", n_components=1)) > 0.5
    assert score(x, y, quick("gaussian", n_components=1)) < 0.1


def test_cka_equals_the_formula_of_unbiased_hsic() -> None:
    x, y = normal(30, 4, seed=0), normal(30, 6, seed=1)
    y[:, :2] += 2 * x[:, :2]

    def hsic(a: Tensor, b: Tensor) -> float:
        k, m = (g - torch.diag(g.diagonal()) for g in (a @ a.T, b @ b.T))
        n = len(a)
        first = (
            torch.trace(k @ m)
            + k.sum() * m.sum() / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (k @ m).sum()
        )
        return float(first / (n * (n - 3)))

    a, b = x - x.mean(0), y - y.mean(0)
    expected = hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b))
    assert score(x, y, quick("cka", standardise=False)) == pytest.approx(expected, abs=1e-9)
    assert score(x, x, quick("cka")) == pytest.approx(1.0, abs=1e-12)


def test_debiased_cka_of_independent_wide_rows_is_near_zero() -> None:
    values = [
        score(normal(40, 200, seed=s), normal(40, 200, seed=s + 50), quick("cka"))
        for s in range(20)
    ]
    assert abs(sum(values) / 20) < 0.03


# --- laws
# ----------------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), estimator=st.sampled_from(ESTIMATORS))
def test_the_score_is_symmetric(seed: int, estimator: str) -> None:
    x, y = normal(60, 4, seed=seed), normal(60, 7, seed=seed + 1)
    y[:, :3] += x[:, :3]
    forth, back = (
        layer_pair_mi(*pair, quick(estimator)).matrix for pair in (([x, y], [y]), ([y], [x, y]))
    )
    torch.testing.assert_close(forth, back.T, rtol=1e-8, atol=1e-8)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), estimator=st.sampled_from(("cca", "gaussian")))
def test_invertible_linear_maps_change_nothing_when_all_components_are_kept(
    seed: int, estimator: str
) -> None:
    x, y, _ = correlated(80, [0.9, 0.5, 0.0], seed=seed)
    mixing = normal(3, 3, seed=seed + 7) + 3 * torch.eye(3, dtype=torch.float64)
    config = quick(
        estimator,
        n_components=3,
        standardise=False,
        **({"shrinkage": 0.0} if estimator == "cca" else {}),
    )
    assert score(x @ mixing + 5.0, y, config) == pytest.approx(score(x, y, config), abs=1e-7)
    assert score(x, y @ mixing - 5.0, config) == pytest.approx(score(x, y, config), abs=1e-7)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_standardised_scores_do_not_depend_on_units(estimator: str) -> None:
    x, y, _ = correlated(100, [0.9, 0.5, 0.0], seed=1)
    config = quick(estimator)
    units = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)
    assert score(x * units, y, config) == pytest.approx(score(x, y, config), abs=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_order_of_paired_rows_does_not_matter_and_the_pairing_does(estimator: str) -> None:
    x, y, _ = correlated(150, [0.9, 0.8], seed=1)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    config = quick(estimator)
    together = score(x[order], y[order], config)
    assert together == pytest.approx(score(x, y, config), abs=0.15 if estimator == "cca" else 1e-8)
    assert score(x, y[order], config) < 0.3 * together


def test_an_identical_pair_is_capped_at_its_documented_value() -> None:
    x = normal(200, 3, seed=0)
    cap = -0.5 * math.log(CORRELATION_CAP)
    assert score(x, x, quick(n_components=3)) == pytest.approx(3 * cap, rel=1e-6)
    bias = score(x, x, quick("gaussian", n_components=3)) - 3 * cap
    assert -0.1 < bias < 0.0


def test_negative_held_out_correlations_count_as_zero() -> None:
    one = torch.ones(2, dtype=torch.float64)
    assert float(nats_of(torch.tensor([-0.9, 0.0], dtype=torch.float64), one, one)) == 0.0
    assert float(
        nats_of(torch.tensor([0.6], dtype=torch.float64), one[:1], one[:1])
    ) == pytest.approx(-0.5 * math.log(0.64))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_all_pairs_at_once_equal_one_pair_at_a_time(estimator: str) -> None:
    x = [normal(60, 9, seed=i) for i in range(5)]
    y = [normal(60, 6, seed=10 + j) + x[j][:, :6] for j in range(3)]
    config = quick(
        estimator, n_permutations=3, **({} if estimator == "cka" else {"n_components": 4})
    )
    grid = layer_pair_mi(x, y, config)
    for i in range(5):
        for j in range(3):
            alone = layer_pair_mi([x[i]], [y[j]], config)
            torch.testing.assert_close(grid.matrix[i, j], alone.matrix[0, 0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(
                grid.null[:, i, j], alone.null[:, 0, 0], rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                grid.interval[i, j], alone.interval[0, 0], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_null_draw_is_the_estimate_on_permuted_rows(estimator: str) -> None:
    x, y, _ = correlated(60, [0.9, 0.3, 0.2, 0.1, 0.0, 0.0], seed=2)
    config = quick(estimator, n_permutations=4)
    got = layer_pair_mi([x], [y], config, seed=4)
    orders = draw_resamples(torch.arange(60), config, 4).orders
    for order, draw in zip(orders, got.null, strict=True):
        assert sorted(order.tolist()) == list(range(60))
        again = layer_pair_mi([x], [y[order]], config, seed=4)
        torch.testing.assert_close(draw, again.matrix, rtol=1e-3, atol=1e-5)
    assert got.null.abs().max() > 1e-3
    assert (got.matrix - got.null).mean() > 0.05


@pytest.mark.parametrize(("d_expert", "d_target"), [(3, 8), (8, 3)])
def test_narrow_layers_limit_the_components_of_all(d_expert: int, d_target: int) -> None:
    got = layer_pair_mi([normal(200, d_expert, seed=0)], [normal(200, d_target, seed=1)], quick())
    assert got.n_components == 3


def test_default_components_follow_rank_and_rows() -> None:
    wide = [normal(200, 100, seed=0)]
    assert layer_pair_mi(wide, wide, quick()).n_components == 32
    assert layer_pair_mi(wide, wide, quick("ksg")).n_components == 8
    assert layer_pair_mi(wide, wide, quick("cka")).n_components is None
    assert layer_pair_mi([wide[0][:40]], [wide[0][:40]], quick()).n_components == 10
    centred = wide[0][:, :6] - wide[0][:, :6].mean(1, keepdim=True)
    assert layer_pair_mi([centred], wide, quick()).n_components == 5


def test_principal_scores_agree_from_either_gram_matrix() -> None:
    x = normal(20, 20, seed=0)[:, :15]
    x = x - x.mean(0)
    tall = principal_scores(x, 5)
    wide = principal_scores(torch.cat([x, torch.zeros(20, 30, dtype=torch.float64)], 1), 5)
    torch.testing.assert_close(tall.variances, wide.variances)
    torch.testing.assert_close(tall.scores @ tall.scores.T, wide.scores @ wide.scores.T)
    torch.testing.assert_close(tall.scores.T @ tall.scores / 20, torch.eye(5, dtype=torch.float64))
    assert tall.rank == wide.rank == 15


# --- null and intervals
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_p_values_are_uniform_under_independence(estimator: str) -> None:
    n, layers = (40, 6) if estimator == "ksg" else (48, 8)
    components = {} if estimator == "cka" else {"n_components": 2}
    config = quick(estimator, n_permutations=39, **components)
    p = []
    for seed in range(5):
        x = [normal(n, 3, seed=100 * seed + i) for i in range(layers)]
        y = [normal(n, 3, seed=100 * seed + 50 + i) for i in range(layers)]
        p.append(layer_pair_mi(x, y, config, seed=seed).p_values.flatten())
    values = torch.cat(p)
    # 180-320 pairs, of which those sharing a layer are dependent: bounds are several binomial
    # standard errors wide.
    assert 0.01 <= float((values <= 0.05).double().mean()) <= 0.11
    assert 0.40 <= float((values <= 0.5).double().mean()) <= 0.62
    assert float(values.min()) >= 1 / 40


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_planted_dependence_stands_far_above_the_null(estimator: str) -> None:
    x, y, _ = correlated(120, [0.8, 0.8], seed=0)
    noise = normal(120, 2, seed=9)
    got = layer_pair_mi([x, noise], [y], quick(estimator, n_permutations=49))
    assert got.p_values[0, 0] == pytest.approx(1 / 50)
    assert got.z_scores[0, 0] > 6
    assert got.p_values[1, 0] > 0.02
    torch.testing.assert_close(got.null_mean, got.null.mean(0))
    torch.testing.assert_close(got.null_sd, got.null.std(0))
    torch.testing.assert_close(got.z_scores, (got.matrix - got.null_mean) / got.null_sd)


@pytest.mark.parametrize(("estimator", "least"), [("cca", 0.8), ("gaussian", 0.85), ("ksg", 0.7)])
def test_intervals_cover_the_truth_where_the_fit_is_not_the_bottleneck(
    estimator: str, least: float
) -> None:
    covered = 0
    for seed in range(40):
        x, y, truth = correlated(300, [0.7], seed=seed)
        got = layer_pair_mi([x], [y], quick(estimator, n_components=1, n_bootstrap=200), seed=seed)
        low, high = got.interval[0, 0].tolist()
        assert low < float(got.matrix) < high
        covered += low <= truth <= high
    assert (
        least <= covered / 40
    )  # nominal 0.95; ksg's local terms are dependent, so its interval is narrow
    assert high - low < 0.4


def test_cka_interval_covers_the_large_sample_value() -> None:
    def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
        x = normal(n, 5, seed=seed)
        return x, x[:, :3] @ normal(3, 4, seed=77) + normal(n, 4, seed=seed + 500)

    truth = sum(score(*draw(2000, 900 + i), quick("cka", standardise=False)) for i in range(4)) / 4
    covered = 0
    for seed in range(40):
        x, y = draw(200, seed)
        low, high = layer_pair_mi(
            [x], [y], quick("cka", n_bootstrap=200, standardise=False), seed=seed
        ).interval[0, 0]
        covered += bool(low <= truth <= high)
    assert (
        covered >= 34
    )  # of 40; 92 of 100 in a longer run: first-order weights are a tenth too narrow at n=200


def test_intervals_are_centred_on_the_estimate_and_cca_stays_above_zero() -> None:
    matrix = torch.tensor([[1.0, 0.1]], dtype=torch.float64)
    spread = torch.linspace(-1.0, 1.0, 101, dtype=torch.float64)[:, None, None]
    draws = matrix + 5.0 + spread  # resampling adds noise, so every draw is biased upward
    plain = _interval(matrix, draws, quick("gaussian", confidence=0.5))
    torch.testing.assert_close(
        plain, torch.tensor([[[0.5, 1.5], [-0.4, 0.6]]], dtype=torch.float64)
    )
    clamped = _interval(matrix, draws, quick("cca", confidence=0.5))
    torch.testing.assert_close(
        clamped, torch.tensor([[[0.5, 1.5], [0.0, 0.6]]], dtype=torch.float64)
    )


def test_a_null_draw_equal_to_the_estimate_counts_against_it() -> None:
    got = example(n_permutations=3)
    null = torch.stack([got.matrix, got.matrix - 1, got.matrix + 1])
    tied = dataclasses.replace(got, null=null)
    torch.testing.assert_close(tied.p_values, torch.full((2, 2), 0.75), check_dtype=False)


def test_more_confidence_and_fewer_texts_widen_the_interval() -> None:
    x, y, _ = correlated(400, [0.7, 0.5], seed=0)

    def width(n: int, confidence: float) -> float:
        got = layer_pair_mi(
            [x[:n]], [y[:n]], quick("gaussian", confidence=confidence, n_bootstrap=300)
        )
        return float(got.interval[0, 0, 1] - got.interval[0, 0, 0])

    assert width(400, 0.5) < width(400, 0.95) < width(100, 0.95)


# --- the result
# ----------------------------------------------------------------------------------------------------


def example(estimator: str = "cca", **fields: Any) -> LayerPairMI:
    x, y, _ = correlated(150, [0.9, 0.8, 0.7], seed=0)
    noise = normal(150, 3, seed=5)
    experts = {"blocks.2.hook_resid_post": x, "blocks.4.hook_resid_post": noise}
    targets = {"blocks.0.hook_resid_post": y, "blocks.1.hook_resid_post": normal(150, 4, seed=6)}
    return layer_pair_mi(ActivationStore(experts), targets, quick(estimator, **fields))


def test_hook_names_label_rows_and_columns() -> None:
    got = example(n_permutations=5)
    assert got.expert_hook_names == ("blocks.2.hook_resid_post", "blocks.4.hook_resid_post")
    assert got.target_hook_names == ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    assert got.argmax() == ("blocks.2.hook_resid_post", "blocks.0.hook_resid_post")
    assert got.argmin() != got.argmax()
    frame = got.to_pandas()
    assert list(frame["expert_layer"]) == [2, 2, 4, 4]
    assert list(frame["target_layer"]) == [0, 1, 0, 1]
    assert frame["mutual_information"].tolist() == got.matrix.flatten().tolist()
    assert frame["p_value"].tolist() == got.p_values.flatten().tolist()
    assert frame["high"].tolist() == got.interval[..., 1].flatten().tolist()
    assert got.unit == "nats"
    assert got.n_samples == 150
    assert "LayerPairMI(cca, 2 x 2 layers, n_samples=150, null 0.0" in repr(got)
    assert "highest" in repr(got)


def test_lists_get_names_that_carry_their_index() -> None:
    x = normal(40, 3, seed=0)
    got = layer_pair_mi([x, x + 1], [x], quick("gaussian"))
    assert got.expert_hook_names == ("expert.0.states", "expert.1.states")
    assert list(got.to_pandas()["expert_layer"]) == [0, 1]
    named = layer_pair_mi({"embed": x}, [x], quick("gaussian"))
    assert named.to_pandas()["expert_layer"].tolist() == [None]


def test_cka_is_labelled_as_a_score_without_unit() -> None:
    got = example("cka")
    assert got.unit == "cka"
    assert "cka" in got.to_pandas()
    assert "mutual_information" not in got.to_pandas()


def test_without_permutations_the_null_is_empty() -> None:
    got = example()
    assert got.null.shape == (0, 2, 2)
    assert torch.isnan(got.null_mean).all()
    assert torch.isnan(got.null_sd).all()
    assert (got.p_values == 1).all()
    assert "no null" in repr(got)


def test_the_plot_is_made_by_plots() -> None:
    pytest.importorskip("plotly")
    assert type(example(n_permutations=2).plot()).__name__ == "Figure"


def test_clipped_coordinates_are_recorded() -> None:
    x, y, _ = correlated(600, [0.9, 0.8], seed=0)
    spoiled = x.clone()
    spoiled[3, 1] = 1e4
    clean = layer_pair_mi([x], [y], quick(clip=8.0))
    got = layer_pair_mi([spoiled], [y], quick(clip=8.0))
    loose = layer_pair_mi([spoiled], [y], quick(clip=None))
    assert clean.clipped == {"expert": {}, "target": {}}
    assert got.clipped == {
        "expert": {"expert.0.states": {"n_entries": 1, "n_coordinates": 1, "coordinates": [1]}},
        "target": {},
    }
    assert loose.clipped == {"expert": {}, "target": {}}
    assert abs(float(got.matrix - clean.matrix)) < 0.5 * float(clean.matrix - loose.matrix)


# --- conformance
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
class TestConformance:
    """What holds for every estimator."""

    def test_inputs_are_not_mutated_and_any_float_dtype_is_taken(self, estimator: str) -> None:
        x, y, _ = correlated(60, [0.9, 0.5], seed=0)
        x[0, 0] = 1e3  # clipped inside
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            a, b = x.to(dtype), y.to(dtype)
            before = a.clone(), b.clone()
            got = layer_pair_mi([a], [b], quick(estimator, clip=8.0, n_permutations=2))
            assert torch.equal(a, before[0])
            assert torch.equal(b, before[1])
            assert got.matrix.dtype == got.null.dtype == torch.float64
            assert got.matrix.device == a.device

    def test_float32_agrees_with_float64(self, estimator: str) -> None:
        x, y, _ = correlated(100, [0.9, 0.5], seed=0)
        exact = score(x.float().double(), y.float().double(), quick(estimator))
        assert score(x.float(), y.float(), quick(estimator)) == pytest.approx(exact, abs=1e-4)

    def test_the_seed_decides_everything(self, estimator: str) -> None:
        x, y, _ = correlated(60, [0.9, 0.5], seed=0)
        config = quick(estimator, n_permutations=3)
        torch.manual_seed(1)
        a = layer_pair_mi([x], [y], config, seed=5)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        b = layer_pair_mi([x], [y], config, seed=5)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(a.matrix, b.matrix)
        assert torch.equal(a.null, b.null)
        assert torch.equal(a.interval, b.interval)
        c = layer_pair_mi([x], [y], config, seed=6)
        assert not torch.equal(a.null, c.null)
        assert not torch.equal(a.interval, c.interval)

    def test_config_survives_json(self, estimator: str) -> None:
        config = quick(estimator)
        assert MIConfig(**json.loads(json.dumps(config.to_dict()))) == config

    def test_a_result_does_not_move(self, estimator: str) -> None:
        x, y, _ = correlated(60, [0.9, 0.5], seed=0)
        got = layer_pair_mi([x], [y], quick(estimator, n_permutations=2))
        kept = got.matrix.clone()
        again = LayerPairMI(**{k: getattr(got, k) for k in got.__dataclass_fields__})
        x.zero_()
        got.null_mean.zero_()
        again.matrix.zero_()
        assert torch.equal(got.matrix, kept)

    def test_bad_rows_are_named_by_hook(self, estimator: str) -> None:
        good = {"blocks.0.hook_resid_post": normal(30, 4, seed=0)}
        bad = {"blocks.3.hook_resid_post": normal(30, 4, seed=1)}
        bad["blocks.3.hook_resid_post"][7, 2] = torch.nan
        message = r"target_states\['blocks.3.hook_resid_post'\] holds NaN or Inf in 1 of 30 rows \(first: row 7\)"
        with pytest.raises(DataError, match=message):
            layer_pair_mi(good, bad, quick(estimator))
        with pytest.raises(DataError, match=r"paired row by row .*: got 30 and 29 rows"):
            layer_pair_mi(good, [normal(29, 4, seed=1)], quick(estimator))
        with pytest.raises(
            DataError, match=r"expert_states\['expert.0.states'\] is the same in every row"
        ):
            layer_pair_mi([torch.ones(30, 4)], good, quick(estimator))
        with pytest.raises(DataError, match="target_states is empty"):
            layer_pair_mi(good, [], quick(estimator))

    def test_a_progress_bar_changes_nothing(
        self, estimator: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        x = normal(30, 3, seed=0)
        config = quick(estimator, n_permutations=2)
        silent = layer_pair_mi([x], [x], config)
        assert capsys.readouterr().err == ""
        shown = layer_pair_mi([x], [x], config, progress=True)
        assert f"null ({estimator})" in capsys.readouterr().err
        assert torch.equal(silent.null, shown.null)


# --- every field has an effect or raises
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"estimator": "gaussian"}),
        ({}, {"n_components": 2}),
        ({"estimator": "gaussian"}, {"n_components": 2}),
        ({"estimator": "ksg"}, {"n_components": 2}),
        ({}, {"n_folds": 7}),
        ({}, {"shrinkage": 0.9}),
        ({"estimator": "ksg"}, {"n_neighbors": 9}),
        ({}, {"standardise": False}),
        ({"estimator": "cka"}, {"standardise": False}),
        ({}, {"clip": 1.0}),
    ],
)
def test_every_field_changes_the_score(base: dict[str, Any], change: dict[str, Any]) -> None:
    scales = torch.tensor([1.0, 5.0, 0.2, 1.0, 3.0], dtype=torch.float64)
    x, y, _ = correlated(120, [0.9, 0.7, 0.5, 0.3, 0.1], seed=0)
    x, y = x @ normal(5, 5, seed=1) * scales, y @ normal(5, 5, seed=2) * scales
    base = {"estimator": "cca"} | base
    assert abs(score(x, y, quick(**base)) - score(x, y, quick(**(base | change)))) > 1e-3


def test_counts_decide_the_draws() -> None:
    x, y, _ = correlated(60, [0.9, 0.5], seed=0)
    few = layer_pair_mi([x], [y], quick(n_permutations=4, n_bootstrap=10))
    many = layer_pair_mi([x], [y], quick(n_permutations=9, n_bootstrap=400))
    assert (len(few.null), len(many.null)) == (4, 9)
    assert not torch.equal(few.interval, many.interval)
    # The draws of one kind do not move the others.
    assert torch.equal(few.matrix, many.matrix)
    assert torch.equal(few.null, many.null[:4])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"estimator": "ccaa"}, "estimator must be one of .*closest: 'cca'"),
        ({"n_components": 0}, "n_components must be an integer"),
        ({"n_folds": 1}, "n_folds must be an integer"),
        ({"n_permutations": -1}, "n_permutations must be an integer"),
        ({"n_bootstrap": 1}, "n_bootstrap must be an integer"),
        ({"shrinkage": 1.0}, "shrinkage must be a number"),
        ({"clip": 0.0}, "clip must be a number"),
        ({"standardise": "yes"}, "standardise must be a bool"),
        ({"estimator": "ksg", "n_neighbors": 0}, "n_neighbors must be an integer"),
        ({"confidence": 1.0}, "confidence must be a number"),
        ({"n_neighbors": 3}, "n_neighbors=3 has no effect for estimator='cca'"),
        ({"estimator": "ksg", "n_folds": 4}, "n_folds=4 has no effect for estimator='ksg'"),
        (
            {"estimator": "gaussian", "shrinkage": 0.2},
            r"shrinkage=0.2 has no effect for estimator='gaussian' \(it applies to cca\)",
        ),
        (
            {"estimator": "cka", "n_components": 3},
            "n_components=3 has no effect for estimator='cka'",
        ),
    ],
)
def test_bad_or_idle_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        MIConfig(**fields)


@pytest.mark.parametrize(
    ("config", "n", "message"),
    [
        (quick("ksg"), 4, "mutual information with n_neighbors=5 needs more than 5 samples, got 4"),
        (quick("cca"), 5, "mutual information with n_folds=3 needs at least 6 samples, got 5"),
        (
            quick("gaussian", n_components=2),
            5,
            "mutual information with n_components=2 needs more than 5 samples, got 5",
        ),
        (quick("cka"), 3, "debiased CKA needs at least 4 samples, got 3"),
    ],
)
def test_too_few_samples_are_refused(config: MIConfig, n: int, message: str) -> None:
    x = normal(n, 2, seed=0)
    with pytest.raises(DataError, match=message):
        layer_pair_mi([x], [x], config)
    more = normal(n + 1, 2, seed=0) if config.estimator != "ksg" else normal(6, 2, seed=0)
    assert torch.isfinite(layer_pair_mi([more], [more], config).matrix).all()


def test_more_components_than_rank_are_refused() -> None:
    x = normal(40, 6, seed=0)
    low_rank = x[:, :2] @ normal(2, 9, seed=1)
    with pytest.raises(
        ArgumentError,
        match=r"n_components=3 exceeds the rank 2 of target_states\['target.0.states'\]",
    ):
        layer_pair_mi([x], [low_rank], quick(n_components=3))


# --- defaults, groups, and estimators of one's own
# ---------------------------------------------------------------------------------------------------


def test_a_config_says_which_settings_were_used() -> None:
    def settings(estimator: str) -> dict[str, Any]:
        known = MIConfig(estimator=estimator).to_dict()
        return {k: known[k] for k in ("n_folds", "shrinkage", "n_neighbors", "n_components")}

    nothing = dict.fromkeys(("n_folds", "shrinkage", "n_neighbors", "n_components"))
    assert settings("cca") == {**nothing, "n_folds": 3, "shrinkage": 0.1}
    assert settings("ksg") == {**nothing, "n_neighbors": 5}
    assert settings("gaussian") == settings("cka") == nothing
    # As version 0.1.0 saved it: null is the default still.
    assert MIConfig(n_folds=None, shrinkage=None, n_neighbors=None) == MIConfig()


def test_the_estimator_of_a_config_may_be_changed_in_a_copy() -> None:
    copy = dataclasses.replace(MIConfig(), estimator="ksg")
    assert copy == MIConfig(estimator="ksg")
    assert MIConfig(**{**MIConfig().to_dict(), "estimator": "gaussian"}).n_folds is None
    with pytest.raises(ArgumentError, match="n_folds=5 has no effect"):
        dataclasses.replace(MIConfig(n_folds=5), estimator="ksg")


def test_without_groups_every_row_is_drawn_alone_as_before() -> None:
    config = MIConfig(n_permutations=3, n_bootstrap=4)
    got = draw_resamples(torch.arange(20), config, seed=5)
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(20, generator=generator)
    first, second = torch.randint(2**62, (2,), generator=generator).tolist()
    assert torch.equal(torch.cat(got.folds), order)
    assert [len(f) for f in got.folds] == [7, 7, 6]
    stream = torch.Generator().manual_seed(first)
    assert all(torch.equal(o, torch.randperm(20, generator=stream)) for o in got.orders)
    drawn = torch.randint(20, (4, 20), generator=torch.Generator().manual_seed(second))
    counts = torch.stack([torch.bincount(row, minlength=20) for row in drawn])
    assert torch.equal(got.weights, counts.double())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rows_that_are_groups_of_one_are_rows(estimator: str) -> None:
    x, y, _ = correlated(40, [0.9, 0.5], seed=0)
    config = quick(estimator, n_permutations=3)
    plain = layer_pair_mi([x], [y], config)
    groups = torch.randperm(40, generator=torch.Generator().manual_seed(1)).sort().values - 7
    grouped = layer_pair_mi([x], [y], config, groups=groups)
    for name in ("matrix", "null", "interval"):
        assert torch.equal(getattr(plain, name), getattr(grouped, name))
    assert (plain.n_groups, grouped.n_groups) == (None, 40)
    assert "n_samples=40 in 40 groups" in repr(grouped)


@pytest.mark.parametrize("equal", [True, False])
def test_draws_keep_groups_together(equal: bool) -> None:
    sizes = torch.full((45,), 4) if equal else torch.arange(45) % 5 + 2
    groups = torch.repeat_interleave(torch.randperm(45) * 3, sizes)
    config = MIConfig(n_permutations=20, n_bootstrap=6)
    got = draw_resamples(groups, config, seed=0)
    parts = [set(groups[fold].tolist()) for fold in got.folds]
    assert sum(map(len, parts)) == 45
    assert sorted(torch.cat(got.folds).tolist()) == list(range(len(groups)))
    met_itself = 0
    for order in got.orders:
        for group in groups.unique():
            rows = (groups == group).nonzero()[:, 0]
            met = order[rows]
            other = groups[met].unique()
            assert len(other) == 1
            whole = (groups == other).nonzero()[:, 0]
            assert (met.diff() >= 0).all()  # in the order of its tokens
            assert len(met.unique()) == min(len(rows), len(whole))
            met_itself += bool(other == group)
        if equal:
            assert len(order.unique()) == len(order)
    assert met_itself < 0.08 * 20 * 45
    for weights in got.weights:
        assert float(weights.sum()) == pytest.approx(len(groups))
        assert all(len(weights[groups == g].unique()) == 1 for g in groups.unique())


def tokens(sizes: Tensor, seed: int) -> Tensor:
    """Rows of which 80 % of the variance belongs to their text."""
    groups = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    text, token = normal(len(sizes), 3, seed=seed), normal(len(groups), 3, seed=seed + 10**6)
    return 0.8**0.5 * text[groups] + 0.2**0.5 * token


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_null_of_groups_is_calibrated_where_that_of_rows_is_not(estimator: str) -> None:
    components = {} if estimator == "cka" else {"n_components": 2}
    config = quick(estimator, n_permutations=39, n_bootstrap=2, **components)
    layers = 4 if estimator == "ksg" else 6
    by_group, by_row = [], []
    for seed in range(5):
        sizes = torch.randint(3, 10, (20,), generator=torch.Generator().manual_seed(seed))
        groups = torch.repeat_interleave(torch.arange(20), sizes)
        x, y = (
            [tokens(sizes, 1000 * seed + start + i) for i in range(layers)] for start in (0, 500)
        )
        by_group.append(layer_pair_mi(x, y, config, seed=seed, groups=groups).p_values)
        by_row.append(layer_pair_mi(x, y, config, seed=seed).p_values)
    # 80-180 pairs, of which those sharing a layer are dependent. Nominal 0.05.
    assert float((torch.stack(by_group) <= 0.05).double().mean()) <= 0.11
    assert float((torch.stack(by_group) <= 0.5).double().mean()) > 0.25
    assert float((torch.stack(by_row) <= 0.05).double().mean()) > 0.5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_dependence_between_groups_is_found_and_its_interval_is_wider(estimator: str) -> None:
    sizes = torch.arange(60) % 4 + 3
    groups = torch.repeat_interleave(torch.arange(60), sizes)
    x = tokens(sizes, 0)
    y = x + 0.3 * tokens(sizes, 1)
    config = quick(estimator, n_permutations=39, n_bootstrap=200)
    grouped = layer_pair_mi([x], [y], config, groups=groups)
    plain = layer_pair_mi([x], [y], config)
    assert float(grouped.p_values) == pytest.approx(1 / 40)
    assert float(grouped.matrix) == pytest.approx(
        float(plain.matrix), abs=0.3 if estimator == "cca" else 1e-12
    )
    width = [float(r.interval[..., 1] - r.interval[..., 0]) for r in (grouped, plain)]
    assert width[0] > 1.2 * width[1]


@pytest.mark.parametrize("estimator", ["gaussian", "cka"])
def test_a_null_draw_with_repeated_rows_is_the_estimate_on_them(estimator: str) -> None:
    sizes = torch.arange(12) % 5 + 2
    groups = torch.repeat_interleave(torch.arange(12), sizes)
    x, y = tokens(sizes, 0), tokens(sizes, 1)
    config = quick(estimator, n_permutations=3, standardise=False)
    got = layer_pair_mi([x], [y], config, groups=groups)
    for order, draw in zip(draw_resamples(groups, config, 0).orders, got.null, strict=True):
        assert len(order.unique()) < len(order)
        again = layer_pair_mi([x], [y[order]], config)
        torch.testing.assert_close(draw, again.matrix)


def test_repeated_rows_that_span_fewer_components_are_no_error() -> None:
    groups = torch.repeat_interleave(torch.arange(5), torch.tensor([60, 1, 1, 1, 1]))
    x, y = normal(64, 8, seed=0), normal(64, 8, seed=1)
    got = layer_pair_mi([x], [y], quick("gaussian", n_permutations=20), groups=groups)
    assert torch.isfinite(got.null).all()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([0, 1, 2], r"one integer per row, shape \(30,\), got torch.int64 of shape \(3,\)"),
        (torch.arange(30) / 2, "one integer per row, .* got torch.float32"),
        (["a"] * 30, "one integer per row"),
        ([0] * 15 + [1] * 15, "at least 6 groups .* got 2"),
    ],
)
def test_unusable_groups_are_refused(groups: Any, message: str) -> None:
    x = normal(30, 3, seed=0)
    with pytest.raises(DataError, match=message):
        layer_pair_mi([x], [x], quick(), groups=groups)


def test_an_estimator_of_ones_own_is_one_entry_in_the_table() -> None:
    def columns(side: Any) -> Tensor:
        return torch.stack([layer.features[:, 0] for layer in side])

    @register_estimator("own")
    class Own(Estimator):
        unit, quantity = "share", "common_sign"
        defaults = {"n_folds": 4}  # noqa: RUF012
        options = {"sign": 1}  # noqa: RUF012

        def __init__(self, expert: Any, target: Any, config: MIConfig, folds: Any) -> None:
            self.x, self.y, self.folds = columns(expert).sign(), columns(target).sign(), folds
            self.x = self.x * config.option("sign")

        def observed(self) -> Tensor:
            return (self.x @ self.y.T) / self.x.shape[1]

        def permuted(self, order: Tensor) -> Tensor:
            return (self.x @ self.y[:, order].T) / self.x.shape[1]

        def bootstrap(self, weights: Tensor) -> Tensor:
            return torch.einsum("bn,in,jn->bij", weights, self.x, self.y) / self.x.shape[1]

    try:
        x = normal(40, 3, seed=0)
        config = MIConfig(estimator="own", n_permutations=9)
        assert config.n_folds == 4
        got = layer_pair_mi([x, -x], [x], config)
        assert got.matrix.flatten().tolist() == [1.0, -1.0]
        assert (got.unit, got.n_components) == ("share", None)
        assert "common_sign" in got.to_pandas()
        other = MIConfig(estimator="own", n_permutations=9, options={"sign": -1})
        assert layer_pair_mi([x, -x], [x], other).matrix.flatten().tolist() == [-1.0, 1.0]
        assert MIConfig(**json.loads(json.dumps(other.to_dict()))) == other != config
        assert hash(other) != hash(config)
        assert dict(config.options) == {"sign": 1}
        for wrong, message in (
            ({"width": 1}, r"'width' is no option of estimator='own', which has: sign"),
            ({"sign": [1]}, r"options\['sign'\] must be a number"),
            ("sign", "options must be a dict"),
        ):
            with pytest.raises(ArgumentError, match=message):
                MIConfig(estimator="own", options=wrong)
        with pytest.raises(ArgumentError, match="which has: none"):
            MIConfig(options={"sign": 1})
        register_estimator("own")(Own)  # the same again changes nothing
        with pytest.raises(ArgumentError, match="there is already an estimator 'own'"):
            register_estimator("own")(TABLE["cca"])
        with pytest.raises(ArgumentError, match=r"n_neighbors=7 .* applies to ksg"):
            MIConfig(estimator="own", n_neighbors=7)
    finally:
        del TABLE["own"]
    with pytest.raises(ArgumentError, match="estimator must be one of"):
        MIConfig(estimator="own")
    with pytest.raises(ArgumentError, match=r"Estimator must define observed\(\)"):
        register_estimator("empty")(Estimator)


# --- threads
# -------------------------------------------------------------------------------------------------------


def test_the_number_of_torch_threads_is_as_before() -> None:
    def in_a_new_thread() -> int:
        found: list[int] = []
        worker = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        worker.start()
        worker.join()
        return found[0]

    original = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with parallel_map(torch.device("cpu")) as run:
            assert list(run(lambda _: torch.get_num_threads(), range(3))) == [1, 1, 1]
        assert torch.get_num_threads() == in_a_new_thread() == 2

        def fails_inside() -> None:
            with parallel_map(torch.device("cpu")) as run:
                list(run(lambda i: 1 / i, [1, 0]))

        with pytest.raises(ZeroDivisionError):
            fails_inside()
        assert torch.get_num_threads() == in_a_new_thread() == 2
    finally:
        torch.set_num_threads(original)


def test_other_devices_use_the_plain_map() -> None:
    with parallel_map(torch.device("meta")) as run:
        assert list(run(lambda i: i + 1, [1, 2])) == [2, 3]
