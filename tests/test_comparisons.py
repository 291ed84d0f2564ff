"""The table of controls, ceilings and baselines: what a user adds becomes a row, and what cannot be
measured becomes a row that says why."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.evaluation import (
    COMPARISONS,
    Evaluation,
    EvaluationRow,
    NotMeasured,
    register_control,
)
from expertsteer_lens.evaluation.finished import KeptRows
from expertsteer_lens.evaluation.methods import (
    few_labels_plan,
    paper_plan,
    shuffled_plan,
    wrong_layer_plan,
)
from expertsteer_lens.interventions import edits
from expertsteer_lens.interventions.edits import EDITS, Edit
from expertsteer_lens.learn.directions import mean_difference
from expertsteer_lens.pipeline.labelling import best_cut, score_states
from expertsteer_lens.show.plots import plot_evaluation
from expertsteer_lens.show.report import next_step, table_for_people

FAST = esl.ExpertSteerConfig(
    mi=esl.MIConfig(n_permutations=2, n_bootstrap=5, n_components=4),
    rfm=esl.RFMConfig(bandwidth=1.0, validation_fraction=0.0, n_rounds=1),
    pairing=esl.PairingConfig(n_candidates=2),
)


@pytest.fixture(scope="module")
def zoo():
    expert, target = esl.zoo.load_pair(host="huggingface")
    return {
        "expert": expert,
        "target": target,
        "pairs": esl.zoo.contrast_pairs(n=20),
        "anchors": esl.zoo.anchors(n=40),
        "behaviour": esl.zoo.behaviour(n=8),
    }


@pytest.fixture(scope="module")
def fit(zoo) -> esl.pipeline.ExpertSteering:
    return esl.ExpertSteer(FAST).fit(**zoo, progress=False)


@pytest.fixture(scope="module")
def foreign(fit, zoo) -> Evaluation:
    """A plan that does not come from the fit, and steers every layer that it may."""
    names = list(fit.target_pairs)[1:-1]
    width = fit.target_pairs.d_model
    plan = esl.SteeringPlan.from_vectors(
        {name: torch.ones(width) for name in names},
        coefficient=0.05,
        median_norms=fit.target_anchors,
    )
    return esl.evaluate(plan, zoo["target"], fit=fit, n_random=2, n_shuffles=1)


@pytest.fixture
def registered():
    """Names registered in a test are taken out again."""
    before = set(COMPARISONS)
    yield
    for name in set(COMPARISONS) - before:
        COMPARISONS.pop(name)


class TestWhatCouldNotBeMeasured:
    def test_it_is_a_row_that_keeps_its_role_and_says_why(self, foreign):
        shuffled, wrong = (foreign.row(m) for m in ("label-shuffled RFM", "wrong layer"))
        assert shuffled.role == wrong.role == "control"
        assert shuffled.note == "the plan does not come from this fit"
        assert wrong.note.startswith("0 of ")
        assert "allowed target layers are free" in wrong.note
        for row in (shuffled, wrong):
            assert not row.measured
            assert math.isnan(row.effect)
            assert bool(row.per_prompt.isnan().all())
        assert foreign.row("native RFM").measured

    def test_provenance_and_verdict_say_so(self, foreign):
        assert set(foreign.provenance["not_measured"]) == {"label-shuffled RFM", "wrong layer"}
        assert foreign.not_measured == foreign.provenance["not_measured"]
        assert "Not measured: label-shuffled RFM (the plan does not come" in foreign.verdict
        assert foreign.ceiling.measured

    def test_tables_figures_and_files_can_hold_it(self, foreign, tmp_path):
        frame = foreign.to_pandas().set_index("method")
        assert frame.loc["wrong layer", "note"].startswith("0 of ")
        assert frame.loc["wrong layer", "effect"] != frame.loc["wrong layer", "effect"]
        shown = table_for_people(foreign).set_index("method")
        assert shown.loc["wrong layer", "effect"] == "–"
        assert shown.loc["label-shuffled RFM", "note"] == "the plan does not come from this fit"
        assert "nan" not in shown.to_string().lower()
        differences = foreign.differences().set_index("method")
        assert math.isnan(differences.difference["wrong layer"])
        assert not math.isnan(differences.difference["native RFM"])
        text = json.dumps(foreign.to_dict(), allow_nan=False)
        assert json.loads(text)["verdict"] == foreign.verdict
        loaded = esl.load(esl.save(foreign, tmp_path / "evaluation"))
        assert loaded.not_measured == foreign.not_measured
        pytest.importorskip("plotly")
        figure = plot_evaluation(foreign)
        drawn = {t.y[0] for t in figure.data}
        assert "wrong layer" not in drawn
        assert "native RFM" in drawn
        assert "not measured: label-shuffled RFM, wrong layer" in figure.layout.title.text

    def test_a_plan_that_steers_what_the_fit_did_not_read_is_named(self, fit):
        from expertsteer_lens.evaluation.methods import wrong_layer_plan

        plan = fit.plan(coefficient=0.1)
        elsewhere = replace(plan.vectors[0], hook_name="blocks.1.hook_mlp_out")
        with pytest.raises(NotMeasured, match=r"'blocks\.1\.hook_mlp_out', which this fit did not"):
            wrong_layer_plan(fit, replace(plan, vectors=(elsewhere,)))


def test_prompts_and_texts_that_the_fit_chose_by_are_named_in_the_verdict(fit, zoo, tmp_path):
    plan = fit.plan(coefficient=0.1)
    given = {"fit": fit, "n_random": 2, "n_shuffles": 0}
    result = esl.evaluate(
        plan,
        zoo["target"],
        behaviour=fit.validation_behaviour,
        neutral=fit.calibration_texts,
        **given,
    )
    n, m = len(fit.validation_behaviour), len(fit.calibration_texts)
    assert result.not_held_out == [
        f"{m} of {m} neutral test texts are among the calibration texts",
        f"{n} of {n} test prompts are among the validation prompts of the fit",
    ]
    assert f"too good: {m} of {m} neutral test texts are among the" in result.verdict
    loaded = esl.load(esl.save(result, tmp_path / "evaluation"))
    assert loaded.verdict == result.verdict
    again = esl.load(esl.save(fit, tmp_path / "fit"), target=zoo["target"])
    assert again.data.text_hashes == fit.data.text_hashes
    assert len(fit.data.text_hashes["pairs"]) == 2 * len(zoo["pairs"])
    assert fit.data.pair_groups == list(range(2 * len(zoo["pairs"])))


def test_a_plan_of_another_fit_is_named_in_the_verdict(fit, zoo, tmp_path):
    """As OUT holds them where a second command was killed between its fit and its plan."""
    given = {"n_random": 2, "n_shuffles": 0}
    fewer = {**zoo, "pairs": zoo["pairs"].split(0.5)[0]}
    other = esl.ExpertSteer(FAST, seed=1).fit(**fewer, progress=False)
    plan = esl.load(esl.save(other.plan(coefficient=0.1), tmp_path / "plan"))
    result = esl.evaluate(plan, zoo["target"], fit=fit, **given)
    (said,) = result.not_held_out
    assert said.startswith("the plan comes from another fit than the one given (pairs, test_")
    assert said in result.verdict
    saved = esl.load(esl.save(fit.plan(coefficient=0.1), tmp_path / "own"))
    for own in (saved, fit.refit(seed=3).plan(coefficient=0.2), fit.place(n_blocks=2).plan):
        assert esl.evaluate(own, zoo["target"], fit=fit, **given).not_held_out == []


class TestAPlanWithParametersOfItsOwn:
    def context(self, fit) -> esl.SteeringPlan:
        plan = fit.plan(coefficient=0.1)
        weights = torch.linspace(-0.1, 0.1, fit.target_pairs.d_model)
        own = {"weights": weights, "bias": torch.tensor(1.0)}
        vector = replace(plan.vectors[0], edit="add_contextual", parameters=own)
        return replace(plan, vectors=(vector,))

    def test_other_directions_and_layers_are_steered_at_a_fixed_strength(self, fit):
        plan = self.context(fit)
        for other in (shuffled_plan(fit, plan, 0), wrong_layer_plan(fit, plan)):
            assert [v.edit for v in other.vectors] == ["add"]
            assert not other.vectors[0].parameters
        random = plan.with_random_directions(seed=0).vectors[0]
        assert torch.equal(random.parameters["weights"], plan.vectors[0].parameters["weights"])

    def test_an_edit_that_is_nothing_without_them_is_a_row_that_says_so(self, fit):
        edits.register_edit(
            "pull",
            Edit(lambda x, v, coefficient, to: x + coefficient * to * v, parameters={"to": ""}),
        )
        try:
            vector = replace(
                fit.plan(coefficient=0.1).vectors[0], edit="pull", parameters={"to": 2.0}
            )
            plan = replace(fit.plan(coefficient=0.1), vectors=(vector,))
            with pytest.raises(NotMeasured, match="parameters of edit='pull' belong to the plan's"):
                wrong_layer_plan(fit, plan)
        finally:
            del EDITS["pull"]

    def test_rows_of_other_weights_are_not_taken_for_this_plans(self, fit):
        plan = self.context(fit)
        settings = []
        for sign in (1.0, -1.0):  # of one norm, so that they look alike
            own = {
                **plan.vectors[0].parameters,
                "weights": sign * plan.vectors[0].parameters["weights"],
            }
            other = replace(plan, vectors=(replace(plan.vectors[0], parameters=own),))
            assert repr(other) == repr(plan)
            settings.append(KeptRows({"this plan": other}, {}, 0.1, None, None).setting)
        assert settings[0] != settings[1]


class TestAControlOfTheUser:
    @pytest.mark.usefixtures("registered")
    def test_it_becomes_a_row_and_its_role_may_be_new(self, fit, zoo):
        seeds = []

        def backwards(setting, seed):
            seeds.append(seed)
            assert setting.fit is not None
            return setting.plan.with_coefficient(-setting.plan.vectors[0].coefficient)

        def nothing(setting, seed):
            raise NotMeasured("nothing to measure here")

        register_control("backwards", backwards, role="my own", calibrate=False, n_seeds=2)
        register_control("nothing", nothing)
        plan = fit.plan(coefficient=0.1)
        result = esl.evaluate(plan, zoo["target"], fit=fit, n_random=2, n_shuffles=0, seed=5)
        rows = [r for r in result.rows if r.method == "backwards"]
        assert seeds == [r.seed for r in rows] == [5, 6]
        assert {r.role for r in rows} == {"my own"}
        assert {r.coefficient for r in rows} == {-plan.vectors[0].coefficient}
        assert result.row("nothing").note == "nothing to measure here"
        assert "Not measured: nothing (nothing to measure here)." in result.verdict
        pytest.importorskip("plotly")
        assert "backwards" in {t.y[0] for t in plot_evaluation(result).data}

    @pytest.mark.usefixtures("registered")
    def test_names_and_roles_that_are_taken_are_refused(self):
        def plan(setting, seed):
            return setting.plan

        for name in ("this plan", "unsteered", "prompting"):
            with pytest.raises(ArgumentError, match=f"name='{name}' is the name of another method"):
                register_control(name, plan)
        with pytest.raises(ArgumentError, match="there is already a method 'native RFM'"):
            register_control("native RFM", plan)
        for role in ("plan", "floor", "base"):
            with pytest.raises(ArgumentError, match=f"role='{role}' belongs to rows"):
                register_control("mine", plan, role=role)
        with pytest.raises(ArgumentError, match="n_seeds must be an integer"):
            register_control("mine", plan, n_seeds=0)


def test_a_method_whose_damage_never_fits_the_budget_is_a_row_that_says_so(fit, zoo, tmp_path):
    """Random directions may be dear where the plan's own is cheap: the other rows are not lost."""
    tight = replace(fit, config=fit.config.changed({"budget": 1e-12, "budget_unit": "kl"}))
    result = esl.evaluate(fit.plan(coefficient=0.1), zoo["target"], fit=tight, n_random=2)
    floor = [row for row in result.rows if row.role == "floor"]
    assert len(floor) == 2
    assert all("even coefficient 0.005 costs" in row.note for row in floor)
    assert all(row.measured for row in result.rows if row.method == "random (same norm)")
    assert all(map(math.isnan, result.floor))
    # The plan is over this budget too, so random directions of its norm say what chance does.
    assert "over the budget of 1e-12 that everything else keeps" in result.verdict
    assert "inf" not in result.verdict
    kept = replace(result, provenance={**result.provenance, "plan_cost": 0.0})
    assert "0 of 2 random directions fit the budget" in kept.verdict
    assert "cost more than the budget" in next_step(kept)
    assert "cost too much" in plot_evaluation(result).layout.title.text
    esl.save(result, tmp_path / "kept")
    assert esl.load(tmp_path / "kept").verdict == result.verdict


