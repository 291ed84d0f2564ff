"""Configurations are checked when they are made, from Python and from JSON, and name the field and the
remedy."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Literal

import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens._config import check_field_types, config_from_dict
from expertsteer_lens.errors import ArgumentError, DataError, HookNameError

CONFIGS = [esl.AlignerConfig, esl.MIConfig, esl.PairingConfig, esl.RFMConfig, esl.ExpertSteerConfig]


def _by_keyword(values):
    return esl.ExpertSteerConfig(**values)


class TestExpertSteerConfig:
    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            (
                "reading",
                "first",
                r"reading must be 'answer', 'mean', 'last', 'attention' or an integer, got",
            ),
            ("reading", "all", r"reading must be .* got 'all'"),
            ("reading", 2.5, r"reading .*got 2\.5; the default is 'answer'"),
            ("reading", True, "reading .*got True"),
            ("pair_tokens", 1, "pair_tokens must be True or False, got 1"),
            ("align_on_pairs", "yes", "align_on_pairs must be True or False, got 'yes'; the def"),
            (
                "aligner",
                "ridge",
                r"aligner must be AlignerConfig\(\.\.\.\) or a dict of its fields",
            ),
            ("aligner", {"knd": 1}, "aligner has unknown field 'knd'; closest: 'kind'; known fi"),
            ("aligner", {"n_folds": "5"}, r"aligner\.n_folds must be an integer"),
            ("rfm", None, r"rfm must be RFMConfig\(\.\.\.\) .*got None; leave it out for the def"),
            ("mi", {"clip": -1}, "mi: clip must be a number"),
            ("batch_size", 2.0, "batch_size must be an integer, got 2.0"),
            ("batch_size", 0, "batch_size must be an integer in"),
            ("held_out", -1, "held_out must be a number in"),
            ("validation", -1, "validation must be a number in"),
            ("budget", "0.1", "budget must be a number, got '0.1'"),
            ("budget", -1, "budget must be a number in"),
            ("budget_unit", "bits", "budget_unit must be 'nll' or 'kl', got 'bits'"),
        ],
    )
    @pytest.mark.parametrize("from_json", [False, True])
    def test_a_value_that_a_field_cannot_take_is_refused_with_the_remedy(
        self, field, value, message, from_json
    ):
        make = esl.ExpertSteerConfig.from_dict if from_json else _by_keyword
        with pytest.raises(ArgumentError, match=message):
            make({field: value})

    def test_a_part_given_as_a_dict_becomes_that_part(self):
        made = esl.ExpertSteerConfig(rfm={"bandwidth": [1.0, 2.0]}, aligner={"kind": "ridge"})
        assert made.rfm == esl.RFMConfig(bandwidth=(1.0, 2.0))
        assert made.aligner == esl.AlignerConfig(kind="ridge")

    def test_it_survives_json(self):
        settings = esl.ExpertSteerConfig(
            reading="mean", batch_size=4, budget=0.2, rfm={"center_gradients": [True, False]}
        )
        again = esl.ExpertSteerConfig.from_dict(json.loads(json.dumps(settings.to_dict())))
        assert again == settings
        assert again.reading == "mean"

    def test_the_name_of_0_1_for_the_reading_is_understood_in_json(self):
        again = esl.ExpertSteerConfig.from_dict({"read_positions": "mean"})
        assert again.reading == "mean"

    def test_what_is_no_dict_of_fields_is_refused(self):
        for data in ([], "anchored", None):
            with pytest.raises(ArgumentError, match="config must be a dict of the fields of"):
                esl.ExpertSteerConfig.from_dict(data)


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_of_every_config_refuses_a_value_of_another_kind(cls):
    for field in fields(cls):
        with pytest.raises(ArgumentError, match=rf"x\.{field.name} must be "):
            config_from_dict(cls, {field.name: {1, 2}}, "x")


@pytest.mark.parametrize("cls", CONFIGS)
def test_the_defaults_of_every_config_pass_its_own_check(cls):
    made = cls()
    check_field_types(made)
    assert config_from_dict(cls, json.loads(json.dumps(made.to_dict()))) == made


@dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclass(frozen=True)
class Outer:
    name: Literal["a", "b"] | str
    inner: Inner | None = None
    weights: float | tuple[float, ...] = 1.0


def test_annotations_say_what_a_field_takes():
    made = config_from_dict(Outer, {"name": "c", "inner": {"size": 2}, "weights": [1, 2.5]})
    assert made == Outer("c", Inner(2), (1, 2.5))
    for data, message in (
        ({"name": 1}, "config.name must be 'a', 'b' or a text, got 1; give one"),
        ({"name": "a", "inner": {"size": None}}, "config.inner.size must be an integer, got None"),
        ({"name": "a", "weights": ["x"]}, "config.weights must be a number or a tuple, each a num"),
        (
            {"name": "a", "inner": 3},
            r"config.inner must be Inner\(...\) or a dict .* or None, got 3",
        ),
    ):
        with pytest.raises(ArgumentError, match=message):
            config_from_dict(Outer, data)


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        (
            {"mi": {"n_folds": 6}},
            {"n_anchors": 5},
            r"config\.mi cannot work on this fit, and no mo",
        ),
        ({"pairing": {"n_pairs": 9}}, {}, r"config\.pairing cannot work .*, but 2 are allowed"),
        (
            {"aligner": {"kind": "procrustes"}},
            {"n_anchors": 1},
            r"config\.(mi|aligner) cannot work",
        ),
    ],
    ids=["mi", "pairing", "aligner"],
)
def test_settings_that_cannot_work_are_refused_before_a_model_is_run(changes, given, message):
    from expertsteer_lens.pipeline.rehearsal import rehearse

    sizes = {
        "expert_hook_names": [f"blocks.{i}.hook_resid_post" for i in range(3)],
        "target_hook_names": [f"blocks.{i}.hook_resid_post" for i in range(4)],
        "n_anchors": 60,
        "labels": torch.tensor([1.0, 0.0]).repeat(10),
        "same_width": False,
    }
    rehearse(esl.ExpertSteerConfig(), 0, **sizes)
    with pytest.raises((ArgumentError, DataError), match=message):
        rehearse(esl.ExpertSteerConfig().changed(changes), 0, **sizes | given)


@pytest.mark.parametrize("depth", [500, 100_000])
def test_a_value_that_is_nested_too_deeply_or_long_is_refused_in_few_words(depth):
    nested: list = []
    for _ in range(depth):
        nested = [nested]
    for value in (nested, "x" * depth * 10):
        for data in ({"reading": value}, {"rfm": {"bandwidth": value}}):
            with pytest.raises(ArgumentError, match=r"nested too deeply|must be|one of") as stop:
                esl.ExpertSteerConfig.from_dict(data)
            assert len(str(stop.value)) < 1000


@pytest.mark.parametrize("which", ["expert_hook_names", "target_hook_names"])
def test_hook_names_of_a_fit_are_a_list(which):
    expert, target = esl.zoo.load_pair(host="huggingface")
    steer, pairs = esl.ExpertSteer(), esl.zoo.contrast_pairs(20)
    for given, error, message in (
        ("blocks.0.hook_resid_post", HookNameError, r"write \['blocks\.0\.hook_resid_post'\]"),
        ([], ArgumentError, "is empty; give at least one name"),
    ):
        with pytest.raises(error, match=f"{which} .*{message}"):
            steer.fit(expert, target, pairs, anchors=esl.zoo.anchors(30), **{which: given})
