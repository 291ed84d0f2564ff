"""Writers that die, fail or meet: the old or the new is always there, and nothing of others goes."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError, ArtifactError

SYSTEM_CALLS = ("rename", "replace", "rmdir", "unlink", "mkdir", "fsync")


class Killed(BaseException):
    """A process that dies runs no clean-up: every later call fails as well."""


def states(value: float) -> esl.ActivationStore:
    return esl.ActivationStore({"blocks.0.hook_resid_post": torch.full((2, 3), value)})


def value_of(folder: Path) -> float:
    return float(esl.load(folder)["blocks.0.hook_resid_post"][0, 0])


def failing(patch: pytest.MonkeyPatch, at: int, error: BaseException, *, ever: bool) -> list[str]:
    """Let the call number `at` to the operating system raise, or it and all after it; returns the
    calls that were made."""
    calls: list[str] = []

    def wrap(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == at or (ever and len(calls) > at):
                raise error
            return real(*args, **kwargs)

        return call

    for name in SYSTEM_CALLS:
        patch.setattr(os, name, wrap(name))
    return calls


def number_of_calls(folder: Path) -> int:
    esl.save(states(1.0), folder)
    with pytest.MonkeyPatch.context() as patch:
        calls = failing(patch, -1, Killed(), ever=False)
        esl.save(states(2.0), folder)
    return len(calls)


def test_killed_at_any_step_the_old_or_the_new_loads_and_the_next_save_clears_up(tmp_path):
    n_calls = number_of_calls(tmp_path / "counted")
    assert n_calls > 3
    found = []
    for step in range(1, n_calls + 1):
        folder = tmp_path / str(step) / "states"
        esl.save(states(1.0), folder)
        (folder / "notes.txt").write_text("mine")
        with pytest.MonkeyPatch.context() as patch:
            failing(patch, step, Killed(), ever=True)
            with suppress(Killed):
                esl.save(states(2.0), folder)
        found.append(value_of(folder))
        esl.save(states(3.0), folder)
        assert value_of(folder) == 3.0
        assert (folder / "notes.txt").read_text() == "mine"
        assert [p.name for p in folder.parent.iterdir()] == ["states"]
    assert set(found) == {1.0, 2.0}
    assert found == sorted(found)


def test_an_error_at_any_step_is_ours_and_says_that_the_old_is_intact(tmp_path):
    full, kept = OSError(errno.ENOSPC, "No space left on device"), []
    for step in range(1, number_of_calls(tmp_path / "counted") + 1):
        folder = tmp_path / str(step) / "states"
        esl.save(states(1.0), folder)
        with pytest.MonkeyPatch.context() as patch:
            failing(patch, step, full, ever=False)
            message = ""
            try:
                esl.save(states(2.0), folder)
            except ArtifactError as error:
                message = str(error)
        assert not message or "No space left" in message
        intact = "what was there before is as it was" in message
        assert value_of(folder) == (1.0 if intact else 2.0)
        kept.append(intact)
        esl.save(states(3.0), folder)
        assert [p.name for p in folder.parent.iterdir()] == ["states"]
    assert set(kept) == {True, False}


def test_a_place_that_cannot_be_written_to_is_a_named_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"could not be written.*choose a place"):
        esl.save(states(1.0), tmp_path / "file" / "states")


def test_a_full_disk_of_the_tensor_writer_is_a_named_error(tmp_path, monkeypatch):
    import safetensors.torch

    def full(*args, **kwargs):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    esl.save(states(1.0), tmp_path / "states")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ArtifactError, match=r"could not be written.*No space left"):
        esl.save(states(2.0), tmp_path / "states")
    assert value_of(tmp_path / "states") == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["states"]


def test_files_of_others_in_the_folder_stay(tmp_path):
    folder = esl.save(states(1.0), tmp_path / "states")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "notes.txt").write_text("mine")
    folder.chmod(0o750)
    esl.save(states(2.0), folder)
    assert (folder / ".git" / "HEAD").read_text() == "ref"
    assert (folder / "notes.txt").read_text() == "mine"
    assert folder.stat().st_mode & 0o777 == 0o750
    assert [p.name for p in tmp_path.iterdir()] == ["states"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    folder = esl.save(states(1.0), tmp_path / "states")
    (tmp_path / "link").symlink_to(folder)
    esl.save(states(2.0), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert value_of(folder) == 2.0


def test_the_working_folder_is_not_replaced_under_the_feet_of_the_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"working folder.*give a folder inside"):
        esl.save(states(1.0), ".")
    assert list(tmp_path.iterdir()) == []


def test_writers_take_turns_and_a_reader_meets_one_result_or_the_other(tmp_path):
    folder, errors, done = tmp_path / "states", [], threading.Event()
    esl.save(states(0.0), folder)

    def writer(value: float) -> None:
        try:
            for _ in range(15):
                esl.save(states(value), folder)
        except BaseException as error:
            errors.append(error)

    def reader() -> None:
        try:
            while not done.is_set():
                assert value_of(folder) in (0.0, 1.0, 2.0)
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=writer, args=(v,)) for v in (1.0, 2.0)]
    watching = threading.Thread(target=reader)
    for thread in (*writers, watching):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    watching.join()
    assert errors == []
    assert [p.name for p in tmp_path.iterdir()] == ["states"]


def test_the_bytes_that_are_checked_are_the_bytes_that_are_read(tmp_path, monkeypatch):
    folder, other = esl.save(states(1.0), tmp_path / "a"), esl.save(states(2.0), tmp_path / "b")
    file = "tensors.safetensors"
    wanted, swapped = hashlib.sha256((folder / file).read_bytes()).hexdigest(), []

    def swap(real):
        def digest(*args, **kwargs):
            found = real(*args, **kwargs)
            if found.hexdigest() == wanted:
                os.replace(other / file, folder / file)
                swapped.append(True)
            return found

        return digest

    for name in ("sha256", "file_digest"):
        monkeypatch.setattr(hashlib, name, swap(getattr(hashlib, name)))
    assert value_of(folder) == 1.0
    assert swapped == [True]


@pytest.mark.slow
def test_a_process_killed_while_it_saves_leaves_the_old_or_the_new(tmp_path):
    folder = tmp_path / "states"
    code = (
        "import sys, torch, expertsteer_lens as e\n"
        "s = [e.ActivationStore({'blocks.0.hook_resid_post': torch.full((2, 3), float(v))})"
        " for v in (1, 2)]\n"
        f"e.save(s[0], {str(folder)!r}); print('go', flush=True)\n"
        f"while True:\n    for x in s: e.save(x, {str(folder)!r})\n"
    )
    for repeat in range(3):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        time.sleep(0.05 + 0.013 * repeat)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert value_of(folder) in (1.0, 2.0)
    esl.save(states(3.0), folder)
    assert value_of(folder) == 3.0
    assert [p.name for p in tmp_path.iterdir()] == ["states"]


def test_a_file_is_the_old_or_the_new_whatever_call_fails(tmp_path):
    from expertsteer_lens._atomic import write_file, write_text

    for ever, error in ((True, Killed()), (False, OSError(errno.ENOSPC, "No space left"))):
        for step in range(1, 8):
            file = tmp_path / f"{ever}{step}" / "table.csv"
            write_text(file, "old")
            with pytest.MonkeyPatch.context() as patch:
                failing(patch, step, error, ever=ever)
                with suppress(Killed, ArtifactError):
                    write_text(file, "new")
            assert file.read_text() in ("old", "new")
            write_text(file, "next")
            assert file.read_text() == "next"
            assert [p.name for p in file.parent.iterdir()] == ["table.csv"]

    def half(there: Path) -> None:
        assert there.suffix == ".csv"
        there.write_text("half")
        raise ValueError("a writer that fails")

    with pytest.raises(ValueError, match=r"a writer that fails"):
        write_file(file, half)
    assert file.read_text() == "next"
    assert [p.name for p in file.parent.iterdir()] == ["table.csv"]


def test_reports_figures_and_tables_of_a_run_that_fails_are_the_old_ones(tmp_path, monkeypatch):
    import plotly.graph_objects
    import results

    from expertsteer_lens.cli.results import write_evaluation, write_pairs

    def contents() -> dict[str, bytes]:
        # a figure has another random id each time
        return {p.name: p.read_bytes()[-200:] for p in tmp_path.iterdir()}

    def half(self, file, *args, **kwargs):
        with open(file, "w") as stream:
            stream.write("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    measured = results.evaluation()
    write_evaluation(tmp_path, measured)
    before = contents()
    assert set(before) == {"comparison.csv", "comparison.html", "evaluation.json", "plotly.min.js"}
    frame = type(measured.to_pandas())
    for kind, name in (
        (plotly.graph_objects.Figure, "write_html"),
        (frame, "to_csv"),
        (Path, "write_text"),
    ):
        with monkeypatch.context() as patch:
            wrong = half if kind is not Path else lambda file, *_, **__: half(None, file)
            patch.setattr(kind, name, wrong)
            with pytest.raises(ArtifactError, match="No space left"):
                write_evaluation(tmp_path, measured)
        assert contents() == before, name
    with monkeypatch.context() as patch:
        patch.setattr(frame, "to_json", half)
        with pytest.raises(ArtifactError, match="No space left"):
            write_pairs(tmp_path / "pairs.jsonl", esl.zoo.contrast_pairs(n=2))
    assert contents() == before


@pytest.mark.parametrize(
    "use",
    [
        esl.load,
        lambda path: esl.save(states(1.0), path),
        esl.ActivationStore.open,
        lambda path: esl.capture(esl.zoo.load("expert"), ["A dog."], store=path),
    ],
)
def test_a_folder_that_may_not_be_entered_is_a_named_error(tmp_path, monkeypatch, use):
    def closed(name):
        real = getattr(os, name)

        def call(path=".", *args, **kwargs):
            if str(path).startswith(f"{tmp_path}{os.sep}"):
                raise PermissionError(errno.EACCES, "Permission denied")
            return real(path, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("stat", "listdir", "scandir", "mkdir", "open"):
            patch.setattr(os, name, closed(name))
        with pytest.raises(ArtifactError, match=r"(cannot be read|could not be written).*denied"):
            use(tmp_path / "closed" / "s")


@pytest.mark.parametrize("path", ["", "a\0b", None, 3])
def test_what_can_be_no_path_is_a_named_error(path):
    for use in (esl.load, lambda path: esl.save(states(1.0), path), esl.ActivationStore.open):
        with pytest.raises(ArgumentError, match=r"a path must be a text or a pathlib\.Path"):
            use(path)


def test_the_root_has_no_name_to_replace():
    with pytest.raises(ArtifactError, match="is the root of the file system"):
        esl.save(states(1.0), "/")
    with pytest.raises(ArgumentError, match="has no name of its own"):
        esl.ActivationStore.merge("/")