class TestComparedPlans:
    """Plans given by name."""

    @staticmethod
    def evaluated(fit, zoo, **changes):
        plan = fit.plan(coefficient=0.1)
        return esl.evaluate(
            plan, zoo["target"], fit=fit, **{"n_random": 2, "n_shuffles": 0} | changes
        )

    @pytest.mark.parametrize(
        "name", ["random (same budget)", "this plan", "native RFM", "prompting"]
    )
    def test_the_name_of_another_row_is_refused(self, fit, zoo, name):
        with pytest.raises(ArgumentError, match="is the name of another row"):
            self.evaluated(fit, zoo, compare={name: fit.plan(coefficient=0.1)})

    def test_a_plan_that_steers_away_stays_one(self, fit, zoo):
        away = fit.plan(coefficient=0.1).with_coefficient(-0.2)
        row = self.evaluated(fit, zoo, compare={"away": away}).row("away")
        assert row.coefficient < 0
        assert row.effect < 0
        assert row.wrong_way == float((row.per_prompt > 0).double().mean()) < 0.5

    def test_a_stopped_evaluation_goes_on_with_the_same_plans_only(self, fit, zoo, monkeypatch):
        from expertsteer_lens.errors import Interrupted
        from expertsteer_lens.evaluation import run

        measured, row_of = [], run._Run.row_of

        def stopping(self, job):
            if job.method == "native RFM":
                raise KeyboardInterrupt
            measured.append(job.method)
            return row_of(self, job)

        plan = fit.plan(coefficient=0.1)
        mine = {"mine": plan.with_random_directions(seed=1)}
        monkeypatch.setattr(run._Run, "row_of", stopping)
        with pytest.raises(Interrupted) as stop:
            self.evaluated(fit, zoo, compare=mine)
        monkeypatch.setattr(run._Run, "row_of", row_of)
        kept = stop.value.finished
        assert len(kept.rows) == len(measured) > 0
        for changes in (
            {"compare": {"mine": plan.with_random_directions(seed=2)}},
            {"compare": mine, "n_bootstrap": 50},
            {"compare": mine, "fit": replace(fit, seed=fit.seed + 1)},
        ):
            with pytest.raises(ArgumentError, match="finished holds rows of another evaluation"):
                esl.evaluate(
                    plan,
                    zoo["target"],
                    **{"fit": fit, "n_random": 2, "n_shuffles": 0, "finished": kept} | changes,
                )
        assert self.evaluated(fit, zoo, compare=mine, finished=kept).row("mine").measured


