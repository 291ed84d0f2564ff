"""Closed forms, references and limits of the aligners."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import Tensor

from expertsteer_lens.align import (
    KINDS,
    RIDGE_PATH,
    AffineMap,
    Aligner,
    AlignerConfig,
    fit_aligner,
    fit_aligner_grid,
)
from expertsteer_lens.align.fold_sums import coordinate_scale
from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.errors import (
    ArgumentError,
    DataError,
    HookNameError,
    WidthError,
)

FITTED = tuple(k for k in KINDS if k != "identity")
SINGLE = {"rtol": 1e-4, "atol": 1e-5}  # weights are stored in float32


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def paired(
    n: int = 200, d_expert: int = 12, d_target: int = 8, noise: float = 0.5, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Anchors with a decaying spectrum, offsets, and a linear relation plus noise."""
    scales = torch.linspace(2.0, 0.3, d_expert, dtype=torch.float64)
    expert = (
        normal(n, d_expert, seed=seed)
        * scales
        @ normal(d_expert, d_expert, seed=99)
        / d_expert**0.5
        + 3.0
    )
    target = (
        expert @ normal(d_expert, d_target, seed=98)
        + noise * normal(n, d_target, seed=seed + 1)
        - 2.0
    )
    return expert, target


def covariances(e: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C_EE, C_TE, C_TT with divisor n."""
    joint = torch.cov(torch.cat([e, t], 1).T, correction=0)
    d = e.shape[1]
    return joint[:d, :d], joint[d:, :d], joint[d:, d:]


def fvu(aligner: Aligner, e: Tensor) -> float:
    """In-sample fraction of variance lost by the round trip."""
    return float(
        (aligner.decode(aligner.encode(e)) - e).square().sum() / (e - e.mean(0)).square().sum()
    )


# --- ridge


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.1, 10.0])
def test_ridge_equals_the_direct_solve_and_sklearn(ridge: float) -> None:
    e, t = paired()
    got = fit_aligner(e, t, AlignerConfig(ridge=ridge))
    c_ee, c_te, _ = covariances(e, t)
    penalty = ridge * c_ee.diagonal().mean()
    direct = c_te @ torch.linalg.inv(c_ee + penalty * torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(got.encoder.weight.double(), direct, **SINGLE)
    reference = Ridge(alpha=max(float(penalty) * len(e), 1e-12)).fit(e.numpy(), t.numpy())
    torch.testing.assert_close(
        got.encode(e), torch.from_numpy(reference.predict(e.numpy())), **SINGLE
    )
    assert got.quality.ridge == ridge


def test_every_point_of_the_ridge_path_equals_sklearn_cross_validation() -> None:
    e, t = paired(n=60, noise=3.0)
    config = AlignerConfig(n_folds=3)
    got = fit_aligner(e, t, config, seed=4)
    folds = torch.randperm(60, generator=torch.Generator().manual_seed(4)).tensor_split(3)
    assert got.quality.ridge_path is not None
    for ridge, r2 in got.quality.ridge_path[::4]:
        errors, total = 0.0, 0.0
        for held in folds:
            train = torch.tensor(sorted(set(range(60)) - set(held.tolist())))
            unit = e[train].var(0, correction=0).mean()
            model = Ridge(alpha=float(ridge * unit * len(train))).fit(
                e[train].numpy(), t[train].numpy()
            )
            errors += float(
                (t[held] - torch.from_numpy(model.predict(e[held].numpy()))).square().sum()
            )
            total += float((t[held] - t[train].mean(0)).square().sum())
        assert r2 == pytest.approx(1.0 - errors / total, abs=1e-9)
    best = max(got.quality.ridge_path, key=lambda point: point[1])
    assert got.quality.ridge == best[0]
    assert [ridge for ridge, _ in got.quality.ridge_path] == list(RIDGE_PATH)


def test_reported_r2_is_out_of_fold() -> None:
    e, t = paired(n=60, d_expert=30, noise=5.0)
    got = fit_aligner(e, t, AlignerConfig(ridge=1e-6, n_folds=3), seed=1)
    inside = 1.0 - float((t - got.encode(e)).square().sum() / (t - t.mean(0)).square().sum())
    folds = torch.randperm(60, generator=torch.Generator().manual_seed(1)).tensor_split(3)
    errors = total = 0.0
    for held in folds:
        train = torch.tensor(sorted(set(range(60)) - set(held.tolist())))
        part = fit_aligner(e[train], t[train], AlignerConfig(ridge=1e-6, n_folds=2))
        errors += float((t[held] - part.encode(e[held])).square().sum())
        total += float((t[held] - t[train].mean(0)).square().sum())
    assert got.quality.r2 == pytest.approx(1.0 - errors / total, abs=1e-3)
    assert inside > got.quality.r2 + 0.1


@pytest.mark.parametrize("kind", ["ridge", "procrustes", "anchored_autoencoder"])
def test_held_out_r2_of_noise_is_not_positive(kind: str) -> None:
    e, t = normal(120, 20, seed=0), normal(120, 10, seed=1)
    assert fit_aligner(e, t, AlignerConfig(kind=kind)).quality.r2 <= 0.01
    assert fit_aligner(e, e @ normal(20, 10, seed=2), AlignerConfig(kind=kind)).quality.r2 > 0.2


def test_the_ridge_of_a_fold_is_chosen_on_the_other_folds() -> None:
    # Fold 0 prefers a large ridge and the others a small one; scoring fold 0 with its own favourite
    # would be a peek.
    e, t = paired(n=90, noise=0.1)
    held = torch.randperm(90, generator=torch.Generator().manual_seed(0)).tensor_split(3)[0]
    t = t.clone()
    t[held] = t.mean(0) + 5 * normal(len(held), 8, seed=5)
    free = fit_aligner(e, t, AlignerConfig(n_folds=3), seed=0)
    assert free.quality.ridge_path is not None
    assert free.quality.r2 < max(r2 for _, r2 in free.quality.ridge_path) - 1e-3


def test_more_features_than_anchors_equals_the_wide_formula() -> None:
    n, d = 25, 60
    e, t = normal(n, d, seed=0), normal(n, 40, seed=1)
    got = fit_aligner(e, t, AlignerConfig(ridge=0.3, n_folds=2))
    c_ee, c_te, _ = covariances(e, t)
    direct = c_te @ torch.linalg.inv(
        c_ee + 0.3 * c_ee.diagonal().mean() * torch.eye(d, dtype=torch.float64)
    )
    torch.testing.assert_close(got.encoder.weight.double(), direct, **SINGLE)
    assert len(got.encoder.factors) == 1 or sum(f.numel() for f in got.encoder.factors) < 60 * 40


# --- autoencoder


def test_linear_autoencoder_optimum_is_the_principal_subspace() -> None:
    e, _ = paired()
    got = fit_aligner(e, None, AlignerConfig(kind="autoencoder", n_components=3), d_target=8)
    values, vectors = torch.linalg.eigh(covariances(e, e)[0])
    top = vectors[:, -3:]
    projection = (got.decoder.weight @ got.encoder.weight).double()
    torch.testing.assert_close(projection, top @ top.T, **SINGLE)
    assert fvu(got, e) == pytest.approx(float(values[:-3].sum() / values.sum()), abs=1e-5)


def test_adam_reaches_the_closed_form_optimum_and_does_not_pass_it() -> None:
    e, _ = paired()
    closed = fit_aligner(e, None, AlignerConfig(kind="autoencoder", n_components=3), d_target=8)
    config = AlignerConfig(
        kind="autoencoder", n_components=3, solver="adam", n_steps=1500, n_folds=2
    )
    trained = fit_aligner(e, None, config, d_target=8)
    assert fvu(closed, e) - 1e-6 <= fvu(trained, e) <= fvu(closed, e) + 1e-3
    short = fit_aligner(e, None, dataclasses.replace(config, n_steps=3), d_target=8)
    slow = fit_aligner(e, None, dataclasses.replace(config, learning_rate=1e-5), d_target=8)
    assert fvu(short, e) > fvu(trained, e) + 0.05
    assert fvu(slow, e) > fvu(trained, e) + 0.05


@pytest.mark.parametrize("solver", ["closed_form", "adam"])
def test_two_seeds_give_the_same_reconstruction_in_different_bases(solver: str) -> None:
    e, t = paired()
    config = AlignerConfig(
        kind="autoencoder",
        n_components=3,
        n_folds=2,
        solver=solver,
        n_steps=800 if solver == "adam" else None,
    )
    a, b = (fit_aligner(e, t, config, seed=s) for s in (0, 1))
    # Adam may stop with the last axis still turned a little: what both seeds share is the loss.
    assert fvu(a, e) == pytest.approx(fvu(b, e), abs=5e-3 if solver == "adam" else 1e-6)
    if solver == "closed_form":
        torch.testing.assert_close(a.decode(a.encode(e)), b.decode(b.encode(e)), **SINGLE)
    assert (a.encoder.weight - b.encoder.weight).norm() > 0.5 * a.encoder.weight.norm()


def test_autoencoder_ignores_the_target_but_for_its_width() -> None:
    e, t = paired()
    config = AlignerConfig(kind="autoencoder")
    with_target, without = fit_aligner(e, t, config), fit_aligner(e, None, config, d_target=8)
    assert torch.equal(with_target.encoder.weight, without.encoder.weight)
    assert with_target.quality == without.quality
    assert with_target.quality.r2 is None


def test_encoder_of_autoencoder_is_an_isometry_of_the_principal_components() -> None:
    e, _ = paired(d_expert=8)
    got = fit_aligner(e, None, AlignerConfig(kind="autoencoder"), d_target=8)
    w = got.encoder.weight.double()
    torch.testing.assert_close(w @ w.T, torch.eye(8, dtype=torch.float64), **SINGLE)
    assert got.encode(e).mean(0).abs().max() < 1e-4


# --- procrustes


def test_procrustes_recovers_a_planted_rotation_and_scale() -> None:
    e, _ = paired(n=300, d_expert=6)
    rotation = torch.linalg.qr(normal(6, 6, seed=3))[0]
    t = 2.5 * e @ rotation.T + 1.0
    got = fit_aligner(e, t, AlignerConfig(kind="procrustes"))
    torch.testing.assert_close(got.encoder.weight.double(), 2.5 * rotation, **SINGLE)
    torch.testing.assert_close(got.encode(e), t, **SINGLE)
    torch.testing.assert_close(got.decode(t), e, **SINGLE)
    assert got.quality.r2 == pytest.approx(1.0, abs=1e-6)


def test_procrustes_is_a_scaled_isometry_between_principal_components() -> None:
    e, t = paired()
    got = fit_aligner(e, t, AlignerConfig(kind="procrustes", n_components=4))
    singular = torch.linalg.svdvals(got.encoder.weight)
    torch.testing.assert_close(singular[:4], singular[:1].expand(4), **SINGLE)
    assert singular[4:].max() < 1e-5
    fitted, centred = got.encode(e) - t.mean(0), t - t.mean(0)
    # The one scale is the best: what is left over is orthogonal to what was fitted.
    assert abs(float((fitted * (centred - fitted)).sum() / fitted.square().sum())) < 1e-5


# --- anchored autoencoder


def anchored_objective(
    w: Tensor, d: Tensor, e: Tensor, t: Tensor, weight: float, ridge: float
) -> float:
    """The loss as documented, with the ridge as isotropic noise on the expert's states."""
    c_ee, c_te, c_tt = covariances(e, t)
    jittered = c_ee + ridge * c_ee.diagonal().mean() * torch.eye(len(c_ee), dtype=torch.float64)
    lost = torch.eye(len(c_ee), dtype=torch.float64) - d @ w
    agreement = torch.trace(w @ jittered @ w.T) - 2 * (w * c_te).sum() + torch.trace(c_tt)
    return float(
        torch.trace(lost @ jittered @ lost.T) / torch.trace(c_ee)
        + weight * agreement / torch.trace(c_tt)
    )


def alternating(
    w: Tensor, e: Tensor, t: Tensor, weight: float, ridge: float, steps: int
) -> list[float]:
    """Alternating least squares from `w`, the loss after every half step."""
    c_ee, c_te, c_tt = covariances(e, t)
    eye = torch.eye(len(c_ee), dtype=torch.float64)
    jittered = c_ee + ridge * c_ee.diagonal().mean() * eye
    relative = weight * torch.trace(c_ee) / torch.trace(c_tt)
    history = []
    for _ in range(steps):
        d = jittered @ w.T @ torch.linalg.inv(w @ jittered @ w.T)
        history.append(anchored_objective(w, d, e, t, weight, ridge))
        left = d.T @ d + relative * torch.eye(w.shape[0], dtype=torch.float64)
        w = torch.linalg.solve(left, d.T + relative * c_te @ torch.linalg.inv(jittered))
        history.append(anchored_objective(w, d, e, t, weight, ridge))
    return history


@pytest.mark.parametrize("weight", [0.05, 1.0, 20.0])
def test_alternating_least_squares_only_descends_and_never_below_the_closed_form(
    weight: float,
) -> None:
    e, t = paired(n=300, d_expert=10, d_target=4, noise=2.0)
    got = fit_aligner(
        e, t, AlignerConfig(kind="anchored_autoencoder", anchor_weight=weight, ridge=0.01)
    )
    w = got.encoder.weight.double()
    best = anchored_objective(w, got.decoder.weight.double(), e, t, weight, 0.01)
    for start in range(4):
        history = alternating(normal(4, 10, seed=start), e, t, weight, 0.01, steps=100)
        assert all(b <= a + 1e-9 for a, b in itertools.pairwise(history))
        assert best - 1e-6 <= history[-1] < 0.7 * history[0]
    # The closed form is a fixed point, and alternation finds its way back from nearby (from afar it
    # crawls).
    assert alternating(w, e, t, weight, 0.01, steps=20)[-1] == pytest.approx(best, abs=1e-6)
    near = alternating(
        w + 0.05 * w.norm() * normal(4, 10, seed=9) / 40**0.5, e, t, weight, 0.01, steps=400
    )
    assert near[0] > best + 1e-4
    assert near[-1] - best < 0.1 * (near[0] - best)


def test_anchored_autoencoder_lies_between_reconstruction_and_regression() -> None:
    e, t = paired(n=300, d_expert=10, d_target=4, noise=2.0)

    def fit(weight: float) -> Aligner:
        return fit_aligner(
            e, t, AlignerConfig(kind="anchored_autoencoder", anchor_weight=weight, ridge=1e-6)
        )

    regression = fit_aligner(e, t, AlignerConfig(ridge=1e-6))
    pca = fit_aligner(e, t, AlignerConfig(kind="autoencoder"))
    torch.testing.assert_close(
        fit(1e6).encoder.weight, regression.encoder.weight, rtol=1e-2, atol=1e-3
    )
    assert fvu(fit(1e-6), e) == pytest.approx(fvu(pca, e), abs=1e-4)
    losses = [fvu(fit(w), e) for w in (1e-6, 0.1, 1.0, 10.0, 1e6)]
    misses = [float((fit(w).encode(e) - t).square().mean()) for w in (1e-6, 0.1, 1.0, 10.0, 1e6)]
    assert losses == sorted(losses)
    assert losses[-1] > losses[0] + 0.01
    assert misses == sorted(misses, reverse=True)
    assert misses[0] > misses[-1] + 0.01


# --- identity


def test_identity_needs_equal_widths() -> None:
    e, t = paired(d_expert=8)
    got = fit_aligner(e, t, AlignerConfig(kind="identity"))
    assert torch.equal(got.encode(e), e)
    assert torch.equal(got.decode(e), e)
    assert torch.equal(got.encoder.weight, torch.eye(8))
    assert got.quality.r2 == pytest.approx(
        1 - float((t - e).square().sum() / (t - t.mean(0)).square().sum())
    )
    assert fit_aligner(e, e, AlignerConfig(kind="identity")).quality.r2 == 1.0
    with pytest.raises(
        WidthError, match="kind='identity' maps d_expert=12 to d_target=8, which must be equal"
    ):
        fit_aligner(*paired(), AlignerConfig(kind="identity"))


def test_identity_effective_rank_is_the_same_from_either_gram_matrix() -> None:
    e = normal(10, 30, seed=0)
    wide = fit_aligner(e, e, AlignerConfig(kind="identity")).quality.effective_rank
    padded = torch.cat([e, e, e, e])
    assert wide == pytest.approx(
        fit_aligner(padded, padded, AlignerConfig(kind="identity")).quality.effective_rank
    )


# --- quality


def test_effective_rank_counts_equal_axes() -> None:
    x = torch.cat([torch.eye(6, dtype=torch.float64), -torch.eye(6, dtype=torch.float64)]).repeat(
        4, 1
    )
    x = torch.cat([x, torch.zeros(len(x), 4, dtype=torch.float64)], 1)
    got = fit_aligner(x, None, AlignerConfig(kind="autoencoder", n_folds=2), d_target=10)
    assert got.quality.effective_rank == pytest.approx(6.0, abs=1e-6)
    assert got.quality.n_components == 6


@pytest.mark.parametrize("kind", FITTED)
def test_fvu_is_measured_on_held_out_rows(kind: str) -> None:
    e, t = normal(24, 40, seed=0), normal(24, 40, seed=1)
    got = fit_aligner(
        e,
        t,
        AlignerConfig(
            kind=kind, n_folds=2, ridge=1e-6 if kind in ("ridge", "anchored_autoencoder") else None
        ),
    )
    assert fvu(got, e) < 1e-3  # 23 directions fit 24 anchors exactly
    assert got.quality.reconstruction_fvu > 0.3


def test_ridge_decoder_is_the_best_linear_one() -> None:
    e, t = paired(n=400)
    got = fit_aligner(e, t, AlignerConfig(ridge=0.0))
    code = got.encode(e)
    best = torch.linalg.lstsq(code - code.mean(0), e - e.mean(0)).solution
    torch.testing.assert_close(
        got.decode(code), (code - code.mean(0)) @ best + e.mean(0), rtol=1e-3, atol=1e-3
    )


# --- grid


def stores() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    e0, t0 = paired()
    e1, t1 = paired(d_expert=10, seed=5)
    name = "blocks.{}.hook_resid_post".format
    return {name(0): e0, name(1): e1}, {name(0): t0, name(1): t1, name(2): t0 + t1}


@pytest.mark.parametrize("kind", FITTED)
def test_a_grid_equals_single_fits(kind: str) -> None:
    experts, targets = stores()
    config = AlignerConfig(kind=kind)
    grid = fit_aligner_grid(ActivationStore(experts), targets, config, seed=3)
    assert list(grid) == [(e, t) for e in experts for t in targets]
    for (e, t), got in grid.items():
        alone = fit_aligner(experts[e], targets[t], config, seed=3)
        torch.testing.assert_close(got.encoder.weight, alone.encoder.weight)
        torch.testing.assert_close(got.decoder.bias, alone.decoder.bias)
        assert got.quality == alone.quality


def test_a_grid_of_chosen_pairs_fits_only_these() -> None:
    experts, targets = stores()
    pairs = [
        ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post"),
        ("blocks.0.hook_resid_post", "blocks.0.hook_resid_post"),
    ]
    assert list(fit_aligner_grid(experts, targets, pairs=pairs)) == pairs
    assert fit_aligner_grid(experts, targets, pairs=[]) == {}
    e = {"blocks.0.hook_resid_post": targets["blocks.0.hook_resid_post"]}
    same = fit_aligner_grid(e, targets, AlignerConfig(kind="identity"))
    assert len(same) == 3


def test_a_grid_names_what_is_wrong() -> None:
    experts, targets = stores()
    with pytest.raises(
        HookNameError, match=r"blocks\.7\.hook_resid_post.*the expert states.*closest"
    ):
        fit_aligner_grid(
            experts, targets, pairs=[("blocks.7.hook_resid_post", "blocks.0.hook_resid_post")]
        )
    bad = dict(targets)
    bad["blocks.1.hook_resid_post"] = targets["blocks.1.hook_resid_post"].clone()
    bad["blocks.1.hook_resid_post"][17, 2] = torch.inf
    with pytest.raises(
        DataError, match=r"target\['blocks.1.hook_resid_post'\] holds NaN or Inf .*row 17"
    ):
        fit_aligner_grid(experts, bad)
    short = {k: v[:-1] for k, v in targets.items()}
    with pytest.raises(DataError, match=r"must be paired row by row .*200 and 199 rows"):
        fit_aligner_grid(experts, short)
    ragged = {**experts, "blocks.1.hook_resid_post": experts["blocks.1.hook_resid_post"][:50]}
    ragged_t = {**targets, "blocks.1.hook_resid_post": targets["blocks.1.hook_resid_post"][:50]}
    diagonal = [("blocks.0.hook_resid_post",) * 2, ("blocks.1.hook_resid_post",) * 2]
    with pytest.raises(DataError, match="has 50 rows, the others have 200"):
        fit_aligner_grid(ragged, ragged_t, pairs=diagonal)


# --- conformance


@pytest.mark.parametrize("kind", KINDS)
class TestConformance:
    """What holds for every aligner."""

    def fit(self, kind: str, seed: int = 0) -> Aligner:
        e, t = paired(d_expert=8)
        return fit_aligner(e, t, AlignerConfig(kind=kind), seed=seed)

    def test_encode_keeps_leading_axes_dtype_and_device(self, kind: str) -> None:
        got = self.fit(kind)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            h = torch.ones(2, 3, 8, dtype=dtype)
            for out in (got.encode(h), got.decode(h), got.encode_direction(h)):
                assert out.shape == (2, 3, 8)
                assert out.dtype == dtype
                assert out.device == h.device

    def test_low_precision_states_are_mapped_in_float32(self, kind: str) -> None:
        got, h = self.fit(kind), normal(50, 8, seed=3).to(torch.bfloat16)
        assert torch.equal(got.encode(h), got.encode(h.float()).to(torch.bfloat16))
        assert torch.equal(got.decode(h), got.decode(h.float()).to(torch.bfloat16))

    def test_encode_is_affine_with_the_published_weight_and_bias(self, kind: str) -> None:
        got, h = self.fit(kind), normal(5, 8, seed=1).float()
        torch.testing.assert_close(
            got.encode(h), h @ got.encoder.weight.T + got.encoder.bias, **SINGLE
        )
        torch.testing.assert_close(
            got.decode(h), h @ got.decoder.weight.T + got.decoder.bias, **SINGLE
        )
        torch.testing.assert_close(
            got.encode_direction(h), got.encode(h) - got.encoder.bias, **SINGLE
        )

    def test_inputs_are_not_mutated_and_results_do_not_alias_them(self, kind: str) -> None:
        e, t = paired(d_expert=8)
        before = e.clone(), t.clone()
        got = fit_aligner(e, t, AlignerConfig(kind=kind))
        kept = got.encode(before[0])
        assert torch.equal(e, before[0])
        assert torch.equal(t, before[1])
        e.zero_()
        got.encoder.weight.zero_()
        got.decoder.weight.zero_()
        assert torch.equal(got.encode(before[0]), kept)

    def test_the_seed_decides_everything(self, kind: str) -> None:
        torch.manual_seed(1)
        a = self.fit(kind, seed=5)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        b = self.fit(kind, seed=5)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(a.encoder.weight, b.encoder.weight)
        assert a.quality == b.quality
        assert a.seed == 5

    def test_config_survives_json(self, kind: str) -> None:
        config = AlignerConfig(kind=kind)
        assert AlignerConfig(**json.loads(json.dumps(config.to_dict()))) == config

    def test_repr_states_kind_widths_and_quality(self, kind: str) -> None:
        text = repr(self.fit(kind))
        assert text.startswith(f"Aligner({kind}, 8 → 8, n_anchors=200")
        assert ("held-out R²" in text) == (kind != "autoencoder")

    def test_wrong_widths_are_refused(self, kind: str) -> None:
        got, h = self.fit(kind), torch.zeros(3, 9)
        for method in (got.encode, got.decode, got.encode_direction):
            with pytest.raises(
                WidthError,
                match="aligner maps d_expert=8 to d_target=8, but the activations have width 9",
            ):
                method(h)

    def test_to_returns_a_copy_in_float32(self, kind: str) -> None:
        got = self.fit(kind)
        moved = got.to("cpu")
        assert moved is not got
        assert torch.equal(moved.encoder.weight, got.encoder.weight)
        assert got.to(torch.float64).encoder.weight.dtype == torch.float32

    def test_low_precision_anchors_are_fitted_in_float64(self, kind: str) -> None:
        e, t = (x.to(torch.bfloat16) for x in paired(d_expert=8))
        got = fit_aligner(e, t, AlignerConfig(kind=kind))
        exact = fit_aligner(e.double(), t.double(), AlignerConfig(kind=kind))
        torch.testing.assert_close(got.encoder.weight, exact.encoder.weight)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(8, 40),
    d_expert=st.integers(1, 20),
    d_target=st.integers(1, 20),
    kind=st.sampled_from(FITTED),
)
def test_any_shape_fits_and_reports_finite_quality(
    n: int, d_expert: int, d_target: int, kind: str
) -> None:
    e, t = normal(n, d_expert, seed=n), normal(n, d_target, seed=n + 1)
    got = fit_aligner(e, t, AlignerConfig(kind=kind, n_folds=2))
    assert got.encode(e).shape == (n, d_target)
    assert got.decode(t).shape == (n, d_expert)
    assert torch.isfinite(got.encoder.weight).all()
    assert torch.isfinite(got.decoder.weight).all()
    assert -1e-9 <= got.quality.reconstruction_fvu < 10.0
    assert 1.0 - 1e-9 <= got.quality.effective_rank <= min(d_expert, d_target, n - 1) + 1e-6


