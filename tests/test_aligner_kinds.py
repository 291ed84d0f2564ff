"""Kinds of aligners stand in one table, users may add to it, and maps need not be affine."""

from __future__ import annotations

import ast
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import expertsteer_lens as esl
from expertsteer_lens.align import (
    KINDS,
    AffineMap,
    Aligner,
    AlignerConfig,
    RowKind,
    RowMap,
    applicable_kinds,
    fit_aligner,
    fit_aligner_grid,
    register_aligner,
)
from expertsteer_lens.errors import ArgumentError, ArtifactError, DataError, WidthError

GOLDENS = pathlib.Path(__file__).parent / "goldens"


@dataclasses.dataclass(frozen=True)
class NearAnchors:
    """Mean of the anchors' other states, weighted by how near the anchors are (Nadaraya-Watson)."""

    here: Tensor
    there: Tensor
    width: float

    @property
    def d_in(self) -> int:
        return self.here.shape[1]

    @property
    def d_out(self) -> int:
        return self.there.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        near = -torch.cdist(x, self.here.to(x)) / self.width
        return near.softmax(1) @ self.there.to(x)

    def to(self, *args: Any, **kwargs: Any) -> NearAnchors:
        return NearAnchors(
            self.here.to(*args, **kwargs), self.there.to(*args, **kwargs), self.width
        )


def fit_near_anchors(
    expert: Tensor, target: Tensor, config: AlignerConfig, seed: int
) -> tuple[RowMap, RowMap | None]:
    width = config.option("width")
    back = NearAnchors(target, expert, width) if config.option("two_ways") else None
    return NearAnchors(expert, target, width), back


@pytest.fixture(autouse=True)
def near_anchors() -> Iterator[None]:
    kind = RowKind(fit_rows=fit_near_anchors, options={"width": 0.3, "two_ways": True})
    register_aligner("near_anchors", kind)
    yield
    del KINDS["near_anchors"]


def circle(n: int = 120) -> tuple[Tensor, Tensor]:
    """A relation that no affine map knows: an angle, and the point of the circle."""
    angle = 6.0 * torch.rand(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return angle, torch.cat([angle.sin(), angle.cos(), (2 * angle).sin()], 1)


def near(**options: Any) -> AlignerConfig:
    return AlignerConfig(kind="near_anchors", options=options)


# --- a kind that is not affine


def test_a_registered_kind_fits_what_no_affine_map_can() -> None:
    e, t = circle()
    got = fit_aligner(e, t, near(width=0.05), seed=1)
    assert isinstance(got.encoder, RowMap)
    assert (got.d_expert, got.d_target, got.seed) == (1, 3, 1)
    assert got.quality.r2 > 0.95 > 0.5 > fit_aligner(e, t).quality.r2
    torch.testing.assert_close(got.encode(e), got.encoder(e))
    assert float((got.decode(t) - e).abs().mean()) < 0.2


def test_its_quality_is_measured_on_held_out_rows() -> None:
    e, t = circle(40)
    config = dataclasses.replace(near(), n_folds=4)
    got = fit_aligner(e, t, config, seed=2).quality
    missed = lost = t_spread = e_spread = 0.0
    folds = torch.randperm(40, generator=torch.Generator().manual_seed(2)).tensor_split(4)
    for held in folds:
        train = torch.tensor(sorted(set(range(40)) - set(held.tolist())))
        encoder, decoder = fit_near_anchors(e[train], t[train], config, 2)
        code = encoder(e[held])
        missed += float((t[held] - code).square().sum())
        t_spread += float((t[held] - t[train].mean(0)).square().sum())
        lost += float((e[held] - decoder(code)).square().sum())
        e_spread += float((e[held] - e[train].mean(0)).square().sum())
    assert got.r2 == pytest.approx(1.0 - missed / t_spread, rel=1e-9)
    assert got.reconstruction_fvu == pytest.approx(lost / e_spread, rel=1e-9)
    assert (got.n_anchors, got.n_components, got.ridge) == (40, None, None)
    assert 1.0 <= got.effective_rank <= 3.0


def test_groups_hold_for_registered_kinds_too() -> None:
    texts = torch.arange(20).repeat_interleave(5)
    generator = torch.Generator().manual_seed(0)
    e, t = (torch.randn(20, 4, generator=generator)[texts] for _ in range(2))
    assert fit_aligner(e, t, near()).quality.r2 > 0.9
    assert fit_aligner(e, t, near(), groups=texts).quality.r2 < 0.1


def test_a_grid_of_a_registered_kind_equals_single_fits() -> None:
    e, t = circle(30)
    grid = fit_aligner_grid({"a": e, "b": 2 * e}, {"c": t, "d": t[:, :2]}, near(), seed=1)
    assert list(grid) == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]
    alone = fit_aligner(2 * e, t, near(), seed=1)
    assert torch.equal(grid["b", "c"].encode(2 * e), alone.encode(2 * e))
    assert grid["b", "c"].quality == alone.quality
    with pytest.raises(DataError, match=r"expert\['a'\] holds NaN"):
        fit_aligner_grid({"a": e / 0.0 - e / 0.0}, {"c": t}, near())


