"""A capture shared by several processes is, once put together, the capture of one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_states_folder import HOOKS, LABELS, TEXTS, Died, capture, contents, dying, host  # noqa: F401

import expertsteer_lens as esl
from expertsteer_lens.data.states_shards import shard_folder, shard_of
from expertsteer_lens.errors import ArgumentError, ArtifactError


def shared(model_host, store: Path, of: int, **changes) -> list[esl.ActivationStore]:
    return [capture(model_host, store, shard=(i, of), **changes) for i in range(of)]


@pytest.mark.parametrize("of", [1, 2, 3])
@pytest.mark.parametrize("positions", ["last", "mean", "all"])
def test_the_whole_is_bit_for_bit_what_one_process_writes(host, tmp_path, positions, of):  # noqa: F811
    one = capture(host, tmp_path / "one", positions=positions)
    parts = shared(host, tmp_path / "many", of, positions=positions)
    assert sum(part.n for part in parts) == one.n
    assert sum(int((part.labels > 0).sum()) for part in parts) == int((one.labels > 0).sum())
    assert len({part.n for part in parts} | {one.n}) > 1 or of == 1
    merged = esl.ActivationStore.merge(tmp_path / "many")
    assert merged.provenance == one.provenance
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    again = esl.ActivationStore.merge(tmp_path / "many")  # nothing happens
    assert torch.equal(again[HOOKS[0]], one[HOOKS[0]])
    assert torch.equal(
        capture(host, tmp_path / "many", positions=positions)[HOOKS[1]], one[HOOKS[1]]
    )


def test_each_process_runs_its_own_passes_and_goes_on_where_it_was(host, tmp_path, monkeypatch):  # noqa: F811
    capture(host, tmp_path / "one")
    for number in range(2):
        with monkeypatch.context() as patch:
            dying(host, patch, 1)
            with pytest.raises(Died):
                capture(host, tmp_path / "many", shard=(number, 2))
        with pytest.raises(ArtifactError, match=r"shards are missing|is not complete; run the"):
            esl.ActivationStore.merge(tmp_path / "many")
        with monkeypatch.context() as patch:
            dying(host, patch, 1)  # four passes, two each, of which one is done
            capture(host, tmp_path / "many", shard=(number, 2))
    esl.ActivationStore.merge(tmp_path / "many")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_a_merge_that_died_goes_on(host, tmp_path, monkeypatch):  # noqa: F811
    from expertsteer_lens.data.states_writer import StatesWriter

    capture(host, tmp_path / "one")
    shared(host, tmp_path / "many", 2)
    write, written = StatesWriter.write, []

    def dies(self, number, states, norms):
        if len(written) == 2:
            raise Died
        written.append(number)
        write(self, number, states, norms)

    with monkeypatch.context() as patch:
        patch.setattr(StatesWriter, "write", dies)
        with pytest.raises(Died):
            esl.ActivationStore.merge(tmp_path / "many")
        assert written == [0, 1]
        written[:] = []
        esl.ActivationStore.merge(tmp_path / "many")
    assert written == [2, 3]
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_what_cannot_be_put_together_is_refused(host, tmp_path):  # noqa: F811
    store = tmp_path / "many"
    with pytest.raises(ArtifactError, match="there are no shards"):
        esl.ActivationStore.merge(store)
    capture(host, store, shard=(0, 2))
    with pytest.raises(ArtifactError, match=r"shards are missing: .*many\.shard-1-of-2"):
        esl.ActivationStore.merge(store)
    capture(host, store, shard=(1, 2), positions="last")
    with pytest.raises(ArtifactError, match=r"of different captures: their key, .* differ"):
        esl.ActivationStore.merge(store)
    shutil.rmtree(shard_folder(store, (1, 2)))
    with pytest.raises(ArtifactError, match="holds states of another capture"):
        capture(host, store, shard=(0, 2), positions="last")
    capture(host, store, shard=(1, 2))
    file = shard_folder(store, (1, 2)) / "states-001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="is damaged: its checksum differs"):
        esl.ActivationStore.merge(store)
    capture(host, store, shard=(0, 3))
    with pytest.raises(ArtifactError, match=r"shards of \[2, 3\] processes"):
        esl.ActivationStore.merge(store)


def test_shards_that_are_none_are_refused_before_the_model_is_run(host, tmp_path, monkeypatch):  # noqa: F811
    dying(host, monkeypatch, 0)
    for shard, message in (
        ((0, 5), "there are 4 batches to share; use fewer processes"),
        ((2, 2), r"shard=\(2, 2\) must be a process from 0 on"),
        ((-1, 2), "a process"),
        ("both", r"shard must be 'auto' or \(process, processes\)"),
        ((0.0, 2), "shard must be"),
    ):
        with pytest.raises(ArgumentError, match=message):
            capture(host, tmp_path / "s", shard=shard)
    with pytest.raises(ArgumentError, match="shard= goes with store="):
        capture(host, shard=(0, 2))
    assert list(tmp_path.iterdir()) == []


def test_what_a_launcher_says_is_read(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert shard_of("auto") is None
    assert shard_of(None) is None
    with monkeypatch.context() as mpi:
        mpi.setenv("OMPI_COMM_WORLD_RANK", "2")
        mpi.setenv("OMPI_COMM_WORLD_SIZE", "3")
        assert shard_of("auto") == (2, 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match="start with accelerate launch or torchrun"):
        shard_of("auto")
    monkeypatch.setenv("RANK", "1")
    assert shard_of("auto") == (1, 2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert shard_of("auto") is None


SCRIPT = """
import sys
import torch
import expertsteer_lens as esl

torch.set_num_threads(1)
expert = esl.zoo.load("expert", host="huggingface")
how = {"positions": "mean", "batch_size": 4, "store": sys.argv[1], "shard": "auto"}
esl.capture(expert, esl.zoo.anchors()[:24], **how)
"""


def test_two_processes_of_accelerate_launch(tmp_path):
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed")
    script, root = tmp_path / "read.py", Path(esl.__file__).parents[1]
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    # Its launcher of several processes; whether there are GPUs is for the model to know.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0"]
    for command, store in (([sys.executable], "one"), (launch, "two")):
        ran = subprocess.run(
            [*command, str(script), str(tmp_path / store)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
    assert not (tmp_path / "two").exists()
    esl.ActivationStore.merge(tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