# --- every field has an effect or raises


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"kind": "procrustes"}),
        ({}, {"n_components": 2}),
        ({"kind": "autoencoder"}, {"n_components": 2}),
        ({"kind": "procrustes"}, {"n_components": 2}),
        ({"kind": "anchored_autoencoder"}, {"n_components": 2}),
        ({}, {"ridge": 5.0}),
        ({"kind": "anchored_autoencoder"}, {"ridge": 5.0}),
        ({"kind": "anchored_autoencoder"}, {"anchor_weight": 0.01}),
        ({}, {"standardise": True}),
        ({"kind": "autoencoder"}, {"standardise": True}),
        ({"kind": "procrustes"}, {"standardise": True}),
        ({"kind": "anchored_autoencoder"}, {"standardise": True}),
        ({"kind": "autoencoder", "n_folds": 2}, {"solver": "adam", "n_steps": 50}),
        ({"kind": "autoencoder", "solver": "adam", "n_folds": 2, "n_steps": 50}, {"n_steps": 5}),
        (
            {"kind": "autoencoder", "solver": "adam", "n_folds": 2, "n_steps": 50},
            {"learning_rate": 1e-4},
        ),
    ],
)
def test_every_field_changes_the_map(base: dict, change: dict) -> None:
    e, t = paired(noise=2.0)
    a, b = (fit_aligner(e, t, AlignerConfig(**c)) for c in (base, base | change))
    assert (a.encoder.weight - b.encoder.weight).abs().max() > 1e-3