def test_encode_keeps_leading_axes_dtype_and_inputs() -> None:
    e, t = circle(30)
    got = fit_aligner(e, t, near())
    kept = e.clone()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        h = e[:6].reshape(2, 3, 1).to(dtype)
        out = got.encode(h)
        assert (out.shape, out.dtype, out.device) == ((2, 3, 3), dtype, h.device)
        assert got.decode(out).shape == (2, 3, 1)
    assert torch.equal(got.encode(h), got.encode(h.float()).to(dtype))
    assert torch.equal(e, kept)
    moved = got.to(torch.float32)
    assert moved.encoder.here.dtype == torch.float32
    assert got.encoder.here.dtype == torch.float64


def test_what_a_map_that_is_not_affine_cannot_do_is_an_error_that_says_so(tmp_path) -> None:
    e, t = circle(30)
    got = fit_aligner(e, t, near(two_ways=False))
    with pytest.raises(ArgumentError, match=r"kind='near_anchors' is not affine.*encode both"):
        got.encode_direction(e)
    with pytest.raises(ArgumentError, match="kind='near_anchors' maps one way only"):
        got.decode(t)
    with pytest.raises(ArgumentError, match=r"NearAnchors cannot be written to a file"):
        esl.save(got, tmp_path / "aligner")
    with pytest.raises(WidthError, match="aligner maps d_expert=1 to d_target=3"):
        got.encode(t)
    assert got.quality.reconstruction_fvu is None
    assert repr(got).startswith("Aligner(near_anchors, 1 → 3, n_anchors=30, held-out R²=")
    assert "FVU" not in repr(got)
    assert got.to("cpu").decoder is None


def test_a_map_of_the_wrong_width_is_an_error_that_names_it() -> None:
    @dataclasses.dataclass(frozen=True)
    class Short(NearAnchors):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x)[:, :1]

    e, t = circle(30)
    got = fit_aligner(e, t, near())
    broken = dataclasses.replace(got, encoder=Short(e, t, 0.3))
    with pytest.raises(
        WidthError, match=r"Short says d_out=3 and returned \(30, 1\) for \(30, 1\)"
    ):
        broken.encode(e)


def test_a_registered_kind_may_be_affine_and_then_does_all_that_affine_maps_do(tmp_path) -> None:
    def fit_scaling(
        expert: Tensor, target: Tensor, config: AlignerConfig, seed: int
    ) -> tuple[AffineMap, AffineMap]:
        scale = float((expert * target).sum() / expert.square().sum())
        eye = torch.eye(expert.shape[1])
        zero = torch.zeros(expert.shape[1])
        return AffineMap((scale * eye,), zero), AffineMap((eye / scale,), zero)

    register_aligner("scaling", RowKind(fit_rows=fit_scaling, needs_equal_widths=True))
    try:
        e = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        got = fit_aligner(e, 2 * e, AlignerConfig(kind="scaling"))
        assert got.quality.n_components == 3
        torch.testing.assert_close(got.encode_direction(e), 2 * e)
        again = esl.load(esl.save(got, tmp_path / "aligner"))
        assert torch.equal(again.encode(e), got.encode(e))
        assert again.config == got.config
        assert "scaling" in applicable_kinds(4, 4)
        assert "scaling" not in applicable_kinds(4, 5)
    finally:
        del KINDS["scaling"]
    with pytest.raises(ArtifactError, match=r"kind must be one of .*, got 'scaling'"):
        esl.load(tmp_path / "aligner")


def test_a_whole_fit_with_a_registered_kind_gives_a_plan_that_can_be_saved(tmp_path) -> None:
    expert, target = esl.zoo.load_pair(host="huggingface")
    settings = esl.ExpertSteerConfig(
        aligner=near(width=2.0),
        mi=esl.MIConfig(n_permutations=2, n_bootstrap=5, n_components=4),
        pairing=esl.PairingConfig(n_candidates=3),
        rfm=esl.RFMConfig(bandwidth=1.0, n_rounds=1),
    )
    assert esl.ExpertSteerConfig.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    fit = esl.ExpertSteer(settings).fit(
        expert, target, esl.zoo.contrast_pairs(12), anchors=esl.zoo.anchors(40), progress=False
    )
    key = fit.layer_pairs.keys()[0]
    assert isinstance(fit.aligners[key].encoder, NearAnchors)
    plan = fit.plan(coefficient=0.1)
    again = esl.load(esl.save(plan, tmp_path / "plan"))
    assert torch.equal(again.vectors[0].direction, plan.vectors[0].direction)
    with pytest.raises(ArgumentError, match=r"NearAnchors cannot be written to a file"):
        esl.save(fit, tmp_path / "fit")


