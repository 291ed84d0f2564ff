"""The four steps end to end on the bundled pair, with their controls; and what bad input gets."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import models
import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import (
    ArgumentError,
    DataError,
    ExpertSteerError,
    HookNameError,
    ModelStateError,
)
from expertsteer_lens.evaluation.methods import base_plan, realigned_plan
from expertsteer_lens.measure.metrics import behaviour_metric
from expertsteer_lens.pipeline.fit_data import split_anchors

FAST_RFM = esl.RFMConfig(bandwidth=1.0, center_gradients=False, validation_fraction=0.0, n_rounds=3)
FAST_MI = esl.MIConfig(n_permutations=10, n_bootstrap=20, n_components=8)


def config(**changes) -> esl.ExpertSteerConfig:
    texts = {
        "pair_tokens": False,
        "reading": "last",
        "align_on_pairs": False,
    }  # quick: see test_reading
    return esl.ExpertSteerConfig(**{"rfm": FAST_RFM, "mi": FAST_MI, **texts, **changes})


@pytest.fixture(scope="module")
def zoo():
    expert, target = esl.zoo.load_pair()
    return {
        "expert": expert,
        "target": target,
        "pairs": esl.zoo.contrast_pairs(n=60),
        "anchors": esl.zoo.anchors(n=240),
        "behaviour": esl.zoo.behaviour(n=40),
    }


@pytest.fixture(scope="module")
def fit(zoo):
    return esl.ExpertSteer(config()).fit(**zoo, progress=False)


@pytest.fixture(scope="module")
def evaluation(fit, zoo):
    return esl.evaluate(
        fit.plan(),
        zoo["target"],
        fit=fit,
        n_random=5,
        n_shuffles=2,
        prompt_prefix="What a happy day. ",
    )


class TestOnTheZoo:
    def test_the_expert_steers_the_target_beyond_chance(self, evaluation):
        mean, sd = evaluation.floor
        assert evaluation.plan.low > mean + 2 * sd
        assert evaluation.verdict.startswith("Works")

    def test_it_comes_near_the_native_ceiling(self, evaluation):
        assert evaluation.plan.effect > 0.5 * evaluation.ceiling.effect

    def test_shuffled_labels_do_less(self, evaluation):
        shuffled = [r.effect for r in evaluation.rows if r.method == "label-shuffled RFM"]
        assert len(shuffled) == 2
        assert evaluation.plan.effect > max(shuffled) + 0.1

    def test_the_budget_holds_on_texts_it_was_not_calibrated_on(self, evaluation):
        assert evaluation.plan.nll_rise < 2 * evaluation.budget

    def test_swapping_the_classes_turns_the_direction_round(self, zoo, fit):
        key = fit.layer_pairs.keys()[0]
        mapped = fit.aligners[key].encode(fit.data.expert_pair_states[key[0]])
        flipped = esl.fit_rfm(mapped, 1 - zoo["pairs"].labels, FAST_RFM, seed=0).direction
        torch.testing.assert_close(flipped, -fit.direction(*key), atol=1e-4, rtol=0)

    def test_the_weights_of_neither_model_change(self, zoo):
        def digest(model):
            return [float(p.detach().double().sum()) for p in model.original_model.parameters()]

        before = digest(zoo["expert"]), digest(zoo["target"])
        found = esl.ExpertSteer(config()).fit(
            zoo["expert"], zoo["target"], zoo["pairs"], anchors=zoo["anchors"][:60], progress=False
        )
        found.plan(coefficient=0.1)
        assert (digest(zoo["expert"]), digest(zoo["target"])) == before

    def test_the_same_seed_gives_the_same_fit_and_another_seed_another_split(self, zoo, fit):
        arguments = (zoo["expert"], zoo["target"], zoo["pairs"])
        keywords = {"anchors": zoo["anchors"], "behaviour": zoo["behaviour"], "progress": False}
        again = esl.ExpertSteer(config()).fit(*arguments, **keywords)
        assert again.layer_pairs.keys() == fit.layer_pairs.keys()
        key = fit.layer_pairs.keys()[0]
        assert torch.equal(again.direction(*key), fit.direction(*key))
        other = esl.ExpertSteer(config(), seed=1).fit(*arguments, **keywords)
        assert other.calibration_texts != fit.calibration_texts

    def test_no_text_is_used_twice(self, zoo, fit):
        held = set(fit.calibration_texts) | set(fit.data.test_texts)
        assert not set(fit.calibration_texts) & set(fit.data.test_texts)
        assert len(held) == round(240 * 0.15) * 2
        assert not set(fit.validation_behaviour.prompts) & set(fit.test_behaviour.prompts)
        assert fit.target_anchors.n == 240 - len(held)

    def test_the_results_tell_their_story(self, fit, evaluation):
        assert "capture" in fit.summary()
        assert "chosen" in fit.summary()
        assert bool(fit.to_pandas().chosen.iloc[0])
        frame = evaluation.to_pandas()
        assert {
            "unsteered",
            "this plan",
            "random (same norm)",
            "random (same budget)",
            "label-shuffled RFM",
            "wrong layer",
            "native RFM",
            "native mean difference (CAA)",
            "prompting",
        } == set(frame.method)
        assert len(evaluation.to_pandas(collapse=False)) == 1 + 5 * 2 + 2 + 1 + 2 + 1 + 1
        unsteered = evaluation.row("unsteered")
        assert unsteered.effect == unsteered.nll_rise == unsteered.kl == 0.0
        assert unsteered.accuracy == evaluation.base_accuracy
        assert all(r.kl > 0 for r in evaluation.rows if r.coefficient)
        json.dumps(evaluation.to_dict())
        assert evaluation.row("prompting").coefficient == 0
        with pytest.raises(ArgumentError, match="no method 'magic'"):
            evaluation.row("magic")

    def test_paired_differences_are_those_of_the_rows(self, evaluation):
        frame = evaluation.differences().set_index("method")
        floor = torch.tensor(
            [r.effect for r in evaluation.rows if r.method == "random (same budget)"]
        ).mean()
        assert frame.difference["random (same budget)"] == pytest.approx(
            evaluation.plan.effect - float(floor), abs=1e-6
        )
        assert frame.difference["unsteered"] == pytest.approx(evaluation.plan.effect)
        assert bool(((frame.low <= frame.difference) & (frame.difference <= frame.high)).all())

    def test_all_methods_steer_as_many_layers_within_the_budget(self, fit, zoo):
        plan = fit.plan()
        result = esl.evaluate(
            plan,
            zoo["target"],
            fit=fit,
            methods="all",
            n_random=2,
            n_shuffles=1,
            n_generate=3,
            max_new_tokens=8,
            text_score=lambda texts: [len(t) for t in texts],
        )
        names = {r.method for r in result.rows}
        assert {
            "native PCA (RepE)",
            "native logistic probe (ITI)",
            "ridge + RFM",
            "procrustes + RFM",
            "autoencoder + RFM",
            "least squares + mean difference (L-Cross)",
            "paper preset",
        } < names
        identity = result.row("identity + RFM")  # the models' widths differ
        assert not identity.measured
        assert "identity" in identity.note
        assert result.provenance["not_measured"] == {"identity + RFM": identity.note}
        assert "Not measured" not in result.verdict  # which names controls and ceilings only
        assert sum(r.method == "paper preset" for r in result.rows) == 2
        one, two = (r for r in result.rows if r.method == "paper preset")
        assert not torch.equal(one.per_prompt, two.per_prompt)
        assert all(
            len(r.hook_names) == 1
            for r in result.rows
            if r.measured and (r.role not in ("base", "baseline") or r.coefficient)
        )
        assert all(
            r.length > 0 and r.text_score > 0 and 0 <= r.repetition <= 1
            for r in result.rows
            if r.measured
        )

    def test_pairs_that_the_expert_cannot_tell_apart_are_chosen_only_for_want_of_others(self, fit):
        store = fit.data.expert_pair_states
        permuted = store.labels[
            torch.randperm(len(store.labels), generator=torch.Generator().manual_seed(2))
        ]
        blind = esl.ActivationStore(store.activations, permuted, store.provenance)
        lost = replace(fit, data=replace(fit.data, expert_pair_states=blind))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = lost.refit(
                pairing=esl.PairingConfig(min_auc=0.95),
                rfm=esl.RFMConfig(bandwidth=1.0, n_rounds=1),
            )
        assert "reach min_auc=0.95, too few for n_pairs=1; does the expert" in found.summary()
        assert max(r.validation_auc for r in found.rfms.values()) < 0.95
        assert any(step["step"] == "select" for step in found.steps)
        assert not any(step["step"] == "select" for step in fit.steps)

    def test_the_ceiling_does_not_depend_on_the_rule_of_the_fit(self, fit, zoo, evaluation):
        paper = replace(fit.refit(pairing=esl.PairingConfig(rule="min_mi")), gradients={})
        result = esl.evaluate(
            paper.plan(coefficient=0.1), zoo["target"], fit=paper, n_random=2, n_shuffles=0
        )
        assert result.row("native RFM").hook_names == evaluation.row("native RFM").hook_names
        assert result.row("native RFM").effect == pytest.approx(
            evaluation.row("native RFM").effect, abs=1e-6
        )

    def test_another_aligner_is_held_to_the_same_choice_of_pairs(self, fit):
        plan = realigned_plan(fit, fit.plan(coefficient=0.1), "ridge")
        chosen = fit.refit(aligner=esl.AlignerConfig(kind="ridge")).layer_pairs[0]
        assert (plan.vectors[0].provenance["expert_hook_name"], plan.vectors[0].hook_name) == (
            chosen.expert,
            chosen.target,
        )

    def test_an_empty_list_is_not_taken_for_none(self, fit, zoo):
        with pytest.raises(DataError, match="neutral is empty"):
            esl.evaluate(fit.plan(coefficient=0.1), zoo["target"], fit=fit, neutral=[])

    def test_expert_minus_base_is_carried_over_by_the_maps(self, fit, zoo):
        shift = {
            h: torch.linspace(-1, 1, fit.data.expert_pair_states.d_model)
            for h in fit.data.expert_pair_states
        }
        base = esl.ActivationStore(
            {h: x - 3 * shift[h] for h, x in fit.data.expert_pair_states.items()},
            fit.data.expert_pair_states.labels,
        )
        plan = base_plan(fit, fit.plan(coefficient=0.1), base)
        vector = plan.vectors[0]
        key = (vector.provenance["expert_hook_name"], vector.hook_name)
        expected = fit.aligners[key].encode_direction(shift[key[0]] / shift[key[0]].norm())
        torch.testing.assert_close(
            vector.direction, expected / expected.norm(), atol=1e-4, rtol=1e-4
        )
        effects = {
            k: fit.predicted_effect(
                k[1], a.encode_direction(shift[k[0]]) / a.encode_direction(shift[k[0]]).norm()
            )
            for k, a in fit.aligners.items()
        }
        assert key == max(effects, key=effects.get)
        with pytest.raises(ArgumentError, match="base has no states at"):
            base_plan(
                fit, plan, esl.ActivationStore({"blocks.9.hook_resid_post": torch.ones(4, 2)})
            )
        with pytest.raises(ArgumentError, match="need fit="):
            esl.evaluate(plan, zoo["target"], base=base)
        with pytest.raises(ArgumentError, match="text_score is given, but nothing is generated"):
            esl.evaluate(plan, zoo["target"], fit=fit, text_score=len)

    def test_a_refit_equals_a_fit_with_those_settings(self, fit, zoo):
        ridge = config(aligner=esl.AlignerConfig(kind="ridge"))
        keywords = {"anchors": zoo["anchors"], "behaviour": zoo["behaviour"], "progress": False}
        anew = esl.ExpertSteer(ridge, seed=0).fit(
            zoo["expert"], zoo["target"], zoo["pairs"], **keywords
        )
        again = fit.refit(aligner=esl.AlignerConfig(kind="ridge"))
        assert again.layer_pairs.keys() == anew.layer_pairs.keys()
        key = anew.layer_pairs.keys()[0]
        torch.testing.assert_close(again.direction(*key), anew.direction(*key))
        with pytest.raises(ArgumentError, match="reading='mean' acts only where models are read"):
            fit.refit(reading="mean")

    def test_given_neutral_and_test_prompts_are_used_as_given(self, zoo):
        validation, test = zoo["behaviour"].split(0.5, seed=3)
        neutral = esl.zoo.neutral_texts(20)
        found = esl.ExpertSteer(config()).fit(
            zoo["expert"],
            zoo["target"],
            zoo["pairs"],
            anchors=zoo["anchors"],
            behaviour=validation,
            test_behaviour=test,
            neutral=neutral,
            progress=False,
        )
        assert found.validation_behaviour.prompts == validation.prompts
        assert found.test_behaviour.prompts == test.prompts
        assert set(found.calibration_texts) | set(found.data.test_texts) == set(neutral)
        assert found.target_anchors.n == len(zoo["anchors"])

    def test_a_plan_round_trips_with_its_calibration(self, fit, zoo, tmp_path):
        plan = fit.plan()
        loaded = esl.load(esl.save(plan, tmp_path / "plan"))
        assert loaded.provenance["calibration"]["coefficient"] == plan.vectors[0].coefficient
        assert loaded.provenance["config"]["pairing"]["rule"] == "attribution"
        host = esl.as_host(zoo["target"])
        one, two = (behaviour_metric(host, fit.test_behaviour, plan=p) for p in (plan, loaded))
        assert torch.equal(one, two)

    def test_several_pairs_share_one_coefficient(self, zoo):
        found = esl.ExpertSteer(config(pairing=esl.PairingConfig(n_pairs=2))).fit(
            **zoo, progress=False
        )
        plan = found.plan(coefficient=0.05)
        assert len({v.hook_name for v in plan.vectors}) == 2
        assert {v.coefficient for v in plan.vectors} == {0.05}

    def test_without_a_behaviour_the_read_out_chooses(self, zoo):
        steps = []
        found = esl.ExpertSteer(config()).fit(
            zoo["expert"],
            zoo["target"],
            zoo["pairs"],
            anchors=zoo["anchors"],
            progress=False,
            on_step=steps.append,
        )
        assert next(s for s in steps if s["step"] == "attribute")["metric"] == "read-out"
        assert found.test_behaviour is None
        assert found.plan().vectors[0].coefficient > 0
        with pytest.raises(DataError, match="behaviour is missing"):
            esl.evaluate(found.plan(coefficient=0.1), zoo["target"], fit=found)

    def test_the_papers_preset_runs_as_described(self, zoo):
        paper = esl.ExpertSteer(
            config(
                aligner=esl.AlignerConfig(kind="autoencoder"),
                pairing=esl.PairingConfig(rule="min_mi"),
            )
        ).fit(
            zoo["expert"], zoo["target"], zoo["pairs"], behaviour=zoo["behaviour"], progress=False
        )
        pair = paper.layer_pairs[0]
        allowed = paper.layer_pair_mi.matrix[:, 1:-1]
        assert pair.score == pytest.approx(float(allowed.min()))
        assert list(paper.rfms) == paper.layer_pairs.keys()
        preset = esl.ExpertSteerConfig.preset("paper")
        assert (preset.aligner.kind, preset.pairing.rule) == ("autoencoder", "min_mi")

    def test_a_model_can_steer_itself(self, zoo):
        found = esl.ExpertSteer(config(aligner=esl.AlignerConfig(kind="identity"))).fit(
            zoo["target"],
            zoo["target"],
            zoo["pairs"],
            anchors=zoo["anchors"],
            behaviour=zoo["behaviour"],
            progress=False,
        )
        host = esl.as_host(zoo["target"])
        change = behaviour_metric(host, found.test_behaviour, plan=found.plan()) - behaviour_metric(
            host, found.test_behaviour
        )
        assert float(change.mean()) > 0


class TestEvaluateAlone:
    def test_a_plan_without_a_fit_is_held_against_random_directions_only(self, zoo, fit):
        result = esl.evaluate(
            fit.plan(coefficient=0.1),
            zoo["target"],
            behaviour=fit.test_behaviour,
            neutral=fit.data.test_texts,
            calibration_texts=fit.calibration_texts,
            n_random=2,
        )
        assert result.ceiling is None
        assert {r.role for r in result.rows} == {"base", "plan", "control", "floor"}

    def test_a_random_direction_is_called_chance(self, zoo, fit):
        result = esl.evaluate(
            fit.plan(coefficient=0.1).with_random_directions(seed=99),
            zoo["target"],
            behaviour=fit.test_behaviour,
            neutral=fit.data.test_texts,
            calibration_texts=fit.calibration_texts,
            n_random=6,
        )
        assert result.verdict.startswith("Not distinguishable from chance")

    def test_missing_texts_are_asked_for(self, zoo, fit):
        with pytest.raises(DataError, match="neutral and calibration_texts are missing"):
            esl.evaluate(fit.plan(coefficient=0.1), zoo["target"], behaviour=fit.test_behaviour)


class TestVerdicts:
    @staticmethod
    def result(
        plan: float,
        floor: list[float],
        ceiling: float,
        *,
        coefficient: float = 0.1,
        same_norm: tuple[float, ...] = (),
        cost: float | None = None,
    ):
        from expertsteer_lens.evaluation.run import FLOOR, Evaluation, EvaluationRow

        def row(method, role, effect):
            return EvaluationRow(
                method,
                role,
                0,
                (),
                coefficient,
                effect,
                effect - 0.05,
                effect + 0.05,
                0.5,
                0.02,
                0.01,
                torch.zeros(1),
                torch.zeros(1),
            )

        rows = [row("this plan", "plan", plan), *(row(FLOOR, "floor", f) for f in floor)]
        rows += [row("random (same norm)", "control", effect) for effect in same_norm]
        facts = {} if cost is None else {"plan_cost": cost}
        return Evaluation((*rows, row("native RFM", "ceiling", ceiling)), 0.0, 0.5, 0.1, facts)

    def test_what_is_better_than_chance_but_lowers_the_behaviour_does_not_work(self):
        found = self.result(-0.5, [-3.0, -2.6, -3.4], -0.4)
        assert found.outcome == "no gain"
        assert found.verdict.startswith("Better than chance, but it does not raise")
        assert "%" not in found.verdict

    def test_a_plan_above_all_chance_means_something_whatever_the_target_can(self):
        found = self.result(3.0, [0.0, 0.22, -0.22], 0.2)
        assert found.outcome == "works"
        assert "1500 % of the native ceiling" in found.verdict
        assert "ceiling" not in self.result(3.0, [0.0, 0.22, -0.22], -0.2).verdict

    def test_few_seeds_ask_for_more(self):
        """Two random directions say little of how far a third may be."""
        assert self.result(0.5, [0.0, 0.2], 9.0).outcome == "chance"
        assert (
            self.result(0.5, [0.0, 0.2, 0.1, 0.05, 0.15, 0.1, 0.05, 0.15], 1.0).outcome == "works"
        )
        assert "with 2 seeds 15.6 may be luck" in self.result(0.5, [0.0, 0.2], 9.0).verdict

    def test_a_random_direction_passes_for_an_effect_in_one_case_of_forty(self):
        g = torch.Generator().manual_seed(1)
        passed = 0
        for _ in range(400):
            *floor, plan = torch.randn(6, generator=g, dtype=torch.float64).tolist()
            passed += self.result(plan, floor, 100.0).outcome in ("works", "no gain")
        assert passed / 400 < 0.05

    def test_a_plan_that_steers_away_is_read_from_the_other_side(self):
        found = self.result(-1.0, [0.0, 0.1, -0.1], -1.25, coefficient=-0.1)
        assert found.outcome == "works"
        assert "10.0 sd below the random floor" in found.verdict
        assert "80 % of the native ceiling" in found.verdict
        assert self.result(1.0, [0.0, 0.1, -0.1], -1.25, coefficient=-0.1).outcome == "chance"

    def test_a_plan_over_the_budget_stands_beside_random_directions_of_its_norm(self):
        """Those within the budget are weaker than it, which is no merit of its direction."""
        given = {"plan": 1.0, "floor": [0.0, 0.1, -0.1], "ceiling": 1.25}
        strong = (0.0, 0.9, -0.9)
        found = self.result(**given, same_norm=strong, cost=0.2)
        assert found.outcome == "chance"
        assert "over the budget of 0.1 that everything else keeps (0.20" in found.verdict
        assert self.result(**given, same_norm=strong, cost=0.1).outcome == "works"
        assert self.result(**given, same_norm=strong).outcome == "works"  # of before it was known

    def test_a_target_that_cannot_express_it_is_said_to_be_so(self):
        assert self.result(0.9, [0.0, 0.4, -0.4], 0.5).verdict.startswith(
            "The target cannot express this"
        )

    def test_success_states_floor_ceiling_and_cost(self):
        text = self.result(1.0, [0.0, 0.1, -0.1], 1.25).verdict
        assert "10.0 sd above the random floor" in text
        assert "80 % of the native ceiling" in text
        assert "neutral NLL +0.02" in text

    def test_no_effect_is_not_sold(self):
        assert self.result(0.1, [0.0, 0.1, -0.1], 1.25).verdict.startswith(
            "Not distinguishable from chance"
        )


class TestBadInput:
    @pytest.fixture(scope="class")
    def model(self):
        return models.bridge("gpt2")

    PAIRS = esl.ContrastPairs.from_lists(
        ["the cat was happy", "a good day", "so glad"], ["the cat was sad", "a bad day", "cried"]
    )

    def attempt(self, model, **keywords):
        return esl.ExpertSteer(config()).fit(model, model, self.PAIRS, progress=False, **keywords)

    def test_unknown_hook_names_get_the_closest(self, model):
        with pytest.raises(HookNameError, match=r"closest: 'blocks\.1\.hook_resid_post'"):
            self.attempt(model, target_hook_names=["blocks.1.hook_resid_pots"])

    def test_pairs_of_another_type_are_refused(self, model):
        with pytest.raises(DataError, match="pairs must be ContrastPairs, got list"):
            esl.ExpertSteer().fit(model, model, ["a", "b"])

    def test_too_few_anchors_are_refused(self, model):
        with pytest.raises(DataError, match="too few to fit on and hold out"):
            self.attempt(model, anchors=["the cat", "the dog"])

    def test_training_mode_is_refused(self, model):
        model.train()
        try:
            with pytest.raises(ModelStateError, match=r"call model\.eval"):
                self.attempt(model)
        finally:
            model.eval()

    def test_an_object_that_is_no_model_is_refused(self, model):
        with pytest.raises(ExpertSteerError, match="int"):
            esl.ExpertSteer().fit(model, 3, self.PAIRS)

    def test_unknown_presets_and_config_fields_are_refused(self):
        with pytest.raises(ArgumentError, match="closest: 'anchored'"):
            esl.ExpertSteer(preset="anchord")
        with pytest.raises(ArgumentError, match="unknown field 'alinger'"):
            esl.ExpertSteerConfig.from_dict({"alinger": {}})

    def test_a_preset_beside_a_config_is_refused(self):
        with pytest.raises(ArgumentError, match=r"config and preset='nonsense' exclude each other"):
            esl.ExpertSteer(config(), preset="nonsense")
        with pytest.raises(ArgumentError, match=r"config must be an ExpertSteerConfig, got \{\}"):
            esl.ExpertSteer({})

    @pytest.mark.parametrize("seed", [-1, "a", 1.5, 2**70, True])
    def test_a_seed_that_a_step_cannot_use_is_refused_at_once(self, seed):
        with pytest.raises(ArgumentError, match="seed must be an integer in"):
            esl.ExpertSteer(seed=seed)

    @pytest.mark.parametrize(
        ("changes", "pairs", "message"),
        [
            ({"pairing": esl.PairingConfig(n_pairs=99)}, 3, r"config\.pairing .*n_pairs=99 needs"),
            ({"pairing": esl.PairingConfig(skip_first=9)}, 3, r"config\.pairing .*skip_first=9"),
            ({"mi": esl.MIConfig(n_components=200)}, 20, r"config\.mi .*n_components=200 exceeds"),
            ({"rfm": esl.RFMConfig()}, 2, r"config\.rfm .*validation_fraction"),
            ({"rfm": esl.RFMConfig(validation_fraction=0.0)}, 3, r"config\.rfm .*ask for a search"),
            ({"aligner": esl.AlignerConfig(n_folds=40)}, 20, r"config\.aligner .*n_folds=40"),
        ],
    )
    def test_what_cannot_work_is_refused_before_a_model_is_run(
        self, model, monkeypatch, changes, pairs, message
    ):
        def never(*args, **keywords):
            raise AssertionError("a model was run")

        monkeypatch.setattr(type(esl.as_host(model)), "forward", never)
        words = [f"the cat saw {'big ' * i}dog" for i in range(pairs)]
        texts = esl.ContrastPairs.from_lists(words, [f"{w} ." for w in words])
        quick = {"rfm": FAST_RFM, "mi": esl.MIConfig(n_folds=2), **changes}
        anchors = (
            [f"{w} it" for w in words] + [f"it was {w}" for w in words] + list("abcdefghijklmn")
        )
        with pytest.raises(ExpertSteerError, match=message):
            esl.ExpertSteer(esl.ExpertSteerConfig(**quick)).fit(
                model, model, texts, anchors=anchors
            )

    def test_the_coefficient_is_a_number_or_auto(self, fit):
        with pytest.raises(ArgumentError, match="a number or 'auto', got 'large'"):
            fit.plan(coefficient="large")
        with pytest.raises(HookNameError, match="a fitted layer pair"):
            fit.plan(layer_pairs=[("blocks.0.hook_resid_post", "nowhere")])
        for wrong, message in (
            (("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"), "is given in a list"),
            ([("blocks.0.hook_resid_post",)], "must hold"),
            ([], "is empty"),
        ):
            with pytest.raises(ArgumentError, match=message):
                fit.plan(layer_pairs=wrong)


def test_anchor_parts_are_disjoint_and_complete():
    texts = [f"t{i}" for i in range(40)]
    fitted, calibration, test = split_anchors(texts, 0.3, 0)
    assert (len(fitted), len(calibration), len(test)) == (28, 6, 6)
    assert sorted(fitted + calibration + test) == sorted(texts)
    assert split_anchors(texts, 0.3, 1)[0] != fitted