def test_n_folds_changes_the_held_out_quality() -> None:
    e, t = paired(noise=2.0)
    a, b = (fit_aligner(e, t, AlignerConfig(n_folds=k)).quality for k in (2, 10))
    assert a.r2 != b.r2
    assert a.reconstruction_fvu != b.reconstruction_fvu


def test_standardised_fits_do_not_depend_on_the_units_of_coordinates() -> None:
    e, t = paired()
    units_e, units_t = (
        torch.logspace(-2, 2, 12, dtype=torch.float64),
        torch.logspace(-1, 1, 8, dtype=torch.float64),
    )
    for kind in FITTED:
        config = AlignerConfig(kind=kind, standardise=True)
        a, b = fit_aligner(e, t, config), fit_aligner(e * units_e, t * units_t, config)
        assert a.quality.reconstruction_fvu == pytest.approx(b.quality.reconstruction_fvu, rel=1e-6)
        if kind != "autoencoder":
            assert a.quality.r2 == pytest.approx(b.quality.r2, rel=1e-6)
            torch.testing.assert_close(
                b.encode(e * units_e), a.encode(e) * units_t, rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "rigde"}, "kind must be one of .*closest: 'ridge'"),
        ({"n_components": 0}, "n_components must be an integer"),
        ({"ridge": -1.0}, "ridge must be a number"),
        ({"kind": "anchored_autoencoder", "anchor_weight": 0.0}, "anchor_weight must be a number"),
        ({"standardise": 1}, "standardise must be a bool"),
        ({"n_folds": 1}, "n_folds must be an integer"),
        ({"solver": "sgd"}, "solver must be one of"),
        ({"kind": "autoencoder", "solver": "adam", "n_steps": 0}, "n_steps must be an integer"),
        (
            {"kind": "autoencoder", "solver": "adam", "learning_rate": 0.0},
            "learning_rate must be a number",
        ),
        ({"kind": "procrustes", "ridge": 0.1}, "ridge=0.1 has no effect for kind='procrustes'"),
        ({"anchor_weight": 1.0}, "anchor_weight=1.0 has no effect for kind='ridge'"),
        ({"solver": "adam"}, "solver='adam' has no effect for kind='ridge'"),
        (
            {"kind": "identity", "n_components": 3},
            "n_components=3 has no effect for kind='identity'",
        ),
        ({"kind": "identity", "n_folds": 3}, "n_folds=3 has no effect"),
        ({"kind": "identity", "standardise": True}, "standardise=True has no effect"),
        ({"kind": "autoencoder", "n_steps": 5}, "no effect for solver='closed_form'"),
        ({"kind": "autoencoder", "learning_rate": 0.1}, "no effect for solver='closed_form'"),
    ],
)
def test_bad_or_idle_fields_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        AlignerConfig(**fields)


