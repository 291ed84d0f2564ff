"""Progress bars are seen where they are asked for, or where somebody can see them."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from expertsteer_lens import _progress
from expertsteer_lens._progress import Step, is_shown, progress_bar


@pytest.mark.parametrize("terminal", [True, False])
def test_without_a_wish_a_bar_is_shown_on_a_terminal_only(monkeypatch, terminal):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert is_shown(None) is terminal
    assert is_shown(True) is True
    assert is_shown(False) is False


@pytest.mark.parametrize("progress", [True, False, None])
def test_the_environment_overrules(monkeypatch, progress):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert not is_shown(progress)
    monkeypatch.setenv("TQDM_DISABLE", "0")
    assert is_shown(progress) is (progress is not False)


@pytest.mark.parametrize("progress", [True, False, None])
def test_nothing_is_lost_on_the_way(monkeypatch, capsys, progress):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert list(progress_bar(range(5), "counting", progress=progress)) == list(range(5))
    assert ("counting" in capsys.readouterr().err) is bool(progress)


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when told."""
    time = SimpleNamespace(now=0.0)
    monkeypatch.setattr(_progress.time, "perf_counter", lambda: time.now)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    return time


def test_a_log_has_one_line_a_step_and_none_of_the_steps_inside(capsys, clock):
    for _ in progress_bar([1, 2], "outer", progress=True, unit="batch"):
        clock.now += 2
        assert list(progress_bar([1], "inner", progress=True)) == [1]
    assert capsys.readouterr().err == "outer: 2 batches in 4.0 s\n"


@pytest.mark.parametrize(("seconds", "is_said"), [(5, False), (7, True)])
def test_what_takes_more_than_a_minute_says_what_it_costs(capsys, clock, seconds, is_said):
    for _ in progress_bar(range(10), "read", progress=True, unit="batch", cost="800 tokens"):
        clock.now += seconds
    line = "read: 10 batches, about 1 min 10 s; 800 tokens\n"
    assert (line in capsys.readouterr().err) is is_said


def test_who_stops_a_step_is_told_how_far_it_was(capsys, clock):
    def stopped():
        with Step("read", total=3, progress=True) as step:
            step.advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert capsys.readouterr().err == "read: stopped after 1 of 3 (0.0 s)\n"
    assert _progress._open == []


def test_on_a_terminal_it_is_a_bar_and_no_line(monkeypatch, capsys, clock):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress_bar([1, 2], "counting", progress=None)) == [1, 2]
    err = capsys.readouterr().err
    assert "counting:   0%" in err
    assert "items in" not in err


def test_a_model_is_loaded_into_a_log_without_the_loaders_bars():
    """In a process of its own: the loader's bars would write to the standard error it began with."""
    from expertsteer_lens import zoo

    code = (
        "import sys, expertsteer_lens as esl\n"
        f"esl.load_model({str(zoo.model_path('target'))!r}, host='huggingface')\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "it/s" not in done.stderr


def test_the_steps_of_a_fit_that_run_models_say_what_they_cost(monkeypatch, capsys):
    import expertsteer_lens as esl

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(_progress, "LONG", 0.0)
    expert, target = esl.zoo.load_pair(host="huggingface")
    config = esl.ExpertSteerConfig(
        mi=esl.MIConfig(n_permutations=2, n_bootstrap=5, n_components=4),
        rfm=esl.RFMConfig(bandwidth=1.0, validation_fraction=0.0, n_rounds=1),
        pairing=esl.PairingConfig(n_candidates=1, n_layers=1),
    )
    esl.ExpertSteer(config).fit(
        expert,
        target,
        esl.zoo.contrast_pairs(n=12),
        anchors=esl.zoo.anchors(n=30),
        behaviour=esl.zoo.behaviour(n=8),
        progress=True,
    )
    announced = [line for line in capsys.readouterr().err.splitlines() if ", about " in line]
    for step, cost in (
        ("capture", " tokens, "),
        ("attribution", "4 prompts with their completions"),
        ("token pairs", "texts through 2 models"),
    ):
        lines = [line for line in announced if line.startswith(f"{step}: ")]
        assert lines, step
        assert all(cost in line.partition("; ")[2] for line in lines)
