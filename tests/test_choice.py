"""How firm a choice of layers is, from halves of the labelled pairs."""

from __future__ import annotations

import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.pipeline.choice import MOST_PAIRS, N_DIVISIONS, choose_on_halves

D = 6
CONFIG = esl.RFMConfig(bandwidth=1.0, validation_fraction=0.0, n_rounds=2)


def firmness(shifts: list[float], gradients: list[float], n_pairs: int, n_chosen: int = 1) -> dict:
    """A fit whose maps are the identity: expert layer i separates the labels by `shifts[i]` along
    the first axis, and target layer i has a gradient of `gradients[i]` along it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([1.0, 0.0]).repeat(n_pairs)
    experts = {}
    for i, shift in enumerate(shifts):
        rows = torch.randn(2 * n_pairs, D, generator=generator)
        rows[:, 0] += shift * (2 * labels - 1)
        experts[f"e.{i}.out"] = rows
    names = [f"t.{i}.out" for i in range(len(gradients))]
    units = dict.fromkeys(names, torch.zeros(D, dtype=torch.float64))
    for name, gradient in zip(names, gradients, strict=True):
        units[name] = gradient * torch.eye(D, dtype=torch.float64)[0]
    targets = dict.fromkeys(names, experts["e.0.out"])
    maps = esl.align.fit_aligner_grid(experts, targets, esl.AlignerConfig(kind="identity"))
    rfms = {(e, t): esl.fit_rfm(experts[e], labels, CONFIG) for e, t in maps}
    scores = torch.tensor(
        [[float(units[t] @ rfms[e, t].direction.double()) for t in names] for e in experts]
    )
    config = esl.PairingConfig(skip_first=0, skip_last=0, n_pairs=n_chosen)
    chosen = esl.pair.select_layer_pairs(list(experts), names, config, scores=scores)
    store = esl.ActivationStore(experts, labels)
    return choose_on_halves(store, chosen, maps, rfms, units, config, 0)


def test_a_clear_choice_is_made_again_from_every_half():
    found = firmness([3.0], [2.0, 1.0], n_pairs=40)
    assert found["halves"] == 2 * N_DIVISIONS
    assert found["pairs_again"] == found["targets_again"] == 10
    assert found["others"] == "none"
    assert found["runner_up"] == "e.0.out → t.1.out, 50% of the score"
    low, high = map(float, found["cosine"].split(" to "))
    assert 0.9 < low <= high <= 1.0


def test_a_choice_between_equals_is_not():
    found = firmness([0.7] * 4, [1.0], n_pairs=16)
    assert found["pairs_again"] < 8
    assert found["targets_again"] == 10  # there is no other
    counts = [int(part.rsplit("(", 1)[1][:-1]) for part in found["others"].split("; ")]
    assert sum(counts) + found["pairs_again"] == 10
    assert counts == sorted(counts, reverse=True)


def test_directions_of_noise_are_no_longer_the_same():
    low = float(firmness([0.0], [1.0], n_pairs=12)["cosine"].split(" to ")[0])
    assert low < 0.8


def test_several_pairs_are_the_same_in_any_order():
    found = firmness([3.0], [2.0, 1.99, 0.5], n_pairs=40, n_chosen=2)
    assert found["pairs_again"] == 10
    assert found["runner_up"].startswith("e.0.out → t.2.out, 25%")


@pytest.mark.parametrize("n_pairs", [2, 3])
def test_pairs_that_are_too_few_to_halve_are_said(n_pairs):
    found = firmness([3.0], [1.0], n_pairs=n_pairs)
    assert found == {"halves": 0, "because": f"{n_pairs} labelled pairs are too few to halve"}


def test_many_pairs_cost_no_more_than_the_most(monkeypatch):
    sizes = []
    fit = esl.fit_rfm
    monkeypatch.setattr(
        "expertsteer_lens.pipeline.choice.fit_rfm",
        lambda rows, *args, **kwargs: sizes.append(len(rows)) or fit(rows, *args, **kwargs),
    )
    monkeypatch.setattr("expertsteer_lens.pipeline.choice.MOST_PAIRS", 20)
    firmness([3.0], [1.0], n_pairs=30)
    assert set(sizes) == {20}  # a half of 20 pairs, two texts each
    assert MOST_PAIRS >= 500


def test_a_fit_says_how_firm_its_choice_is():
    expert, target = esl.zoo.load_pair(host="huggingface")
    config = esl.ExpertSteerConfig(
        pair_tokens=False,
        mi=esl.MIConfig(n_permutations=2, n_bootstrap=5, n_components=4),
        rfm=CONFIG,
        pairing=esl.PairingConfig(n_candidates=6),
    )
    fit = esl.ExpertSteer(config).fit(
        expert,
        target,
        esl.zoo.contrast_pairs(12),
        anchors=esl.zoo.anchors(40),
        behaviour=esl.zoo.behaviour(8),
        progress=False,
    )
    (step,) = (s for s in fit.steps if s["step"] == "stability")
    assert step["halves"] == 10
    assert 0 <= step["pairs_again"] <= step["targets_again"] <= 10
    best, second = fit.to_pandas().score[:2]
    assert step["runner_up"].endswith(f"{second / best:.0%} of the score")
    assert f"pairs_again {step['pairs_again']}" in fit.summary()
    by_rule = fit.refit(pairing=esl.PairingConfig(rule="depth"))
    assert "stability" not in {s["step"] for s in by_rule.steps}
