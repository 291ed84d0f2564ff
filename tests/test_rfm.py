"""The Recursive Feature Machine: against xRFM, autograd and scikit-learn, laws, and every setting's
effect."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, DataError, SolveError, WidthError
from expertsteer_lens.learn.rfm import RFM, RFMConfig, fit_rfm

SINGLE = RFMConfig(bandwidth=1.0, center_gradients=False, validation_fraction=0.0)
"""One setting, no validation, last round."""
XRFM_LIKE = RFMConfig(
    bandwidth=10.0,
    bandwidth_unit="absolute",
    center_gradients=False,
    normalise="max",
    standardise="none",
    targets="zero_one",
    validation_fraction=0.0,
)


def planted(
    n: int = 80, d: int = 30, *, gap: float = 2.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit noise, classes `2 * gap` apart along one unit axis."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.randn(d, generator=generator, dtype=torch.float64)
    axis = axis / axis.norm()
    labels = (torch.arange(n) % 2).double()
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return noise + gap * (2.0 * labels[:, None] - 1.0) * axis, labels, axis


def nonlinear(n: int, d: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels from a curved rule, so that rounds, centring and normaliser all matter."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator)
    labels = rows[:, 0] + 0.5 * rows[:, 1] ** 2 + 0.3 * torch.randn(n, generator=generator) > 0.5
    return rows, labels.float()


def cosine(left: Tensor, right: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(left.double(), right.double(), dim=0))


def fit(rows: Tensor, labels: Tensor, config: RFMConfig = SINGLE, **changes) -> RFM:
    return fit_rfm(rows, labels, dataclasses.replace(config, **changes))


def dense_rfm(rows: Tensor, labels: Tensor, config: RFMConfig) -> Tensor:
    """The recursion written out in d-space with autograd gradients and an explicit d x d metric:
    returns the AGOP."""
    x, metric = rows.double(), torch.eye(rows.shape[1], dtype=torch.float64)
    y = labels.double() - (labels.double().mean() if config.targets == "centred" else 0.0)
    n = len(x)
    for _ in range(config.n_rounds):

        def f(at: Tensor, centres: Tensor, weights: Tensor, m: Tensor) -> Tensor:
            moved = at[:, None, :] - centres[None, :, :]
            t = torch.einsum("ijk,kl,ijl->ij", moved, m, moved).clamp(min=1e-300).sqrt()
            return torch.exp(-t / config.bandwidth) @ weights

        kernel = torch.stack(
            [f(x, x[i : i + 1], torch.ones(1).double(), metric) for i in range(n)], dim=1
        )
        kernel.fill_diagonal_(1.0)
        alpha = torch.linalg.solve(kernel + config.ridge * torch.eye(n), y)
        gradients = []
        for j in range(n):
            others = torch.arange(n) != j
            at = x[j : j + 1].clone().requires_grad_()
            (slope,) = torch.autograd.grad(f(at, x[others], alpha[others], metric).sum(), at)
            gradients.append(slope[0])
        g = torch.stack(gradients)
        if config.center_gradients:
            g = g - g.mean(0)
        agop = g.T @ g / n
        metric = agop / {"trace": agop.trace(), "max": agop.max(), "none": 1.0}[config.normalise]
    return agop


# -- references


@pytest.mark.parametrize("shape", [(24, 7), (16, 40)], ids=["d<n", "n<d"])
@pytest.mark.parametrize("center", [True, False], ids=["centred", "uncentred"])
@pytest.mark.parametrize("normalise", ["trace", "max", "none"])
def test_direction_and_share_equal_the_dense_recursion_with_autograd(
    shape, center, normalise
) -> None:
    rows, labels = nonlinear(*shape)
    bandwidth = 2.0 if normalise == "none" else 5.0
    config = dataclasses.replace(
        XRFM_LIKE,
        bandwidth=bandwidth,
        center_gradients=center,
        normalise=normalise,
        n_rounds=3,
        targets="centred",
    )
    found = fit_rfm(rows, labels, config)
    values, vectors = torch.linalg.eigh(dense_rfm(rows, labels, config))
    assert abs(cosine(found.direction, vectors[:, -1])) > 1.0 - 1e-8
    assert found.eigenvalue_share == pytest.approx(float(values[-1] / values.sum()), rel=1e-6)
    top = found.top_directions(3)
    torch.testing.assert_close(
        (top.double() @ vectors[:, [-1, -2, -3]]).abs(), torch.eye(3).double(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("kernel", ["l2", "l2_high_dim"])
@pytest.mark.parametrize("center", [True, False], ids=["centred", "uncentred"])
@pytest.mark.parametrize("shape", [(120, 40), (90, 200)], ids=["d<n", "n<d"])
def test_five_rounds_give_the_direction_of_xrfm(kernel, center, shape) -> None:
    rfm_src = pytest.importorskip(
        "xrfm.rfm_src", reason="xrfm, the reference implementation, is not installed"
    )
    rows, labels = nonlinear(*shape)
    reference = rfm_src.RFM(
        kernel=kernel, bandwidth=10.0, device="cpu", verbose=False, tuning_metric="mse"
    )
    data = (rows.clone(), labels[:, None].clone())
    reference.fit(
        data,
        data,
        iters=5,
        reg=1e-3,
        center_grads=center,
        return_best_params=False,
        early_stop_rfm=False,
    )
    expected = torch.linalg.eigh(reference.M.double())[1][:, -1]
    assert (
        abs(cosine(fit(rows, labels, XRFM_LIKE, center_gradients=center).direction, expected))
        >= 0.9999
    )
    # The test can fail: one round fewer is another direction.
    assert (
        abs(
            cosine(
                fit(rows, labels, XRFM_LIKE, center_gradients=center, n_rounds=1).direction,
                expected,
            )
        )
        < 0.9999
    )


def test_one_round_predicts_as_scikit_learn_kernel_ridge() -> None:
    from sklearn.kernel_ridge import KernelRidge

    rows, labels = nonlinear(50, 12)
    new = torch.randn(9, 12, generator=torch.Generator().manual_seed(4))
    found = fit(rows, labels, XRFM_LIKE, n_rounds=1).predict(new)
    kernel = torch.exp(-torch.cdist(rows.double(), rows.double()) / 10.0)
    model = KernelRidge(alpha=1e-3, kernel="precomputed").fit(kernel.numpy(), labels.numpy())
    expected = model.predict(torch.exp(-torch.cdist(new.double(), rows.double()) / 10.0).numpy())
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-6, rtol=1e-6)


def test_standardised_fits_equal_raw_fits_on_standardised_rows() -> None:
    rows, labels = nonlinear(60, 20)
    rows = rows.double() * torch.linspace(0.5, 4.0, 20).double() + 7.0
    centred = rows - rows.mean(0)
    absolute = dataclasses.replace(XRFM_LIKE, normalise="trace", bandwidth=4.0)
    scalar, sigma = centred.square().mean().sqrt(), centred.square().mean(0).sqrt()
    by_scale = fit(rows, labels, absolute, standardise="scale")
    assert (
        cosine(by_scale.direction, fit(centred / scalar, labels, absolute).direction) > 1.0 - 1e-9
    )
    # Per coordinate, the gradient v of the standardised problem becomes the displacement sigma * v.
    gradient = fit(centred / sigma, labels, absolute).direction.double()
    by_coordinate = fit(rows, labels, absolute, standardise="coordinate")
    assert cosine(by_coordinate.direction, sigma * gradient) > 1.0 - 1e-9
    assert cosine(by_coordinate.direction, gradient / sigma) < 0.99
    top = by_coordinate.top_directions(2)
    torch.testing.assert_close(top[0], by_coordinate.direction, atol=1e-5, rtol=0)


def test_constant_coordinates_are_left_alone_by_coordinate_standardising() -> None:
    rows, labels, axis = planted()
    widened = torch.cat([rows, torch.full((80, 1), 0.1).double()], dim=1)
    found = fit(widened, labels, standardise="coordinate").direction
    assert float(found[-1]) == 0.0
    assert cosine(found[:-1], axis) > 0.9


# -- laws


@pytest.mark.parametrize("shape", [(80, 30), (60, 300)], ids=["d<n", "n<d"])
@pytest.mark.parametrize("config", [SINGLE, RFMConfig()], ids=["single", "default"])
def test_planted_direction_is_recovered_with_its_sign(shape, config) -> None:
    rows, labels, axis = planted(*shape, gap=3.0)
    # The mean difference is the best estimate there is for this data: noise alone keeps it at
    # cosine 0.95 and 0.80.
    floor = 0.9 * cosine(rows[labels == 1].mean(0) - rows[labels == 0].mean(0), axis)
    found = fit_rfm(rows.float(), labels, config)
    assert found.direction.dtype == torch.float32
    assert float(found.direction.norm()) == pytest.approx(1.0, abs=1e-6)
    assert cosine(found.direction, axis) > floor
    assert found.median_projection.negative < found.median_projection.positive
    # Towards label 1, whichever class that is.
    assert cosine(fit_rfm(rows.float(), 1.0 - labels, config).direction, axis) < -floor


def test_sign_is_that_of_the_correlation_of_labels_and_projections() -> None:
    for seed in range(6):
        rows, labels = nonlinear(40, 15, seed=seed)
        for vector in fit(rows, labels).top_directions(4):
            correlation = torch.corrcoef(
                torch.stack([labels.double(), rows.double() @ vector.double()])
            )[0, 1]
            assert float(correlation) > 0.0


def test_shuffled_labels_find_neither_the_direction_nor_an_auc() -> None:
    rows, labels, axis = planted(120, 40, gap=3.0)
    real = fit_rfm(rows, labels)
    aucs, cosines = [], []
    for seed in range(5):
        order = torch.randperm(120, generator=torch.Generator().manual_seed(seed))
        fitted = fit_rfm(rows[:80], labels[order][:80], SINGLE)
        held = fitted.predict(rows[80:])
        truth = labels[order][80:] == 1
        aucs.append(float((held[truth][:, None] > held[~truth][None, :]).double().mean()))
        cosines.append(abs(cosine(fitted.direction, axis)))
    assert real.validation_auc == 1.0
    assert sum(aucs) / 5 == pytest.approx(0.5, abs=0.12)
    assert sum(cosines) / 5 < 0.5 < cosine(real.direction, axis)


@pytest.mark.parametrize("standardise", ["none", "scale"])
@pytest.mark.parametrize("shape", [(40, 12), (20, 30)], ids=["d<n", "n<d"])
def test_rotating_and_shifting_the_rows_rotates_the_direction(standardise, shape) -> None:
    rows, labels = nonlinear(*shape)
    rows = rows.double() * torch.linspace(0.3, 2.0, shape[1]).double()
    generator = torch.Generator().manual_seed(1)
    turn, _ = torch.linalg.qr(
        torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)
    )
    plain = fit(rows, labels, standardise=standardise)
    turned = fit(rows @ turn.T + 5.0, labels, standardise=standardise)
    assert cosine(turned.direction, turn @ plain.direction.double()) > 1.0 - 1e-8
    assert turned.eigenvalue_share == pytest.approx(plain.eigenvalue_share, rel=1e-6)


def test_coordinate_standardising_does_not_commute_with_rotations() -> None:
    rows, labels = nonlinear(40, 12)
    rows = rows.double() * torch.linspace(0.1, 4.0, 12).double()
    generator = torch.Generator().manual_seed(1)
    turn, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    plain, turned = (
        fit(r, labels, standardise="coordinate").direction.double() for r in (rows, rows @ turn.T)
    )
    assert cosine(turned, turn @ plain) < 0.999


def test_padding_with_zero_coordinates_changes_nothing() -> None:
    # 40 rows in 30 dimensions are solved over coordinates, padded to 300 over inner products: the
    # same problem.
    rows, labels = nonlinear(40, 30)
    padded = torch.cat([rows, torch.zeros(40, 270)], dim=1)
    config = dataclasses.replace(XRFM_LIKE, normalise="trace")
    narrow, wide = fit_rfm(rows, labels, config), fit_rfm(padded, labels, config)
    assert cosine(wide.direction[:30], narrow.direction) > 1.0 - 1e-8
    assert float(wide.direction[30:].abs().max()) < 1e-7
    assert wide.eigenvalue_share == pytest.approx(narrow.eigenvalue_share, rel=1e-7)
    torch.testing.assert_close(
        wide.predict(padded + 0.1), narrow.predict(rows + 0.1), atol=1e-2, rtol=1e-2
    )
    torch.testing.assert_close(wide.predict(padded), narrow.predict(rows), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(
        wide.top_directions(5)[:, :30], narrow.top_directions(5), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("shape", [(40, 12), (20, 30)], ids=["d<n", "n<d"])
def test_order_of_rows_and_unit_of_activations_do_not_matter(shape) -> None:
    rows, labels = nonlinear(*shape)
    plain = fit(rows, labels)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(2))
    assert cosine(fit(rows[order], labels[order]).direction, plain.direction) > 1.0 - 1e-8
    assert cosine(fit(1000.0 * rows, labels).direction, plain.direction) > 1.0 - 1e-8


def test_swapped_labels_flip_direction_and_prediction_with_centred_targets_only() -> None:
    rows, labels = nonlinear(60, 20)
    rows, labels = rows[labels.argsort()[:45]], labels[labels.argsort()[:45]]  # unequal classes
    plain, swapped = fit(rows, labels), fit(rows, 1.0 - labels)
    torch.testing.assert_close(swapped.direction, -plain.direction, atol=1e-6, rtol=0)
    torch.testing.assert_close(swapped.predict(rows), 1.0 - plain.predict(rows), atol=1e-8, rtol=0)
    zero_one = [fit(rows, y, targets="zero_one").direction for y in (labels, 1.0 - labels)]
    assert cosine(zero_one[0], -zero_one[1]) < 1.0 - 1e-6


@pytest.mark.parametrize("shape", [(40, 12), (20, 30)], ids=["d<n", "n<d"])
@pytest.mark.parametrize("n_rounds", [1, 3])
def test_predictor_reproduces_its_training_labels_up_to_the_ridge(shape, n_rounds) -> None:
    rows, labels = nonlinear(*shape)
    fitted = fit(rows, labels, n_rounds=n_rounds, ridge=1e-2)
    residual = fitted.predict(rows) - labels.double()
    assert float(residual.square().mean()) == pytest.approx(fitted.chosen.train_error, rel=1e-5)
    assert float(residual.abs().max()) < 0.5


def test_labels_as_bool_or_signs_and_half_precision_rows_are_accepted() -> None:
    rows, labels, _ = planted(30, 8)
    plain = fit(rows, labels).direction
    for same in (labels.bool(), 2.0 * labels - 1.0, labels.long()):
        assert torch.equal(fit(rows, same).direction, plain)
    assert cosine(fit(rows.bfloat16(), labels).direction, plain) > 0.999


# -- validation and search


def test_search_keeps_the_best_auc_then_the_lower_error_then_the_earlier_round() -> None:
    rows, labels = nonlinear(150, 10)
    config = RFMConfig(bandwidth=(0.01, 1.0), center_gradients=(True, False), n_rounds=3)
    found = fit_rfm(rows, labels, config, seed=1)
    searched = [line for line in found.history if line.stage == "search"]
    assert [(r.bandwidth, r.center_gradients, r.round) for r in searched] == [
        (b, c, t) for b in (0.01, 1.0) for c in (True, False) for t in (1, 2, 3)
    ]
    best = max(searched, key=lambda r: (r.validation_auc, -r.validation_error))
    assert found.chosen == best
    assert found.validation_auc == best.validation_auc > 0.7
    fitted = [line for line in found.history if line.stage == "fit"]
    assert [line.round for line in fitted] == list(range(1, best.round + 1))
    assert all(
        line.bandwidth == best.bandwidth and math.isnan(line.validation_auc) for line in fitted
    )


def test_what_an_internal_split_chooses_is_fitted_on_all_rows() -> None:
    rows, labels = nonlinear(100, 10)
    found = fit_rfm(rows, labels, RFMConfig(n_rounds=3), seed=4)
    again = fit(
        rows,
        labels,
        bandwidth=found.chosen.bandwidth,
        center_gradients=found.chosen.center_gradients,
        n_rounds=found.chosen.round,
    )
    torch.testing.assert_close(found.direction, again.direction, atol=1e-6, rtol=0)
    assert again.validation_auc is None


def test_given_validation_rows_choose_but_are_never_fitted() -> None:
    from sklearn.metrics import roc_auc_score

    rows, labels = nonlinear(120, 10)
    train, held = (rows[:80], labels[:80]), (rows[80:], labels[80:])
    found = fit_rfm(*train, RFMConfig(n_rounds=3), validation=held)
    assert {line.stage for line in found.history} == {"search"}
    assert found.validation_auc == pytest.approx(
        roc_auc_score(held[1].numpy(), found.predict(held[0]).numpy())
    )
    again = fit(
        *train,
        bandwidth=found.chosen.bandwidth,
        center_gradients=found.chosen.center_gradients,
        n_rounds=found.chosen.round,
    )
    torch.testing.assert_close(found.direction, again.direction, atol=1e-6, rtol=0)
    error = (found.predict(held[0]) - held[1]).square().mean()
    assert float(error) == pytest.approx(found.chosen.validation_error, rel=1e-6)


@pytest.mark.parametrize("shape", [(40, 12), (20, 30)], ids=["d<n", "n<d"])
@pytest.mark.parametrize("n_rounds", [1, 3])
def test_predictions_in_chunks_are_those_of_the_whole(shape, n_rounds) -> None:
    rows, labels = nonlinear(*shape)
    fitted = fit(rows, labels, n_rounds=n_rounds)
    whole = fitted.predictor.predict(rows)
    torch.testing.assert_close(fitted.predictor.predict(rows, chunk=7), whole, atol=1e-9, rtol=0)


def test_settings_that_fail_are_recorded_and_the_rest_decides() -> None:
    rows, labels = nonlinear(60, 10)
    config = RFMConfig(
        bandwidth=(1e-4, 5.0), bandwidth_unit="absolute", center_gradients=False, n_rounds=2
    )
    found = fit_rfm(rows, labels, config)
    failed = [line for line in found.history if line.status != "ok"]
    assert [(line.bandwidth, line.round) for line in failed] == [(1e-4, 1)]
    assert "gradients vanish in round 1 at bandwidth=0.0001" in failed[0].status
    assert found.chosen.bandwidth == 5.0
    with pytest.raises(
        SolveError, match=r"gradients vanish in round 1 at bandwidth=0.0002.*raise bandwidth"
    ):
        fit_rfm(rows, labels, dataclasses.replace(config, bandwidth=(1e-4, 2e-4)))


def test_history_is_a_table_with_a_line_per_round() -> None:
    rows, labels = nonlinear(40, 6)
    history = fit(rows, labels, n_rounds=4).history
    table = history.to_pandas()
    assert list(table["round"]) == [1, 2, 3, 4]
    assert list(table.columns) == list(history[0]._fields)
    assert (table["status"] == "ok").all()
    assert table["validation_auc"].isna().all()


def test_reference_settings_are_those_of_the_published_code() -> None:
    config = RFMConfig.reference()
    assert (config.bandwidth, config.center_gradients, config.ridge) == (
        (1.0, 10.0, 100.0),
        (True, False),
        1e-3,
    )
    assert (config.standardise, config.normalise, config.targets) == ("none", "max", "zero_one")
    rows, labels, axis = planted(80, 30, gap=3.0)
    assert cosine(fit_rfm(rows, labels, config).direction, axis) > 0.8


# -- settings


CHANGES = [
    ("kernel", "gaussian"),
    ("bandwidth", 2.0),
    ("bandwidth_unit", "absolute"),
    ("ridge", 0.5),
    ("n_rounds", 2),
    ("center_gradients", True),
    ("standardise", "coordinate"),
    ("targets", "zero_one"),
    ("validation_fraction", 0.4),
]


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_every_setting_changes_the_direction(name, value) -> None:
    rows, labels = nonlinear(61, 10)
    rows = rows * torch.linspace(0.2, 3.0, 10)
    base = dataclasses.replace(SINGLE, n_rounds=4)
    assert (
        cosine(
            fit(rows, labels, base, **{name: value}).direction, fit(rows, labels, base).direction
        )
        < 1.0 - 1e-6
    )


def test_normalise_and_scale_act_with_absolute_bandwidths() -> None:
    rows, labels = nonlinear(61, 10)
    rows = 2.0 * rows
    base = dataclasses.replace(SINGLE, bandwidth_unit="absolute", bandwidth=3.0)
    found = [fit(rows, labels, base, normalise=n).direction for n in ("trace", "max", "none")]
    found.append(fit(rows, labels, base, standardise="none").direction)
    for i, left in enumerate(found):
        for right in found[:i]:
            assert cosine(left, right) < 1.0 - 1e-6


def test_every_setting_is_covered_by_a_test_of_its_effect() -> None:
    covered = {name for name, _ in CHANGES} | {"normalise"}
    assert covered == {f.name for f in dataclasses.fields(RFMConfig)}


def test_config_survives_json() -> None:
    config = RFMConfig(bandwidth=(1.0, 2.0), center_gradients=(False,))
    assert RFMConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "laplac"}, "kernel must be one of .*closest: 'laplace'"),
        ({"bandwidth": 0.0}, r"bandwidth must be a number in \(0.0, inf\], got 0.0"),
        ({"bandwidth": (1.0, -1.0)}, r"bandwidth must be a number in \(0.0, inf\], got -1.0"),
        ({"bandwidth": ()}, "non-empty tuple of numbers"),
        ({"bandwidth_unit": "median"}, "bandwidth_unit must be one of"),
        ({"ridge": -1.0}, "ridge must be a number in"),
        ({"n_rounds": 0}, "n_rounds must be an integer in"),
        ({"n_rounds": 2.5}, "n_rounds must be an integer in"),
        ({"center_gradients": "yes"}, "center_gradients a bool"),
        ({"center_gradients": ()}, "center_gradients a bool"),
        ({"normalise": "l1"}, "normalise must be one of"),
        (
            {"normalise": "max"},
            "normalise='max' has no effect with bandwidth_unit='median_distance'",
        ),
        ({"standardise": "zscore"}, "standardise must be one of"),
        ({"targets": "signs"}, "targets must be one of"),
        ({"validation_fraction": 0.6}, "validation_fraction must be a number in"),
    ],
)
def test_settings_outside_their_range_are_refused(changes, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        RFMConfig(**changes)


# -- state


def test_seed_fixes_the_split_and_nothing_global_is_touched() -> None:
    rows, labels = nonlinear(100, 10)
    state = torch.random.get_rng_state()
    first, again, other = (fit_rfm(rows, labels, RFMConfig(n_rounds=2), seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.direction, again.direction)
    assert first.history.to_pandas().equals(again.history.to_pandas())
    assert not first.history.to_pandas().equals(other.history.to_pandas())


@pytest.mark.parametrize("shape", [(40, 12), (20, 30)], ids=["d<n", "n<d"])
def test_inputs_are_neither_changed_nor_aliased(shape) -> None:
    rows, labels = nonlinear(*shape)
    held = (rows.clone() + 0.1, labels.clone())
    before = rows.clone(), labels.clone(), held[0].clone()
    fitted = fit_rfm(rows, labels, SINGLE, validation=held)
    assert torch.equal(rows, before[0])
    assert torch.equal(labels, before[1])
    assert torch.equal(held[0], before[2])
    direction, top, predicted = (
        fitted.direction.clone(),
        fitted.top_directions(2),
        fitted.predict(before[2]),
    )
    rows.fill_(float("nan"))
    held[0].zero_()
    assert torch.equal(fitted.direction, direction)
    assert torch.equal(fitted.top_directions(2), top)
    assert torch.equal(fitted.predict(before[2]), predicted)


def test_projection_is_the_raw_inner_product_and_its_medians_are_by_class() -> None:
    rows, labels, _ = planted(40, 8)
    rows = rows.float() + 3.0
    fitted = fit(rows, labels)
    projected = fitted.project(rows)
    torch.testing.assert_close(projected, rows @ fitted.direction)
    assert fitted.project(rows.double()).dtype == torch.float64
    for label, median in enumerate(fitted.median_projection):
        assert median == pytest.approx(float(projected[labels == label].median()))


def test_repr_names_what_was_chosen() -> None:
    rows, labels, _ = planted(40, 8)
    assert repr(fit(rows, labels)).startswith(
        "RFM(n=40, d=8, bandwidth=1 (median_distance), center_gradients=False, round=5, "
        "validation_auc=none, "
    )
    assert "validation_auc=1.000" in repr(fit_rfm(*planted(40, 8, gap=4.0)[:2]))


def test_activations_that_require_gradients_give_results_that_do_not() -> None:
    rows, labels, _ = planted(20, 5)
    fitted = fit(rows.clone().requires_grad_(), labels)
    assert not fitted.direction.requires_grad
    assert not fitted.predict(rows).requires_grad


# -- errors


def test_unusable_data_is_refused_by_name() -> None:
    rows, labels, _ = planted(20, 5)
    bad = rows.clone()
    bad[4, 1] = float("nan")
    with pytest.raises(
        DataError, match=r"activations holds NaN or Inf in 1 of 20 rows \(first: row 4\)"
    ):
        fit_rfm(bad, labels)
    with pytest.raises(DataError, match="labels must hold two classes, got only"):
        fit_rfm(rows, torch.zeros(20))
    with pytest.raises(
        DataError, match=r"labels must have one label per row: expected shape \(20,\), got \(19,\)"
    ):
        fit_rfm(rows, labels[1:])
    with pytest.raises(DataError, match="labels must hold two classes"):
        fit_rfm(rows[:1], labels[:1])
    with pytest.raises(DataError, match="activations must differ between rows"):
        fit_rfm(torch.full((20, 5), 0.1), labels)
    with pytest.raises(DataError, match="activations must be a floating tensor"):
        fit_rfm(torch.ones(20, 5, dtype=torch.long), labels)


def test_unusable_validation_is_refused_by_name() -> None:
    rows, labels, _ = planted(20, 5)
    with pytest.raises(WidthError, match=r"validation\[0\] must have width 5, got 4"):
        fit_rfm(rows, labels, validation=(rows[:, :4], labels))
    with pytest.raises(DataError, match=r"validation\[1\] must hold two classes"):
        fit_rfm(rows, labels, validation=(rows, torch.ones(20)))


def test_a_search_without_validation_rows_is_refused() -> None:
    rows, labels, _ = planted(20, 5)
    with pytest.raises(ArgumentError, match="ask for a search, which needs validation rows"):
        fit_rfm(rows, labels, RFMConfig(validation_fraction=0.0))
    with pytest.raises(
        DataError, match=r"too few for validation_fraction=0.2: 2 negative and 1 positive rows"
    ):
        fit_rfm(rows[:3], labels[:3])
    with pytest.raises(
        DataError, match="18 negative and 2 positive rows do not give both parts both classes"
    ):
        fit_rfm(rows, torch.arange(20) < 2, RFMConfig(validation_fraction=0.1))
    with pytest.raises(ArgumentError, match="seed must be an integer in"):
        fit_rfm(rows, labels, seed=-1)
    assert fit(rows[:2], labels[:2]).direction.shape == (5,)
    assert fit(rows[:, :1], labels).direction.abs().tolist() == [1.0]


def test_duplicate_rows_at_too_small_a_ridge_raise_and_at_a_larger_one_do_not() -> None:
    rows, labels, _ = planted(20, 5)
    doubled, twice = torch.cat([rows, rows]), torch.cat([labels, labels])
    with pytest.raises(
        SolveError,
        match=r"not positive definite at ridge=0; raise ridge.*Nothing was changed for you",
    ):
        fit(doubled, twice, ridge=0.0)
    found = fit(doubled, twice, ridge=1e-3)
    assert bool(torch.isfinite(found.direction).all())
    # Two copies with twice the ridge are one copy.
    assert (
        cosine(
            fit(doubled, twice, XRFM_LIKE, ridge=2e-3).direction,
            fit(rows, labels, XRFM_LIKE).direction,
        )
        > 0.999999
    )


def test_a_median_distance_of_zero_is_refused() -> None:
    rows = torch.zeros(10, 3)
    rows[0] = 1.0
    with pytest.raises(SolveError, match="median distance between rows is 0"):
        fit(rows, torch.arange(10) % 2, ridge=1.0)


def test_methods_refuse_other_widths_and_ranks() -> None:
    rows, labels, _ = planted(20, 5)
    fitted = fit(rows, labels)
    with pytest.raises(WidthError, match="activations must have width 5, got 4"):
        fitted.predict(rows[:, :4])
    with pytest.raises(WidthError, match="activations must have width 5, got 4"):
        fitted.project(rows[:, :4])
    with pytest.raises(ArgumentError, match=r"k must be an integer in \[1, 5\], got 6"):
        fitted.top_directions(6)
