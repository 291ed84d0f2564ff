"""A saved fit made again: equal bit by bit, and what differs is named."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import expertsteer_lens as esl
from expertsteer_lens.cli import app as cli
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.pipeline import reproduce
from expertsteer_lens.pipeline.reproduce import LEAST_COSINE, compare

SMALL = esl.ExpertSteerConfig(
    mi=esl.MIConfig(n_permutations=2, n_bootstrap=10, n_components=4),
    pairing=esl.PairingConfig(n_candidates=3, n_layers=2),
    rfm=esl.RFMConfig(bandwidth=(1.0,), n_rounds=2),
)
PAIRS, ANCHORS = esl.zoo.contrast_pairs(10), esl.zoo.anchors(24)
EXPERT, TARGET = (str(esl.zoo.model_path(name)) for name in ("expert", "target"))


@pytest.fixture(scope="module")
def zoo():
    return esl.zoo.load_pair(host="huggingface")


@pytest.fixture(scope="module")
def fit(zoo):
    return esl.ExpertSteer(SMALL, seed=3).fit(
        *zoo, PAIRS, anchors=ANCHORS, behaviour=esl.zoo.behaviour(8), progress=False
    )


@pytest.fixture(scope="module")
def saved(fit, tmp_path_factory):
    return esl.save(fit, tmp_path_factory.mktemp("fits") / "out" / "fit")


def test_a_saved_fit_comes_out_again_bit_by_bit(zoo, saved):
    found = reproduce(esl.load(saved), *zoo, PAIRS, anchors=ANCHORS, progress=False)
    assert found.differences == ()
    assert found.bit_equal
    assert found.same_machine
    assert found.reproduced
    assert found.verdict.startswith(f"Reproduced: all {len(found.cosines)} directions are equal")
    assert set(found.to_pandas().columns) == {"expert", "target", "chosen", "1 - cosine"}
    assert found.to_pandas().chosen.sum() == len(found.chosen)


def test_a_fit_without_prompts_with_neutral_texts_and_from_states_comes_out_again(zoo):
    expert, target = zoo
    steps = esl.ExpertSteer(dataclasses.replace(SMALL, pair_tokens=False), seed=1)
    states = steps.capture(expert, PAIRS, anchors=ANCHORS)
    one = steps.fit(
        states, target, PAIRS, anchors=ANCHORS, neutral=esl.zoo.neutral_texts(9), progress=False
    )
    found = reproduce(one, states, target, PAIRS, anchors=ANCHORS, progress=False)
    assert found.bit_equal, found
    two = steps.fit(expert, target, PAIRS, progress=False)
    assert reproduce(two, expert, target, PAIRS, progress=False).bit_equal


def test_texts_and_models_other_than_those_of_the_fit_are_refused(zoo, fit):
    expert, target = zoo
    other = esl.zoo.contrast_pairs(11)
    with pytest.raises(
        DataError, match=r"pairs are not those of the fit: it recorded 10 with hash"
    ):
        reproduce(fit, expert, target, other, anchors=ANCHORS)
    with pytest.raises(DataError, match=r"anchors are not those of the fit.*the same order"):
        reproduce(fit, expert, target, PAIRS, anchors=ANCHORS[::-1])
    with pytest.raises(DataError, match="was given anchors; give the same ones"):
        reproduce(fit, expert, target, PAIRS)
    with pytest.raises(ArgumentError, match="expert is not the model of the fit"):
        reproduce(fit, target, target, PAIRS, anchors=ANCHORS)
    with pytest.raises(ArgumentError, match="target is not the model of the fit"):
        reproduce(fit, expert, expert, PAIRS, anchors=ANCHORS)
    with pytest.raises(ArgumentError, match=r"made by refit\(seed=...\)"):
        reproduce(fit.refit(seed=4), expert, target, PAIRS, anchors=ANCHORS)
    early = dataclasses.replace(fit, data=dataclasses.replace(fit.data, text_hashes={}))
    with pytest.raises(ArgumentError, match="does not say which texts it was made from"):
        reproduce(early, expert, target, PAIRS, anchors=ANCHORS)


def turned(fit, key, by: float):
    """The fit with one direction turned a little."""
    rfm = fit.rfms[key]
    generator = torch.Generator().manual_seed(0)
    moved = rfm.direction + by * torch.randn(rfm.direction.shape, generator=generator)
    rfms = {**fit.rfms, key: dataclasses.replace(rfm, direction=moved / moved.norm())}
    return dataclasses.replace(fit, rfms=rfms)


def on_another_machine(fit):
    facts = {**fit.provenance, "made_on": {**fit.provenance["made_on"], "threads": 99}}
    return dataclasses.replace(fit, data=dataclasses.replace(fit.data, provenance=facts))


def test_what_differs_is_named_and_judged_by_where_it_was_made(fit):
    key = next(iter(fit.rfms))
    near, far = turned(fit, key, 1e-5), turned(fit, key, 1e-2)
    same = compare(fit, near)
    assert not same.reproduced
    assert same.agrees
    assert same.cosines[key] > LEAST_COSINE
    assert "Not reproduced bit by bit on the same kind of machine" in same.verdict
    assert any(d.startswith(f"direction {key[0]} → {key[1]}: 1 - cosine") for d in same.differences)
    elsewhere = compare(on_another_machine(fit), near)
    assert elsewhere.reproduced
    assert elsewhere.differences[0].startswith("threads: 99 then, ")
    assert "up to rounding" in elsewhere.verdict
    wrong = compare(on_another_machine(fit), far)
    assert not wrong.reproduced
    assert wrong.verdict.startswith("Not reproduced: smallest cosine")
    fewer = {k: v for k, v in fit.rfms.items() if k != key}
    lost = compare(fit, dataclasses.replace(fit, rfms=fewer))
    assert not lost.agrees
    assert f"fitted only then: {key[0]} → {key[1]}" in lost.differences
    data, name = fit.data, next(iter(fit.gradients))
    states = data.target_pair_states
    states = esl.ActivationStore(
        {n: states[n] * (1 + 1e-3) for n in states},
        states.labels,
        provenance={**states.provenance, "dtype": "float16"},
    )
    mi = fit.layer_pair_mi
    elsewise = dataclasses.replace(
        fit,
        layer_pair_mi=dataclasses.replace(mi, matrix=mi.matrix + 0.25),
        gradients={**fit.gradients, name: 1.5 * fit.gradients[name]},
        data=dataclasses.replace(data, target_pair_states=states),
    )
    said = compare(fit, elsewise).differences
    for what in (
        "target dtype: float32 then, float16 now",
        "target states of the pairs: relative difference up to 1.0e-03",
        "layer-pair scores: up to 2.5e-01 nats",
        f"gradient at {name}: relative difference 5.0e-01",
    ):
        assert what in said, said
    facts = {k: v for k, v in fit.provenance.items() if k != "made_on"}
    silent = dataclasses.replace(fit, data=dataclasses.replace(fit.data, provenance=facts))
    assert "the saved fit does not say what it was made on" in compare(silent, fit).differences
    assert not compare(silent, fit).same_machine


def test_the_command_makes_it_again_and_says_what_differs(saved, tmp_path):
    rows = [
        {"positive": p, "negative": n} for p, n in zip(PAIRS.positive, PAIRS.negative, strict=True)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (tmp_path / "anchors.txt").write_text("\n".join(ANCHORS))
    arguments = [
        "reproduce", saved.parent, "--expert", EXPERT, "--target", TARGET, "--host", "huggingface",
        "--pairs", tmp_path / "pairs.jsonl", "--anchors", tmp_path / "anchors.txt", "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["reproduced"]
    assert found["bit_equal"]
    assert found["differences"] == []
    (tmp_path / "anchors.txt").write_text("\n".join(ANCHORS[1:]))
    refused = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert isinstance(refused.exception, DataError)
    assert "anchors are not those of the fit" in str(refused.exception)


THREADS = """
import sys, torch
torch.set_num_threads(2)
import expertsteer_lens as esl
from expertsteer_lens.pipeline import reproduce
fit = esl.load(sys.argv[1])
pair = esl.zoo.load_pair(host="huggingface")
found = reproduce(fit, *pair, esl.zoo.contrast_pairs(10), anchors=esl.zoo.anchors(24), progress=False)
print(found.agrees, found.same_machine, found.reproduced, found.differences[:1])
"""


@pytest.mark.slow
def test_with_another_number_of_threads_it_agrees(saved):
    if torch.get_num_threads() == 2:
        pytest.skip("the fit was made with two threads itself")
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(saved)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.stdout.startswith("True False True ('threads: "), done.stdout
