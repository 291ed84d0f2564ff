"""Stores of states in folders: what a kill, a full disk, a second writer or a flipped bit leaves."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file

import expertsteer_lens as esl
from expertsteer_lens._checked_json import digest_of
from expertsteer_lens.data import states_folder, states_writer
from expertsteer_lens.errors import ArgumentError, ArtifactError, DataError, HookNameError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.hosts.facts import probe_batch

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
WORDS = "the cat was happy and sad then they ran home with a friend in the snow"
TEXTS = [" ".join(WORDS.split(" ")[i % 5 : i % 5 + 2 + i % 7]) for i in range(12)]
LABELS = [1, 0] * 6


@pytest.fixture(scope="module")
def host():
    return as_host(models.hf("llama"), tokenizer=models.tokenizer())


def capture(host, path=None, **changes):
    settings = {"hook_names": HOOKS, "positions": "mean", "labels": LABELS, "batch_size": 3}
    return esl.capture(host.model, TEXTS, store=path, **{**settings, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


class Died(BaseException):
    """What a kill looks like from inside: no clean-up that we rely on."""


def dying(host, monkeypatch, after: int):
    """Let the model die in the pass after `after` others."""
    real, passes = type(host).read, []

    def read(self, *args, **kwargs):
        passes.append(1)
        if len(passes) > after:
            raise Died
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(host), "read", read)


@pytest.mark.parametrize("positions", ["last", "mean", "all", 1])
def test_a_store_in_a_folder_is_the_store_in_memory(host, tmp_path, positions):
    held = capture(host, positions=positions)
    there = capture(host, tmp_path / "states", positions=positions)
    assert there.hook_names == held.hook_names == HOOKS
    assert (there.n, there.d_model) == (held.n, held.d_model)
    assert there.provenance == held.provenance
    for store in (
        there,
        esl.ActivationStore.open(tmp_path / "states"),
        esl.load(tmp_path / "states"),
    ):
        assert store.labels.dtype == held.labels.dtype
        assert torch.equal(store.labels, held.labels)
        for name in HOOKS:
            assert torch.equal(store[name], held[name])
            assert store.median_norm(name) == held.median_norm(name)
    assert sorted(contents(tmp_path / "states")) == [
        "index.json",
        "states-000.safetensors",
        "states-001.safetensors",
    ]
    plain = load_file(tmp_path / "states" / "states-001.safetensors")
    assert torch.equal(plain["states"], held[HOOKS[1]])


def test_selected_rows_and_hook_points_are_read_when_they_are_asked_for(
    host, tmp_path, monkeypatch
):
    held, _ = capture(host), capture(host, tmp_path / "s")
    real, mapped = states_folder.map_file, []

    def watch(folder, file):
        mapped.append(file.hook_name)
        return real(folder, file)

    monkeypatch.setattr(states_folder, "map_file", watch)
    monkeypatch.chdir(tmp_path)
    # Not through ActivationStore: the types checked under test look into a mapping's values.
    states, _, _ = states_folder.open_folder(Path("s"))
    monkeypatch.chdir("/")  # the folder was given relative to another place
    rows = torch.tensor([5, 0, 5])
    part = states.only([HOOKS[1]]).select(rows).select(torch.tensor([True, False, True]))
    assert list(part.shapes.items()) == [(HOOKS[1], (2, held.d_model))]
    assert HOOKS[1] in part
    assert HOOKS[0] not in part
    assert mapped == []
    assert torch.equal(part[HOOKS[1]], held[HOOKS[1]][[5, 5]])
    assert part[HOOKS[1]] is part[HOOKS[1]]
    assert mapped == [HOOKS[1]]


def test_parts_of_a_store_in_a_folder_are_those_of_one_in_memory(host, tmp_path):
    held, store = capture(host), capture(host, tmp_path / "s")
    for s in (held, store):
        part = s.select([5, 0, -1], hook_names=[HOOKS[1]])
        assert part.hook_names == [HOOKS[1]]
        assert (part.n, part.labels.tolist()) == (3, [0, 1, 0])
        assert torch.equal(part[HOOKS[1]], held[HOOKS[1]][[5, 0, 11]])
        assert torch.equal(s.to(torch.float64)[HOOKS[0]], held[HOOKS[0]].double())
        with pytest.raises(HookNameError, match=r"blocks\.7.*an ActivationStore"):
            s.select(hook_names=["blocks.7.hook_resid_post"])
        with pytest.raises(ArgumentError, match="hook_names is empty"):
            s.select(hook_names=[])
        with pytest.raises(DataError, match=r"cannot be torch\.int32"):
            s.activations.to(torch.int32)[HOOKS[0]]
    with pytest.raises(DataError, match="holds NaN or Inf"):
        esl.ActivationStore({HOOKS[0]: 1e9 * held[HOOKS[0]]}).to(torch.float16)
    store[HOOKS[1]].zero_()  # what is written to mapped states stays in memory
    assert torch.equal(esl.ActivationStore.open(tmp_path / "s")[HOOKS[1]], held[HOOKS[1]])


@pytest.mark.parametrize("positions", ["last", "mean", "all"])
def test_a_capture_that_died_goes_on_and_becomes_what_it_would_have_been(
    host, tmp_path, monkeypatch, positions
):
    capture(host, tmp_path / "whole", positions=positions)
    for after in range(4):
        folder = tmp_path / f"died{after}"
        with monkeypatch.context() as patch:
            dying(host, patch, after)
            with pytest.raises(Died):
                capture(host, folder, positions=positions)
        with pytest.raises(ArtifactError, match=rf"not complete: {after} of 4 batches are there"):
            esl.ActivationStore.open(folder)
        with monkeypatch.context() as patch:
            dying(host, patch, 4 - after)  # so many passes are left, and no more are run
            capture(host, folder, positions=positions)
        assert contents(folder) == contents(tmp_path / "whole")


def test_a_complete_store_runs_no_model_and_may_be_read_only(host, tmp_path, monkeypatch):
    held, folder = capture(host, tmp_path / "s"), tmp_path / "s"
    dying(host, monkeypatch, 0)
    monkeypatch.setattr(states_writer, "hold", None)  # nothing is written, not even a lock
    assert torch.equal(capture(host, folder)[HOOKS[0]], held[HOOKS[0]])


def test_what_is_damaged_half_way_is_read_again(host, tmp_path, monkeypatch):
    capture(host, tmp_path / "whole")
    folder = tmp_path / "s"
    with monkeypatch.context() as patch:
        dying(host, patch, 3)
        with pytest.raises(Died):
            capture(host, folder)
    file = folder / "states-001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # of a norm that the first batch wrote, or of one that is not there yet
    row = json.loads((folder / "index.json").read_text())["batches"][0][0]
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    file.write_bytes(data)
    with (folder / "progress.jsonl").open("ab") as stream:  # a line that a kill cut off
        stream.write(b'{"batch": 3, "sha2')
    capture(host, folder)
    assert row < len(TEXTS)
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"positions": "last"}, "positions"),
        ({"hook_names": HOOKS[:1]}, "hook_names"),
        ({"labels": [0, 1] * 6}, "labels"),
        ({"prepend_bos": False}, "prepend_bos and tokens"),
        ({"spans": [(0, 7)] * 12}, "spans"),
    ],
)
def test_another_capture_is_refused_and_what_differs_is_named(host, tmp_path, changes, name):
    capture(host, tmp_path / "s")
    before = contents(tmp_path / "s")
    with pytest.raises(
        ArtifactError, match=f"holds states of another capture: its {name} (is|are)"
    ):
        capture(host, tmp_path / "s", **changes)
    assert contents(tmp_path / "s") == before


def test_other_texts_and_other_weights_are_refused(host, tmp_path):
    capture(host, tmp_path / "s")
    with pytest.raises(ArtifactError, match=r"its texts_digest and tokens are not"):
        esl.capture(
            host.model, [*TEXTS[:-1], "a boy ran"], HOOKS, positions="mean", labels=LABELS,
            batch_size=3, store=tmp_path / "s",
        )  # fmt: skip
    other = as_host(models.hf("llama", seed=1), tokenizer=models.tokenizer())
    with pytest.raises(ArtifactError, match="its fingerprint is not what this one asks for"):
        capture(other, tmp_path / "s")


def token_that_only_texts_have(host) -> int:
    """One that the fingerprint is not measured on."""
    probe = set(probe_batch(host).input_ids.flatten().tolist())
    tokens = host.tokenize(TEXTS)
    shown = tokens.input_ids[tokens.attention_mask.bool()].tolist()
    return next(token for token in shown if token not in probe)


@pytest.mark.parametrize("complete", [True, False])
def test_weights_that_differ_in_one_token_are_refused(tmp_path, monkeypatch, complete):
    model = models.hf("llama")
    host = as_host(model, tokenizer=models.tokenizer())
    with monkeypatch.context() as patch:
        dying(host, patch, 9 if complete else 1)
        with pytest.raises(Died) if not complete else contextlib.nullcontext():
            capture(host, tmp_path / "s")
    before, fingerprint = contents(tmp_path / "s"), host.fingerprint
    with torch.no_grad():
        model.get_input_embeddings().weight[token_that_only_texts_have(host)] += 1.0
    assert host.fingerprint == fingerprint
    with pytest.raises(ArtifactError, match=r"^store=.* another capture: its weights is not"):
        capture(host, tmp_path / "s")
    assert contents(tmp_path / "s") == before


def test_a_store_that_does_not_know_its_weights_is_taken_by_the_fingerprint(host, tmp_path):
    held = capture(host, tmp_path / "s")
    file = tmp_path / "s" / "index.json"
    index = json.loads(file.read_text())
    for name in ("weights", "ends", "autocast"):
        del index["key"][name]
    index["content_sha256"] = digest_of(index)
    file.write_text(json.dumps(index))
    assert torch.equal(capture(host, tmp_path / "s")[HOOKS[0]], held[HOOKS[0]])


@pytest.mark.parametrize("first", [True, False])
def test_ends_of_tokens_are_not_left_out_and_not_added(host, tmp_path, first):
    capture(host, tmp_path / "s", positions="all", ends=first)
    with pytest.raises(
        ArtifactError, match=rf"its ends is not .*\(ends: {first} there, {not first}"
    ):
        capture(host, tmp_path / "s", positions="all", ends=not first)


def test_a_share_is_not_taken_for_the_whole(host, tmp_path):
    capture(host, tmp_path / "s", shard=(0, 2))
    with pytest.raises(ArtifactError, match=r"its shard is not .*\(shard: \[0, 2\] there, None"):
        capture(host, tmp_path / "s.shard-0-of-2")


def test_another_arithmetic_is_refused_where_a_capture_goes_on(host, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        dying(host, patch, 1)
        with pytest.raises(Died):
            capture(host, tmp_path / "s")
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ArtifactError, match=r"its autocast is not .*None there, bfloat16 here"):
            capture(host, tmp_path / "s")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    with pytest.raises(ArtifactError, match=r"begun with another matmul_precision \(matmul_prec"):
        capture(host, tmp_path / "s")
    monkeypatch.undo()
    monkeypatch.setattr(host.model.config, "_attn_implementation_internal", "sdpa")
    with pytest.raises(ArtifactError, match=r"begun with another attention \(attention: eager"):
        capture(host, tmp_path / "s")
    monkeypatch.undo()
    capture(host, tmp_path / "s")


@pytest.mark.parametrize("name", ["progress.jsonl", "states-000.safetensors", "index.json"])
def test_nothing_is_written_through_a_link(host, tmp_path, monkeypatch, name):
    with monkeypatch.context() as patch:
        dying(host, patch, 1)
        with pytest.raises(Died):
            capture(host, tmp_path / "s")
    outside, file = tmp_path / "outside", tmp_path / "s" / name
    file.rename(outside)
    file.symlink_to(outside)
    before = outside.read_bytes()
    with pytest.raises(ArtifactError, match=rf"its {name} is a link, through which a file outside"):
        capture(host, tmp_path / "s")
    assert outside.read_bytes() == before


def test_a_capture_killed_at_its_end_leaves_nothing_for_good(host, tmp_path):
    capture(host, tmp_path / "s")
    wanted = contents(tmp_path / "s")
    for name in ("progress.jsonl", ".capture.expertsteer-lock", ".index.expertsteer-new.json"):
        (tmp_path / "s" / name).write_text("")
    capture(host, tmp_path / "s")
    assert contents(tmp_path / "s") == wanted


def test_batches_must_be_the_same_where_it_goes_on_and_need_not_be_where_it_is_complete(
    host, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        dying(host, patch, 1)
        with pytest.raises(Died):
            capture(host, tmp_path / "s")
    with pytest.raises(
        ArtifactError, match=r"begun with another batch_size \(batch_size: 3 there, 4"
    ):
        capture(host, tmp_path / "s", batch_size=4)
    with pytest.raises(ArtifactError, match=r"begun with another tokens_per_pass"):
        capture(host, tmp_path / "s", tokens_per_pass=4)
    capture(host, tmp_path / "s")
    capture(host, tmp_path / "s", batch_size=4)


def test_two_writers_on_one_path_are_refused_by_name(host, tmp_path, monkeypatch):
    from expertsteer_lens._atomic import hold

    with hold(tmp_path / "s" / "capture", ""):
        with pytest.raises(
            ArtifactError, match=r"is being written by another process; wait for it"
        ):
            capture(host, tmp_path / "s")
    capture(host, tmp_path / "s")


def test_a_place_with_other_things_is_refused_and_left_alone(host, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"has files in it \(notes.txt\)"):
        capture(host, tmp_path)
    with pytest.raises(ArtifactError, match="is a file; give a folder"):
        capture(host, tmp_path / "notes.txt")
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_save_does_not_replace_a_store(host, tmp_path):
    store = capture(host, tmp_path / "s")
    with pytest.raises(ArtifactError, match="is not a saved plan or result of this kind"):
        esl.save(store, tmp_path / "s")
    saved = esl.load(esl.save(store, tmp_path / "copy"))
    assert torch.equal(saved[HOOKS[1]], store[HOOKS[1]])


class TestDisks:
    """No room and no permission, at every step; a stand-in for a small disk, which a test may not
    mount."""

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
    @pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "open", "fsync", "replace"])
    def test_an_error_at_any_step_is_ours_and_what_was_there_stays(
        self, host, tmp_path, monkeypatch, call, code
    ):
        if not hasattr(os, call):
            pytest.skip(f"os.{call} is not on this system")
        capture(host, tmp_path / "whole")
        real, folder = getattr(os, call), tmp_path / "s"
        for at in (0, 1, 2, 9):
            calls = []

            def failing(*args, calls=calls, at=at, **kwargs):
                calls.append(1)
                if len(calls) > at:
                    raise OSError(code, os.strerror(code))
                return real(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(os, call, failing)
                message = ""
                try:
                    capture(host, folder)
                except ArtifactError as error:
                    message = str(error)
            assert not message or os.strerror(code) in message
            assert not message or "as they were" in message or "as it was" in message
            assert message or len(calls) <= at or call == "open"
            capture(host, folder)
            assert contents(folder) == contents(tmp_path / "whole")

    def test_a_disk_without_the_room_says_so_before_the_second_pass(
        self, host, tmp_path, monkeypatch
    ):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        dying(host, monkeypatch, 1)
        with pytest.raises(ArtifactError, match=r"Make room on the disk.*No space left"):
            capture(host, tmp_path / "s")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_read_only_folder(self, host, tmp_path):
        (tmp_path / "s").mkdir()
        (tmp_path / "s").chmod(0o500)
        with pytest.raises(ArtifactError, match="could not be written"):
            capture(host, tmp_path / "s")


class TestDamage:
    @pytest.fixture
    def folder(self, host, tmp_path):
        capture(host, tmp_path / "s")
        return tmp_path / "s"

    def test_a_flipped_bit_is_noticed_when_its_hook_point_is_asked_for(self, folder):
        file = folder / "states-001.safetensors"
        data = bytearray(file.read_bytes())
        data[1000] ^= 1
        file.write_bytes(data)
        store = esl.ActivationStore.open(folder)
        assert store[HOOKS[0]].shape[0] == 12
        with pytest.raises(ArtifactError, match=r"states-001.*damaged: its checksum differs"):
            store[HOOKS[1]]
        assert esl.ActivationStore.open(folder, check=False)[HOOKS[1]].shape[0] == 12

    def test_a_file_of_another_size_or_header_is_noticed_at_once(self, folder):
        file = folder / "states-000.safetensors"
        whole = file.read_bytes()
        for data in (whole[:-1], whole + b"\0", b"x" + whole[1:], b""):
            file.write_bytes(data)
            with pytest.raises(ArtifactError, match=r"is damaged: it is not the float32 matrix"):
                esl.ActivationStore.open(folder)
        file.unlink()
        with pytest.raises(ArtifactError, match=r"incomplete: states-000.* is missing"):
            esl.ActivationStore.open(folder)

    def test_an_index_that_was_changed_is_noticed(self, folder):
        file = folder / "index.json"
        text = file.read_text()
        file.write_text(text.replace('"positions": "mean"', '"positions": "last"'))
        with pytest.raises(ArtifactError, match="does not match its content_sha256"):
            esl.ActivationStore.open(folder)
        file.write_text(text.replace('"format_version": 1', '"format_version": 2'))
        with pytest.raises(ArtifactError, match="format_version 2, this package reads 1"):
            esl.load(folder)
        file.write_text(text.replace('"expertsteer_lens states"', '"states"'))
        with pytest.raises(ArtifactError, match=r"index\.json is no index of states"):
            esl.ActivationStore.open(folder)
        file.write_text("{")
        with pytest.raises(ArtifactError, match="is damaged"):
            esl.ActivationStore.open(folder)
        file.unlink()
        with pytest.raises(ArtifactError, match=r"index\.json is missing"):
            esl.ActivationStore.open(folder)

    def test_an_index_with_a_true_checksum_and_wrong_types_is_a_named_error(self, folder):
        file = folder / "index.json"
        index = json.loads(file.read_text())
        for key in ("key", "widths", "n_rows", "n_norms", "labels", "sha256", "provenance"):
            for value in (0, "x", [1], {"dtype": "float33", "values": [1]}, -1, 2**70, True):
                changed = {**index, key: value}
                if key == "provenance" and isinstance(value, dict):
                    continue  # of whatever the writer knew
                changed["content_sha256"] = digest_of(changed)
                file.write_text(json.dumps(changed))
                with pytest.raises((ArtifactError, DataError)):
                    esl.ActivationStore.open(folder)


def test_a_fit_takes_a_store_in_a_folder_for_the_expert(tmp_path):
    expert, target = esl.zoo.load_pair(host="huggingface")
    pairs, anchors = esl.zoo.contrast_pairs(8), esl.zoo.anchors(20)
    steps = esl.ExpertSteer(
        esl.ExpertSteerConfig(
            mi=esl.MIConfig(n_permutations=2, n_bootstrap=10, n_components=4),
            pairing=esl.PairingConfig(n_candidates=3),
            rfm=esl.RFMConfig(bandwidth=(1.0,), n_rounds=2),
        )
    )
    held = steps.capture(expert, pairs, anchors=anchors)
    there = steps.capture(expert, pairs, anchors=anchors, store=tmp_path / "s")
    fits = [
        steps.fit(s, target, pairs, anchors=anchors, behaviour=esl.zoo.behaviour(8), progress=False)
        for s in (held, there)
    ]
    key = next(iter(fits[0].rfms))
    assert torch.equal(fits[0].direction(*key), fits[1].direction(*key))
    again = esl.load(esl.save(fits[1], tmp_path / "fit"))
    assert torch.equal(again.direction(*key), fits[0].direction(*key))


SERVER = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)  # a process with threads cannot be forked
import models, expertsteer_lens as esl
from expertsteer_lens.hosts import as_host
host = as_host(models.hf("llama"), tokenizer=models.tokenizer())
words = "the cat was happy and sad then they ran home with a friend in the snow".split()
texts = [" ".join(words[(i + j) % 15] for j in range(1 + i % 19)) for i in range(80)]
host.fingerprint, host.basis
for line in sys.stdin:
    path, seconds = line.split()
    began, child = time.perf_counter(), os.fork()
    if child == 0:
        esl.capture(host.model, texts, positions="mean", batch_size=2, store=path)
        os._exit(0)
    if float(seconds) >= 0:
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(status, time.perf_counter() - began, flush=True)
"""
"""Captures in processes of their own, each killed after so many seconds; a negative number: not."""


