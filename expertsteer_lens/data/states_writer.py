"""Writing a store of states to a folder, batch by batch, so that a capture that dies goes on where
it was; the files are described in `states_folder`."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertsteer_lens._atomic import (
    LOCK,
    NEW,
    check_place,
    hold,
    lock_of,
    named,
    write_file,
    write_text,
)
from expertsteer_lens._checked_json import DIGEST, digest_of
from expertsteer_lens.errors import ArtifactError

from .capture_plan import TOKEN_ENDS, CapturePlan, labels_to, starts_of
from .states_folder import (
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    PROGRESS,
    StatesFile,
    check_file,
    files_of,
    map_file,
    read_index,
    read_progress,
)


class StatesWriter:
    """Takes the batches of a capture in any order, and knows which are there already.

    `writing` is the way to get one."""

    def __init__(self, folder: Path, plan: CapturePlan) -> None:
        self.folder, self.plan = folder, plan
        self.done: dict[int, str] = {}
        """Number and checksum of each batch that is there."""
        self.is_complete = False
        self._files: dict[str, StatesFile] = {}
        self._row_starts = starts_of(plan.row_counts)
        self._norm_starts = starts_of(plan.norm_counts or [])
        self._resume()

    def write(
        self, number: int, states: Mapping[str, Tensor], norms: Mapping[str, Tensor] | None
    ) -> None:
        """Put a batch on the disk: rows prompt after prompt, in the order of `plan.batches`.

        Args:
            number: of the batch.
            states: `[rows, d]` by hook name, float32 on the CPU, finite.
            norms: `[tokens]` by hook name, if the plan keeps norms.

        Raises:
            ArtifactError: it cannot be written; the batches before are as they were.
        """
        with self._named():
            if not self._files:
                self._lay_out(states)
            digest = hashlib.sha256()
            for name, file in self._files.items():
                # "r+b" would make a file that somebody removed meanwhile
                handle = os.open(self.folder / file.name, os.O_RDWR | getattr(os, "O_BINARY", 0))
                try:
                    for place, content in self._pieces(number, file, states[name], norms):
                        digest.update(content)
                        _write_at(handle, place, content)
                finally:
                    os.close(handle)
            entry = json.dumps({"batch": number, "sha256": digest.hexdigest()}) + "\n"
            with (self.folder / PROGRESS).open("ab") as stream:
                stream.write(entry.encode())
        self.done[number] = digest.hexdigest()

    def norms(self) -> dict[str, Tensor]:
        """The norms of all tokens by hook name, of a capture whose batches are all there; nothing
        where the plan keeps none."""
        out = {}
        for name, file in self._files.items() if self.plan.norm_counts is not None else ():
            content = map_file(self.folder, file)
            out[name] = torch.frombuffer(
                content, dtype=torch.float32, count=file.n_norms, offset=file.norms_at(0)
            )
        return out

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Say in the index that all batches are there, with the checksums of the files.

        Args:
            facts: more provenance, known only now.

        Raises:
            ArtifactError: it cannot be written; the batches are as they were.
        """
        digests = {}
        with self._named():
            for name, file in self._files.items():
                with (self.folder / file.name).open("rb+") as stream:
                    os.fsync(stream.fileno())
                    digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
        self._write_index(
            complete=True,
            sha256=digests,
            provenance={**self.plan.provenance, **facts},
            widths={name: file.width for name, file in self._files.items()},
        )
        self.is_complete = True
        _clear(self.folder)

    # -- what is there ----------------------------------------------------------------------------

    def _resume(self) -> None:
        """Begin the folder, or find what an earlier capture of the same left."""
        with self._named():
            entries = [p.name for p in self.folder.iterdir() if not p.name.startswith(".")]
        if INDEX not in entries:
            if entries:
                raise ArtifactError(
                    f"store={str(self.folder)!r} has files in it ({entries[0]}) and is no store of "
                    "states; give a new folder."
                )
            self._write_index(complete=False)
            return
        index = read_index(self.folder)
        try:
            self._check_same(index)
            if index["complete"]:
                self.is_complete = True
                return
            self._refuse_links()
            if index["widths"] is None:
                return
            self._files = files_of(index)
        except ArtifactError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{self.folder / INDEX} lacks what its format has: {error!r}."
            ) from error
        for file in self._files.values():
            check_file(self.folder, file)
        self.done = self._intact(read_progress(self.folder))
        self._rewrite_progress()

    def _refuse_links(self) -> None:
        """What is written to a link would be written outside of the folder."""
        for path in self.folder.iterdir():
            if path.is_symlink() and (path.name in (INDEX, PROGRESS) or path.match("states-*")):
                raise ArtifactError(
                    f"store={str(self.folder)!r} is not complete and its {path.name} is a link, "
                    "through which a file outside would be overwritten; put the file itself there, "
                    "or give another folder."
                )

    def _check_same(self, index: dict[str, Any]) -> None:
        complete, plan = index["complete"], self.plan
        # Earlier versions did not say these.
        there = {"ends": TOKEN_ENDS in index["provenance"], "autocast": None, **index["key"]}
        other = [k for k in {**plan.key, **there} if there.get(k) != plan.key.get(k)]
        # Hosts keep the same weights in other forms; where weights are not known, the fingerprint
        # alone counts.
        same_host = index["made_with"].get("host") == plan.made_with.get("host")
        known = None not in (there.get("weights"), plan.key.get("weights")) and same_host
        if not known or "fingerprint" in other:
            other = [k for k in other if k != "weights"]
        if other:
            raise ArtifactError(
                f"store={str(self.folder)!r} holds states of another capture: its {_listed(other)} "
                f"{'is' if len(other) == 1 else 'are'} not what this one asks for "
                f"({_difference(other[0], there, plan.key)}); give another folder, or "
                "remove it."
            )
        if complete:
            return
        begun = index["made_with"]
        other = [k for k in plan.made_with if k in begun and begun[k] != plan.made_with[k]]
        if other or index["batches"] != plan.batches:
            name = other[0] if other else "batches"
            raise ArtifactError(
                f"store={str(self.folder)!r} was begun with another {_listed(other or [name])} "
                f"({_difference(name, begun, plan.made_with)}), and would not become "
                "what it would have been; go on as it was begun, or give another folder."
            )

    def _intact(self, claimed: Mapping[int, str]) -> dict[int, str]:
        """Those batches whose bytes are there: a machine that lost its power may have written that
        a batch is there and not the batch."""
        content = {name: map_file(self.folder, file) for name, file in self._files.items()}
        out = {}
        for number, said in claimed.items():
            if not 0 <= number < len(self.plan.batches):
                continue
            digest = hashlib.sha256()
            for name, file in self._files.items():
                for place, size in self._places(number, file):
                    digest.update(content[name][place : place + size])
            if digest.hexdigest() == said:
                out[number] = said
        return out

    # -- layout -----------------------------------------------------------------------------------

    def _places(self, number: int, file: StatesFile) -> Iterator[tuple[int, int]]:
        """Where the pieces of a batch stand in a file, and their sizes."""
        for counts, starts, at in (
            (self.plan.row_counts, self._row_starts, file.row_at),
            (self.plan.norm_counts or [], self._norm_starts, file.norms_at),
        ):
            for prompt in self.plan.batches[number] if counts else ():
                begin, end = at(starts[prompt]), at(starts[prompt] + counts[prompt])
                yield begin, end - begin

    def _pieces(
        self, number: int, file: StatesFile, rows: Tensor, norms: Mapping[str, Tensor] | None
    ) -> Iterator[tuple[int, memoryview]]:
        content = _bytes_of(rows)
        if norms is not None:
            content = memoryview(content.tobytes() + _bytes_of(norms[file.hook_name]).tobytes())
        at = 0
        for place, size in self._places(number, file):
            yield place, content[at : at + size]
            at += size
        assert at == len(content), "a batch has the rows that the plan says"

    def _lay_out(self, states: Mapping[str, Tensor]) -> None:
        """Make every file as large as it will be, so that a disk without the room says so now."""
        widths = {name: states[name].shape[1] for name in self.plan.key["hook_names"]}
        files = files_of({**self._sizes(), "key": self.plan.key, "widths": widths})
        for file in files.values():
            write_file(self.folder / file.name, partial(_reserve, file))
        with suppress(FileNotFoundError):
            (self.folder / PROGRESS).unlink()
        self._write_index(complete=False, widths=widths)
        self._files = files

    def _sizes(self) -> dict[str, int]:
        return {
            "n_rows": sum(self.plan.row_counts),
            "n_norms": sum(self.plan.norm_counts or ()),
        }

    def _write_index(self, *, complete: bool, **known: Any) -> None:
        plan = self.plan
        index = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "complete": complete,
            "key": plan.key,
            "made_with": plan.made_with,
            "widths": None,
            **self._sizes(),
            "batches": plan.batches,
            "labels": labels_to(plan.labels),
            "provenance": plan.provenance,
            **({} if plan.whole is None else {"whole": plan.whole}),
            **known,
        }
        index[DIGEST] = digest_of(index)
        write_text(self.folder / INDEX, json.dumps(index, allow_nan=False))

    def _rewrite_progress(self) -> None:
        """Without lines that were cut off, which a line after them would be joined to."""
        lines = [json.dumps({"batch": n, "sha256": d}) + "\n" for n, d in self.done.items()]
        write_text(self.folder / PROGRESS, "".join(lines))

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArtifactError(
                f"{self.folder} could not be written ({error}). The {len(self.done)} of "
                f"{len(self.plan.batches)} batches before are as they were: make room or get "
                "permission, then run the same capture again, and it goes on."
            ) from error


