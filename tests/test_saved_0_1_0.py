"""Files that version 0.1.0 wrote still load, and give the numbers they gave then.

`goldens/saved_0_1_0/` was written by that version: one folder for each kind, and in `facts.json`
what its objects answered."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArtifactError
from expertsteer_lens.files.kinds import KINDS

SAVED = pathlib.Path(__file__).parent / "goldens" / "saved_0_1_0"
FACTS = json.loads((SAVED / "facts.json").read_text())
# Kinds that version did not have: what a stopped command keeps, and the data of a fit.
NEWER = {"FinishedReadings", "FinishedRows", "FitData"}
KINDS_THEN = sorted(set(KINDS) - NEWER)


def rows() -> torch.Tensor:
    drawn = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(drawn).double() * 8


def directions(fit: esl.pipeline.ExpertSteering) -> dict[str, list[float]]:
    return {f"{e} {t}": fit.direction(e, t)[:4].tolist() for e, t in fit.rfms}


def close(found: Any, expected: Any) -> None:
    # The numbers were written in full; another build of torch may round the sums differently.
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            close(found[key], value)
    else:
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.fixture(scope="module")
def fit() -> esl.pipeline.ExpertSteering:
    target = esl.zoo.load("target", host="huggingface")
    return esl.load(SAVED / "ExpertSteering", target=target)


def test_every_kind_of_that_version_is_among_them():
    assert {p.name for p in SAVED.iterdir() if p.is_dir()} == set(KINDS_THEN)
    assert set(KINDS) >= NEWER


@pytest.mark.parametrize("kind", KINDS_THEN)
def test_a_thing_of_0_1_0_loads_and_survives_saving_in_todays_format(kind, tmp_path):
    config = json.loads((SAVED / kind / "config.json").read_text())
    assert config["format_version"] == 1
    loaded = esl.load(SAVED / kind)
    assert type(loaded).__name__ == kind
    again = esl.load(esl.save(loaded, tmp_path / "again"))
    assert repr(again) == repr(loaded)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (written["format_version"], written["kind"]) == (2, kind)


def test_a_thing_of_0_1_0_is_replaced_by_one_of_its_kind_only(tmp_path):
    import shutil

    for kind in ("SteeringPlan", "LayerPairs"):
        shutil.copytree(SAVED / kind, tmp_path / kind)
    plan = esl.load(SAVED / "SteeringPlan")
    esl.save(plan, tmp_path / "SteeringPlan")
    with pytest.raises(ArtifactError, match="not a saved plan or result of this kind"):
        esl.save(plan, tmp_path / "LayerPairs")


def test_the_plan_adds_what_it_added():
    plan = esl.load(SAVED / "SteeringPlan")
    close([float(v.delta.double().sum()) for v in plan.vectors], FACTS["plan_delta_sum"])


def test_the_rfm_predicts_what_it_predicted_and_has_its_leading_direction(tmp_path):
    rfm = esl.load(SAVED / "RFM")
    assert rfm.predict(rows()).tolist() == pytest.approx(FACTS["rfm_scores"], rel=1e-9)
    torch.testing.assert_close(rfm.top_directions(1)[0], rfm.direction, atol=1e-5, rtol=0)
    again = esl.load(esl.save(rfm, tmp_path / "rfm"))
    assert torch.equal(again.predict(rows()), rfm.predict(rows()))


def test_the_aligner_maps_as_it_mapped():
    aligner = esl.load(SAVED / "Aligner")
    total = float(aligner.encode(torch.ones(1, aligner.d_expert)).double().sum())
    close(total, FACTS["aligner_encode_sum"])


def test_the_fit_has_its_directions_and_makes_the_plan_it_made(fit):
    close(directions(fit), FACTS["fit_directions"])
    made = fit.plan(coefficient=FACTS["fit_plan_coefficient"])
    for ours, theirs in zip(made.vectors, esl.load(SAVED / "SteeringPlan").vectors, strict=True):
        torch.testing.assert_close(ours.delta, theirs.delta, atol=1e-6, rtol=0)


def test_the_fit_is_said_to_have_read_as_that_version_did(fit):
    c = fit.config
    assert (c.reading, c.pair_tokens, c.mi_on) == ("last", False, "texts")


def test_the_fit_can_be_fitted_again_from_what_it_read(fit):
    close(directions(fit.refit()), FACTS["refit_directions"])


def test_the_other_results_have_their_numbers():
    def content(kind: str) -> dict[str, Any]:
        return json.loads((SAVED / kind / "config.json").read_text())["content"]["fields"]

    evaluation, calibration = esl.load(SAVED / "Evaluation"), esl.load(SAVED / "Calibration")
    for row, fields in zip(evaluation.rows, content("Evaluation")["rows"]["$tuple"], strict=True):
        assert (row.method, row.effect) == (fields["fields"]["method"], fields["fields"]["effect"])
    assert calibration.coefficient == content("Calibration")["coefficient"]
    pairs, expected = esl.load(SAVED / "LayerPairs"), content("LayerPairs")
    assert pairs.rule == expected["rule"]
    mi = esl.load(SAVED / "LayerPairMI")
    assert mi.n_samples == content("LayerPairMI")["n_samples"]
    assert mi.matrix.shape == (len(mi.expert_hook_names), len(mi.target_hook_names))
    store = esl.load(SAVED / "ActivationStore")
    names = content("ActivationStore")["activations"]
    assert list(store) == list(names)


def test_what_0_1_0_wrote_of_an_rfm_is_read_only_if_it_is_whole(tmp_path):
    import shutil

    folder = shutil.copytree(SAVED / "RFM", tmp_path / "rfm")
    config = json.loads((folder / "config.json").read_text())
    del config["content"]["fields"]["_fold"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="lacks what its format has: '_fold'"):
        esl.load(folder)