def n_there(folder: Path) -> int:
    file = folder / "progress.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill_captures(folder: Path, n: int, seed: int) -> tuple[int, int]:
    """Kill captures `n` times at random moments and see that each goes on where it was, and in the
    end is what it would have been. Returns the kills that met a capture under way, and those of
    them that found batches on the disk."""
    root = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root.parent)])}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )

    def run(path: Path, seconds: float) -> tuple[int, float]:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(f"{path} {seconds}\n")
        server.stdin.flush()
        status, took = server.stdout.readline().split()
        return int(status), float(took)

    draw, met, with_batches, number = random.Random(seed), 0, 0, 0
    status, whole = run(folder / "whole", -1)
    assert status == 0
    wanted = contents(folder / "whole")
    while met < n:
        path, status = folder / f"killed{number}", signal.SIGKILL
        number += 1
        while status == signal.SIGKILL:
            before = n_there(path)
            status, _ = run(path, draw.uniform(0.0, whole) if met < n else -1)
            if status == signal.SIGKILL:
                met += 1
                with_batches += n_there(path) > 0
                # All but the batch in flight is kept, of this run and of those before.
                assert n_there(path) >= before or not (path / "progress.jsonl").exists()
        assert status == 0
        assert contents(path) == wanted
    assert server.stdin is not None
    server.stdin.close()
    server.wait()
    assert server.stdout is not None
    server.stdout.close()
    return met, with_batches


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked to be killed")
def test_kill_9_at_random_moments(tmp_path):
    n = int(os.environ.get("KILLS", "4"))
    met, with_batches = kill_captures(tmp_path, n, seed=0)
    print(f"{met} captures killed, {with_batches} of them with batches on the disk")
    assert met == n
    assert with_batches > 0