# --- errors


def test_bad_data_is_refused_with_the_reason() -> None:
    e, t = paired()
    with pytest.raises(
        DataError, match=r"expert and target must be paired .* got 200 and 199 rows"
    ):
        fit_aligner(e, t[:-1])
    bad = e.clone()
    bad[5, 0] = torch.nan
    with pytest.raises(
        DataError, match=r"expert holds NaN or Inf in 1 of 200 rows \(first: row 5\)"
    ):
        fit_aligner(bad, t)
    with pytest.raises(DataError, match="target: kind='ridge' needs target states"):
        fit_aligner(e)
    with pytest.raises(
        DataError,
        match=r"n_folds=5 needs at least 10 anchors .* got 9; add anchors or lower n_folds",
    ):
        fit_aligner(e[:9], t[:9])
    with pytest.raises(DataError, match="expert is the same in every row"):
        fit_aligner(torch.ones(20, 4), t[:20])
    with pytest.raises(DataError, match="target is the same in every row"):
        fit_aligner(e[:20], torch.ones(20, 4))
    with pytest.raises(
        ArgumentError, match=r"n_components=9 exceeds 8, .*'procrustes'.*d_expert=12 and d_target=8"
    ):
        fit_aligner(e, t, AlignerConfig(kind="procrustes", n_components=9))
    assert fit_aligner(e, t, AlignerConfig(n_components=9)).quality.n_components == 9
    with pytest.raises(ArgumentError, match="d_target is needed"):
        fit_aligner(e, None, AlignerConfig(kind="autoencoder"))
    with pytest.raises(ArgumentError, match="d_target must be an integer"):
        fit_aligner(e, None, AlignerConfig(kind="autoencoder"), d_target=0)
    with pytest.raises(WidthError, match="d_target=9, but target has width 8"):
        fit_aligner(e, t, d_target=9)