def test_a_length_is_held_against_chance_as_a_share_of_the_norm_is(fit, zoo):
    """Random directions and the target's own get strengths in the unit of the plan."""
    hook = fit.plan(coefficient=0.1).vectors[0].hook_name
    norm = fit.target_anchors.median_norm(hook)
    direction = fit.plan(coefficient=0.1).vectors[0].direction
    of = {"basis": fit.plan(coefficient=0.1).basis}
    share = esl.SteeringPlan.from_vectors(
        {hook: direction}, coefficient=0.3, median_norms={hook: norm}, **of
    )
    length = esl.SteeringPlan.from_vectors(
        {hook: direction}, coefficient=0.3 * norm, relative_to="unit", **of
    )
    one, other = (
        esl.evaluate(p, zoo["target"], fit=fit, n_random=3, n_shuffles=0) for p in (share, length)
    )
    assert other.row("random (same norm)").effect == pytest.approx(
        one.row("random (same norm)").effect, abs=1e-4
    )
    for method in ("random (same budget)", "native RFM", "wrong layer"):
        strong, as_length = one.row(method), other.row(method)
        assert as_length.coefficient > 1  # beyond all shares of the grid
        assert as_length.nll_rise == pytest.approx(strong.nll_rise, abs=0.05)


def test_what_is_no_number_is_a_row_that_says_so(fit, zoo, monkeypatch):
    """A strength at which the model overflows: no verdict is made of NaN."""
    from expertsteer_lens.measure.prepared import Completions

    totals = Completions.totals

    def overflowing(self, batch, plan, vector_edits=None):
        found = totals(self, batch, plan, vector_edits)
        strong = plan is not None and max(abs(v.coefficient) for v in plan.vectors) > 0.45
        return found * math.nan if strong else found

    monkeypatch.setattr(Completions, "totals", overflowing)
    plan = fit.plan(coefficient=0.1)
    result = esl.evaluate(
        plan.with_coefficient(0.5),
        zoo["target"],
        fit=fit,
        n_random=2,
        n_shuffles=0,
        compare={"mine": plan},
    )
    assert result.outcome == "not measured"
    assert "probabilities are no finite numbers" in result.verdict
    assert "Works" not in result.verdict
    unknown = replace(result, provenance={**result.provenance, "plan_cost": math.nan})
    assert unknown.over_budget
    json.dumps(unknown.to_dict(), allow_nan=False)
    assert "was not measured" in plot_evaluation(result).layout.title.text
    assert "float32" in next_step(result)


