"""Pushing to the hub and loading from it, against a stand-in on this machine that speaks its
protocol; the client is the real one, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError, ArtifactError
from expertsteer_lens.files.card import plan_card, result_card
from expertsteer_lens.files.hub import hub_id

SESSION = """
import dataclasses, json, sys
import torch
import expertsteer_lens as esl

plan = esl.SteeringPlan.from_vectors(
    {"blocks.1.hook_resid_post": torch.ones(4)}, coefficient=2.0, relative_to="unit"
)
plan = dataclasses.replace(plan, target={"name": "owner/base-model"})
states = esl.ActivationStore({"blocks.0.hook_resid_post": torch.eye(2)})
out = {}

def attempt(name, fn):
    try:
        out[name] = str(fn())
    except Exception as error:
        out[name] = f"{type(error).__name__}: {error}"

strength = lambda p: p.vectors[0].coefficient
attempt("push", lambda: plan.push_to_hub("user/one", token="hf_stand_in", commit_message="first"))
attempt("load", lambda: strength(esl.load("user/one")))
first = out["push"].rsplit("/", 1)[-1]
stronger = plan.with_coefficient(5.0)
attempt("again", lambda: esl.push_to_hub(stronger, "user/one", token="hf_stand_in"))
attempt("newest", lambda: strength(esl.SteeringPlan.from_pretrained("user/one")))
attempt("older", lambda: strength(esl.load("user/one", revision=first)))
attempt("branch", lambda: plan.with_coefficient(7.0).push_to_hub("user/one", revision="strong"))
attempt("of branch", lambda: strength(esl.load("hf://user/one", revision="strong")))
attempt("main", lambda: strength(esl.load("user/one")))
attempt("propose", lambda: plan.with_coefficient(9.0).push_to_hub("user/one", create_pr=True))
attempt("proposed", lambda: strength(esl.load("user/one", revision="refs/pr/1")))
attempt("no namespace", lambda: plan.push_to_hub("two", private=True))
attempt("two", lambda: strength(esl.load("user/two")))
attempt("states", lambda: esl.push_to_hub(states, "user/two"))
attempt("states back", lambda: esl.load("user/two").n)
attempt("wrong kind", lambda: esl.SteeringPlan.from_pretrained("user/two"))
attempt("function", lambda: plan.with_positions(lambda real: real).push_to_hub("user/never"))
attempt("name", lambda: plan.push_to_hub("user/a b"))
attempt("no revision", lambda: esl.load("user/one", revision="nowhere"))
attempt("no repository", lambda: esl.load("user/nothing"))
attempt("kept", lambda: strength(esl.load("user/one", local_files_only=True)))
attempt("own cache", lambda: strength(esl.load("user/one", cache_dir="cache")))
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """What the session printed, and what the hub holds and heard."""
    folder = tmp_path_factory.mktemp("hub")
    with hub_server.running() as (hub, address):
        env = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(Path(esl.__file__).parents[1]),
        }
        ran = subprocess.run(
            [sys.executable, "-c", SESSION], env=env, cwd=folder, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        yield json.loads(ran.stdout.splitlines()[-1]), hub


def test_a_plan_is_pushed_and_loaded(session):
    out, hub = session
    assert out["load"] == "2.0", out
    assert hub.messages[0] == "first"
    assert hub_server.TOKEN in hub.tokens
    files = hub.repos["user/one"]["main"][1]
    assert set(files) >= {"README.md", "config.json", "vectors.safetensors"}


def test_every_revision_is_there(session):
    out, _ = session
    assert (out["newest"], out["older"]) == ("5.0", "2.0"), out
    assert (out["of branch"], out["main"]) == ("7.0", "5.0"), out


def test_a_change_can_be_proposed(session):
    out, _ = session
    assert out["propose"].endswith("/user/one/discussions/1"), out
    assert (out["proposed"], out["kept"]) == ("9.0", "5.0"), out


def test_a_name_without_namespace_is_the_owners(session):
    out, hub = session
    assert "/user/two/commit/" in out["no namespace"], out
    assert "user/two" in hub.private
    assert out["two"] == "2.0"


def test_another_kind_of_thing_leaves_nothing_behind(session):
    out, hub = session
    assert out["states back"] == "2", out
    files = hub.repos["user/two"]["main"][-1]
    assert "tensors.safetensors" in files
    assert "vectors.safetensors" not in files
    assert out["wrong kind"].startswith(
        "ArtifactError: user/two holds a saved ActivationStore, no plan"
    )


def test_nothing_is_made_before_the_content_is_checked(session):
    out, hub = session
    assert out["function"].startswith("ArgumentError"), out
    assert "user/never" not in hub.repos
    assert out["name"].startswith("ArgumentError: repo_id must be 'owner/name' or 'name'")


def test_what_is_not_there_is_said(session):
    out, _ = session
    for name in ("no revision", "no repository"):
        assert out[name].startswith("ArtifactError: no folder 'user/"), out
        assert "could not be fetched from the hub" in out[name]
    assert out["own cache"] == "5.0"


def test_the_card_names_the_model_the_place_and_the_use(session):
    _, hub = session
    card = hub.repos["user/one"]["main"][-1]["README.md"].decode()
    front = card.split("---")[1]
    assert "library_name: expertsteer-lens\nbase_model: owner/base-model\ntags:\n" in front
    assert 'esl.load("user/one")' in card


class TestWhichNamesMeanTheHub:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("user/plan", "user/plan"),
            ("hf://user/plan", "user/plan"),
            ("results/plam", None),  # there is a folder `results`
            ("hf://results/plam", "results/plam"),
            ("./user/plan", None),
            ("../user/plan", None),
            ("~/plan", None),
            ("/tmp/plan", None),
            ("a/b/c", None),
            ("plan", None),
            ("user/", None),
            ("user\\plan", None),
            (Path("user/plan"), None),
        ],
    )
    def test_only_owner_and_name_where_no_folder_is_of_that_name(
        self, name, expected, tmp_path, monkeypatch
    ):
        (tmp_path / "results").mkdir()
        monkeypatch.chdir(tmp_path)
        assert hub_id(name) == expected

    def test_a_misspelt_folder_asks_nobody(self, tmp_path, monkeypatch):
        import huggingface_hub

        def asked(*args, **kwargs):
            raise AssertionError("the hub was asked")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
        monkeypatch.chdir(tmp_path)
        plan = esl.SteeringPlan.from_vectors(
            {"blocks.1.hook_resid_post": torch.ones(4)}, relative_to="unit"
        )
        esl.save(plan, "results/plan")
        with pytest.raises(ArtifactError, match=r"for the hub write hf://results/plam"):
            esl.load("results/plam")
        with pytest.raises(ArtifactError, match="neither a folder nor a hub id"):
            esl.load(Path("nobody/plan"))


