"""What a user's type checker sees: a notebook's cell passes, and a misspelt name does not."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CELL = """\
from typing import assert_type

import torch

import expertsteer_lens as esl

model: object = object()
pairs = esl.ContrastPairs.from_lists(["a b", "c d"], ["e f", "g h"])
states = esl.capture(model, pairs.texts, labels=pairs.labels, positions="mean")
assert_type(states, esl.ActivationStore)
rfm = esl.fit_rfm(torch.randn(8, 4), torch.tensor([0, 1] * 4), esl.RFMConfig(n_rounds=1))
assert_type(rfm, esl.learn.RFM)
config = esl.ExpertSteerConfig(aligner=esl.AlignerConfig(kind="ridge"), reading="answer")
fit = esl.ExpertSteer(config).fit(model, model, pairs)
assert_type(fit, esl.pipeline.ExpertSteering)
plan = fit.plan(coefficient="auto")
assert_type(plan.with_coefficient(0.2), esl.SteeringPlan)
with plan.hooks(model) as report:
    assert_type(report, esl.steer.RunReport)
assert_type(esl.evaluate(plan, model, fit=fit).verdict, str)
esl.save(plan, "folder")
"""
MISSPELT = CELL.replace("esl.fit_rfm(", "esl.fit_rfn(")
WRONG = CELL.replace("n_rounds=1", 'n_rounds="one"')


def mypy(path: pathlib.Path) -> subprocess.CompletedProcess[str]:
    # With the project's settings, from its folder: what `make check` found out is not asked again.
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def pyright(path: pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "basedpyright", "--level", "error"]
    command += ["--pythonpath", sys.executable, str(path)]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("checker", [mypy, pyright])
def test_a_cell_is_checked_and_mistakes_are_found(checker, tmp_path):
    pytest.importorskip("basedpyright" if checker is pyright else "mypy")
    good = tmp_path / "cell.py"
    good.write_text(CELL)
    done = checker(good)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, cell, sign in (("misspelt", MISSPELT, "fit_rfn"), ("wrong", WRONG, "n_rounds")):
        bad = tmp_path / f"{name}.py"
        bad.write_text(cell)
        done = checker(bad)
        assert done.returncode != 0
        assert sign in done.stdout
