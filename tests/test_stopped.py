"""A command that is stopped or fails: what is finished is kept, and the same command goes on from
there to what it would have found."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import expertsteer_lens as esl
from expertsteer_lens.cli import app as cli
from expertsteer_lens.cli import commands_fit
from expertsteer_lens.cli.stopped import Stopped
from expertsteer_lens.errors import ArgumentError, ArtifactError, DataError, Interrupted
from expertsteer_lens.evaluation import run as evaluation_run
from expertsteer_lens.files import io
from expertsteer_lens.pipeline import expert_steer, read_models, readings

EXPERT, TARGET = (str(esl.zoo.model_path(name)) for name in ("expert", "target"))
CONFIG = {
    "mi": {"n_permutations": 5, "n_bootstrap": 10, "n_components": 8},
    "rfm": {"bandwidth": 1.0, "center_gradients": False, "validation_fraction": 0.0, "n_rounds": 2},
}


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A process that was started in the background ignores SIGINT, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("texts")
    pairs, behaviour = esl.zoo.contrast_pairs(n=30), esl.zoo.behaviour(n=8)
    rows = [
        {"positive": p, "negative": n} for p, n in zip(pairs.positive, pairs.negative, strict=True)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (folder / "anchors.txt").write_text("\n".join(esl.zoo.anchors(n=60)))
    content = {n: getattr(behaviour, n) for n in ("prompts", "positive", "negative")}
    (folder / "behaviour.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def fit_command(files: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
    given = {"pairs": "pairs.jsonl", "anchors": "anchors.txt", "behaviour": "behaviour.json"}
    texts = [x for option, name in given.items() for x in (f"--{option}", str(files / name))]
    config = ["--config", str(files / "config.json"), "--host", "huggingface", "--n-random", "2"]
    models = ["--expert", EXPERT, "--target", TARGET]
    return ["fit", *models, *texts, *config, "--save-fit", "--out", str(out), *more]


def run(command: list[str]) -> Any:
    result = CliRunner().invoke(cli.app, command)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def whole(files: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What a fit leaves that nobody stopped."""
    out = tmp_path_factory.mktemp("whole")
    result = run(fit_command(files, out))
    assert result.exit_code == 0, result.output
    return out