# --- the table


def test_a_name_is_given_once() -> None:
    register_aligner("near_anchors", KINDS["near_anchors"])  # the same again changes nothing
    with pytest.raises(ArgumentError, match="there is already an aligner kind 'ridge'"):
        register_aligner("ridge", KINDS["near_anchors"])
    assert KINDS["ridge"] is not KINDS["near_anchors"]


def test_a_kind_of_rows_is_always_measured_against_the_target() -> None:
    for fields in ({"settings": ("standardise",)}, {"uses_target": False}):
        with pytest.raises(ArgumentError, match="a RowKind is fitted to target rows"):
            RowKind(fit_rows=fit_near_anchors, **fields)


def test_kinds_that_can_be_compared_between_two_widths() -> None:
    same = applicable_kinds(4, 4)
    assert same == tuple(KINDS)
    assert set(same) - set(applicable_kinds(4, 5)) == {"identity"}
    for kind in applicable_kinds(4, 4):
        e = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
        assert isinstance(fit_aligner(e, e, AlignerConfig(kind=kind)), Aligner)


def test_no_module_of_align_compares_kinds() -> None:
    folder = pathlib.Path(esl.__file__).parent / "align"
    found = []
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith(".kind"):
                found.append(f"{path.name}: {ast.unparse(node)}")
    assert found == []


# --- settings


def test_a_configuration_says_what_is_used() -> None:
    assert AlignerConfig(kind="anchored_autoencoder").anchor_weight == 1.0
    trained = AlignerConfig(kind="autoencoder", solver="adam")
    assert (trained.n_steps, trained.learning_rate) == (2000, 0.01)
    untouched = AlignerConfig(kind="autoencoder")
    assert (untouched.n_steps, untouched.learning_rate, untouched.anchor_weight) == (None,) * 3
    assert AlignerConfig(kind="anchored_autoencoder") == AlignerConfig(
        kind="anchored_autoencoder", anchor_weight=1.0
    )
    assert near() == near(width=0.3, two_ways=True)
    assert dict(near(width=1.0).options) == {"two_ways": True, "width": 1.0}
    assert hash(near()) == hash(near(width=0.3))


def test_configurations_of_0_1_0_with_nulls_mean_the_same() -> None:
    saved = {
        "kind": "anchored_autoencoder",
        "n_components": None,
        "ridge": None,
        "anchor_weight": None,
        "standardise": False,
        "n_folds": 5,
        "solver": "closed_form",
        "n_steps": None,
        "learning_rate": None,
    }
    assert AlignerConfig(**saved) == AlignerConfig(kind="anchored_autoencoder")
    old = esl.load(GOLDENS / "saved_0_1_0" / "Aligner")
    text = (GOLDENS / "saved_0_1_0" / "Aligner" / "config.json").read_text(encoding="utf-8")
    assert '"anchor_weight": null' in text
    assert old.config == AlignerConfig(kind="anchored_autoencoder", n_folds=old.config.n_folds)
    facts = json.loads((GOLDENS / "saved_0_1_0" / "facts.json").read_text(encoding="utf-8"))
    encoded = old.encode(torch.ones(1, old.d_expert, dtype=torch.float64))
    assert float(encoded.sum()) == pytest.approx(facts["aligner_encode_sum"], rel=1e-6)


def test_options_survive_json_and_cannot_be_changed() -> None:
    config = near(width=0.7)
    again = AlignerConfig(**json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.option("width") == 0.7
    with pytest.raises(TypeError):
        config.options["width"] = 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": {"width": 1.0}}, "'width' is no option of kind='ridge', which has: none"),
        (
            {"kind": "near_anchors", "options": {"wdith": 1.0}},
            "'wdith' is no option of kind='near_anchors', which has: width, two_ways",
        ),
        (
            {"kind": "near_anchors", "options": {"width": [1.0]}},
            r"options\['width'\] must be a number, a text or a bool, got \[1.0\]",
        ),
        ({"kind": "near_anchors", "options": 3}, "options must be a dict of settings by name"),
        ({"kind": "near_anchors", "ridge": 0.1}, "ridge=0.1 has no effect for kind='near_anchors'"),
        ({"kind": "procrustes", "ridge": 0.1}, "it applies to anchored_autoencoder, ridge"),
    ],
)
def test_bad_options_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        AlignerConfig(**fields)


def test_an_unknown_option_of_a_configuration_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="kind='ridge' has no option 'width'; it has"):
        AlignerConfig().option("width")