def test_an_instruction_in_the_prompt_has_no_cost_that_was_measured(fit, zoo):
    result = esl.evaluate(
        fit.plan(coefficient=0.1),
        zoo["target"],
        fit=fit,
        n_random=2,
        n_shuffles=0,
        prompt_prefix="Be glad. ",
    )
    assert math.isnan(result.row("prompting").nll_rise)
    assert "nan" not in plot_evaluation(result).to_json().lower().replace("nannan", "")
    assert result.row("unsteered").nll_rise == 0.0


def test_rows_of_the_first_version_are_measured():
    row = EvaluationRow(
        method="m",
        role="control",
        seed=0,
        hook_names=(),
        coefficient=0.1,
        effect=1.0,
        low=0.0,
        high=2.0,
        accuracy=1.0,
        nll_rise=0.0,
        kl=0.0,
        per_prompt=torch.ones(1),
        correct=torch.ones(1),
    )
    assert row.measured


@pytest.mark.parametrize("labeller", [None, "expert", "self"])
def test_with_one_labelled_pair_the_direction_is_that_of_the_labels_a_model_gives(
    fit, zoo, labeller
):
    plan, pairs, target = fit.plan(coefficient=0.1), zoo["pairs"], fit.target_pairs
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(fit.seed)).tolist()
    for seed in (0, 3):
        found = few_labels_plan(fit, plan, labeller, seed)
        which = order[seed]
        one = esl.ContrastPairs.from_lists([pairs.positive[which]], [pairs.negative[which]])
        rows = [pairs.texts.index(t) for t in one.texts]
        labels = torch.tensor([1, 0])
        if labeller is not None:
            model = zoo["expert" if labeller == "expert" else "target"]
            said = esl.label_texts(
                model, one, pairs.texts, config=esl.ExpertSteerConfig(reading="mean")
            )
            # Read as the fit read them: by the part in which the texts of a pair differ.
            store = fit.data.expert_pair_states if labeller == "expert" else target
            layers = [store[n] for n in list(store)[1:-1]]
            scores = score_states([x[rows] for x in layers], labels.float(), layers)
            agree = ((scores > best_cut(scores)).long() == said.labels).float().mean()
            assert agree > 0.8
            labels, rows = (scores > best_cut(scores)).long(), range(len(pairs.texts))
            labels[pairs.texts.index(one.texts[0])] = 1
            labels[pairs.texts.index(one.texts[1])] = 0
        vector = found.vectors[0]
        by_hand = mean_difference(target[vector.hook_name][list(rows)], labels)
        assert torch.allclose(vector.direction, by_hand, atol=1e-5)


def test_few_labels_are_rows_of_an_evaluation_with_all_methods(fit, zoo):
    result = esl.evaluate(
        fit.plan(coefficient=0.1), zoo["target"], fit=fit, methods="all", n_random=2, n_shuffles=2
    )
    table = result.to_pandas().set_index("method")
    for name in ("native mean difference", "expert as labeller", "self as labeller"):
        assert table.loc[f"{name}, 1 pair", "n"] == 2
        assert table.loc[f"{name}, 1 pair", "role"] == "baseline"


def test_the_papers_preset_compares_layers_as_the_paper_does(fit, monkeypatch):
    asked = []
    refit = esl.pipeline.ExpertSteering.refit
    monkeypatch.setattr(
        esl.pipeline.ExpertSteering,
        "refit",
        lambda self, **changes: asked.append(changes) or refit(self, **changes),
    )
    paper_plan(fit, fit.plan(coefficient=0.1), 0)
    preset = esl.ExpertSteerConfig.preset("paper")
    (changes,) = asked
    assert (changes["mi_on"], changes["align_on_pairs"]) == ("texts", False)
    assert changes["aligner"] == preset.aligner
    assert changes["pairing"].rule == preset.pairing.rule