class TestCards:
    def plan(self, **facts):
        import dataclasses

        plan = esl.SteeringPlan.from_vectors(
            {"blocks.1.hook_resid_post": torch.ones(4)}, relative_to="unit"
        )
        return dataclasses.replace(plan, **facts)

    def test_the_command_and_the_figures_of_the_fit(self):
        import dataclasses

        facts = {
            "expert_hook_name": "blocks.2.hook_resid_post",
            "mutual_information": 0.123,
            "aligner": {"r2": 0.5},
            "rfm_validation_auc": 0.875,
        }
        plan = self.plan(
            target={"name": "b"}, provenance={"expert": {"name": "a"}, "config": {}, "seed": 3}
        )
        vector = dataclasses.replace(plan.vectors[0], provenance=facts)
        card = plan_card(dataclasses.replace(plan, vectors=(vector,)))
        assert "expertsteer-lens fit --expert a --target b" in card
        assert "--pairs pairs.jsonl --config fit.json --seed 3" in card
        assert (
            "| `blocks.2.hook_resid_post` | `blocks.1.hook_resid_post` | 0.123 | 0.5 | 0.875 |"
            in card
        )
        assert "base_model" not in card  # "b" is no id of the hub

    def test_the_command_takes_the_texts_that_were_given(self):
        names = {"target": {"name": "b"}, "provenance": {"expert": {"name": "a"}, "config": {}}}
        for given, options in {
            "anchors": "--pairs pairs.jsonl --anchors anchors.txt --config",
            "behaviour": "--pairs pairs.jsonl --behaviour behaviour.json --config",
        }.items():
            names["provenance"] = {"expert": {"name": "a"}, "config": {}, given: {"given": True}}
            assert options in plan_card(self.plan(**names))
        own = {"anchors": {"n": 3, "given": False}, "behaviour": None}
        names["provenance"] = {"expert": {"name": "a"}, "config": {}, **own}
        assert "--pairs pairs.jsonl --config" in plan_card(self.plan(**names))

    def test_the_verdict_of_an_evaluation(self):
        from expertsteer_lens.evaluation.result import Evaluation, EvaluationRow

        def row(method, role, effect, seed=0):
            return EvaluationRow(
                method=method,
                role=role,
                seed=seed,
                hook_names=(),
                coefficient=0.5,
                effect=effect,
                low=effect - 0.1,
                high=effect + 0.1,
                per_prompt=torch.zeros(1),
                correct=torch.zeros(1),
                accuracy=0.5,
                nll_rise=0.05,
                kl=0.0,
            )

        rows = (
            row("plan", "plan", 1.5),
            row("random", "floor", 0.1),
            row("random", "floor", 0.2, 1),
        )
        evaluation = Evaluation(rows, 0.0, 0.5, 0.1, {})
        card = plan_card(self.plan(), evaluation)
        assert evaluation.verdict in card
        assert "| plan | plan | 0.5 | 1.5 [1.4, 1.6] | 0.05 |" in card
        with pytest.raises(ArgumentError, match="evaluation= goes with a plan"):
            esl.push_to_hub(esl.ActivationStore({"a": torch.eye(2)}), "u/x", evaluation=evaluation)

    def test_names_of_strangers_are_plain_text(self):
        name = "\x1b]0;owned\x07<script>alert(1)</script>\n---\nlicense: mit\n| `a`"
        card = plan_card(self.plan(target={"name": name}, provenance={"expert": {"name": name}}))
        assert "\x1b" not in card
        assert "<script>" not in card
        assert "\nlicense" not in card
        assert card.count("\n---\n") == 1  # the end of the front matter

    def test_names_of_strangers_are_one_word_of_the_command_each(self):
        import shlex

        name = 'x"; touch /tmp/owned; echo "$(id)\' \\'
        provenance = {"expert": {"name": name}, "config": {}, "seed": "0; touch /tmp/owned"}
        card = plan_card(self.plan(target={"name": name}, provenance=provenance))
        command = card.split("```bash\n")[1].split("```")[0]
        assert shlex.split(command.replace("\\\n", "")) == [
            *("expertsteer-lens", "fit", "--expert", name, "--target", name),
            *("--pairs", "pairs.jsonl", "--config", "fit.json", "--seed", "0; touch /tmp/owned"),
        ]

    def test_other_results_have_one_too(self):
        card = result_card(esl.ActivationStore({"blocks.0.hook_resid_post": torch.eye(2)}))
        assert "# ActivationStore" in card
        assert "library_name: expertsteer-lens" in card
