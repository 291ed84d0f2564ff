"""Files that were found to be read wrongly: each is refused by name (`benchmarks/hostile_files.py`
finds them)."""

from __future__ import annotations

import json
import os
import pickle
import signal
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import results
import torch

import expertsteer_lens as esl
from expertsteer_lens._checked_json import digest_of
from expertsteer_lens.benchmarks import public
from expertsteer_lens.benchmarks.transfer.real import _read_worked
from expertsteer_lens.benchmarks.transfer.tasks import (
    TransferTask,
    read_field,
    read_styles,
    read_truthfulqa,
)
from expertsteer_lens.cli.inputs import read_config, read_texts
from expertsteer_lens.errors import ArtifactError, DataError

READERS = {
    "pairs": esl.data.ContrastPairs.from_jsonl,
    "behaviour": esl.data.Behaviour.from_json,
    "texts": read_texts,
    "settings": lambda path: read_config(path, "anchored"),
    "benchmark": lambda path: public.load("mmlu_anatomy", path=path),
}


class Runs:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return esl.save(results.evaluation(), tmp_path / "it")


@pytest.mark.parametrize("kind", sorted(READERS))
def test_a_file_that_is_none_is_named_and_never_waited_for(kind, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for name in ("pipe", "zero", "folder", "loop", "nothing"):
        with pytest.raises(DataError, match=r"is no file|is not a file|cannot be read"):
            READERS[kind](tmp_path / f"{name}.jsonl")


@contextmanager
def waiting_is_an_error():
    """A file that is waited for, or read for ever, ends the block after some seconds."""

    def over(*_: object) -> None:
        raise TimeoutError("waited for a file that is none")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, 30.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["index.json", "progress.jsonl", "states-000.safetensors"])
def test_a_part_of_a_states_folder_that_is_no_file_is_never_waited_for(name, tmp_path):
    """Mutations 9079 and 9972 of seed 0: `index.json` led to /dev/zero, and was read for ever."""
    host = esl.zoo.load("target", host="huggingface")
    hooks, texts = ["blocks.1.hook_resid_post"], ["A dog.", "A cat."]
    store = tmp_path / "states"
    esl.capture(host, texts, hooks, store=store, positions="last")
    whole = (store / "index.json").read_text()
    if name == "progress.jsonl":  # is read where the store is not complete
        index = json.loads(whole)
        index["complete"] = False
        index["content_sha256"] = digest_of(index)
        (store / "index.json").write_text(json.dumps(index))
    (store / name).unlink(missing_ok=True)
    os.mkfifo(store / name)
    for read in (esl.load, esl.ActivationStore.open):
        with waiting_is_an_error(), pytest.raises(ArtifactError):
            read(store)


def test_a_task_that_is_no_file_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "task.json")
    with waiting_is_an_error(), pytest.raises(DataError, match="is no file"):
        TransferTask.from_json(tmp_path / "task.json")


REAL_DATA = {
    "pairs/llama8b/3201-a.jsonl": lambda folder: read_field(folder, "3201"),
    "benchmark/3201-a.json": lambda folder: read_field(folder, "3201"),
    "gsm8k/test.jsonl": lambda folder: _read_worked(folder / "gsm8k/test.jsonl"),
    "formality.jsonl": lambda folder: read_styles(folder / "formality.jsonl", "f", n_pairs=2),
    "TruthfulQA.csv": lambda folder: read_truthfulqa(
        folder / "TruthfulQA.csv", n_pairs=2, n_tests=2
    ),
}


@pytest.mark.parametrize("kind", ["pipe", "folder", "nothing readable"])
@pytest.mark.parametrize("name", REAL_DATA)
def test_data_of_real_tasks_that_are_no_file_are_never_waited_for(name, kind, tmp_path):
    for each in REAL_DATA:
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).write_text("{}\n")
    (tmp_path / name).unlink()
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(b"\xff\xfe{}")
    with waiting_is_an_error(), pytest.raises(DataError, match=r"is no file|is not UTF-8 text"):
        REAL_DATA[name](tmp_path)


def test_a_line_of_a_real_task_that_is_no_json_is_named(tmp_path):
    (tmp_path / "style.jsonl").write_text('{"prompt": "a"\n')
    with pytest.raises(DataError, match=r"style\.jsonl is not JSON"):
        read_styles(tmp_path / "style.jsonl", "style", n_pairs=2)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that fails when read")
@pytest.mark.parametrize("name", ["config.json", "tensors.safetensors"])
def test_a_file_that_fails_when_it_is_read_is_named(saved, name):
    (saved / name).unlink()
    (saved / name).symlink_to("/proc/self/mem")
    with pytest.raises(ArtifactError, match="cannot be read"):
        esl.load(saved)


def test_a_number_that_no_computer_has_is_named(saved):
    file = saved / "config.json"
    text = file.read_text()
    for raw in ("1e999", "-1e999", "NaN", "1" * 5000):
        file.write_text(text.replace('"budget": 0.1', f'"budget": {raw}', 1))
        assert raw in file.read_text()
        with pytest.raises(ArtifactError, match="is damaged"):
            esl.load(saved)


@pytest.mark.parametrize("answer", [{"a": 1}, [0], "²", "9" * 5000, None])
def test_an_answer_of_a_benchmark_that_is_none(answer, tmp_path):
    rows = [{"question": f"{i}?", "choices": ["a", "b"], "answer": answer} for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError, match=r"row 0"):
        public.load("mmlu_anatomy", path=tmp_path / "a.jsonl")


@pytest.mark.parametrize("ending", ["csv", "parquet", "json", "jsonl"])
def test_a_table_that_is_none(ending, tmp_path):
    file = tmp_path / f"a.{ending}"
    for content in (
        b"",
        b"\0\xff\xfe",
        b'a,b\n"',
        b"PAR1\0\0\0\0PAR1",
        b"[" * 10**5,
        b"3",
        b"\xff",
    ):
        file.write_bytes(content)
        with pytest.raises(DataError):
            public.load("mmlu_anatomy", path=file)


def test_a_damaged_file_of_torch_save_is_named_whatever_it_raises(tmp_path):
    file = tmp_path / "a.pt"
    torch.save({1: torch.ones(8), 2: torch.ones(8)}, file)
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = next(n for n in parts if n.endswith("data.pkl"))
    found = set()
    for at in range(2, len(parts[name]), 3):
        damaged = bytearray(parts[name])
        damaged[at] ^= 4
        with zipfile.ZipFile(file, "w") as archive:
            for part, content in parts.items():
                archive.writestr(part, bytes(damaged) if part == name else content)
        try:
            esl.SteeringPlan.from_foreign(file)
        except esl.errors.ExpertSteerError as error:
            found.add(type(error.__cause__).__name__)
    assert len(found) > 2  # it fails in many ways, all of them named


@pytest.mark.parametrize("ending", ["pt", "safetensors", "gguf"])
def test_a_pickle_in_disguise_runs_nothing(ending, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    file = tmp_path / f"a.{ending}"
    file.write_bytes(pickle.dumps(Runs()))
    with pytest.raises(ArtifactError):
        esl.SteeringPlan.from_foreign(file)
    assert ran == []
