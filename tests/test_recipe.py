"""The recipe for large models says what the cost model says, and its commands exist."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
import shlex
from dataclasses import replace

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipe_8b.md"


@pytest.fixture(scope="module")
def cost():
    import sys

    spec = importlib.util.spec_from_file_location("cost_8b", ROOT / "benchmarks" / "cost_8b.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cost_8b"] = module
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_page_are_those_of_the_script(cost):
    shown = (
        PAGE.read_text(encoding="utf-8").split("<!-- cost -->\n")[1].split("\n<!-- /cost -->")[0]
    )
    assert shown == cost.tables()


def test_the_numbers_in_the_prose_follow_from_the_model(cost):
    text = PAGE.read_text(encoding="utf-8")

    def attribution(batch):
        rows = cost.memory(replace(cost.Work(), batch=batch), cost.EXPERT, cost.TARGET)
        return sum(v for what, _, v in rows if "attribution" in what) / cost.GIB

    assert (
        f"At 4 it needs {attribution(4):.0f} GiB instead of {attribution(16):.0f}, at 128 it would "
        f"need {attribution(128):.0f} GiB" in text
    )
    grid = cost.EXPERT.layers * (cost.TARGET.layers - 2)
    assert (
        f"{grid * 2.96 / 60:.0f} minutes of CPU time for the whole grid instead of "
        f"{grid * 0.61 / 60:.0f}" in text
    )
    assert f"{8 * 4096 * 8192 / 1e6:.0f} MB, and {cost.TARGET.layers - 2 + 32} of them" in text


def test_the_defaults_in_the_model_are_the_packages(cost):
    import inspect

    import expertsteer_lens as esl
    from expertsteer_lens.measure.metrics import default_batch
    from expertsteer_lens.measure.strengths import CURVE
    from expertsteer_lens.pipeline.read_models import COMPARED

    work, config = cost.Work(), esl.ExpertSteerConfig()
    assert (work.batch, work.held_out) == (config.batch_size, config.held_out)
    assert work.candidates == config.pairing.n_candidates
    assert work.compared == COMPARED
    assert work.curve == 3 + len(CURVE)
    assert work.metric_batch == default_batch(cost.TARGET.vocab)
    defaults = inspect.signature(esl.evaluate).parameters
    assert (work.n_random, work.n_shuffles) == (
        defaults["n_random"].default,
        defaults["n_shuffles"].default,
    )


def test_costs_grow_as_the_formulas_say(cost):
    work = cost.Work()
    for what, _, value in cost.memory(
        replace(work, batch=2 * work.batch), cost.EXPERT, cost.TARGET
    ):
        before = next(v for w, _, v in cost.memory(work, cost.EXPERT, cost.TARGET) if w == what)
        assert value == pytest.approx(before * (2 if "attribution" in what else 1))
    twice = replace(cost.Machine(), gpu_flops=2 * cost.Machine().gpu_flops)
    for fast, slow in zip(
        cost.seconds(work, cost.EXPERT, cost.TARGET, twice),
        cost.seconds(work, cost.EXPERT, cost.TARGET, cost.Machine()),
        strict=True,
    ):
        assert slow[2] / fast[2] == pytest.approx(2 if "GPU" in slow[0] else 1)


def test_the_memory_of_a_map_is_what_a_map_holds(cost):
    """`8 rank (d_e + d_t)` bytes for encoder and decoder, on a small fit."""
    import torch

    from expertsteer_lens.align import AlignerConfig, fit_aligner

    generator = torch.Generator().manual_seed(0)
    found = fit_aligner(
        torch.randn(20, 64, generator=generator),
        torch.randn(20, 48, generator=generator),
        AlignerConfig(kind="anchored_autoencoder"),
    )
    size = sum(
        f.numel() * f.element_size() for m in (found.encoder, found.decoder) for f in m.factors
    )
    assert size == 8 * 19 * (64 + 48)


def test_every_command_of_the_page_parses():
    from typer.main import get_command

    from expertsteer_lens.cli import app as cli

    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    lines = [
        line
        for block in blocks
        for line in block.splitlines()
        if line.startswith("expertsteer-lens ")
    ]
    assert len(lines) >= 3
    for line in lines:
        _, command, *arguments = shlex.split(line)
        get_command(cli.app).commands[command].make_context(command, arguments)


def test_the_settings_of_the_page_are_read(tmp_path):
    from expertsteer_lens.cli import inputs

    found = re.search(r"holding `(\{.*?\})`", PAGE.read_text(encoding="utf-8"))
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(json.loads(found.group(1))))
    assert inputs.read_config(path, "anchored").batch_size == 4


def test_what_is_stored_for_a_backward_pass_is_within_a_quarter_of_the_formula(cost):
    found, formula = cost.measure_saved(60)
    assert 0.75 < found / formula <= 1.0
