"""Several experts of one fit: their layers are candidates side by side."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError, DataError, HookNameError
from expertsteer_lens.pipeline.experts import Experts

SMALL = esl.ExpertSteerConfig(
    mi=esl.MIConfig(n_permutations=3, n_bootstrap=3),
    pairing=esl.PairingConfig(n_layers=2, n_candidates=8),
    rfm=esl.RFMConfig(n_rounds=1),
)
TEXTS = {"pairs": esl.zoo.contrast_pairs(10), "anchors": esl.zoo.anchors(40)}


@pytest.fixture(scope="module")
def models():
    return esl.zoo.load_pair(host="huggingface")


def fitted(expert, target, config=SMALL, **changes):
    return esl.ExpertSteer(config).fit(expert, target, **{**TEXTS, "progress": False} | changes)


@pytest.fixture(scope="module")
def both(models):
    """The target is an expert beside the expert."""
    expert, target = models
    return fitted([expert, target], target, behaviour=esl.zoo.behaviour(20))


def names_of(models) -> list[str]:
    return list(Experts.of(list(models)).sources)


def test_one_expert_in_a_list_is_one_expert(models):
    expert, target = models
    alone, listed = fitted(expert, target), fitted([expert], target)
    assert alone.rfms.keys() == listed.rfms.keys()
    for key, rfm in alone.rfms.items():
        assert torch.equal(rfm.direction, listed.rfms[key].direction)


def test_each_expert_has_the_maps_it_would_have_alone(models, both):
    """The target's tokens end where the target's do, so the expert's token pairs are those of a fit
    with it alone, and its maps and directions too."""
    expert, target = models
    alone = fitted(expert, target, behaviour=esl.zoo.behaviour(20))
    assert both.data.token_moments.n == alone.data.token_moments.n
    name = names_of(models)[0]
    shared = 0
    for (e, t), rfm in alone.rfms.items():
        other = both.rfms.get((f"{name}/{e}", t))
        if other is not None:
            shared += 1
            cosine = torch.nn.functional.cosine_similarity(rfm.direction, other.direction, dim=0)
            assert cosine > 1 - 1e-4
    assert shared >= 2


def test_layers_of_all_experts_are_candidates(models, both):
    expert, target = models
    first, second = names_of(models)
    layers = list(both.data.expert_pair_states)
    assert layers == [f"{first}/{h}" for h in esl.hosts.as_host(expert).hook_names()] + [
        f"{second}/{h}" for h in esl.hosts.as_host(target).hook_names()
    ]
    assert {e.partition("/")[0] for e, _ in both.data.token_moments.pairs} == {first, second}
    assert both.layer_pair_mi.matrix.shape == (len(layers), 5)
    widths = {e.partition("/")[0]: both.data.expert_pair_states[e].shape[1] for e in layers}
    assert widths == {first: 128, second: 96}
    # A state and its own copy share more than two models do.
    own = both.layer_pair_mi.matrix[len(layers) - 3, 2]
    assert own > both.layer_pair_mi.matrix[: len(layers) - 5].max()


def test_what_a_fit_says_of_its_experts(models, both):
    facts = both.provenance["expert"]
    assert facts["name"].count(" + ") == 1
    assert facts["d_model"] == "128 + 96"
    assert facts["fingerprint"] == " + ".join(esl.hosts.as_host(m).fingerprint for m in models)
    assert facts["basis"] == "centred + raw"


def test_it_is_saved_refitted_evaluated_and_made_again(models, both, tmp_path):
    expert, target = models
    esl.save(both, tmp_path / "fit")
    again = esl.load(tmp_path / "fit", target=target)
    assert again.layer_pairs.keys() == both.layer_pairs.keys()
    refitted = again.refit(rfm=dataclasses.replace(SMALL.rfm, n_rounds=2))
    assert list(refitted.data.expert_pair_states) == list(both.data.expert_pair_states)
    plan = both.plan(coefficient=0.1)
    result = esl.evaluate(plan, target, fit=both, n_random=2, progress=False)
    assert {row.method for row in result.rows} >= {"this plan", "wrong layer"}
    made = esl.pipeline.reproduce(
        again, [expert, target], target, TEXTS["pairs"], anchors=TEXTS["anchors"], progress=False
    )
    assert made.bit_equal, made.verdict
    with pytest.raises(ArgumentError, match="expert is not the model of the fit"):
        esl.pipeline.reproduce(
            again, expert, target, TEXTS["pairs"], anchors=TEXTS["anchors"], progress=False
        )


def test_states_may_stand_for_an_expert(models):
    """Maps are then fitted on one state a text, for all experts."""
    expert, target = models
    steer = esl.ExpertSteer(SMALL)
    states = steer.capture(expert, **TEXTS, progress=False)
    found = fitted([states, target], target)
    want = fitted([expert, target], target, dataclasses.replace(SMALL, pair_tokens=False))
    assert found.data.maps_on == "texts"
    for key, rfm in want.rfms.items():
        assert torch.allclose(rfm.direction, found.rfms[key].direction, atol=1e-4)


@pytest.mark.parametrize("anchors", ["given", "some of the pairs' texts", "none"])
def test_states_read_before_are_those_that_a_fit_reads(models, anchors):
    """Also of a text that is an anchor and a text of a pair: it is read on its own words here, and
    on those in which the pair differs there."""
    expert, target = models
    pairs = TEXTS["pairs"]
    given = {
        "given": esl.zoo.anchors(40),
        "some of the pairs' texts": [*esl.zoo.anchors(30), *pairs.texts[:8]],
        "none": None,
    }[anchors]
    steer = esl.ExpertSteer(dataclasses.replace(SMALL, pair_tokens=False))
    states = steer.capture(expert, pairs, anchors=given, progress=False)
    one, other = (
        steer.fit(e, target, pairs, anchors=given, progress=False) for e in (states, expert)
    )
    for what in ("expert_anchor_states", "expert_pair_states", "target_anchor_states"):
        here, there = getattr(one.data, what), getattr(other.data, what)
        for name in there:
            assert torch.allclose(here[name], there[name], atol=1e-4), (what, name)


@pytest.mark.parametrize("where", ["memory", "folder", "shards"])
@pytest.mark.parametrize("anchors", ["given", "some of the pairs' texts"])
def test_tokens_read_before_give_the_maps_of_a_fit_with_the_model(models, where, anchors, tmp_path):
    expert, target = models
    pairs = TEXTS["pairs"]
    given = esl.zoo.anchors(40)
    if anchors != "given":
        given = [*given[:30], *pairs.texts[:8]]
    steer = esl.ExpertSteer(SMALL)
    store = None if where == "memory" else tmp_path / "tokens"
    how = {"anchors": given, "tokens": True, "store": store, "progress": False}
    states = steer.capture(expert, pairs, anchors=given, progress=False)
    if where == "shards":
        for i in range(2):
            steer.capture(expert, pairs, **how, shard=(i, 2))
        tokens = esl.ActivationStore.merge(store)
    else:
        tokens = steer.capture(expert, pairs, **how)
    assert len(tokens) == SMALL.pairing.n_layers
    options = {"anchors": given, "behaviour": esl.zoo.behaviour(16), "progress": False}
    want = steer.fit(expert, target, pairs, **options)
    found = steer.fit(states, target, pairs, **options, expert_tokens=tokens)
    assert found.data.maps_on == want.data.maps_on == "tokens"
    assert found.data.token_moments.n == want.data.token_moments.n
    assert found.data.token_moments.pairs == want.data.token_moments.pairs
    for key, rfm in want.rfms.items():
        cosine = torch.nn.functional.cosine_similarity(
            rfm.direction, found.rfms[key].direction, dim=0
        )
        assert cosine > 1 - 1e-4
    esl.save(found, tmp_path / "fit")
    again = esl.load(tmp_path / "fit", target=target)
    made = esl.pipeline.reproduce(
        again, states, target, pairs, anchors=given, expert_tokens=tokens, progress=False
    )
    assert made.bit_equal, made.verdict


def test_tokens_that_do_not_serve_are_refused(models):
    expert, target = models
    steer = esl.ExpertSteer(SMALL)
    states = steer.capture(expert, **TEXTS, progress=False)
    tokens = steer.capture(expert, **TEXTS, tokens=True, progress=False)
    with pytest.raises(ArgumentError, match="expert that is given as states"):
        fitted(expert, target, expert_tokens=tokens)
    with pytest.raises(ArgumentError, match="expert that is given as states"):
        fitted([states, target], target, expert_tokens=tokens)
    with pytest.raises(DataError, match="do not say where their tokens end"):
        fitted(states, target, expert_tokens=states)
    less = steer.capture(
        expert, TEXTS["pairs"], anchors=TEXTS["anchors"][1:], tokens=True, progress=False
    )
    with pytest.raises(DataError, match="other texts"):
        fitted(states, target, expert_tokens=less)
    own = steer.capture(target, **TEXTS, tokens=True, progress=False)
    with pytest.raises(DataError, match="another model"):
        fitted(states, target, expert_tokens=own)
    few = states.select(hook_names=["blocks.0.hook_resid_post"])
    with pytest.raises(DataError, match="at which expert has no states"):
        fitted(few, target, expert_tokens=tokens)
    for damage in (
        lambda ends: ends[:-1],
        lambda ends: [ends[0][:-1], [*ends[1], 3], *ends[2:]],
        lambda ends: [*ends[:-1], ["a"] * len(ends[-1])],
        lambda ends: "no list",
        lambda ends: [0] * len(ends),
    ):
        facts = {**tokens.provenance, "token_ends": damage(tokens.provenance["token_ends"])}
        wrong = esl.ActivationStore(dict(tokens), provenance=facts)
        with pytest.raises(DataError, match="do not say where their tokens end"):
            fitted(states, target, expert_tokens=wrong)
    for changes in (
        {"pair_tokens": False},
        {"pairing": esl.PairingConfig(rule="min_mi")},
    ):
        with pytest.raises(ArgumentError, match="expert_tokens are not used with config"):
            fitted(states, target, dataclasses.replace(SMALL, **changes), expert_tokens=tokens)
    with pytest.raises(ArgumentError, match="goes with positions='all'"):
        esl.capture(expert, ["A text."], positions="mean", ends=True)


def states_names(fit) -> list[str]:
    return list(fit.data.expert_pair_states)


def test_what_cannot_be_is_said(models):
    expert, target = models
    with pytest.raises(ArgumentError, match="empty list"):
        fitted([], target)
    with pytest.raises(ArgumentError, match="same model twice"):
        fitted([expert, expert], target)
    first, second = names_of(models)
    hook = "blocks.1.hook_resid_post"
    with pytest.raises(HookNameError, match=f"one of {first}/, {second}/"):
        fitted([expert, target], target, expert_hook_names=[hook])
    with pytest.raises(ArgumentError, match=f"no hook point of '{second}'"):
        fitted([expert, target], target, expert_hook_names=[f"{first}/{hook}"])
    names = [f"{first}/{hook}", f"{second}/blocks.9.hook_resid_post"]
    with pytest.raises(HookNameError, match=r"blocks\.9"):
        fitted([expert, target], target, expert_hook_names=names)
    states = esl.ExpertSteer(SMALL).capture(expert, **TEXTS, progress=False)
    with pytest.raises(HookNameError, match=r"blocks\.9"):
        fitted(states, target, expert_hook_names=["blocks.9.hook_resid_post"])
    found = fitted(
        [expert, target], target, expert_hook_names=[f"{second}/{hook}", f"{first}/{hook}"]
    )
    assert states_names(found) == [f"{first}/{hook}", f"{second}/{hook}"]


def test_experts_of_one_name_are_told_apart(models):
    expert, _ = models
    states = esl.capture(expert, ["A text."], progress=False)
    more = [states.select([0]), states.select([0]), states.select([0])]
    name = next(iter(Experts.of([expert, states]).sources))
    assert list(Experts.of(more).sources) == [name, f"{name}-2", f"{name}-3"]


def test_stopped_and_gone_on(models, monkeypatch):
    """Readings of one expert that are whole are not lost."""
    from expertsteer_lens.pipeline import readings

    expert, target = models
    calls, capture = [], readings.capture

    def stop_at_second(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return capture(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(readings, "capture", stop_at_second)
        with pytest.raises(esl.errors.Interrupted) as stopped:
            fitted([expert, target], target)
    first = names_of(models)[0]
    assert list(stopped.value.finished.stores) == [f"expert on pairs ({first})"]
    whole = fitted([expert, target], target)
    found = fitted([expert, target], target, finished=stopped.value.finished)
    for key, rfm in whole.rfms.items():
        assert torch.equal(rfm.direction, found.rfms[key].direction)
    assert fitted([expert, target], target, finished=whole.data).layer_pairs.keys() == (
        whole.layer_pairs.keys()
    )
