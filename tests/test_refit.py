"""A refit takes every setting that can act on states already read, and refuses the others."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError, DataError, HookNameError

CHANGES = {
    "aligner": esl.AlignerConfig(kind="ridge", ridge=1.0),
    "mi": esl.MIConfig(estimator="gaussian", n_permutations=3, n_bootstrap=5),
    "pairing": esl.PairingConfig(rule="depth"),
    "rfm": esl.RFMConfig(bandwidth=3.0, validation_fraction=0.0, n_rounds=1),
    "reading": "mean",
    "mi_on": "tokens",
    "pair_tokens": True,
    "align_on_pairs": False,
    "batch_size": 3,
    "held_out": 0.6,
    "validation": 0.9,
    "budget": 0.5,
    "budget_unit": "kl",
}
"""Another value for every setting; one that is added needs a line here."""

GRID = (0.05, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8)


@pytest.fixture(scope="module")
def fit() -> esl.pipeline.ExpertSteering:
    expert, target = esl.zoo.load_pair(host="huggingface")
    fast = esl.ExpertSteerConfig(
        mi_on="texts",
        pair_tokens=False,  # with token pairs `align_on_pairs` acts on the reading: test_reading
        mi=esl.MIConfig(n_permutations=2, n_bootstrap=5, n_components=4),
        rfm=esl.RFMConfig(bandwidth=1.0, validation_fraction=0.0, n_rounds=2),
        pairing=esl.PairingConfig(n_candidates=2),
    )
    return esl.ExpertSteer(fast).fit(
        expert,
        target,
        esl.zoo.contrast_pairs(n=20),
        anchors=esl.zoo.anchors(n=40),
        behaviour=esl.zoo.behaviour(n=8),
        progress=False,
    )


def doses(fit: esl.pipeline.ExpertSteering) -> tuple[float, list[float]]:
    """What a small calibration finds, and the costs it saw."""
    found = fit.calibrate(fit.plan(coefficient=0.1), grid=GRID, behaviour=None)
    return found.coefficient, [row["cost"] for row in found.curve]


@pytest.mark.parametrize("field", [f.name for f in fields(esl.ExpertSteerConfig)])
def test_every_setting_changes_a_refit_or_is_refused(fit, field):
    changes = {field: CHANGES[field]}
    acts_on = {f.name: f.metadata.get("acts_on") for f in fields(fit.config)}[field]
    if acts_on is not None:
        with pytest.raises(ArgumentError, match=f"{field}=.* acts only where models are read"):
            fit.refit(**changes)
        with pytest.raises(ArgumentError, match=f"{field}="):
            fit.refit(replace(fit.config, **changes))
        return
    again = fit.refit(**changes)
    keys = list(fit.rfms)
    moved = (
        list(again.rfms) != keys
        or any(not torch.equal(again.direction(*k), fit.direction(*k)) for k in keys)
        or not torch.equal(again.layer_pair_mi.matrix, fit.layer_pair_mi.matrix)
        or doses(again) != doses(fit)
    )
    assert moved
    assert again.plan(coefficient=0.1).provenance["config"] == again.config.to_dict()


def test_the_batch_size_of_a_refit_may_change_where_gradients_are_still_to_be_taken(fit):
    by_mi = fit.config.changed({"pairing": {"rule": "min_mi"}})
    bare = replace(fit, gradients={}, config=by_mi)
    again = bare.refit(batch_size=2, pairing=fit.config.pairing)
    assert again.gradients.keys() == fit.gradients.keys()
    with pytest.raises(ArgumentError, match="batch_size=2 acts only where models are read"):
        bare.refit(batch_size=2)
    with pytest.raises(ArgumentError, match="this fit took no gradients; use PairingConfig"):
        bare.predicted_effect("blocks.1.hook_resid_post", torch.ones(96))


def test_what_needs_gradients_or_prompts_says_so_where_there_are_none(fit):
    with pytest.raises(HookNameError, match=r"'blocks\.9\.hook_resid_post'"):
        fit.predicted_effect("blocks.9.hook_resid_post", torch.ones(96))
    bare = replace(fit, data=replace(fit.data, validation_behaviour=None))
    with pytest.raises(DataError, match="no validation prompts, on which a strength could be"):
        bare.context_strength(fit.plan(coefficient=0.1))


def test_unknown_fields_and_seeds_of_a_refit_are_refused(fit):
    with pytest.raises(ArgumentError, match="config has unknown field 'alinger'; closest"):
        fit.refit(alinger="ridge")
    with pytest.raises(ArgumentError, match="seed must be an integer"):
        fit.refit(seed=-1)


def test_names_of_the_first_version_still_work(fit):
    with pytest.warns(DeprecationWarning, match=r"ExpertSteering\.readings is now .*\.data"):
        data = fit.readings
    assert data is fit.data
    for old, new in (
        ("expert_anchors", "expert_anchor_states"),
        ("target_anchors", "target_anchor_states"),
        ("expert_pairs", "expert_pair_states"),
        ("target_pairs", "target_pair_states"),
    ):
        with pytest.warns(DeprecationWarning, match=f"FitData.{old} is now FitData.{new}"):
            assert getattr(data, old) is getattr(data, new)
    with pytest.warns(DeprecationWarning, match=r"data\.expert_pair_states"):
        assert fit.expert_pairs is data.expert_pair_states
    with pytest.warns(DeprecationWarning, match=r"data\.test_texts"):
        assert fit.test_texts is data.test_texts
