"""Progress bars are seen where they are asked for, or where somebody can see them."""

from __future__ import annotations

import sys

import pytest

from expertsteer_lens._progress import is_shown, progress_bar


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
