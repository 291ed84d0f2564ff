"""Figures of the steps hold the numbers they claim, and their titles what follows from them."""

from __future__ import annotations

import pytest
import results
import torch
from scipy.stats import false_discovery_control
from test_tokens_shown import FAST, HOOK, plan_of

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.show import drawing, plots, step_plots
from expertsteer_lens.show.inspection import (
    AnchorCurve,
    SteeringPath,
    anchor_curve,
    direction_words,
    steering_path,
)

pytest.importorskip("plotly")
PROMPTS = ["Once upon a time", "The cat"]


@pytest.fixture(scope="module")
def models():
    return esl.zoo.load_pair(host="huggingface")


@pytest.fixture(scope="module")
def fit(models):
    return esl.ExpertSteer(FAST).fit(
        *models,
        esl.zoo.contrast_pairs(n=12),
        anchors=esl.zoo.anchors(n=60),
        behaviour=esl.zoo.behaviour(n=8),
        progress=False,
    )


def test_lines_join_the_chosen_layers():
    pairs = results.layer_pairs()
    figure = step_plots.plot_pairing_lines(pairs)
    lines = [t for t in figure.data if t.mode == "lines"]
    assert [t.hovertext.split(":")[0] for t in lines] == [f"{p.expert} → {p.target}" for p in pairs]
    assert list(lines[0].y) == [1.0, 1.0]  # layer 2 of 0-2, layer 3 of 0-3
    assert "2 → 3, 0 → 1" in figure.layout.title.text


def test_the_spectrum_is_that_of_the_agop(fit):
    rfm = fit.rfms[fit.layer_pairs.keys()[0]]
    share = step_plots.rfm_spectrum(rfm)
    assert float(share[0]) == pytest.approx(rfm.eigenvalue_share, rel=1e-4)
    assert float(share.sum()) == pytest.approx(1.0)
    figure = step_plots.plot_rfm(fit)
    assert f"holds {rfm.eigenvalue_share:.0%}" in figure.layout.title.text


def test_cells_of_the_maps_are_their_held_out_r2(fit):
    figure = step_plots.plot_aligner_quality(fit)
    shown = sorted(v for row in figure.data[0].z for v in row if v is not None)
    assert shown == pytest.approx(sorted(a.quality.r2 for a in fit.aligners.values()))
    assert f"best R² {shown[-1]:.2f}" in figure.layout.title.text


def test_the_curve_of_anchors_ends_at_all_of_them(fit):
    curve = anchor_curve(fit, sizes=[10, 20, 40])
    e, t = curve.pair
    order = torch.randperm(fit.target_anchors.n, generator=torch.Generator().manual_seed(fit.seed))[
        :20
    ]
    one = esl.fit_aligner(
        fit.data.expert_anchor_states[e][order], fit.target_anchors[t][order], fit.config.aligner
    )
    assert curve.to_pandas().set_index("n_anchors")["r2"][20] == pytest.approx(one.quality.r2)
    with pytest.raises(ArgumentError, match="sizes"):
        anchor_curve(fit, sizes=[10_000])


@pytest.mark.parametrize(("last", "said"), [(0.5, "would help"), (0.401, "would add little")])
def test_a_curve_that_rises_says_that_more_anchors_help(last, said):
    curve = AnchorCurve((HOOK, HOOK), (10, 20), torch.tensor([0.4, last]))
    assert f"more anchors {said}" in curve.plot().layout.title.text


