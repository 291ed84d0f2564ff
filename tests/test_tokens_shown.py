"""The token view, and what an interrupted fit or evaluation keeps: real models, tiny."""

from __future__ import annotations

import ast
import dataclasses
import html
import pathlib

import pytest
import results
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError, Interrupted
from expertsteer_lens.evaluation import run as evaluation_run
from expertsteer_lens.pipeline import expert_steer
from expertsteer_lens.show.tokens import TokenView, view_edits, view_reading, visible

HOOK = "blocks.1.hook_resid_post"
FAST = esl.ExpertSteerConfig(
    pair_tokens=False,
    mi=esl.MIConfig(n_permutations=2, n_bootstrap=5, n_components=4),
    rfm=esl.RFMConfig(bandwidth=1.0, validation_fraction=0.0, n_rounds=1),
    pairing=esl.PairingConfig(n_candidates=1),
)


@pytest.fixture(scope="module")
def models():
    return esl.zoo.load_pair(host="huggingface")


@pytest.fixture(scope="module")
def given(models):
    return {
        "expert": models[0],
        "target": models[1],
        "pairs": esl.zoo.contrast_pairs(n=12),
        "anchors": esl.zoo.anchors(n=30),
        "behaviour": esl.zoo.behaviour(n=8),
        "progress": False,
    }


@pytest.fixture(scope="module")
def fit(given):
    return esl.ExpertSteer(FAST).fit(**given)


def plan_of(model, **options) -> esl.SteeringPlan:
    d = esl.as_host(model).d_model
    return esl.SteeringPlan.from_vectors(
        {HOOK: torch.randn(d)}, coefficient=2.0, relative_to="unit", **options
    )


class TestEdits:
    @pytest.mark.parametrize("positions", ["all", "prompt", "last_prompt", "generated", [0, 2]])
    def test_edited_are_the_tokens_the_rule_says(self, models, positions):
        plan = plan_of(models[1], positions=positions)
        (view,) = view_edits(plan, models[1], "Once upon a time", max_new_tokens=4)
        n, p = len(view.tokens), view.n_prompt
        expected = {
            "all": range(n),
            "prompt": range(p),
            "last_prompt": [p - 1],
            "generated": range(p - 1, n),
        }.get(str(positions), positions)
        assert view.chosen.nonzero()[:, 0].tolist() == list(expected)
        assert n - p == 4
        # What was added is the coefficient along a unit vector, and nothing elsewhere.
        assert torch.allclose(view.delta[view.chosen], torch.tensor(2.0), atol=1e-4)
        assert not view.delta[~view.chosen].any()
        assert repr(positions if isinstance(positions, str) else tuple(positions)) == view.rule

    def test_the_projection_is_that_of_a_capture(self, models):
        plan = plan_of(models[1])
        (view,) = view_edits(plan, models[1], "Once upon a time")
        rows = esl.capture(models[1], ["Once upon a time"], [HOOK], positions="all")[HOOK]
        assert torch.allclose(view.projection, rows @ plan.vectors[0].direction, atol=1e-4)

    def test_a_closed_gate_leaves_tokens_alone_and_its_scores_say_why(self, models):
        direction = torch.randn(esl.as_host(models[1]).d_model)
        rows = esl.capture(models[1], ["Once upon a time"], [HOOK], positions="all")[HOOK]
        threshold = float((rows @ direction).median()) + 1e-3
        gate = esl.interventions.Gate(direction=direction, threshold=threshold, per="token")
        (view,) = view_edits(plan_of(models[1], gate=gate), models[1], "Once upon a time")
        assert torch.equal(view.chosen, view.gate >= 0)
        assert 0 < int(view.chosen.sum()) < len(view.tokens)
        assert "per token" in view.to_html(colour="gate")

    def test_a_given_continuation_is_no_prompt(self, models):
        plan = plan_of(models[1], positions="generated")
        (view,) = view_edits(plan, models[1], "Once upon", continuation=" a time")
        assert len(view.tokens) > view.n_prompt
        assert view.to_pandas()["part"].tolist().count("prompt") == view.n_prompt
        with pytest.raises(ArgumentError, match="continuation or max_new_tokens"):
            view_edits(plan, models[1], "a", continuation="b", max_new_tokens=2)


@pytest.mark.parametrize("positions", ["last", "mean", "answer", 1, -2])
def test_read_are_the_tokens_whose_mean_capture_returns(models, positions):
    text = "Once upon a time there was"
    rows = esl.capture(models[0], [text], [HOOK], positions="all")[HOOK]
    view = view_reading(models[0], text, HOOK, positions=positions, direction=rows[0])
    value = esl.capture(models[0], [text], [HOOK], positions=positions)[HOOK][0]
    assert torch.allclose(rows[view.chosen].mean(0), value, atol=1e-4)
    assert torch.allclose(view.projection, rows @ rows[0], rtol=1e-3, atol=1e-3)
    assert view.what == "read"
    assert "(projection on the direction; strongest" in view.to_html()  # nothing was edited