@contextmanager
def writing(path: str | Path, plan: CapturePlan) -> Iterator[StatesWriter]:
    """A block in which this process alone writes the store at `path`.

    Raises:
        ArtifactError: another process does, the folder holds something else, or it cannot be
            written to.
    """
    check_place(path)
    folder = Path(os.path.realpath(path))
    with named(path):
        is_file = folder.exists() and not folder.is_dir()
        is_begun = (folder / INDEX).is_file()
    if is_file:
        raise ArtifactError(f"store={str(path)!r} is a file; give a folder.")
    if is_begun and read_index(folder).get("complete"):
        if _left_over(folder):
            with suppress(ArtifactError), hold(folder / "capture", ""):
                _clear(folder)
        yield StatesWriter(folder, plan)  # which writes nothing, so the place may be read-only
        return
    with hold(folder / "capture", "wait for it, or give another folder as store=."):
        yield StatesWriter(folder, plan)


def _left_over(folder: Path) -> list[Path]:
    """What is in a complete store beside what belongs there: a capture that was killed at its end
    left it."""
    try:
        names = (PROGRESS, *(f".*.{what}*" for what in (LOCK, NEW)))
        return [path for path in folder.iterdir() if any(map(path.match, names))]
    except OSError:
        return []


def _clear(folder: Path) -> None:
    """Remove it; only while the folder is held."""
    for path in _left_over(folder):
        if path != lock_of(folder / "capture"):
            with suppress(OSError):  # in nobody's way
                path.unlink(missing_ok=True)


def _bytes_of(value: Tensor) -> memoryview:
    assert value.dtype == torch.float32
    content: Any = value.contiguous().numpy()
    return memoryview(content).cast("B")


def _write_at(handle: int, place: int, content: memoryview) -> None:
    if not hasattr(os, "pwrite"):  # Windows
        os.lseek(handle, place, os.SEEK_SET)
    while content:
        if hasattr(os, "pwrite"):
            done = os.pwrite(handle, content, place)
        else:
            done = os.write(handle, content)
        content, place = content[done:], place + done


def _reserve(file: StatesFile, path: Path) -> None:
    with path.open("wb") as stream:
        stream.write(file.header)
        stream.flush()
        try:
            os.posix_fallocate(stream.fileno(), 0, file.n_bytes)
        except AttributeError:  # not on this system: the room is taken as it is written
            stream.truncate(file.n_bytes)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # unknown to the file system
                raise
            stream.truncate(file.n_bytes)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _difference(name: str, there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        text = str(value)
        return text if len(text) <= 80 else text[:77] + "..."

    if name == "batches":
        return "other prompts go together"
    return f"{name}: {shown(there.get(name))} there, {shown(asked.get(name))} here"