def test_words_are_those_whose_logits_the_direction_raises(models):
    target = models[1]
    host = esl.as_host(target)
    last = host.hook_names()[-1]
    row = target.get_output_embeddings().weight[17].detach().float()
    plan = esl.SteeringPlan.from_vectors({last: row}, coefficient=30.0, relative_to="unit")
    words = direction_words(plan, target, PROMPTS, k=3)
    assert words.tokens[0] == host.tokenizer.decode([17])
    assert words.logits[0] > 2 * words.random_logits[0]
    # Steered at the last layer itself, the real logits move by just that much.
    batch = host.tokenize(PROMPTS)
    with torch.no_grad():
        before = host.forward(batch)
        with plan.hooks(target):
            after = host.forward(batch)
    ends = (torch.arange(2), batch.lengths - 1)
    change = (after[ends] - before[ends]).mean(0)
    assert float(words.logits[0]) == pytest.approx(float(change[17] - change.mean()), rel=1e-3)
    assert words.plot().data[0].x[0] == pytest.approx(float(words.logits[0]))
    with pytest.raises(ArgumentError, match="not steered by this plan"):
        direction_words(plan, target, PROMPTS, hook_name="blocks.9.hook_resid_post")


def test_the_path_starts_where_the_plan_acts_and_ends_in_the_logits(models):
    target, host = models[1], esl.as_host(models[1])
    plan = plan_of(target)
    path = steering_path(plan, target, PROMPTS, positive=[" happy"], negative=[" sad"])
    assert path.norm[0] == 0
    assert (path.norm[1:] > 0).all()
    rows = esl.capture(target, PROMPTS, [HOOK])[HOOK]
    delta = plan.vectors[0].delta
    delta = delta - delta.mean() if host.basis == "centred" else delta
    expected = (delta.norm() / rows.norm(dim=-1)).mean()
    assert float(path.norm[1]) == pytest.approx(float(expected), rel=1e-3)
    # The difference at the last layer is all that reaches the logits.
    batch = host.tokenize(PROMPTS)
    ends = (torch.arange(2), batch.lengths - 1)
    with torch.no_grad():
        before = host.forward(batch)[ends]
        with plan.hooks(target):
            after = host.forward(batch)[ends]
    a, b = (host.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in (" happy", " sad"))
    change = ((after - before)[:, a] - (after - before)[:, b]).mean()
    assert float(path.attribution[-1]) == pytest.approx(float(change), abs=1e-3)
    with pytest.raises(ArgumentError, match="or neither"):
        steering_path(plan, target, PROMPTS, positive=["a"])


@pytest.mark.parametrize(("end", "said"), [(0.5, "grows to 50%"), (0.1, "fades to 10%")])
def test_the_title_of_a_path_says_what_becomes_of_it(end, said):
    path = SteeringPath(results.names(3), torch.tensor([0.0, 0.2, end]), None)
    assert f"Steered at layer 1, the difference {said}" in path.plot().layout.title.text


def test_significance_is_corrected_over_the_whole_matrix():
    mi = results.layer_pair_mi()
    adjusted = false_discovery_control(mi.p_values.numpy(), axis=None).reshape(mi.matrix.shape)
    figure = plots.plot_layer_pair_mi(mi, significance=0.3)
    crosses = next(t for t in figure.data if t.name == "not significant")
    shown = set(zip(crosses.y, crosses.x, strict=True))
    assert shown == {(i, j) for i in range(3) for j in range(4) if adjusted[i, j] > 0.3}
    assert 0 < len(shown) < 12
    assert f"{12 - len(shown)} of 12 pairs exceed it" in figure.layout.title.text
    with pytest.raises(ArgumentError, match="significance needs a null"):
        plots.plot_layer_pair_mi(results.layer_pair_mi(n_permutations=0), significance=0.05)


def test_titles_say_what_was_found():
    title = plots.plot_dose_response(results.calibration()).layout.title.text
    assert "Coefficient 0.2: +1.00 nats for 0.090 nats per token" in title
    title = plots.plot_evaluation(results.evaluation()).layout.title.text
    assert "moves the behaviour by +1.00 nats, random directions by +0.00 ± 0.20" in title


def test_a_dark_figure_is_a_copy_with_the_same_numbers():
    figure = plots.plot_evaluation(results.evaluation())
    other = drawing.dark(figure)
    assert [t.x for t in other.data] == [t.x for t in figure.data]
    assert other.layout.font.color == drawing.DARK_INK
    assert figure.layout.font.color == drawing.INK
    assert drawing.FLOOR_FILL not in [s.fillcolor for s in other.layout.shapes]