def test_of_a_chat_only_the_answer_is_outlined(models):
    text = "Once upon a time"
    view = view_reading(models[0], text, HOOK, positions="mean", span=(5, 9))
    assert "".join(t for t, c in zip(view.tokens, view.chosen, strict=True) if c).strip() == "upon"


def test_tokens_of_any_text_are_never_markup():
    hostile = ("<script>alert(1)</script>", "\x00\x1b\n", "'\"&", "‮abc", "x" * 3000)
    n = len(hostile)
    view = TokenView(hostile, 2, "<b>", "'rule'", torch.ones(n, dtype=torch.bool), "edited")
    source = view.to_html()
    assert "<script" not in source
    assert "<b>'" not in source
    assert "␀␛⏎" in source
    assert "[U+202E]abc" in source
    assert "\x00" not in source
    assert visible("é 漢") == "é 漢"
    with pytest.raises(ArgumentError, match="holds no delta"):
        view.to_html(colour="delta")


class TestInterruption:
    def test_an_evaluation_keeps_its_rows_and_goes_on(self, fit, models, monkeypatch):
        plan, options = fit.plan(coefficient=0.05), {"n_random": 2, "n_shuffles": 0}
        whole = esl.evaluate(plan, models[1], fit=fit, **options)
        measured, original = [], evaluation_run._Run.row_of

        def row_of(self, job):
            if len(measured) == 3:
                measured.append("stop")
                raise KeyboardInterrupt
            measured.append((job.method, job.seed))
            return original(self, job)

        monkeypatch.setattr(evaluation_run._Run, "row_of", row_of)
        with pytest.raises(Interrupted, match=r"stopped after 3 of .* finished=stop") as stop:
            esl.evaluate(plan, models[1], fit=fit, **options)
        assert isinstance(stop.value, KeyboardInterrupt)
        other = plan.with_coefficient(0.06)
        with pytest.raises(ArgumentError, match="rows of another evaluation"):
            esl.evaluate(other, models[1], fit=fit, finished=stop.value.finished, **options)
        again = esl.evaluate(plan, models[1], fit=fit, finished=stop.value.finished, **options)
        assert len(measured) == len(set(measured))  # none was measured twice
        assert [r.method for r in again.rows] == [r.method for r in whole.rows]
        assert [r.effect for r in again.rows] == pytest.approx([r.effect for r in whole.rows])

    def test_a_fit_keeps_its_states_and_goes_on(self, fit, given, monkeypatch):
        def stopped(*args, **kwargs):
            raise KeyboardInterrupt

        class read_again(expert_steer.Models):  # noqa: N801 - stands in for a function
            read_pairs = read_anchors = stopped

        with monkeypatch.context() as patch:
            patch.setattr(expert_steer, "solve", stopped)
            with pytest.raises(Interrupted, match="states of both models were read") as stop:
                esl.ExpertSteer(FAST).fit(**given)
        kept = stop.value.finished
        with pytest.raises(ArgumentError, match="with another texts"):
            esl.ExpertSteer(FAST).fit(**{**given, "anchors": esl.zoo.anchors(n=31)}, finished=kept)
        with monkeypatch.context() as patch:
            patch.setattr(expert_steer, "Models", read_again)
            again = esl.ExpertSteer(FAST).fit(**given, finished=kept)
        assert again.layer_pairs.keys() == fit.layer_pairs.keys()
        key = again.layer_pairs.keys()[0]
        assert torch.equal(again.direction(*key), fit.direction(*key))

    def test_an_error_in_a_late_step_has_what_was_finished(self, fit, given, models, monkeypatch):
        def fails(*args, **kwargs):
            raise MemoryError("no room")

        with monkeypatch.context() as patch:
            patch.setattr(expert_steer, "solve", fails)
            with pytest.raises(MemoryError, match="no room") as failed:
                esl.ExpertSteer(FAST).fit(**given)
        assert "Kept in error.finished: the states of both models" in failed.value.__notes__[0]
        again = esl.ExpertSteer(FAST).fit(**given, finished=failed.value.finished)
        assert again.layer_pairs.keys() == fit.layer_pairs.keys()
        plan, original, calls = fit.plan(coefficient=0.05), evaluation_run._Run.row_of, []

        def fails_at_second(self, job):
            calls.append(1)
            return fails() if len(calls) == 2 else original(self, job)

        with monkeypatch.context() as patch:
            patch.setattr(evaluation_run._Run, "row_of", fails_at_second)
            with pytest.raises(MemoryError) as failed:
                esl.evaluate(plan, models[1], fit=fit, n_random=2, n_shuffles=0)
        assert len(failed.value.finished.rows) == 1

    @pytest.mark.parametrize("name", ["expert_hook_names", "target_hook_names"])
    def test_no_hook_points_are_not_all(self, name, given):
        with pytest.raises(ArgumentError, match=f"{name} is empty; give at least one name"):
            esl.ExpertSteer(FAST).fit(**given, **{name: []})

    @pytest.mark.parametrize("other", ["config.validation", "seed", "test_behaviour", "behaviour"])
    def test_prompts_that_chose_never_come_to_test(self, other, given):
        """Where the states of a fit were kept, its texts stay divided as they were."""
        config, seed, given = FAST, 0, dict(given)
        neutral = [t for t in esl.zoo.anchors(n=60) if t not in given["anchors"]][:8]
        prompts = esl.zoo.behaviour(n=16)
        given |= {"neutral": neutral, "test_behaviour": prompts.select(range(8, 12))}
        if other == "config.validation":
            del given["test_behaviour"]
        kept = esl.ExpertSteer(FAST).fit(**given).data
        if other == "config.validation":
            config = dataclasses.replace(FAST, validation=0.75)
        elif other == "seed":
            seed = 5
        elif other == "behaviour":
            given["behaviour"] = prompts.select(range(7))
        else:
            given["test_behaviour"] = prompts.select(range(12, 16))
        with pytest.raises(ArgumentError, match=f"states of a fit with another {other};"):
            esl.ExpertSteer(config, seed=seed).fit(**given, finished=kept)

    def test_states_of_another_dtype_are_not_mixed_in(self, given, fit, monkeypatch):
        from expertsteer_lens.pipeline import readings

        calls, capture = [], readings.capture

        def stop_at_second(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return capture(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(readings, "capture", stop_at_second)
            with pytest.raises(Interrupted) as stop:
                esl.ExpertSteer(FAST).fit(**given)
        double = [model.double() for model in esl.zoo.load_pair(host="huggingface")]
        in_double = {**given, "expert": double[0], "target": double[1]}
        for kept, said in (
            (stop.value.finished, "dtype of the expert"),
            (fit.data, "host or dtype of a model"),
        ):
            with pytest.raises(ArgumentError, match=f"a fit with another {said};"):
                esl.ExpertSteer(FAST).fit(**in_double, finished=kept)

    def test_rows_of_another_fit_or_base_are_not_kept(self, fit, given, models, monkeypatch):
        """Another expert under the same texts and settings; another base model."""
        other = esl.ExpertSteer(FAST).fit(**{**given, "expert": models[1]})
        states = fit.data.expert_pair_states
        base, noisy = (
            esl.ActivationStore(
                {k: states[k] * scale for k in states}, states.labels, states.provenance
            )
            for scale in (0.5, torch.linspace(0.1, 1.0, states.n)[:, None])
        )
        plan, options = fit.plan(coefficient=0.05), {"n_random": 2, "n_shuffles": 0}
        original, calls = evaluation_run._Run.row_of, []

        def stop_at_second(self, job):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(self, job)

        with monkeypatch.context() as patch:
            patch.setattr(evaluation_run._Run, "row_of", stop_at_second)
            with pytest.raises(Interrupted) as stop:
                esl.evaluate(plan, models[1], fit=fit, base=base, **options)
        for changed in ({"fit": other, "base": base}, {"fit": fit, "base": noisy}):
            with pytest.raises(ArgumentError, match="rows of another evaluation"):
                esl.evaluate(plan, models[1], **changed, finished=stop.value.finished, **options)


def test_whatever_has_a_table_shows_it_in_a_notebook():
    package = pathlib.Path(esl.__file__).parent
    without, n = [], 0
    for path in package.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef) or any(
                isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases
            ):
                continue
            names = {b.name for b in node.body if isinstance(b, ast.FunctionDef)}
            targets = [t for b in node.body if isinstance(b, ast.Assign) for t in b.targets]
            names |= {t.id for t in targets if isinstance(t, ast.Name)}
            if "to_pandas" in names:
                n += 1
                without += [node.name] if "_repr_html_" not in names else []
    assert n > 10
    assert without == []


def test_every_result_shows_itself_in_a_notebook_and_no_text_is_markup(fit, models):
    plan = plan_of(models[1])
    pairs = esl.ContrastPairs.from_lists(positive=["<b>x", "z"], negative=["y", "w"])
    things = [fit, fit.layer_pair_mi, fit.layer_pairs, fit.data.target_pair_states, plan]
    things += [next(iter(fit.rfms.values())), next(iter(fit.aligners.values())), pairs]
    things += [plan.vectors[0], results.evaluation(), results.calibration()]
    for thing in things:
        assert html.escape(repr(thing)) in thing._repr_html_()
    assert "paper &lt;preset&gt;" in results.evaluation()._repr_html_()
    assert "<table" in fit._repr_html_()
