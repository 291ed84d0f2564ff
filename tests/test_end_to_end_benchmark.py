"""The benchmark of a whole fit at the size of 8B models runs, in small, on a CPU."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location(
            "end_to_end_8b", ROOT / "benchmarks" / "end_to_end_8b.py"
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["end_to_end_8b"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(), reason="reads the memory of each step there"
)
@pytest.mark.parametrize("options", [["--token-pairs"], ["--dtype", "float32", "--no-strength"]])
def test_every_step_of_a_small_fit_is_measured(script, options, tmp_path):
    few = ["--pairs", "6", "--anchors", "24", "--prompts", "4", "--host", "huggingface"]
    text = script.main(["--small", *few, *options, "--output", str(tmp_path / "out.md")])
    assert (tmp_path / "out.md").read_text(encoding="utf-8") == text + "\n"
    rows = dict(re.findall(r"^\| ([a-z ]+) \| ([\d.]+) \|", text, re.MULTILINE))
    steps = {"models made", "capture", "attribute", "anchors", "pair", "align", "learn", "strength"}
    assert steps <= set(rows)
    assert 0.0 < float(rows["capture"]) < 600.0
    assert (
        f"`python benchmarks/end_to_end_8b.py --{'dtype' if len(options) == 3 else 'host'}" in text
    )
    assert "12 labelled texts, 24 anchors, 4 prompts" in text


def test_the_shapes_are_those_of_8b_models(script):
    for shape in (script.EXPERT, script.TARGET):
        kv = shape.d * shape.kv_heads // shape.heads
        block = 2 * shape.d * (shape.d + kv) + 3 * shape.d * shape.d_ff
        assert shape.layers * block + 2 * shape.vocab * shape.d == pytest.approx(
            shape.params, rel=0.03
        )
    assert (script.EXPERT.layers, script.TARGET.layers) == (32, 28)
    size = script.Texts()
    assert (2 * size.pairs, size.anchors) == (512, 1024)
