"""The benchmark world and its bookkeeping; the whole benchmark is `expertsteer-lens bench`."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.benchmarks import offline
from expertsteer_lens.benchmarks.offline import Bench, StudyRow, plan_name, run_bench
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.evaluation.run import Evaluation, EvaluationRow
from expertsteer_lens.hosts import as_host
from expertsteer_lens.measure.metrics import choice_accuracy
from expertsteer_lens.zoo import domains
from expertsteer_lens.zoo.domains import world

PLAN = "ExpertSteer (anchored)"


def _rows_of(result, domain, seed):
    return offline._rows_of(result, domain, seed, PLAN)


class TestWorld:
    def test_there_are_fifteen_tasks_in_four_domains(self):
        assert len(domains.tasks()) == 15
        assert {t.domain for t in domains.tasks()} == set(domains.DOMAINS)
        assert [t.name for d in domains.DOMAINS for t in domains.tasks(d)] == [
            t.name for t in domains.tasks()
        ]

    @pytest.mark.parametrize("task", [t.name for t in domains.tasks()])
    def test_every_fact_has_one_right_answer_and_one_use(self, task):
        facts = world.facts(task)
        assert len({f.questions for f in facts}) == len(facts) == world.N_FACTS
        assert all(f.right not in f.wrong and len(set(f.wrong)) == len(f.wrong) > 0 for f in facts)
        for split, n in world.SPLITS.items():
            assert sum(f.split == split for f in facts) == n

    @pytest.mark.parametrize("domain", domains.DOMAINS)
    def test_no_fact_is_in_two_of_pairs_validation_and_test(self, domain):
        texts = {
            "pairs": [*domains.contrast_pairs(domain).positive],
            "validation": [*domains.behaviour(domain, "validation").prompts],
            "test": [*domains.behaviour(domain, "test").prompts],
        }
        asked = {split: set() for split in texts}
        for split, name in itertools.product(texts, world.tasks_of(domain)):
            for fact in world.facts(name):
                if any(q in text for q in fact.questions for text in texts[split]):
                    asked[split].add(fact.questions)
        assert all(asked.values())
        for one, two in itertools.combinations(asked.values(), 2):
            assert not one & two

    def test_the_sides_of_a_pair_differ_in_answers_only(self):
        pairs = domains.contrast_pairs("general", 40)
        answers = {f.right for t in world.tasks_of("general") for f in world.facts(t)}
        answers |= {w for t in world.tasks_of("general") for f in world.facts(t) for w in f.wrong}
        for right, wrong in zip(pairs.positive, pairs.negative, strict=True):
            one, two = right.split(), wrong.split()
            assert len(one) == len(two)
            changed = [(a, b) for a, b in zip(one, two, strict=True) if a != b]
            assert changed
            assert all(a.strip(".") in answers and b.strip(".") in answers for a, b in changed)
            assert right.endswith(("Answer:", "A:"))

    def test_careful_sources_are_right_and_careless_ones_mostly_wrong(self):
        rng = random.Random(0)
        facts = [f for t in domains.tasks() for f in world.facts(t.name)]
        for careful, low, high in ((True, 0.94, 1.0), (False, 0.1, 0.35)):
            share = sum(world.answer(rng, f, careful) == f.right for f in facts) / len(facts)
            assert low < share < high

    def test_anchors_are_never_trained_on_and_half_await_an_answer(self):
        anchors = domains.anchors(60)
        assert all(world.split_of(text) == "anchors" for text in anchors)
        assert sum(text.endswith(":") for text in anchors) == 30
        assert domains.anchors(60) == anchors != domains.anchors(60, seed=1)
        assert not any("swer:" in text or " A:" in text for text in domains.neutral_texts(30))

    def test_unknown_names_are_explained(self):
        with pytest.raises(ArgumentError, match="domain must be one of"):
            domains.tasks("law")
        with pytest.raises(ArgumentError, match="name must be one of"):
            domains.task("cures")
        with pytest.raises(ArgumentError, match="split must be one of"):
            domains.behaviour("general", "train")
        with pytest.raises(ArgumentError, match="domains is empty"):
            run_bench(domains=())
        with pytest.raises(ArgumentError, match="domains must be one of"):
            run_bench(domains=("law",))


class TestModels:
    @pytest.fixture(scope="class")
    def target(self):
        return as_host(domains.load("target", "huggingface"))

    @pytest.mark.parametrize("domain", domains.DOMAINS)
    def test_the_target_is_careless_by_default_and_right_when_a_careful_source_speaks(
        self, target, domain
    ):
        test = domains.behaviour(domain, "test")
        assert choice_accuracy(target, test).mean() < 0.5
        assert choice_accuracy(target, test.with_prefix(domains.PROMPT)).mean() > 0.85

    def test_the_experts_differ_from_the_target_in_family_and_width(self, target):
        for name in domains.names()[1:]:
            config = json.loads((domains.model_path(name) / "config.json").read_text())
            assert config["model_type"] == "gpt_neox" != target.model.config.model_type
            assert config["hidden_size"] != target.d_model
            assert sum(f.stat().st_size for f in domains.model_path(name).iterdir()) < 3e6

    def test_a_domain_expert_knows_its_domain(self):
        expert = as_host(domains.load("finance", "huggingface"))
        test = domains.behaviour("finance", "test").with_prefix(domains.PROMPT)
        assert choice_accuracy(expert, test).mean() > 0.9


def evaluation(domain: str) -> Evaluation:
    n = len(domains.behaviour(domain, "test"))
    generator = torch.Generator().manual_seed(0)

    def row(method: str, role: str, seed: int, mean: float) -> EvaluationRow:
        change = mean + torch.randn(n, generator=generator, dtype=torch.float64)
        correct = (change > 0).double()
        return EvaluationRow(
            method,
            role,
            seed,
            ("a",),
            0.1,
            float(change.mean()),
            0.0,
            0.0,
            float(correct.mean()),
            0.0,
            0.0,
            change,
            correct,
        )

    rows = [
        row("unsteered", "base", 0, 0.0),
        row("this plan", "plan", 0, 1.5),
        row("native RFM", "ceiling", 0, 2.0),
    ]
    rows += [row("random (same budget)", "floor", s, 0.0) for s in range(3)]
    return Evaluation(tuple(rows), 0.0, 0.5, 0.1, {})


class TestTables:
    @pytest.fixture(scope="class")
    def bench(self):
        rows = [r for d in ("medicine", "finance") for r in _rows_of(evaluation(d), d, 0)]
        experts = [*domains.DOMAINS, "all"]
        studies = [
            StudyRow("domain", e, 64, d, "a", "b", 0.1, 1.0, 0.9, 1.1, 0.7)
            for e in experts
            for d in domains.DOMAINS
        ]
        studies += [
            StudyRow("width", "medicine-32", 32, "medicine", "a", "b", 0.1, 1.0, 0.9, 1.1, 0.7)
        ]
        return Bench(tuple(rows), tuple(studies), {"medicine": evaluation("medicine")}, 1.0)

    def test_prompts_go_to_their_own_tasks(self):
        found = evaluation("medicine")
        rows = [r for r in _rows_of(found, "medicine", 0) if r.method == PLAN]
        assert [r.task for r in rows] == world.tasks_of("medicine")
        sizes = [len(domains.task(r.task).test) for r in rows]
        chunks = found.plan.per_prompt.split(sizes)
        assert [r.effect for r in rows] == pytest.approx([float(c.mean()) for c in chunks])
        assert all(r.low < r.effect < r.high for r in rows)

    def test_seeds_are_averaged_and_their_spread_is_kept(self):
        found = evaluation("medicine")
        floor = next(r for r in _rows_of(found, "medicine", 0) if r.role == "floor")
        n = len(domains.task(floor.task).test)
        of = torch.tensor([float(r.per_prompt[:n].mean()) for r in found.rows if r.role == "floor"])
        assert floor.n_seeds == 3
        assert floor.effect == pytest.approx(float(of.mean()), abs=1e-6)
        assert floor.seed_sd == pytest.approx(float(of.std()), abs=1e-6)

    def test_the_table_has_a_line_a_task_and_their_mean(self, bench):
        table = bench.table("accuracy")
        assert list(table.index) == [
            *world.tasks_of("medicine"),
            *world.tasks_of("finance"),
            "mean",
        ]
        assert table.loc["mean", PLAN] == pytest.approx(table[PLAN].iloc[:-1].mean())
        assert PLAN in repr(bench)
        with pytest.raises(ArgumentError, match="value must be one of"):
            bench.table("speed")

    def test_domains_stand_side_by_side(self, bench):
        wide = bench.by_domain()
        of = [r for r in bench.rows if r.method == PLAN]
        assert list(wide.columns) == ["medicine", "finance", "all tasks", "effect"]
        for domain in ("medicine", "finance"):
            here = [r.accuracy for r in of if r.domain == domain]
            assert wide.loc[PLAN, domain] == pytest.approx(sum(here) / len(here))
        assert wide.loc[PLAN, "all tasks"] == pytest.approx(sum(r.accuracy for r in of) / len(of))
        assert wide.loc[PLAN, "effect"] == pytest.approx(sum(r.effect for r in of) / len(of))
        assert f"{wide.loc[PLAN, 'effect']:+.2f}" in bench.summary()

    def test_what_is_saved_is_what_was_measured(self, bench, tmp_path):
        pytest.importorskip("plotly")
        folder = bench.save(tmp_path / "out")
        stored = json.loads((folder / "bench.json").read_text())
        assert [r["effect"] for r in stored["rows"]] == [r.effect for r in bench.rows]
        text = (folder / "bench.md").read_text()
        row = bench.rows[1]
        assert f"{row.effect:+.2f} ± {(row.high - row.low) / 2:.2f}" in text
        assert "| 32 | 70% (+1.00 ± 0.10) |" in text
        assert f"| {PLAN} |" in (folder / "summary.md").read_text()
        figure = bench.plot()
        assert {t.name for t in figure.data} == {r.method for r in bench.rows if r.role != "base"}

    def test_what_could_not_be_measured_has_no_row(self):
        found = evaluation("medicine")
        n = len(found.plan.per_prompt)
        missing = EvaluationRow.unmeasured("wrong layer", "control", 0, "no layer", n_prompts=n)
        more = replace(found, rows=(*found.rows, missing))
        assert "wrong layer" not in {r.method for r in _rows_of(more, "medicine", 0)}


class TestWhatTheTablesSay:
    """A name and a command that are true of the run, whatever it was given."""

    def test_the_plan_is_called_by_the_preset_only_if_its_settings_are_the_presets(self):
        config = esl.ExpertSteerConfig
        assert plan_name(config(budget=0.3, budget_unit="kl")) == "ExpertSteer (anchored)"
        assert plan_name(config.preset("paper")) == "ExpertSteer (paper)"
        assert plan_name(config(aligner={"kind": "ridge"})) == "ExpertSteer (own settings)"

    def test_what_a_file_says_is_one_word_of_the_command(self):
        from expertsteer_lens.benchmarks.bench_tables import command_of

        given = {"domains": ["a; b"], "n_random": "3; c", "seed": "$(d)"}
        said = "--domain 'a; b' --n-random '3; c' --seed '$(d)'"
        assert command_of({"arguments": given}) == f"expertsteer-lens bench {said}"

    @pytest.mark.parametrize(
        ("given", "command"),
        [
            ({}, "expertsteer-lens bench"),
            (
                {"domains": ("finance", "general"), "studies": False, "n_random": 3, "seed": 2},
                "expertsteer-lens bench --domain finance --domain general --n-random 3 "
                "--no-studies --seed 2",
            ),
            ({"n_shuffles": 1}, "esl.benchmarks.run_bench(n_shuffles=1)"),
            (
                {"config": esl.ExpertSteerConfig(budget=0.3)},
                "esl.benchmarks.run_bench(config=esl.ExpertSteerConfig.from_dict({'budget': 0.3}))",
            ),
        ],
    )
    def test_the_command_is_the_one_that_was_given(self, monkeypatch, given, command):
        monkeypatch.setattr(offline, "_further", lambda domains: [])

        def measured(config, domain, *rest):
            row = StudyRow("domain", domain, 64, domain, "a", "b", 0.1, 1.0, 0.9, 1.1, 0.7)
            return domain, evaluation(domain), row

        monkeypatch.setattr(offline, "_main_part", measured)
        bench = run_bench(n_jobs=1, **given)
        assert bench.command == command
        assert f"Command: `{command}`" in bench.summary()
        assert f"Command: `{command}`" in bench.to_markdown()
        if "config" not in given:
            assert bench.plan_name == PLAN
