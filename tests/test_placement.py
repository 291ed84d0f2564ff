"""Where a direction is written: measured block by block, and what follows from a plan that was
moved."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError, DataError, HookNameError
from expertsteer_lens.evaluation.methods import native_plan, shuffled_plan, wrong_layer_plan
from expertsteer_lens.learn.directions import mean_difference
from expertsteer_lens.measure import place
from expertsteer_lens.measure.placement import learnt_at, move

SMALL = esl.ExpertSteerConfig(
    budget=0.2,
    mi=esl.MIConfig(n_permutations=3, n_bootstrap=3),
    pairing=esl.PairingConfig(n_layers=2, n_candidates=6),
    rfm=esl.RFMConfig(n_rounds=1),
)


@pytest.fixture(scope="module")
def models():
    return esl.zoo.load_pair(host="huggingface")


@pytest.fixture(scope="module")
def fit(models):
    return esl.ExpertSteer(SMALL).fit(
        *models,
        esl.zoo.contrast_pairs(20),
        anchors=esl.zoo.anchors(60),
        behaviour=esl.zoo.behaviour(24),
        progress=False,
    )


@pytest.fixture(scope="module")
def placed(fit):
    return fit.place(progress=False)


def test_every_block_is_measured_as_by_hand(models, fit, placed):
    """The strength is the one `calibrate` finds there, the effect that of the plan there."""
    plan = fit.plan(coefficient=0.1)
    norms = fit.target_anchors.median_norm
    assert [row["hook_name"] for row in placed.rows] == sorted(
        row["hook_name"] for row in placed.rows
    )
    for row in placed.rows:
        (vector,) = plan.vectors
        name = row["hook_name"]
        there = dataclasses.replace(vector, hook_name=name, median_norm=norms(name))
        there = dataclasses.replace(plan, vectors=(there,))
        found = fit.calibrate(there, curve=False)
        assert found.coefficient == row["coefficient"]
        assert row["cost"] <= SMALL.budget
        measured = fit.calibrate(there, grid=[row["coefficient"]])
        effect = next(r["effect"] for r in measured.curve if r["coefficient"] > 0)
        assert effect == pytest.approx(row["effect"], abs=1e-5)


def test_the_best_block_is_kept_if_it_is_clearly_better(fit, placed):
    rows = {row["hook_name"]: row for row in placed.rows}
    best = max(rows.values(), key=lambda row: row["effect"])
    clearly = best["gain"] > 2 * best["gain_se"]
    assert placed.hook_name == (best["hook_name"] if clearly else placed.learnt_at)
    assert rows[placed.learnt_at]["gain"] == 0.0
    assert placed.plan.vectors[0].coefficient == rows[placed.hook_name]["coefficient"]


@pytest.mark.parametrize("side", [1, -1])
def test_a_block_that_is_far_better_is_taken(models, fit, side):
    """A direction that was learnt where it does nothing: written at its own block it is itself. A
    plan that steers away is written where it lowers the behaviour most."""
    name = "blocks.3.hook_resid_post"
    own = mean_difference(fit.target_pairs[name], fit.target_pairs.labels)
    (vector,) = fit.plan(coefficient=0.1).vectors
    facts = {**vector.provenance, "learnt_at": "blocks.0.hook_resid_post"}
    plan = dataclasses.replace(
        fit.plan(coefficient=0.1),
        vectors=(dataclasses.replace(vector, direction=own, provenance=facts),),
    )
    found = fit.place(plan.with_coefficient(side * 0.1), progress=False)
    rows = {row["hook_name"]: row for row in found.rows}
    assert found.learnt_at == "blocks.0.hook_resid_post"
    best = max(rows.values(), key=lambda row: side * row["effect"])
    assert found.hook_name == best["hook_name"]
    assert side * found.plan.vectors[0].coefficient > 0
    assert found.hook_name != found.learnt_at
    assert found.plan.vectors[0].provenance["learnt_at"] == found.learnt_at


def test_what_a_moved_plan_is_compared_with_is_written_there_too(models, fit):
    (vector,) = fit.plan(coefficient=0.1).vectors
    there = next(n for n in fit.target_pairs if n != vector.hook_name)
    norm = fit.target_anchors.median_norm(there)
    plan = dataclasses.replace(fit.plan(coefficient=0.1), vectors=(move(vector, there, norm),))
    assert learnt_at(plan.vectors[0]) == vector.hook_name
    labels = fit.target_pairs.labels
    native = native_plan(fit, plan, mean_difference)
    (own,) = native.vectors
    assert (own.hook_name, own.median_norm) == (there, norm)
    # It was learnt where a direction promises most, written there.
    allowed = [n for n in list(fit.target_pairs) if fit.predicted_effect(there, own.direction)]
    best = max(
        (mean_difference(fit.target_pairs[n], labels) for n in allowed[1:-1]),
        key=lambda d: fit.predicted_effect(there, d),
    )
    assert fit.predicted_effect(there, own.direction) >= fit.predicted_effect(there, best) - 1e-9
    (shuffled,) = shuffled_plan(fit, plan, 0).vectors
    assert shuffled.hook_name == there
    (wrong,) = wrong_layer_plan(fit, plan).vectors
    assert wrong.hook_name != there
    result = esl.evaluate(plan, models[1], fit=fit, n_random=2, progress=False)
    assert {row.method for row in result.rows} >= {"this plan", "native RFM"}


def test_it_is_saved_with_the_plan(placed, models, tmp_path):
    esl.save(placed.plan, tmp_path / "plan")
    again = esl.load(tmp_path / "plan")
    assert "--behaviour behaviour.json --place " in (tmp_path / "plan" / "README.md").read_text()
    assert again.provenance["placement"]["written_to"] == placed.hook_name
    assert len(again.provenance["placement"]["rows"]) == len(placed.rows)
    assert again.vectors[0].hook_name == placed.hook_name
    assert torch.equal(again.vectors[0].direction, placed.plan.vectors[0].direction)
    with again.hooks(models[1]):
        models[1](torch.tensor([[1, 5, 6]]))


def test_tables_and_pictures(placed):
    frame = placed.to_pandas()
    assert list(frame.hook_name) == [row["hook_name"] for row in placed.rows]
    figure = placed.plot()
    assert list(figure.data[0].x) == [name.split(".")[1] for name in frame.hook_name]
    assert "written to" in repr(placed)


def test_a_block_that_is_over_budget_where_the_direction_was_learnt(models, fit):
    """Then there is nothing to gain on; the best of the others is taken, and said to be."""
    plan = fit.plan(coefficient=0.1)
    own, (vector,) = plan.vectors[0].hook_name, plan.vectors
    other = next(name for name in fit.target_pairs if name != own)
    norms = {own: 1e9, other: fit.target_anchors.median_norm(other)}
    texts = list(fit.calibration_texts)
    found = place(plan, models[1], fit.validation_behaviour, texts, median_norms=norms)
    assert found.hook_name == other
    assert [set(row) == {"hook_name"} for row in found.rows].count(True) == 1
    assert "over budget where it was learnt" in repr(found)
    assert "more" not in found.plot().layout.title.text.split("<br>")[0]
    assert torch.equal(found.plan.vectors[0].direction, vector.direction)


def test_what_cannot_be_is_said(models, fit):
    plan = fit.plan(coefficient=0.1)
    (vector,) = plan.vectors
    two = dataclasses.replace(plan, vectors=(vector, move(vector, "blocks.0.hook_resid_post", 1.0)))
    with pytest.raises(ArgumentError, match="one direction at a time"):
        fit.place(two)
    with pytest.raises(HookNameError, match=r"blocks\.9"):
        fit.place(hook_names=["blocks.9.hook_resid_post"])
    with pytest.raises(ArgumentError, match="n_blocks"):
        fit.place(n_blocks=0)
    given = (plan, models[1], esl.zoo.behaviour(4), esl.zoo.neutral_texts(4))
    length = dataclasses.replace(vector, relative_to="unit", median_norm=None)
    with pytest.raises(ArgumentError, match="is a length"):
        fit.place(dataclasses.replace(plan, vectors=(length,)))
    with pytest.raises(ArgumentError, match="holds 1 prompt"):
        place(plan, models[1], esl.zoo.behaviour(1), given[3], median_norms={})
    with pytest.raises(ArgumentError, match="where the direction was learnt"):
        place(*given, median_norms={"blocks.0.hook_resid_post": 1.0})
    with pytest.raises(ArgumentError, match="residual stream"):
        place(*given, median_norms={"blocks.0.hook_mlp_out": 1.0, vector.hook_name: 1.0})
    with pytest.raises(ArgumentError, match="at every one of 1 blocks"):
        place(*given, median_norms={vector.hook_name: 1e9})
    without = dataclasses.replace(
        fit, data=dataclasses.replace(fit.data, validation_behaviour=None)
    )
    with pytest.raises(DataError, match="no validation prompts"):
        without.place()
