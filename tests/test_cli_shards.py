"""A capture shared by several processes, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import EXPERT, refused, run
from test_states_folder import contents

import expertsteer_lens as esl
from expertsteer_lens.cli.options import parse_shard
from expertsteer_lens.errors import ArgumentError


@pytest.fixture
def capture(tmp_path: Path) -> list[object]:
    """A capture of few texts, in several passes."""
    pairs = esl.zoo.contrast_pairs(6)
    rows = zip(pairs.positive, pairs.negative, strict=True)
    lines = [json.dumps({"positive": p, "negative": n}) for p, n in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    (tmp_path / "anchors.txt").write_text("\n".join(esl.zoo.anchors(6)))
    texts = ["--pairs", tmp_path / "pairs.jsonl", "--anchors", tmp_path / "anchors.txt"]
    return ["capture", "--model", EXPERT, *texts, "--host", "huggingface", "--batch-size", 3]


def test_shards_are_merged_into_what_one_process_writes(capture, tmp_path, monkeypatch):
    one, many = tmp_path / "one", tmp_path / "many"
    assert run(*capture, "--out", one).exit_code == 0
    first = run(*capture, "--out", many, "--shard", "0/2")
    assert first.exit_code == 0, first.output
    assert f"{many}.shard-0-of-2" in first.output.replace("\n", "")
    assert not many.exists()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(*capture, "--out", many, "--shard", "auto").exit_code == 0
    merged = run("merge", many)
    assert merged.exit_code == 0, merged.output
    assert "n=18" in merged.output
    assert contents(many) == contents(one)


def test_a_merge_without_all_shards_names_the_one_that_is_missing(capture, tmp_path, capsys):
    assert run(*capture, "--out", tmp_path / "s", "--shard", "1/2").exit_code == 0
    line = refused(capsys, "merge", tmp_path / "s")
    assert line.startswith("ArtifactError: shards are missing: ")
    assert "s.shard-0-of-2" in line


@pytest.mark.parametrize("bad", ["2/2", "1", "a/2", "-1/2", "0/0", "1/²", "0/2/3", ""])
def test_a_share_that_is_none_is_refused_before_a_model_is_loaded(
    bad, capture, capsys, monkeypatch
):
    monkeypatch.setattr("expertsteer_lens.cli.options.ModelOptions.load", None)
    line = refused(capsys, *capture, f"--shard={bad}")
    assert line.startswith("ArgumentError: --shard must be I/N")
    with pytest.raises(ArgumentError, match="--shard must be I/N"):
        parse_shard(bad)