def interrupt_at(call: int, function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """The function, in whose call of this number (from 1) the process gets a SIGINT."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls) + 1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **kwargs)

    return counted


STAGES = {
    "reading": (readings, "capture", 2, "after the states of expert on pairs were read"),
    "anchors": (read_models, "capture_side_by_side", 1, "of expert on pairs and target on pairs"),
    "learning": (expert_steer, "solve", 1, "after the states of both models were read"),
    "measuring": (evaluation_run._Run, "row_of", 3, "stopped after 2 of "),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_fit_goes_on_to_what_it_would_have_found(
    stage: str,
    files: pathlib.Path,
    whole: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where, name, call, said = STAGES[stage]
    out, calls = tmp_path / "out", list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(where, name, interrupt_at(call, getattr(where, name), calls))
        result = run(fit_command(files, out))
    assert result.exit_code == 130
    line = result.stderr.strip().splitlines()[-1]
    assert said in line
    assert f"kept in {out / 'stopped'}, and the same command goes on from there." in line
    assert not (out / "plan").exists()
    again = list[int]()
    with monkeypatch.context() as patch:
        for room, reader in ((readings, "capture"), (read_models, "capture_side_by_side")):
            patch.setattr(room, reader, interrupt_at(0, getattr(room, reader), again))
        result = run(fit_command(files, out))
    assert result.exit_code == 0, result.output
    # The target on the pairs and both on the anchors are left to read, or the latter, or nothing.
    assert len(again) == {"reading": 2, "anchors": 1, "learning": 0, "measuring": 0}[stage]
    assert not (out / "stopped").exists()
    one, two = esl.load(out / "plan"), esl.load(whole / "plan")
    assert torch.equal(one.vectors[0].direction, two.vectors[0].direction)
    assert one.vectors[0].coefficient == two.vectors[0].coefficient
    first, second = ((p / "evaluation.json").read_text() for p in (out, whole))
    assert json.loads(first)["rows"] == json.loads(second)["rows"]


def test_a_stopped_evaluation_measures_no_row_twice(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan, fit = str(whole / "plan"), str(whole / "fit")
    command = ["evaluate", plan, "--target", TARGET, "--fit", fit, "--host", "huggingface"]
    command += ["--n-random", "2", "--json"]
    kept, calls = tmp_path / "expertsteer-evaluation" / "stopped", list[int]()
    with monkeypatch.context() as patch:
        row_of = interrupt_at(4, evaluation_run._Run.row_of, calls)
        patch.setattr(evaluation_run._Run, "row_of", row_of)
        result = run(command)
    assert (result.exit_code, result.stdout) == (130, "")
    assert "stopped after 3 of " in result.stderr
    assert "kept in expertsteer-evaluation/stopped" in result.stderr
    with pytest.raises(ArgumentError, match=r"stopped/rows holds rows of another evaluation") as no:
        run_and_raise([*command, "--seed", "5"])
    assert "another --out, or remove that folder" in str(no.value)
    assert kept.is_dir()
    again = list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(
            evaluation_run._Run, "row_of", interrupt_at(0, evaluation_run._Run.row_of, again)
        )
        result = run(command)
    assert result.exit_code == 0
    assert "going on with the rows" in result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert len(again) + 3 == len(rows) - 1  # all but those that were kept and the unsteered model
    assert not kept.parent.exists()


def run_and_raise(command: list[str]) -> None:
    error = CliRunner().invoke(cli.app, command).exception
    assert error is not None
    raise error


def failing_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which finds the disk full at its call of this number (from 1)."""
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return function(*args, **kwargs)

    return counted


FAILURES = {
    "reading": (readings, "capture", 2, "states/FinishedReadings"),
    "learning": (expert_steer, "solve", 1, "states/FitData"),
    "saving": (commands_fit, "calibrated", 1, "states/FitData"),
    "measuring": (evaluation_run._Run, "row_of", 3, "rows/FinishedRows"),
    "writing": (commands_fit, "write_results", 1, "rows/FinishedRows"),
}


@pytest.mark.parametrize("stage", FAILURES)
def test_a_fit_that_fails_keeps_what_was_finished(
    stage: str, files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is the same, with a note; the same command goes on from there."""
    where, name, call, kept = FAILURES[stage]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(where, name, failing_at(call, getattr(where, name)))
        with pytest.raises(OSError, match="No space left") as failed:
            run_and_raise(fit_command(files, out))
    (note,) = failed.value.__notes__
    assert f"kept in {out / 'stopped'}; once the cause is removed, the same command" in note
    assert (out / "stopped" / kept / "config.json").is_file()
    if stage == "writing":
        with monkeypatch.context() as patch:
            patch.setattr(readings, "capture", None)  # nothing is read or measured again
            patch.setattr(evaluation_run._Run, "row_of", None)
            assert run(fit_command(files, out)).exit_code == 0
        assert not (out / "stopped").exists()


def test_an_error_of_ours_is_one_line_with_where_to_go_on(
    files: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise ArgumentError("seed cannot be used.")

    monkeypatch.setattr(expert_steer, "solve", fails)
    with pytest.raises(SystemExit) as end:
        cli.main(fit_command(files, tmp_path / "out"))
    assert end.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("ArgumentError: --seed cannot be used. What was finished is kept in ")


def test_what_cannot_be_kept_hides_no_error(
    files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise ArtifactError("no room.")

    monkeypatch.setattr(expert_steer, "solve", failing_at(1, expert_steer.solve))
    monkeypatch.setattr(io, "write_folder", full)
    with pytest.raises(OSError, match="No space left") as failed:
        run_and_raise(fit_command(files, tmp_path / "out"))
    assert failed.value.__notes__ == ["What was finished could not be kept (no room.)"]


@pytest.mark.parametrize("name", ["plan", "fit", "report.html", ""])
def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(
    name: str, files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if name:
        (out / name).mkdir(parents=True)
        (out / name / "mine.txt").write_text("of somebody else")
    else:
        out.write_text("a file")
    monkeypatch.setattr(commands_fit, "load_states_or_model", None)  # no model is loaded
    with pytest.raises(ArtifactError, match=r"out.*(remove it yourself|is no folder)"):
        run_and_raise(fit_command(files, out))


def test_texts_that_are_too_long_are_named_by_file_and_line_before_any_pass(
    files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "word " * 3000
    anchors = tmp_path / "anchors.txt"
    anchors.write_text("\n".join(["", *esl.zoo.anchors(n=60), long]))
    content = json.loads((files / "behaviour.json").read_text())
    behaviour = tmp_path / "behaviour.json"
    prompts = [*content["prompts"][:-1], long]
    behaviour.write_text(json.dumps({**content, "prompts": prompts}))
    monkeypatch.setattr(readings, "capture", None)
    for option, file, said in (
        ("--anchors", anchors, "anchors.txt, line 62: it has "),
        ("--behaviour", behaviour, r"behaviour.prompts\[7\] with its completion has "),
    ):
        with pytest.raises(DataError, match=f"{said}.* tokens, more than the model's context"):
            run_and_raise(fit_command(files, tmp_path / "out", option, str(file)))
    assert not (tmp_path / "out").exists()


def test_states_of_a_fit_with_other_texts_are_refused_by_name(
    files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(readings, "capture", interrupt_at(2, readings.capture, []))
        assert run(fit_command(files, out)).exit_code == 130
    lines = (files / "pairs.jsonl").read_text().split("\n")
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(ArgumentError, match=r"stopped/states holds states of .* another texts;"):
        run_and_raise(fit_command(files, out, "--pairs", str(tmp_path / "pairs.jsonl")))


def test_states_of_a_fit_that_divided_its_prompts_otherwise_are_refused_by_name(
    files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", tmp_path / "config.json"
    with monkeypatch.context() as patch:
        patch.setattr(expert_steer, "solve", interrupt_at(1, expert_steer.solve, []))
        assert run(fit_command(files, out)).exit_code == 130
    other.write_text(json.dumps({**CONFIG, "validation": 0.75}))
    with pytest.raises(ArgumentError, match=r"stopped/states holds .* another config.validation;"):
        run_and_raise(fit_command(files, out, "--config", str(other)))


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_that_is_sent_a_signal_ends_with_its_code_and_no_traceback(
    sent: signal.Signals, code: int, files: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """From outside, while the second text file of states is read: nothing of this process helps."""
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from expertsteer_lens.hosts import reading\n"
        "from expertsteer_lens.cli import main\n"
        "inner, calls = reading._read_batches, []\n"
        "def counted(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2:\n"
        "        print('READY', flush=True)\n"
        "        signal.pause()\n"
        "    return inner(*args)\n"
        "reading._read_batches = counted\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, *fit_command(files, tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line == "READY\n" for line in process.stdout)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "states of expert on pairs were read; what was finished is kept in" in err
    assert (tmp_path / "out/stopped/states/FinishedReadings/config.json").is_file()


def test_what_was_kept_is_removed_only_when_more_is_kept(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at the second stop: what was kept at the first is still there."""
    data = esl.load(whole / "fit").data
    less = readings.FinishedReadings({"expert on pairs": data.expert_pair_states})
    stopped, seen = Stopped(tmp_path / "out"), []

    def stop_with(thing: Any) -> None:
        with stopped.kept_as("states") as found:
            seen.append(found)
            raise Interrupted("stopped, which are kept", thing)

    def full(*args: Any, **kwargs: Any) -> None:
        raise ArtifactError("no room")

    with pytest.raises(Interrupted):
        stop_with(less)
    with monkeypatch.context() as patch:
        patch.setattr(io, "write_folder", full)
        with pytest.raises(ArtifactError, match="no room"):
            stop_with(data)
    with pytest.raises(Interrupted):
        stop_with(data)
    assert seen[0] is None
    assert [list(found.stores) for found in seen[1:]] == [["expert on pairs"]] * 2
    with stopped.kept_as("states") as found:
        assert found.n_anchors == data.n_anchors
    assert [p.name for p in (tmp_path / "out/stopped/states").iterdir()] == ["FitData"]


def test_a_stopped_capture_says_that_it_goes_on(
    files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expertsteer_lens.hosts import reading

    command = ["capture", "--model", EXPERT, "--pairs", str(files / "pairs.jsonl")]
    command += ["--host", "huggingface", "--out", str(tmp_path / "states")]
    with monkeypatch.context() as patch:
        patch.setattr(reading, "_read_batches", interrupt_at(1, reading._read_batches, []))
        result = run(command)
    assert result.exit_code == 130
    assert f"in {tmp_path / 'states'}, and the same command goes on" in result.stderr
    assert run(command).exit_code == 0
