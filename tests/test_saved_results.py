"""Everything a fit found survives a trip through files, and a fit may start from states that were
read elsewhere."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import results
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError, ArtifactError, DataError, ModelStateError
from expertsteer_lens.evaluation.finished import FinishedRows
from expertsteer_lens.files import codec, kinds
from expertsteer_lens.hosts import Host
from expertsteer_lens.pipeline.readings import FinishedReadings

SMALL = esl.ExpertSteerConfig(
    reading="last",
    pair_tokens=False,
    mi=esl.MIConfig(n_permutations=5, n_bootstrap=10, n_components=8),
    pairing=esl.PairingConfig(n_candidates=4),
    rfm=esl.RFMConfig(bandwidth=(1.0, 2.0), n_rounds=2),
)


@pytest.fixture(scope="module")
def zoo() -> dict[str, Any]:
    expert, target = esl.zoo.load_pair(host="huggingface")
    texts = {
        "pairs": esl.zoo.contrast_pairs(30),
        "anchors": esl.zoo.anchors(60),
        "behaviour": esl.zoo.behaviour(8),
    }
    return {"expert": expert, "target": target, "texts": texts}


@pytest.fixture(scope="module")
def fit(zoo) -> esl.pipeline.ExpertSteering:
    return esl.ExpertSteer(SMALL).fit(zoo["expert"], zoo["target"], **zoo["texts"], progress=False)


def differences(one: Any, other: Any, where: str = "it") -> list[str]:
    """Where two results differ, down to the last number; a model is compared by its facts."""
    if isinstance(one, Host) or hasattr(one, "facts"):
        return differences(one.facts(), other.facts(), where)
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        return [] if same else [where]
    if dataclasses.is_dataclass(one):
        names = [f.name for f in dataclasses.fields(one) if f.init]
        return [
            d
            for n in names
            for d in differences(getattr(one, n), getattr(other, n), f"{where}.{n}")
        ]
    if isinstance(one, Mapping):
        if list(one) != list(other):
            return [f"{where}: keys"]
        return [d for k in one for d in differences(one[k], other[k], f"{where}[{k!r}]")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{where}: length"]
        return [
            d
            for i, (a, b) in enumerate(zip(one, other, strict=True))
            for d in differences(a, b, f"{where}[{i}]")
        ]
    if isinstance(one, float) and math.isnan(one):
        return [] if math.isnan(other) else [where]
    return [] if one == other else [where]


def things(fit: esl.pipeline.ExpertSteering) -> dict[str, Any]:
    key = next(iter(fit.rfms))
    made = [
        fit,
        fit.data.expert_pair_states,
        fit.aligners[key],
        fit.rfms[key],
        fit.layer_pair_mi,
        fit.layer_pairs,
        results.calibration(),
        results.evaluation(),
        fit.data,
        FinishedReadings({"expert on pairs": fit.data.expert_pair_states}),
        FinishedRows(results.evaluation().rows, "a digest"),
    ]
    return {type(thing).__name__: thing for thing in made}


@pytest.mark.parametrize("kind", sorted(set(kinds.KINDS) - {"SteeringPlan"}))
def test_every_result_survives_saving_to_the_last_bit(fit, kind, tmp_path):
    thing = things(fit)[kind]
    loaded = esl.load(esl.save(thing, tmp_path / "it"))
    assert differences(thing, loaded) == []
    assert sorted(p.name for p in (tmp_path / "it").iterdir()) == [
        "README.md",
        "config.json",
        "tensors.safetensors",
    ]
    assert repr(thing) in (tmp_path / "it" / "README.md").read_text()


def test_a_difference_would_be_seen(fit):
    other = dataclasses.replace(
        fit, data=dataclasses.replace(fit.data, readout=fit.data.readout + 1e-6)
    )
    assert differences(fit, other) == ["it.data.readout"]
    assert differences(fit, dataclasses.replace(fit, seed=1)) == ["it.seed"]


class TestFitWithoutItsTarget:
    @pytest.fixture(scope="class")
    def folder(self, fit, tmp_path_factory):
        return esl.save(fit, tmp_path_factory.mktemp("fits") / "fit")

    def test_it_makes_plans_of_a_given_strength_and_says_what_it_lacks(self, fit, folder):
        loaded = esl.load(folder)
        ours, theirs = fit.plan(coefficient=0.1), loaded.plan(coefficient=0.1)
        assert torch.equal(ours.vectors[0].direction, theirs.vectors[0].direction)
        assert (ours.target, ours.basis, ours.provenance) == (
            theirs.target,
            theirs.basis,
            theirs.provenance,
        )
        assert (loaded.target.name, loaded.target.d_model) == (fit.target.name, fit.target.d_model)
        assert loaded.summary() == fit.summary()
        assert loaded.to_pandas().equals(fit.to_pandas())
        with pytest.raises(
            ModelStateError,
            match=r"loaded without its target \(target\).*esl\.load\(path, target=model",
        ):
            loaded.plan()

    def test_with_its_target_it_is_the_fit_that_was_saved(self, fit, folder, zoo):
        loaded = esl.load(folder, target=zoo["target"])
        assert loaded.plan().vectors[0].coefficient == fit.plan().vectors[0].coefficient
        again, first = (
            f.refit(rfm=esl.RFMConfig(bandwidth=1.0, n_rounds=1)) for f in (loaded, fit)
        )
        assert torch.equal(
            again.direction(*again.layer_pairs.keys()[0]),
            first.direction(*first.layer_pairs.keys()[0]),
        )
        one, two = (
            esl.evaluate(f.plan(coefficient=0.1), zoo["target"], fit=f, n_random=2, n_shuffles=1)
            for f in (loaded, fit)
        )
        assert differences(one, two) == []

    def test_another_target_is_refused(self, folder, zoo):
        with pytest.raises(
            ArtifactError, match=r"this fit was made for fingerprint .* pass allow_mismatch=True"
        ):
            esl.load(folder, target=zoo["expert"])
        assert esl.load(folder, target=zoo["expert"], allow_mismatch=True).target.name == "expert"

    def test_a_target_for_something_that_is_no_fit_is_refused(self, fit, zoo, tmp_path):
        esl.save(fit.layer_pair_mi, tmp_path / "mi")
        esl.save(fit.plan(coefficient=0.1), tmp_path / "plan")
        for name, kind in (("mi", "LayerPairMI"), ("plan", "SteeringPlan")):
            with pytest.raises(
                ArgumentError, match=f"target= goes with a saved fit, but .* holds a saved {kind}"
            ):
                esl.load(tmp_path / name, target=zoo["target"])

    def test_looking_at_it_imports_no_host(self, folder):
        code = (
            f"import sys, expertsteer_lens as e; e.load({str(folder)!r}).plan(coefficient=0.1); "
            "bad = {'transformer_lens', 'nnsight', 'transformers'} & set(sys.modules); "
            "sys.exit(str(bad) if bad else 0)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestFiles:
    @pytest.fixture
    def folder(self, fit, tmp_path):
        return esl.save(fit.rfms[next(iter(fit.rfms))], tmp_path / "rfm")

    @pytest.mark.parametrize(
        ("find", "put", "message"),
        [
            (
                '"kind": "RFM"',
                '"kind": "Aligner"',
                "says it holds a saved Aligner, but it does not",
            ),
            (
                '"$class": "KernelPredictor"',
                '"$class": "system"',
                r"\$class: 'system' is not understood",
            ),
            ('"$tensor": 0', '"$tensor": 0, "and": 1', r"\$tensor stands beside other keys"),
            ('"$tensor": 0', '"$tensor": 99', r"\$tensor: 99 is not understood"),
            ('"$tuple": [', '"$items": [', "config.json: "),
            ('"length":', '"lenth":', "has an unknown field 'lenth'"),
            (
                '"length": ',
                '"length": -',
                r"(KernelPredictor|RFMRound) is invalid: length must be a number",
            ),
            ('"eigenvalue_share":', '"config":', "'config' stands twice in one object"),
            ('"kernel": "', '"kernel": "un', "RFMConfig is invalid: kernel must be"),
        ],
    )
    def test_content_that_is_not_ours_is_refused(self, folder, find, put, message):
        config = folder / "config.json"
        text = config.read_text()
        assert find in text
        declared = re.sub(r',?\s*"content_sha256": "\w+"', "", text)
        config.write_text(declared.replace(find, put))
        with pytest.raises(ArtifactError, match=message):
            esl.load(folder)

    def test_a_field_that_is_missing_is_named(self, folder):
        config = json.loads((folder / "config.json").read_text())
        del config["content"]["fields"]["eigenvalue_share"], config["content_sha256"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ArtifactError, match="RFM lacks the field 'eigenvalue_share'"):
            esl.load(folder)

    def test_shapes_that_do_not_belong_together_are_refused(self, fit):
        predictor = fit.rfms[next(iter(fit.rfms))].predictor
        for name in ("mean", "coefficients", "gradients"):
            short = getattr(predictor, name)[..., :-1]
            with pytest.raises(ArgumentError, match=f"{name} must have shape"):
                dataclasses.replace(predictor, **{name: short})

    @pytest.mark.parametrize("kind", ["LayerPairMI", "Evaluation", "ActivationStore"])
    def test_a_changed_number_of_a_result_is_noticed(self, fit, kind, tmp_path):
        folder = esl.save(things(fit)[kind], tmp_path / kind)
        file = folder / "config.json"
        text = file.read_text()
        digit = re.search(r'"(?:\$tensor|effect|n_samples)": [-0-9.]*?([1-9])', text)
        file.write_text(text[: digit.start(1)] + "7" + text[digit.end(1) :])
        assert file.read_text() != text
        with pytest.raises(ArtifactError, match=r"config\.json is damaged or was edited"):
            esl.load(folder)

    def test_a_damaged_or_missing_file_is_named(self, folder):
        tensors = folder / "tensors.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-8])
        with pytest.raises(ArtifactError, match=r"tensors\.safetensors is damaged"):
            esl.load(folder)
        tensors.unlink()
        with pytest.raises(ArtifactError, match=r"is incomplete: tensors\.safetensors is missing"):
            esl.load(folder)

    def test_only_the_same_kind_is_replaced(self, fit, folder, tmp_path):
        with pytest.raises(
            ArtifactError, match="exists and is not a saved plan or result of this kind"
        ):
            esl.save(fit.plan(coefficient=0.1), folder)
        esl.save(fit.rfms[next(iter(fit.rfms))], folder)
        model = tmp_path / "model"
        model.mkdir()
        (model / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(ArtifactError, match="exists and is not a saved plan"):
            esl.save(fit.plan(coefficient=0.1), model)
        assert json.loads((model / "config.json").read_text()) == {"model_type": "llama"}

    def test_what_no_file_can_hold_is_refused_and_nothing_is_written(self, tmp_path):
        store = esl.ActivationStore(
            {"blocks.0.hook_resid_post": torch.ones(2, 3)}, provenance={"by": print}
        )
        with pytest.raises(
            ArgumentError, match="builtin_function_or_method cannot be written to a file"
        ):
            esl.save(store, tmp_path / "store")
        with pytest.raises(
            ArgumentError, match="a dict cannot be saved; save takes SteeringPlan, ActivationStore"
        ):
            esl.save({"a": 1}, tmp_path / "dict")
        assert list(tmp_path.iterdir()) == []

    def test_tensors_that_share_memory_are_written_apart(self):
        whole, tensors = torch.arange(6.0).reshape(2, 3), {}
        codec.encode([whole, whole[0], whole.T, whole], tensors)
        assert len({t.data_ptr() for t in tensors.values()}) == 4
        for got, want in zip(tensors.values(), (whole, whole[0], whole.T, whole), strict=True):
            assert got.is_contiguous()
            assert torch.equal(got, want)

    def test_a_class_and_a_kind_of_the_users_own_are_written_and_read(self, tmp_path):
        class Slope(NamedTuple):
            by: torch.Tensor
            name: str = "slope"

        with pytest.raises(ArgumentError, match="a Slope cannot be saved"):
            esl.save(Slope(torch.ones(2)), tmp_path / "slope")
        codec.register_class(Slope)
        kinds.register_kind(kinds.result_kind("Slope"))
        try:
            loaded = esl.load(esl.save(Slope(torch.ones(2)), tmp_path / "slope"))
            assert differences(loaded, Slope(torch.ones(2))) == []
            with pytest.raises(ArgumentError, match="there is already a class 'Slope'"):
                codec.register_class(Slope)
            with pytest.raises(ArgumentError, match="there is already a kind 'Slope'"):
                kinds.register_kind(kinds.result_kind("Slope"))
        finally:
            del codec.CLASSES["Slope"], kinds.KINDS["Slope"]
        with pytest.raises(ArtifactError, match="holds a 'Slope', which this package does not"):
            esl.load(tmp_path / "slope")
        with pytest.raises(ArgumentError, match="must be a dataclass or a named tuple"):
            codec.register_class(object)

    def test_a_class_that_has_only_the_name_of_one_of_ours_is_not_written(self):
        class AlignerConfig(NamedTuple):
            kind: str

        assert codec.encode(AlignerConfig("ridge"), {}) == {"$tuple": ["ridge"]}

    def test_files_name_no_module_and_no_private_class_or_field(self, fit, tmp_path):
        written = (esl.save(fit, tmp_path / "fit") / "config.json").read_text()
        classes = set(re.findall(r'"\$class": "(\w+)"', written))
        public = {"RFM", "KernelPredictor", "Aligner", "AffineMap", "RFMHistory"}
        assert public <= classes <= set(codec.CLASSES)
        assert not re.search(r'"_\w+":', written)
        assert "expertsteer_lens." not in written

    def test_numbers_that_json_lacks_and_keys_that_are_no_text_come_back(self):
        value = {
            "a": (1, 2.5, None, True),
            ("x", "y"): [float("inf"), float("-inf")],
            "$tag": {},
            3: "text",
        }
        written = json.loads(json.dumps(codec.encode(value, {}), allow_nan=False))
        assert codec.decode(written, {}, lambda facts: facts) == value
        assert math.isnan(
            codec.decode(json.loads(json.dumps(codec.encode(float("nan"), {}))), {}, dict)
        )


class TestFitFromStates:
    @pytest.fixture(scope="class")
    def states(self, zoo):
        texts = zoo["texts"]
        return esl.capture(zoo["expert"], [*texts["pairs"].texts, *texts["anchors"]])

    def test_it_finds_what_the_model_itself_would_give(self, fit, states, zoo, tmp_path):
        states = esl.load(esl.save(states, tmp_path / "states"))
        found = esl.ExpertSteer(SMALL).fit(states, zoo["target"], **zoo["texts"], progress=False)
        assert found.layer_pairs.keys() == fit.layer_pairs.keys()
        assert found.provenance == fit.provenance
        for name in fit.data.expert_pair_states:
            torch.testing.assert_close(
                found.data.expert_pair_states[name],
                fit.data.expert_pair_states[name],
                atol=1e-5,
                rtol=1e-5,
            )
            one, two = found.data.expert_anchor_states[name], fit.data.expert_anchor_states[name]
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
        key = fit.layer_pairs.keys()[0]
        torch.testing.assert_close(found.direction(*key), fit.direction(*key), atol=1e-4, rtol=0)

    def test_without_anchors_the_pairs_alone_are_read(self, zoo):
        pairs = zoo["texts"]["pairs"]
        states = esl.capture(zoo["expert"], pairs.texts)
        found = esl.ExpertSteer(SMALL).fit(states, zoo["target"], pairs, progress=False)
        assert found.data.expert_anchor_states.n == found.data.target_anchor_states.n < states.n
        assert found.provenance["anchors"]["given"] is False

    def test_some_of_its_layers_can_be_chosen(self, states, zoo):
        names = list(states)[2:4]
        found = esl.ExpertSteer(SMALL).fit(
            states, zoo["target"], **zoo["texts"], expert_hook_names=names, progress=False
        )
        assert list(found.data.expert_pair_states) == names

    def test_states_of_other_texts_or_tokens_are_refused(self, states, zoo):
        steer, target, texts = esl.ExpertSteer(SMALL), zoo["target"], zoo["texts"]
        with pytest.raises(
            DataError,
            match=r"holds states of 120 texts, which are not the 60 of pairs and anchors, .* make them with ExpertS",
        ):
            steer.fit(states, target, texts["pairs"], progress=False)
        shuffled = {**texts, "anchors": texts["anchors"][::-1]}
        with pytest.raises(
            DataError,
            match=r"not the 120 of pairs and anchors, in this order; make them with ExpertSteer",
        ):
            steer.fit(states, target, **shuffled, progress=False)
        mean = dataclasses.replace(SMALL, reading="mean")
        with pytest.raises(
            DataError, match=r"read at positions='last', but config\.reading is 'mean'"
        ):
            esl.ExpertSteer(mean).fit(states, target, **texts, progress=False)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"seed": "0"}, "seed"),
        ({"seed": True}, "seed"),
        ({"steps": 3}, "steps"),
        ({"wide": "false"}, "wide"),
        ({"name": 3}, "name"),
        ({"share": "0.5"}, "share"),
    ],
)
def test_a_field_of_another_type_is_refused_where_it_is_read(fields, name):
    @dataclasses.dataclass(frozen=True)
    class Made:
        seed: int = 0
        steps: tuple[dict[str, int | str], ...] = ()
        wide: bool = False
        name: str | None = None
        share: float | None = None
        tensor: torch.Tensor | None = None

    codec.register_class(Made)
    try:
        for good in ({}, {"share": 1}, {"name": None}, {"tensor": 3}, {"wide": True}):
            assert codec.decode({"$class": "Made", "fields": good}, {}, dict) == Made(**good)
        with pytest.raises(ArtifactError, match=f"Made: {name} must be .*, got"):
            codec.decode({"$class": "Made", "fields": fields}, {}, dict)
    finally:
        del codec.CLASSES["Made"]
