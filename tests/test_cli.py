"""The command line, through its own parser: what it writes, prints and refuses. `demo` itself is
run by `.ci/run`."""

from __future__ import annotations

import ast
import csv
import inspect
import json
import pathlib
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pandas
import pytest
import results
import torch
from typer.testing import CliRunner

import expertsteer_lens as esl
from expertsteer_lens.benchmarks import offline, transfer
from expertsteer_lens.benchmarks.offline import BenchRow
from expertsteer_lens.benchmarks.transfer import real
from expertsteer_lens.cli import app as cli
from expertsteer_lens.cli import (
    commands_fit,
    commands_plan,
    commands_sets,
    commands_states,
    inputs,
    terminal,
)
from expertsteer_lens.cli.options import LOADING, PUBLIC, SETTINGS, TextOptions, parse_reading
from expertsteer_lens.cli.terminal import print_step
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.show.report import SteeredText

EXPERT, TARGET = (str(esl.zoo.model_path(name)) for name in ("expert", "target"))
SMALL = {
    "mi": {"n_permutations": 5, "n_bootstrap": 10, "n_components": 8},
    "rfm": {"bandwidth": 1.0, "center_gradients": False, "validation_fraction": 0.0, "n_rounds": 2},
    "pair_tokens": False,  # so that saved states of the expert give the plan of the loaded expert
}