# --- pieces


def test_thin_factors_are_kept_only_where_they_are_smaller() -> None:
    e, t = normal(12, 40, seed=0), normal(12, 30, seed=1)
    thin = fit_aligner(e, t, AlignerConfig(n_folds=2, n_components=3))
    assert [tuple(f.shape) for f in thin.encoder.factors] == [(30, 3), (3, 40)]
    e, t = paired()
    assert [tuple(f.shape) for f in fit_aligner(e, t).encoder.factors] == [(8, 12)]


def test_affine_map_without_factors_is_the_identity() -> None:
    identity = AffineMap((), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(identity(torch.zeros(1, 2)), torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(identity.linear(torch.ones(1, 2)), torch.ones(1, 2))


def test_constant_coordinates_are_not_scaled() -> None:
    scale = coordinate_scale(torch.tensor([4.0, 0.0]), standardise=True)
    torch.testing.assert_close(scale, torch.tensor([2.0, 1.0]))
    e, t = paired()
    e = torch.cat([e, torch.full((200, 1), 7.0, dtype=torch.float64)], 1)
    got = fit_aligner(e, t, AlignerConfig(standardise=True))
    assert got.encoder.weight[:, -1].abs().max() == 0.0


@pytest.mark.parametrize("n", [12, 60])
def test_a_gauge_is_the_seeds_and_not_the_signs_of_an_eigenvector_routine(n, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    e, t = torch.randn(n, 20, generator=generator), torch.randn(n, 7, generator=generator)
    config = AlignerConfig(kind="autoencoder")
    first, other = (fit_aligner(e, t, config, seed=seed) for seed in (0, 1))
    real, draws = torch.linalg.eigh, torch.Generator().manual_seed(1)

    def flipped(matrix):
        values, vectors = real(matrix)
        return values, vectors * (2 * torch.randint(2, vectors.shape[-1:], generator=draws) - 1)

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    again = fit_aligner(e, t, config, seed=0)
    torch.testing.assert_close(again.encoder.weight, first.encoder.weight, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(first.encoder.weight, other.encoder.weight, atol=0.1)