def run(*arguments: object):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(capsys, *arguments: object) -> str:
    """The one line on standard error with which `main` ends, with exit code 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    assert stop.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if "it/s]" not in line]  # progress bars of the model loader
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    pairs, behaviour = esl.zoo.contrast_pairs(n=40), esl.zoo.behaviour(n=12)
    rows = [
        {"positive": p, "negative": n} for p, n in zip(pairs.positive, pairs.negative, strict=True)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (folder / "anchors.txt").write_text("\n\n".join(esl.zoo.anchors(n=80)))
    (folder / "neutral.txt").write_text("\n".join(esl.zoo.neutral_texts(n=12)))
    content = {
        "prompts": behaviour.prompts,
        "positive": behaviour.positive,
        "negative": behaviour.negative,
    }
    (folder / "behaviour.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps(SMALL))
    return folder


@pytest.fixture(scope="module")
def fitted(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "new"
    result = run(
        "fit",
        "--expert",
        EXPERT,
        "--target",
        TARGET,
        "--pairs",
        files / "pairs.jsonl",
        "--anchors",
        files / "anchors.txt",
        "--behaviour",
        files / "behaviour.json",
        "--config",
        files / "config.json",
        "--n-random",
        2,
        "--out",
        out,
    )
    assert result.exit_code == 0, result.output
    return out, result.output


@pytest.fixture(scope="module")
def states(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("states") / "states"
    result = run(
        "capture",
        "--model",
        EXPERT,
        "--pairs",
        files / "pairs.jsonl",
        "--anchors",
        files / "anchors.txt",
        "--host",
        "huggingface",
        "--out",
        out,
    )
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def found(states, files, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "fitted"
    result = run(
        "fit",
        "--expert",
        states,
        "--target",
        TARGET,
        "--pairs",
        files / "pairs.jsonl",
        "--anchors",
        files / "anchors.txt",
        "--config",
        files / "config.json",
        "--host",
        "huggingface",
        "--behaviour",
        files / "behaviour.json",
        "--n-random",
        2,
        "--save-fit",
        "--out",
        out,
    )
    assert result.exit_code == 0, result.output
    return out


class TestFit:
    def test_everything_promised_is_written(self, fitted):
        out, printed = fitted
        names = {p.name for p in out.iterdir()}
        assert {
            "report.html",
            "comparison.html",
            "layer_pair_mi.html",
            "layer_pairs.html",
            "dose_response.html",
            "plotly.min.js",
            "comparison.csv",
            "layer_pairs.csv",
            "evaluation.json",
            "plan",
        } == names
        verdict = json.loads((out / "evaluation.json").read_text())["verdict"]
        assert verdict in printed
        assert f"open {out / 'report.html'}" in printed
        assert verdict.replace("&", "&amp;") in (out / "report.html").read_text()
        assert "plotly.min.js" in (out / "comparison.html").read_text()[:2000]

    def test_the_report_shows_texts_and_tokens(self, fitted):
        """Texts at several strengths, which tokens were read in the first pair, and which were
        edited in a prompt and after it."""
        page = (fitted[0] / "report.html").read_text()
        assert page.count("class='esl-tokens'") == 3
        assert "tokens read at" in page
        assert "tokens edited at" in page
        assert "<div class='esl-key'>generated</div>" in page
        strength = esl.load(fitted[0] / "plan").vectors[0].coefficient
        head = [f"<th>{s * strength:+.3g}</th>" for s in (-1, 0.5, 1, 1.5)]
        assert "".join([head[0], "<th>unsteered</th>", *head[1:]]) in page
        kept = esl.zoo.behaviour(n=12).split(0.5, seed=0)[1]
        assert kept.prompts[0] in page

    def test_the_plan_is_that_of_the_library_with_the_same_settings(self, fitted, files):
        plan = esl.load(fitted[0] / "plan")
        assert plan.provenance["config"]["mi"]["n_permutations"] == 5
        assert plan.provenance["config"]["rfm"]["n_rounds"] == 2
        pairs, behaviour = esl.zoo.contrast_pairs(n=40), esl.zoo.behaviour(n=12)
        assert plan.provenance["pairs"] == {"n": 40, "hash": pairs.hash}
        assert plan.provenance["behaviour"]["hash"] == behaviour.hash
        expert, target = esl.zoo.load_pair()
        found = esl.ExpertSteer(inputs.read_config(files / "config.json", "anchored")).fit(
            expert,
            target,
            pairs,
            anchors=esl.zoo.anchors(n=80),
            behaviour=behaviour,
            progress=False,
        )
        key = found.layer_pairs.keys()[0]
        torch.testing.assert_close(
            plan.vectors[0].direction, found.direction(*key), atol=1e-5, rtol=0
        )

    def test_steps_are_reported_as_they_finish(self, fitted):
        for step in ("capture", "pair", "attribute", "align", "learn"):
            assert step in fitted[1]

    def test_without_a_behaviour_only_the_plan_is_written(self, files, tmp_path):
        result = run(
            "fit",
            "--expert",
            EXPERT,
            "--target",
            TARGET,
            "--pairs",
            files / "pairs.jsonl",
            "--anchors",
            files / "anchors.txt",
            "--config",
            files / "config.json",
            "--out",
            tmp_path / "o",
        )
        assert result.exit_code == 0, result.output
        assert [p.name for p in (tmp_path / "o").iterdir()] == ["plan"]
        assert "nothing was evaluated" in result.output
        assert str((tmp_path / "o/plan").resolve()) in result.output

    def test_a_benchmark_gives_pairs_and_behaviour(self, tmp_path):
        rows = [
            {"question": f"Is {i} even?", "choices": ["yes", "no"], "answer": i % 2}
            for i in range(40)
        ]
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps(r) for r in rows))
        options = TextOptions(benchmark="mmlu_anatomy", benchmark_path=path, limit=20)
        pairs, behaviour = inputs.texts_to_fit(options, 3)
        found = esl.benchmarks.load("mmlu_anatomy", path=path, limit=20, seed=3)
        assert (pairs, behaviour) == (found.pairs(), found.behaviour())


class TestOneModelAtATime:
    """`capture` reads the expert, `fit` never loads it, and what the fit saved gives `evaluate` its
    native ceiling."""

    def test_the_plan_is_the_one_found_with_both_models_loaded(self, fitted, found):
        one, two = (esl.load(folder / "plan") for folder in (fitted[0], found))
        assert one.vectors[0].hook_name == two.vectors[0].hook_name
        torch.testing.assert_close(
            one.vectors[0].direction, two.vectors[0].direction, atol=1e-2, rtol=0
        )
        assert two.provenance["expert"] == one.provenance["expert"]

    def test_the_fit_gives_evaluate_its_ceiling_prompts_and_texts(self, found, tmp_path):
        result = run(
            "evaluate",
            found / "plan",
            "--target",
            TARGET,
            "--fit",
            found / "fit",
            "--host",
            "huggingface",
            "--n-random",
            2,
            "--out",
            tmp_path / "e",
        )
        assert result.exit_code == 0, result.output
        again = json.loads((tmp_path / "e/evaluation.json").read_text())
        first = json.loads((found / "evaluation.json").read_text())
        assert [r["method"] for r in again["rows"]] == [r["method"] for r in first["rows"]]
        assert "native RFM" in {r["method"] for r in again["rows"]}
        assert again["verdict"] == first["verdict"]

    def test_tokens_read_before(self, capsys, states, files, tmp_path):
        texts = ["--pairs", files / "pairs.jsonl", "--anchors", files / "anchors.txt"]
        host = ["--host", "huggingface"]
        tokens = tmp_path / "tokens"
        result = run("capture", "--model", EXPERT, *texts, *host, "--tokens", "--out", tokens)
        assert result.exit_code == 0, result.output
        fit = ["fit", "--expert", states, "--target", TARGET, *texts, *host, "--save-fit"]
        fit += ["--expert-tokens", tokens, "--config"]
        assert "not used" in refused(capsys, *fit, files / "config.json", "--out", tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({**SMALL, "pair_tokens": True}))
        result = run(*fit, tmp_path / "config.json", "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
        found = esl.load(tmp_path / "out" / "fit")
        assert found.data.maps_on == "tokens"
        assert set(found.data.token_moments.d_expert) == set(esl.load(tokens))
        again = ["reproduce", tmp_path / "out", "--expert", states, "--target", TARGET, *texts]
        result = run(*again, *host, "--expert-tokens", tokens)
        assert result.exit_code == 0, result.output
        assert str(files) in refused(capsys, *again, *host, "--expert-tokens", files)

    def test_a_block_to_write_to_needs_prompts(self, capsys, states, files):
        arguments = [
            "fit",
            "--expert",
            states,
            "--target",
            TARGET,
            "--pairs",
            files / "pairs.jsonl",
        ]
        assert "--behaviour" in refused(capsys, *arguments, "--place")

    def test_several_experts(self, states, files, tmp_path):
        """One of them as states; the plan says which layer of which expert it comes from, and its
        card how it is made again."""
        result = run(
            "fit",
            "--expert",
            states,
            "--expert",
            TARGET,
            "--target",
            TARGET,
            "--pairs",
            files / "pairs.jsonl",
            "--anchors",
            files / "anchors.txt",
            "--config",
            files / "config.json",
            "--host",
            "huggingface",
            "--out",
            tmp_path / "out",
        )
        assert result.exit_code == 0, result.output
        plan = esl.load(tmp_path / "out" / "plan")
        names = plan.provenance["expert"]["name"].split(" + ")
        assert len(names) == 2
        (vector,) = plan.vectors
        folder, _, hook = vector.provenance["expert_hook_name"].partition("/")
        assert folder in {pathlib.Path(name).name for name in names}
        assert hook.startswith("blocks.")
        card = (tmp_path / "out" / "plan" / "README.md").read_text()
        assert f"--expert {names[0]} --expert {names[1]}" in card

    def test_what_was_saved_is_shown(self, states, found):
        assert "ActivationStore(" in run("show", states).output
        shown = run("show", found / "fit").output
        assert esl.load(found / "fit").summary().splitlines()[-1].strip() in shown
        assert all(word in shown for word in ("AUC", "chosen"))
        assert f"{esl.load(found / 'fit').to_pandas().score[0]:.4g}" in shown
        measured = results.evaluation()
        assert measured.verdict in " ".join(
            run("show", esl.save(measured, found / "saved")).output.split()
        )
        assert (
            "Calibration(" in run("show", esl.save(results.calibration(), found / "curve")).output
        )

    def test_states_of_other_texts_are_refused(self, capsys, states, files):
        line = refused(
            capsys, "fit", "--expert", states, "--target", TARGET, "--pairs", files / "pairs.jsonl"
        )
        assert line.startswith("DataError: expert holds states of")

    def test_evaluate_needs_the_fit_or_prompts_and_texts(self, capsys, fitted):
        line = refused(capsys, "evaluate", fitted[0] / "plan", "--target", TARGET)
        assert "give --behaviour and --neutral, or --fit" in line


class TestShow:
    def test_a_plan_is_described_without_a_model(self, fitted):
        result = run("show", fitted[0] / "plan")
        assert result.exit_code == 0
        plan = esl.load(fitted[0] / "plan")
        assert repr(plan) in result.output
        assert plan.provenance["expert"]["fingerprint"] in result.output
        assert plan.vectors[0].hook_name in result.output

    def test_names_are_whole_in_a_terminal_of_80_columns(self, fitted, found):
        def shown(saved):
            return CliRunner().invoke(cli.app, ["show", str(saved)], env={"COLUMNS": "80"}).stdout

        plan = esl.load(fitted[0] / "plan")
        rows = [line for line in shown(fitted[0] / "plan").splitlines() if line.startswith("│")]
        assert any(plan.vectors[0].hook_name in row for row in rows)
        assert len(rows) == 1  # with an empty column the unit would be broken into lines
        assert "paramet" not in shown(fitted[0] / "plan")
        table = shown(found / "fit").split("fitted pairs")[1]
        assert len([line for line in table.splitlines() if line.startswith("│")]) == min(
            10, len(esl.load(found / "fit").rfms)
        )

    def test_brackets_in_names_are_not_styles(self, tmp_path):
        plan = esl.SteeringPlan.from_vectors(
            {"blocks.1.hook_resid_post": torch.ones(4)}, relative_to="unit"
        )
        strange = esl.SteeringPlan(vectors=plan.vectors, target={"name": "[/b] [red]model"})
        result = run("show", esl.save(strange, tmp_path / "p"))
        assert "[/b] [red]model" in result.output

    @pytest.mark.parametrize("as_json", [False, True])
    def test_control_characters_in_names_are_shown_and_never_sent(self, tmp_path, as_json):
        name = "\x1b]0;title\x07\x1b[2J\x9b2J\x7f\u202egpj é"
        plan = esl.SteeringPlan.from_vectors(
            {"blocks.1.hook_resid_post": torch.ones(4)}, relative_to="unit"
        )
        strange = esl.SteeringPlan(
            vectors=plan.vectors, target={"name": name}, provenance={"expert": {"name": name}}
        )
        folder = esl.save(strange, tmp_path / "p")
        output = run("show", folder, *(["--json"] if as_json else [])).output
        assert "\\u001b]0;title" in output
        assert "\\u202egpj é" in output
        assert [c for c in output if c in name and not c.isprintable()] == []
        if as_json:
            assert json.loads(output)["provenance"]["expert"]["name"] == name

    def test_tables_and_texts_show_control_characters(self, capsys):
        from pandas import DataFrame

        terminal.print_frame(DataFrame({"a\x1b[2J": ["b\x9b2J"]}), "c\x1b[2J")
        terminal.print_texts([SteeredText("p\x1b[2J", {0.0: "t\u202et"})])
        output = capsys.readouterr().out
        assert "\x1b[2J" not in output
        assert not set("\x9b\u202e") & set(output)
        for text in ("a\\u001b", "b\\u009b", "c\\u001b", "p\\u001b", "t\\u202et"):
            assert text in output


class TestSteer:
    def test_three_coefficients_stand_side_by_side(self, fitted):
        prompt = esl.zoo.prompts(n=1)[0]
        result = run(
            "steer",
            fitted[0] / "plan",
            "--target",
            TARGET,
            "--prompt",
            prompt,
            "--max-new-tokens",
            5,
            "--coefficient",
            0.4,
        )
        assert result.exit_code == 0, result.output
        for column in ("coefficient -0.4", "unsteered", "coefficient +0.4"):
            assert column in result.output
        host = esl.as_host(esl.zoo.load("target"))
        plain = host.generate([prompt], max_new_tokens=5)[0]
        assert plain.split()[-1] in result.output

    def test_the_default_coefficient_is_the_largest_of_the_plan(self, tmp_path):
        d = json.loads((esl.zoo.model_path("target") / "config.json").read_text())["hidden_size"]
        vectors = {
            f"blocks.{i}.hook_resid_post": torch.ones(d) + torch.arange(d) * i for i in (1, 2)
        }
        plan = esl.SteeringPlan.from_vectors(
            vectors,
            coefficient={"blocks.1.hook_resid_post": 0.1, "blocks.2.hook_resid_post": -0.7},
            relative_to="unit",
        )
        result = run(
            "steer",
            esl.save(plan, tmp_path / "p"),
            "--target",
            TARGET,
            "--prompt",
            "The cat",
            "--max-new-tokens",
            2,
        )
        assert result.exit_code == 0, result.output
        assert "coefficient +0.7" in result.output

    def test_generated_brackets_are_not_styles(self):
        from expertsteer_lens.show.report import SteeredText

        with terminal.console.capture() as shown:
            terminal.print_texts([SteeredText("[/b]", {0.0: "[red]x[/red]"})])
        assert "[/b]" in shown.get()
        assert "[red]x[/red]" in shown.get()


class TestEvaluate:
    def test_a_saved_plan_is_held_against_random_directions(self, fitted, files, tmp_path):
        result = run(
            "evaluate",
            fitted[0] / "plan",
            "--target",
            TARGET,
            "--behaviour",
            files / "behaviour.json",
            "--neutral",
            files / "neutral.txt",
            "--n-random",
            2,
            "--out",
            tmp_path / "e",
        )
        assert result.exit_code == 0, result.output
        written = json.loads((tmp_path / "e/evaluation.json").read_text())
        assert written["verdict"] in result.output
        assert {r["role"] for r in written["rows"]} <= {"base", "plan", "control", "floor"}
        assert (tmp_path / "e/comparison.html").exists()
        assert (tmp_path / "e/comparison.csv").read_text().count("\n") == len(written["rows"]) + 1


class TestExport:
    def test_both_formats_are_written_as_by_the_library(self, tmp_path):
        plan = esl.SteeringPlan.from_vectors(
            {"blocks.1.hook_resid_post": torch.ones(4)}, relative_to="unit"
        )
        saved = esl.save(plan, tmp_path / "p")
        assert (
            run(
                "export", saved, "--format", "lm_eval", "--out", tmp_path / "s.pt", "--blocks", "h"
            ).exit_code
            == 0
        )
        content = torch.load(tmp_path / "s.pt", weights_only=True)
        torch.testing.assert_close(content["h.1"]["steering_vector"], plan.vectors[0].delta)
        assert (
            run(
                "export",
                saved,
                "--format",
                "gguf",
                "--out",
                tmp_path / "s.gguf",
                "--model-hint",
                "llama",
            ).exit_code
            == 0
        )
        assert (tmp_path / "s.gguf").read_bytes()[:4] == b"GGUF"

    def test_a_merged_checkpoint_and_a_matrix_for_hotwire(self, capsys, tmp_path):
        folder = esl.zoo.model_path("target")
        width = esl.zoo.load("target", host="huggingface").config.hidden_size
        plan = esl.SteeringPlan.from_vectors(
            {"blocks.1.hook_resid_post": torch.ones(width)}, relative_to="unit"
        )
        saved = esl.save(plan, tmp_path / "p")
        give = ("export", saved, "--format")
        merged = run(*give, "merged", "--target", folder, "--out", tmp_path / "m")
        assert merged.exit_code == 0, merged.output
        assert "expertsteer_lens" in (tmp_path / "m" / "config.json").read_text()
        dense = run(*give, "hotwire", "--n-layers", "9", "--out", tmp_path / "h.pt")
        assert dense.exit_code == 0, dense.output
        assert torch.load(tmp_path / "h.pt").shape == (9, width)
        out = ("--out", tmp_path / "x")
        assert "needs --target" in refused(capsys, *give, "merged", *out)
        assert "an option of --format gguf must be one of" in refused(
            capsys, *give, "gguf", "--n-layers", "3", *out
        )

    def test_a_format_that_does_not_exist_is_refused(self, capsys, tmp_path):
        assert "--format must be one of" in refused(
            capsys, "export", "p", "--format", "onnx", "--out", tmp_path / "x"
        )


class TestBenchmarks:
    def test_all_or_one_domain_are_listed(self):
        assert all(name in run("benchmarks").output for name in esl.benchmarks.names())
        shown = run("benchmarks", "--domain", "finance").output
        assert "financial_phrasebank" in shown
        assert "gsm8k" not in shown


class TestBadInput:
    """One line on standard error, exit code 1, no traceback."""

    def fit(self, files, **changes):
        given = {"expert": EXPERT, "target": TARGET, "pairs": files / "pairs.jsonl", **changes}
        return [
            "fit",
            *(
                x
                for k, v in given.items()
                if v is not None
                for x in (f"--{k.replace('_', '-')}", v)
            ),
        ]

    def test_files_that_are_not_there(self, capsys, files, tmp_path):
        assert "nowhere.jsonl" in refused(
            capsys, *self.fit(files, pairs=tmp_path / "nowhere.jsonl")
        )
        assert "nowhere.txt" in refused(capsys, *self.fit(files, anchors=tmp_path / "nowhere.txt"))
        assert "is neither a folder nor a hub id" in refused(
            capsys, "show", tmp_path / "no/plan/here"
        )

    def test_control_characters_in_an_error_are_shown(self, capsys, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"format_version": "\x1b[2J\u202e"}))
        line = refused(capsys, "show", tmp_path)
        assert "format_version \\u001b[2J\\u202e" in line

    def test_a_model_that_is_not_there(self, capsys, files, tmp_path):
        assert "no-model" in refused(
            capsys, *self.fit(files, expert=tmp_path / "no-model", config=files / "config.json")
        )

    def test_a_hub_that_cannot_be_reached_is_an_error_that_names_the_model(
        self, capsys, files, monkeypatch
    ):
        def unreachable(*_, **__):
            raise OSError("We couldn't connect to the hub.")

        monkeypatch.setattr(esl.hosts.loading, "load_model", unreachable)
        said = refused(capsys, *self.fit(files, expert="some/model"))
        assert said.startswith("HostError: some/model could not be loaded")
        assert "couldn't connect" in said

    def test_files_of_another_kind(self, capsys, files, tmp_path):
        (tmp_path / "x.jsonl").write_text('{"a": 1}')
        assert "no field 'positive'" in refused(
            capsys, *self.fit(files, pairs=tmp_path / "x.jsonl")
        )
        (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
        assert "is not UTF-8 text" in refused(capsys, *self.fit(files, anchors=tmp_path / "b.txt"))
        (tmp_path / "e.txt").write_text("\n \n")
        assert "holds no text" in refused(capsys, *self.fit(files, anchors=tmp_path / "e.txt"))

    def test_texts_may_be_conversations(self, tmp_path):
        path = tmp_path / "t.jsonl"
        asked = [{"role": "user", "content": "Why?"}]
        path.write_text(json.dumps("a text\nof two lines") + "\n\n" + json.dumps(asked))
        assert inputs.read_texts(path) == ["a text\nof two lines", esl.Chat.ask("Why?")]
        for content, message in (
            ("{", "line 1: give a JSON text"),
            ("[]", "got list"),
            ('[{"role": "user"}]', "'role' and 'content'"),
        ):
            path.write_text(content)
            with pytest.raises(DataError, match=message):
                inputs.read_texts(path)

    def test_texts_may_be_json_lines_of_any_name_or_a_json_list(self, tmp_path):
        asked = [{"role": "user", "content": "Why?"}]
        texts = ["a text\nof two lines", esl.Chat.ask("Why?")]
        for name in ("t.JSONL", "t.ndjson", "t.Ndjson"):
            (tmp_path / name).write_text(json.dumps(texts[0]) + "\n" + json.dumps(asked))
            assert inputs.read_texts(tmp_path / name) == texts
        for name in ("t.json", "t.JSON"):
            (tmp_path / name).write_text(json.dumps([texts[0], asked], indent=2))
            assert inputs.read_texts(tmp_path / name) == texts

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("t.json", '{"texts": ["a"]}', "must hold a JSON list of texts, got dict"),
            ("t.json", '"a"\n"b"', "is not JSON .*JSON lines ends in .jsonl"),
            ("t.json", "[1]", "give a list of texts"),
            ("t.json", "[]", "give a list of texts"),
            ("t.csv", "text\na dog", r"is a table, .*\.txt"),
            ("t.TSV", "text\na dog", "is a table"),
            ("t.parquet", "PAR1", "is a table"),
            (
                "t.txt",
                '{"text": "a"}\n{"text": "b"}',
                "line 1: this is JSON, .*name the file .jsonl",
            ),
            ("t.txt", '[\n "a",\n "b"\n]', "this is JSON"),
            ("t", '[{"role": "user", "content": "Why?"}]', "this is JSON, but in a plain file"),
        ],
    )
    def test_data_of_another_kind_is_not_read_as_lines_of_text(
        self, tmp_path, name, content, message
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=f"{name}.*{message}"):
            inputs.read_texts(tmp_path / name)

    def test_text_with_brackets_is_text(self, tmp_path):
        for line in ("[applause] Thank you.", "{a", '"Quite so."'):
            (tmp_path / "t.txt").write_text(f"{line}\nmore")
            assert inputs.read_texts(tmp_path / "t.txt") == [line, "more"]

    def test_behaviour_files_are_checked(self, tmp_path):
        path = tmp_path / "b.json"
        for content, message in (
            ("{", "is not JSON .*line 1"),
            ("[1]", "must hold one JSON object, got list"),
            ('{"prompts": ["p"], "positive": ["a"]}', "lacks 'negative'"),
        ):
            path.write_text(content)
            with pytest.raises(DataError, match=message):
                inputs.read_behaviour(path)

    def test_config_files_are_checked(self, tmp_path):
        path = tmp_path / "c.json"
        for content, message in (
            (
                '{"rfm": {"n_round": 2}}',
                r"c\.json\.rfm has unknown field 'n_round'; closest: 'n_rounds'",
            ),
            ('{"rfms": {}}', "unknown field 'rfms'"),
            ('{"budget": -1}', "budget must be"),
        ):
            path.write_text(content)
            with pytest.raises(ArgumentError, match=message):
                inputs.read_config(path, "anchored")
        path.write_text(
            '{"budget": 0.2, "mi": {"estimator": "gaussian"}, "aligner": {"n_folds": 3}}'
        )
        config = inputs.read_config(path, "paper")
        assert (config.budget, config.mi.estimator, config.aligner.kind) == (
            0.2,
            "gaussian",
            "autoencoder",
        )
        assert config.aligner.n_folds == 3

    def test_options_that_exclude_each_other(self, capsys, files):
        assert "got neither" in refused(capsys, *self.fit(files, pairs=None))
        assert "not both" in refused(capsys, *self.fit(files, benchmark="medqa"))
        assert "go with --benchmark" in refused(capsys, *self.fit(files, limit=5))
        assert "go with --benchmark" in refused(capsys, *self.fit(files), "--chat")

    def test_an_expert_given_twice_is_refused(self, capsys, files, found, monkeypatch):
        monkeypatch.setattr(esl.hosts.loading, "load_model", None)
        again = str(pathlib.Path(EXPERT).parent / "." / "target" / ".." / "expert")
        assert f"--expert {again!r} is given twice" in refused(
            capsys, *self.fit(files), "--expert", again
        )
        assert "--expert 'u/x' is given twice" in refused(
            capsys, *self.fit(files, expert="u/x"), "--expert", "u/x"
        )
        assert "is given twice" in refused(
            capsys, "reproduce", found, *self.fit(files)[1:], "--expert", EXPERT
        )

    def test_what_cannot_be_used_is_refused_before_a_model_is_loaded(
        self, capsys, files, found, tmp_path, monkeypatch
    ):
        def loaded(*_, **__):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr(esl.hosts.loading, "load_model", loaded)
        evaluated = ("evaluate", found / "plan", "--target", TARGET)
        assert "holds a saved SteeringPlan, but a saved ExpertSteering" in refused(
            capsys, *evaluated, "--fit", found / "plan"
        )
        assert "there is no folder" in refused(capsys, *evaluated, "--fit", tmp_path / "none")
        assert "anchors are not those of the fit" in refused(
            capsys, "reproduce", found, *self.fit(files, anchors=files / "neutral.txt")[1:]
        )
        assert "the fit was given anchors" in refused(
            capsys, "reproduce", found, *self.fit(files)[1:]
        )
        merged = ("export", found / "plan", "--format", "merged", "--target", TARGET, "--out")
        (tmp_path / "file").write_text("mine")
        for place in (tmp_path, tmp_path / "file"):
            assert "exists and is not an empty folder" in refused(capsys, *merged, place)
        line = refused(
            capsys,
            *("capture", "--model", EXPERT, "--pairs", files / "pairs.jsonl"),
            *("--tokens", "--reading", "last"),
        )
        assert "--tokens keeps every token; leave one" in line

    def test_a_place_without_a_name_is_an_error_in_one_line(self, capsys, files):
        assert "ArtifactError: / is not a saved plan" in refused(capsys, "show", "/")
        assert "ArtifactError: / is not a saved plan" in refused(
            capsys, "reproduce", "/", *self.fit(files)[1:]
        )
        for place in ("/", ""):
            assert "has no name of its own" in refused(capsys, "merge", place)
        assert "--target holds a null byte" in refused(
            capsys, "steer", "x", "--target", "a\0b", "--prompt", "a"
        )
        assert "there is no folder 'xxx" in refused(capsys, "show", "x" * 5000)

    @pytest.mark.parametrize("depth", [300, 500, 700, 900, 2000])
    def test_a_config_that_is_nested_too_deeply(self, capsys, files, tmp_path, depth):
        for content in ('{"reading": %s}', '{"rfm": {"bandwidth": %s}}'):
            (tmp_path / "c.json").write_text(content % ("[" * depth + "]" * depth))
            line = refused(capsys, *self.fit(files, config=tmp_path / "c.json"))
            assert "c.json" in line
            assert len(line) < 1000

    def test_an_option_is_not_taken_for_the_path_of_another(self, capsys):
        line = refused(capsys, "bench", "--real", "--help")
        assert line.startswith("ArgumentError: --real must be a path, got '--help'")
        assert "--help without --real explains the options" in line

    def test_a_package_that_is_missing_is_named_and_a_fault_of_ours_is_not_hidden(
        self, capsys, monkeypatch
    ):
        def fails_with(error):
            def fails(*_, **__):
                raise error

            monkeypatch.setattr("expertsteer_lens.files.io.load", fails)

        fails_with(ModuleNotFoundError("No module named 'plotly'", name="plotly"))
        assert refused(capsys, "show", "x").startswith("ImportError: No module named 'plotly';")
        for error in (
            ModuleNotFoundError("no", name="expertsteer_lens.gone"),
            TypeError("ours"),
            ValueError("ours"),
            RecursionError("ours"),
        ):
            fails_with(error)
            with pytest.raises(type(error)):
                cli.main(["show", "x"])

    def test_an_export_is_not_written_under_the_ending_of_another_format(
        self, capsys, found, tmp_path
    ):
        for format, name, ending in (
            ("gguf", "x.pt", ".gguf"),
            ("gguf", "x", ".gguf"),
            ("lm_eval", "x.gguf", ".pt or .pth"),
            ("hotwire", "x.pth", ".pt"),
        ):
            line = refused(
                capsys, "export", found / "plan", "--format", format, "--out", tmp_path / name
            )
            assert f"--out must end in {ending}, got" in line
        (tmp_path / "x.gguf").mkdir()
        assert "is a folder; give a file" in refused(
            capsys, "export", found / "plan", "--format", "gguf", "--out", tmp_path / "x.gguf"
        )
        assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]

    def test_unknown_names_get_the_closest(self, capsys, files):
        assert "closest: 'anchored'" in refused(capsys, *self.fit(files, preset="anchord"))
        assert "closest: 'medqa'" in refused(
            capsys, *self.fit(files, pairs=None, benchmark="medqaa")
        )

    def test_a_plan_for_another_model_is_refused(self, capsys, fitted):
        line = refused(
            capsys, "steer", fitted[0] / "plan", "--target", EXPERT, "--prompt", "The cat"
        )
        assert line.startswith("WidthError: ")

    def test_one_neutral_text_is_too_few(self, capsys, fitted, files, tmp_path):
        (tmp_path / "n.txt").write_text("one text")
        line = refused(
            capsys,
            "evaluate",
            fitted[0] / "plan",
            "--target",
            TARGET,
            "--behaviour",
            files / "behaviour.json",
            "--neutral",
            tmp_path / "n.txt",
        )
        assert "holds 1 text (equal ones count once); give at least 2" in line

    def test_what_is_no_plan_is_refused_by_commands_that_take_one(self, capsys, found, states):
        for saved, kind in ((found / "fit", "ExpertSteering"), (states, "ActivationStore")):
            for rest in (
                ("steer", saved, "--target", TARGET, "--prompt", "The cat"),
                ("evaluate", saved, "--target", TARGET, "--fit", found / "fit"),
                ("export", saved, "--format", "gguf", "--out", found / "x.gguf"),
            ):
                line = refused(capsys, *rest)
                assert line.startswith("ArtifactError: ")
                assert f"holds a saved {kind}, but a saved SteeringPlan is needed here" in line
        assert "`fit` wrote one to OUT/plan" in refused(
            capsys, "export", found / "fit", "--format", "gguf", "--out", found / "x.gguf"
        )
        assert "holds a saved SteeringPlan, but a saved ExpertSteering" in refused(
            capsys, "evaluate", found / "plan", "--target", TARGET, "--fit", found / "plan"
        )
        assert not (found / "x.gguf").exists()

    def test_what_is_no_expert_is_refused(self, capsys, files, found, tmp_path):
        assert "holds a saved SteeringPlan, which is no expert" in refused(
            capsys, *self.fit(files, expert=found / "plan")
        )
        (tmp_path / "empty").mkdir()
        line = refused(capsys, *self.fit(files, expert=tmp_path / "empty"))
        assert line.startswith("ArgumentError: no model in ")
        (tmp_path / "empty/config.json").write_text("{}")
        line = refused(capsys, *self.fit(files, expert=tmp_path / "empty"))
        assert line.startswith("HostError: ")

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("device", "foo", "--device 'foo' cannot be used"),
            ("device", "cuda:9", "--device 'cuda:9' cannot be used"),
            ("device", "hpu", "--device 'hpu' cannot be used"),
            ("device", "privateuseone", "--device 'privateuseone' cannot be used"),
            ("dtype", "int8", "dtype must name a torch dtype that weights can have"),
            ("dtype", "float8_e4m3fn", "dtype must name a torch dtype that weights can have"),
            ("dtype", "float33", "dtype must name a torch dtype that weights can have"),
            ("host", "jax", "'huggingface', 'nnsight', 'transformer_lens'"),
        ],
    )
    def test_models_are_not_loaded_as_what_they_cannot_be(
        self, capsys, files, option, value, message
    ):
        assert message in refused(capsys, *self.fit(files, **{option: value}))

    def test_a_reading_is_answer_mean_last_or_an_index(self, capsys, files):
        given = ("answer", "last", "mean", "attention", "-2", "0")
        assert [parse_reading(p) for p in given] == [*given[:4], -2, 0]
        for bad in ("--1", "²", "all", "", "1.5", "9" * 30):
            with pytest.raises(
                ArgumentError, match="--reading must be 'answer', 'mean', 'last', 'attention' or"
            ):
                parse_reading(bad)
        line = refused(
            capsys,
            "capture",
            "--model",
            EXPERT,
            "--pairs",
            files / "pairs.jsonl",
            "--reading=--1",
        )
        assert line.startswith("ArgumentError: --reading must be")

    def test_files_that_cannot_be_read_are_named(self, capsys, files, tmp_path):
        path = tmp_path / "b.json"
        for content, message in (
            ("é".encode("utf-16"), "is not UTF-8 text"),
            (b"[" * 100_000, "is no JSON that can be read"),
            (b'{"prompts": ["p"], "positive": null, "negative": ["b"]}', "positive must be a list"),
        ):
            path.write_bytes(content)
            line = refused(capsys, *self.fit(files, behaviour=path))
            assert line.startswith(f"DataError: {path}")
            assert message in line
        path.write_bytes('{"positive": "é"}'.encode("utf-16"))
        assert "is not UTF-8 text" in refused(capsys, *self.fit(files, pairs=path))

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("preset", "anchord", "--preset must be one of"),
            ("dtype", "float33", "--dtype must name"),
            ("host", "jax", "--host must be one of"),
        ],
    )
    def test_an_error_names_the_option(self, capsys, files, option, value, message):
        assert message in refused(capsys, *self.fit(files, **{option: value}))

    def test_an_error_names_the_option_that_may_be_repeated(self, capsys):
        assert "--domain must be one of" in refused(capsys, "bench", "--domain", "law")
        line = refused(capsys, *self.fit_with_benchmark("medqaa"))
        assert line.startswith("ArgumentError: --benchmark must be one of")

    @staticmethod
    def fit_with_benchmark(name):
        return ("fit", "--expert", EXPERT, "--target", TARGET, "--benchmark", name)

    @pytest.mark.parametrize(
        ("command", "option", "value"),
        [
            ("demo", "--n-random", "1"),
            ("fit", "--n-random", "1"),
            ("evaluate", "--seed", "-1"),
            ("bench", "--n-random", "1"),
            ("capture", "--batch-size", "0"),
            ("steer", "--max-new-tokens", "0"),
        ],
    )
    def test_numbers_out_of_range_are_refused_before_anything_is_done(
        self, command, option, value, monkeypatch
    ):
        from expertsteer_lens import zoo

        monkeypatch.setattr(zoo, "load_pair", None)
        monkeypatch.setattr(offline, "run_bench", None)
        result = run(command, option, value)
        assert result.exit_code == 2
        said = " ".join(result.output.replace("│", " ").split())
        assert f"Invalid value for '{option}'" in said

    def test_unknown_commands_and_options_are_usage_errors(self):
        assert run("fly").exit_code == 2
        assert run("show").exit_code == 2


class TestHelp:
    def test_the_version_is_printed(self):
        result = run("--version")
        assert (result.exit_code, result.output.strip()) == (
            0,
            f"expertsteer-lens {esl.__version__}",
        )

    @pytest.mark.parametrize(
        "command",
        ["demo", "capture", "fit", "show", "steer", "evaluate", "export", "bench", "benchmarks"],
    )
    def test_every_option_explains_itself(self, command):
        import click
        from typer.main import get_command

        found = get_command(cli.app).commands[command]
        assert found.help
        for parameter in found.params:
            assert getattr(parameter, "help", None) or isinstance(parameter, click.Argument), (
                parameter.name
            )
        assert run(command, "--help").exit_code == 0

    def test_a_command_is_one_line_of_the_list_and_its_help_breaks_where_the_terminal_does(self):
        from typer.main import get_command

        for name, command in get_command(cli.app).commands.items():
            first, *_ = paragraphs = command.help.split("\n\n")
            assert len(first) <= 62, name  # what a terminal of 80 columns has room for
            assert not any("\n" in paragraph for paragraph in paragraphs), name

    def test_what_a_first_run_does_not_need_stands_apart_in_the_help(self):
        shown = run("fit", "--help").output
        options, *groups = re.split(r"╭─ (?!Options)", shown)
        assert [g.split(" ─")[0] for g in groups] == [PUBLIC, LOADING, SETTINGS]
        needed = ("--expert", "--target", "--pairs", "--anchors", "--behaviour", "--out")
        assert all(f"{name} " in options for name in needed)
        assert "--dtype" not in options

    def test_without_arguments_the_commands_are_listed(self):
        assert all(
            c in run().output
            for c in ("demo", "capture", "fit", "show", "steer", "evaluate", "export", "benchmarks")
        )


PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "command_line.md"


def documented(heading: str) -> dict[str, str]:
    """The table under a heading of the page on the command line: first column, second column."""
    part = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", part, flags=re.MULTILINE)[1:]
    return {first.strip("`"): second for first, second in rows}


def printed(command: str, *arguments: object) -> dict:
    """The one object on standard output, which has the keys that the page names."""
    result = run(command, *arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    named = re.findall(r"`(\w+)`", documented("Tables as JSON")[command].split(" (")[0])
    assert named
    assert set(named) <= set(found)
    return found


class TestJson:
    """`--json` prints one object and nothing else on standard output."""

    def test_a_list_of_benchmarks(self):
        found = printed("benchmarks")["benchmarks"]
        assert {"name", "domain", "licence"} <= set(found[0])

    def test_every_command_that_prints_a_table_has_it(self):
        from typer.main import get_command

        commands = get_command(cli.app).commands
        have = {n for n, c in commands.items() if any("--json" in p.opts for p in c.params)}
        assert have == set(documented("Tables as JSON"))
        calls = {}
        for module in (commands_fit, commands_plan, commands_sets, commands_states):
            for node in ast.parse(inspect.getsource(module)).body:
                if isinstance(node, ast.FunctionDef):
                    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                    calls[node.name] = names - {node.name}
        print_tables = {"print_frame", "print_texts", "print_evaluation"}
        for _ in calls:  # who calls one that does, does
            print_tables |= {name for name, called in calls.items() if called & print_tables}
        assert {"show", "steer", "evaluate"} <= print_tables
        assert print_tables & set(commands) <= have

    def test_a_fit_with_its_evaluation(self, files, tmp_path):
        arguments = ["--expert", EXPERT, "--target", TARGET, "--host", "huggingface"]
        for name in ("pairs.jsonl", "anchors.txt", "behaviour.json", "config.json"):
            arguments += [f"--{name.split('.')[0]}", files / name]
        found = printed("fit", *arguments, "--n-random", 2, "--out", tmp_path / "o")
        assert found["plan"] == str((tmp_path / "o/plan").resolve())
        assert [s["step"] for s in found["steps"]][:2] == ["capture", "attribute"]
        assert any(pair["chosen"] for pair in found["pairs"])
        written = json.loads((tmp_path / "o/evaluation.json").read_text())
        assert found["evaluation"]["verdict"] == written["verdict"]
        assert len(found["evaluation"]["rows"]) == len(written["rows"])
        arguments = [tmp_path / "o/plan", "--target", TARGET, "--host", "huggingface"]
        arguments += ["--behaviour", files / "behaviour.json", "--neutral", files / "neutral.txt"]
        found = printed("evaluate", *arguments, "--n-random", 2)
        assert found["rows"][0]["method"] == "unsteered"
        assert found["verdict"]

    def test_the_demo(self, tmp_path, monkeypatch):
        """The demo itself, on fewer texts."""
        for name, n in {"contrast_pairs": 30, "anchors": 60, "behaviour": 8}.items():
            monkeypatch.setattr(esl.zoo, name, partial(getattr(esl.zoo, name), n))
        found = printed("demo", "--n-random", 2, "--out", tmp_path / "demo")
        assert found["out"] == str((tmp_path / "demo").resolve())
        assert "paper preset" in {row["method"] for row in found["rows"]}
        assert (tmp_path / "demo/report.html").is_file()

    def test_the_benchmark(self, tmp_path, monkeypatch):
        def run_bench(*, on_progress, **_):
            on_progress("a line of progress")
            kinds = (("unsteered", "base"), ("ExpertSteer (anchored)", "plan"))
            rows = [
                BenchRow("cure", "medicine", *kind, 1, 0.5, 0.4, 0.6, None, 0.7) for kind in kinds
            ]
            return esl.benchmarks.Bench(tuple(rows), (), {}, 1.0)

        monkeypatch.setattr(offline, "run_bench", run_bench)
        monkeypatch.setattr(esl.benchmarks.Bench, "save", lambda *_: None)
        found = printed("bench", "--out", tmp_path / "b")
        assert found["out"] == str(tmp_path / "b")
        assert [row["role"] for row in found["rows"]] == ["base", "plan"]

    def test_the_benchmark_on_real_models(self, tmp_path, monkeypatch):
        nothing = SimpleNamespace(tasks=[], development=[], anchors=[], neutral=[])
        summary = pandas.DataFrame({"method": ["m"], "effect": [0.5]})
        result = SimpleNamespace(save=lambda out: None, summary=lambda: summary)
        configs = []

        def bench_transfer(*_, config, **__):
            configs.append(config)
            return result

        monkeypatch.setattr(real, "read_real_data", lambda *_, **__: nothing)
        monkeypatch.setattr(transfer, "bench_transfer", bench_transfer)
        arguments = ("--transfer", f"{EXPERT}:{TARGET}", "--out", tmp_path / "b")
        found = json.loads(run("bench", "--real", tmp_path, *arguments, "--json").stdout)
        assert found["rows"] == [{"method": "m", "effect": 0.5}]
        run("bench", "--real", tmp_path, *arguments, "--no-few-labels", "--json")
        assert [config.n_pairs for config in configs] == [(1, 4), ()]

    def test_a_plan_and_its_texts(self, tmp_path):
        width = esl.as_host(esl.zoo.load_pair(host="huggingface")[1]).d_model
        plan = esl.SteeringPlan.from_vectors(
            {"blocks.1.hook_resid_post": torch.arange(float(width))},
            coefficient=0.1,
            relative_to="unit",
        )
        esl.save(plan, tmp_path / "plan")
        shown = json.loads(run("show", tmp_path / "plan", "--json").stdout)
        assert shown["kind"] == "SteeringPlan"
        assert shown["rows"][0]["hook_name"] == "blocks.1.hook_resid_post"
        arguments = ["steer", tmp_path / "plan", "--target", TARGET, "--max-new-tokens", 3]
        result = CliRunner().invoke(
            cli.app,
            [str(a) for a in [*arguments, "--host", "huggingface", "--interactive", "--json"]],
            input="Once upon\nThe cat\n\nnever asked\n",
        )
        answers = [json.loads(line) for line in result.stdout.splitlines()]
        assert [a["prompt"] for a in answers] == ["Once upon", "The cat"]
        assert set(answers[0]["texts"]) == {"-0.1", "0.0", "0.1"}
        refusal = CliRunner().invoke(cli.app, [str(a) for a in arguments]).exception
        assert "give --prompt TEXT" in str(refusal)

    def test_a_chat_is_shown_to_the_model_as_a_chat(self, tmp_path, monkeypatch):
        seen = []

        def steered(plan, model, prompts, coefficient, *rest):
            seen.extend(prompts)
            return [SteeredText(p, {0.0: "hello"}) for p in prompts]

        monkeypatch.setattr(commands_plan, "steered_texts", steered)
        plan = esl.SteeringPlan.from_vectors(
            {"blocks.1.hook_resid_post": torch.ones(4)}, relative_to="unit"
        )
        esl.save(plan, tmp_path / "plan")
        arguments = ["steer", tmp_path / "plan", "--target", TARGET, "--prompt", "Hi", "--chat"]
        assert "Hi" in run(*arguments, "--host", "huggingface").output
        assert seen == [[{"role": "user", "content": "Hi"}]]


class TestExitCodes:
    def test_the_page_names_those_there_are(self):
        rows = documented("Exit codes")
        assert {int(code): said for code, said in rows.items()} == cli.EXIT_CODES
        shown = " ".join(run("--help").output.split())
        assert all(f"{code} {said}" in shown for code, said in cli.EXIT_CODES.items())

    def test_the_page_names_every_command(self):
        from typer.main import get_command

        table = PAGE.read_text(encoding="utf-8").split("\n## ")[0]
        named = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
        assert named == list(get_command(cli.app).commands)

    @pytest.mark.parametrize(
        ("code", "arguments"),
        [(0, ["benchmarks"]), (1, ["show", "no/such/plan"]), (2, ["show", "--no-such-option"])],
    )
    def test_a_command_ends_with_them(self, code, arguments, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == code
        assert "Traceback" not in capsys.readouterr().err

    def test_who_stops_a_command_gets_130(self, monkeypatch, tmp_path):
        def stopped(*args):
            raise KeyboardInterrupt("stopped after 2 of 5 rows, which are kept: ...")

        monkeypatch.setattr(commands_plan, "load_saved", stopped)
        result = run("steer", tmp_path, "--target", TARGET, "--prompt", "a")
        assert result.exit_code == 130
        assert result.stderr == "stopped after 2 of 5 rows\n"


def test_a_finished_step_is_told_in_words(capsys):
    print_step({"step": "stability", "seconds": 0.25, "halves": 10, "pairs_again": 7})
    assert capsys.readouterr().out.split() == [
        "stability",
        "0.2",
        "s",
        "halves:",
        "10",
        "·",
        "pairs",
        "again:",
        "7",
    ]


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "expertsteer_lens", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"expertsteer-lens {esl.__version__}\n"


def test_a_cell_that_a_spreadsheet_would_run_is_written_as_text(tmp_path):
    from expertsteer_lens.cli.results import write_table

    cells = ['=HYPERLINK("http://x")', "+1", "-1", "@x", "\tx", "\rx", "a=b", "", "'q'", None]
    frame = pandas.DataFrame({"text": cells, "number": [-1.5] * len(cells)})
    write_table(tmp_path / "t.csv", frame)
    with (tmp_path / "t.csv").open(newline="") as file:
        back = pandas.DataFrame(csv.DictReader(file))
    assert list(back["text"]) == [*(f"'{cell}" for cell in cells[:6]), "a=b", "", "'q'", ""]
    assert set(back["number"]) == {"-1.5"}


def test_a_model_labels_a_file_of_texts(tmp_path):
    pairs = esl.zoo.contrast_pairs()
    few = {"positive": pairs.positive[0], "negative": pairs.negative[0]}
    (tmp_path / "few.jsonl").write_text(json.dumps(few) + "\n", encoding="utf-8")
    heap = pairs.texts[2:42]
    (tmp_path / "heap.txt").write_text("\n".join(heap) + "\n", encoding="utf-8")
    options = ("--pairs", tmp_path / "few.jsonl", "--texts", tmp_path / "heap.txt")
    result = run("label", "--model", EXPERT, *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "LabelledTexts(40 texts" in result.output
    found = esl.ContrastPairs.from_jsonl(tmp_path / "out" / "pairs.jsonl")
    good, bad = set(pairs.positive), set(pairs.negative)
    right = [(p in good) + (n in bad) for p, n in zip(found.positive, found.negative, strict=True)]
    assert sum(right) >= 0.9 * 2 * len(found)
    assert len((tmp_path / "out" / "scores.csv").read_text("utf-8").splitlines()) == 41


def test_texts_are_labelled_by_a_question_alone(tmp_path, capsys):
    """What a model that cannot answer says is noise, but every text has a score; with neither pairs
    nor a question nothing is loaded."""
    heap = tmp_path / "heap.txt"
    heap.write_text("\n".join(map(str, esl.zoo.contrast_pairs(8).texts)) + "\n", encoding="utf-8")
    options = ("label", "--model", EXPERT, "--texts", heap, "--out", tmp_path / "out")
    assert "--question" in refused(capsys, *options)
    assert not (tmp_path / "out").exists()
    result = run(*options, "--question", "Is she glad?")
    assert result.exit_code == 0, result.output
    assert "LabelledTexts(16 texts" in result.output


def test_texts_are_labelled_by_an_instruction_alone(tmp_path, capsys):
    pairs = esl.zoo.contrast_pairs(60)
    heap = tmp_path / "heap.txt"
    heap.write_text("\n".join(map(str, pairs.texts)) + "\n", encoding="utf-8")
    options = ("label", "--model", EXPERT, "--texts", heap, "--out", tmp_path / "out")
    assert "--against goes with" in refused(
        capsys, *options, "--question", "Glad?", "--against", "Ella was sad."
    )
    said = ("--instruction", "Ella was happy.", "--against", "Ella was sad.")
    result = run(*options, *said)
    assert result.exit_code == 0, result.output
    found = esl.ContrastPairs.from_jsonl(tmp_path / "out" / "pairs.jsonl")
    good, bad = set(pairs.positive), set(pairs.negative)
    right = [(p in good) + (n in bad) for p, n in zip(found.positive, found.negative, strict=True)]
    assert sum(right) >= 0.9 * 2 * len(found)


def test_the_benchmark_on_real_models_says_what_is_missing(tmp_path, capsys):
    command = ("bench", "--real", tmp_path / "nowhere", "--data", tmp_path)
    said = refused(capsys, *command)
    assert "fetch_real.py" in said
    assert "docs/results.md#where-" in said  # the script has not all of them
    assert "EXPERT:TARGET" in refused(capsys, *command, "--transfer", "one")
    assert "--task" in refused(capsys, *command, "--domain", "finance")
    assert "bfloat16" in refused(capsys, *command, "--dtype", "half a float")
    assert "--device" in refused(capsys, *command, "--device", "toaster")
    few = (*command, "--no-few-labels", "--n-pairs", "2")
    assert "--no-few-labels leaves out" in refused(capsys, *few)
    alone = (("--task", "3201"), ("--dtype", "bfloat16"), ("--device", "cpu"), ("--no-few-labels",))
    for option in alone:
        assert "--real" in refused(capsys, "bench", *option)
