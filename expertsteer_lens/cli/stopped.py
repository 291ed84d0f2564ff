"""What a command had finished when it was stopped: kept in a folder, from which the same command
goes on."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from expertsteer_lens._checks import KEPT
from expertsteer_lens.errors import ArgumentError, ExpertSteerError, Interrupted

from .terminal import say


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM)."""


@contextmanager
def terminated() -> Iterator[None]:
    """A block in which SIGTERM ends the work like Ctrl-C, so that what is finished is kept.

    Raises:
        Terminated: the signal came.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise Terminated("stopped")

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def exit_code(stop: BaseException | None) -> int:
    """With what a command ends that was stopped: 130 by Ctrl-C, 143 by SIGTERM."""
    while stop is not None and not isinstance(stop, Terminated):
        stop = stop.__cause__
    return 130 if stop is None else 143


@contextmanager
def goes_on_from(out: Path) -> Iterator[None]:
    """A block that writes to `out` what is finished, and goes on from it: the user who stops it is
    told so.

    Raises:
        KeyboardInterrupt: the user stopped it.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"stopped; what was finished is in {out}, and the same command goes on from there."
        ) from stop


KINDS = {"states": ("FitData", "FinishedReadings"), "rows": ("FinishedRows",)}
"""What is kept under a name, each kind in a folder of its own, so that none is removed before the
next one is written; the furthest first."""


class Stopped:
    """What is kept in `OUT/stopped`: "states" that a fit had read, and "rows" of an evaluation.

    Args:
        out: folder for the results of the command.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / "stopped"
        self.finished: dict[str, Any] = {}

    @contextmanager
    def kept_as(self, name: str, **also: Any) -> Iterator[Any]:
        """A block that gets what was kept under this name (None: nothing), and in which what is
        finished is kept if the user stops it or it fails.

        Args:
            name: what `finished` of an error is kept as.
            also: what was finished before the block, by name; more may be put into `self.finished`
                inside the block.

        Raises:
            ArgumentError: what was kept is of a command with other options.
            Interrupted: the user stopped it; the message says where it is kept.
        """
        self.finished |= also
        place, before = self.folder / name, self._read(name)
        if before is not None:
            say(f"going on with the {name} in {place}")
        try:
            yield before
        except KeyboardInterrupt as stop:
            if not self._keep_finished(stop, name) and before is None:
                raise
            said = str(stop).split(", which are kept")[0] or "stopped"
            raise Interrupted(
                f"{said}; what was finished is kept in {self.folder}, and the same command goes on "
                "from there.",
                None,
            ) from stop
        except Exception as error:
            said = str(error)
            if before is not None and said.startswith("finished holds "):
                raise ArgumentError(
                    f"{place} {said.removeprefix('finished ').split(';')[0]}; give the options of "
                    "the command that was stopped, another --out, or remove that folder."
                ) from error
            try:
                is_kept = self._keep_finished(error, name) or before is not None
            except (ExpertSteerError, OSError) as reason:
                error.add_note(f"What was finished could not be kept ({reason})")
                is_kept = False
            if hasattr(error, "__notes__"):  # those that say how to go on in Python
                error.__notes__ = [note for note in error.__notes__ if not note.startswith(KEPT)]
            if is_kept:
                error.add_note(
                    f"What was finished is kept in {self.folder}; once the cause is removed, the "
                    "same command goes on from there."
                )
            raise

    def clear(self) -> None:
        """Remove what was kept: the command has ended."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # OUT stays, unless it was made for this alone
                self.folder.parent.rmdir()

    def _read(self, name: str) -> Any:
        from expertsteer_lens._atomic import readable
        from expertsteer_lens.files.io import load

        for kind in KINDS[name]:
            if readable(self.folder / name / kind) is not None:
                return load(self.folder / name / kind)
        return None

    def _keep_finished(self, error: BaseException, name: str) -> bool:
        """Write what was finished before an error; whether there was anything."""
        found = getattr(error, "finished", None)
        if found is not None:
            self.finished[name] = found
        for key, thing in self.finished.items():
            self._keep(thing, key)
        return bool(self.finished)

    def _keep(self, thing: Any, name: str) -> None:
        from expertsteer_lens.files.io import save

        kind = type(thing).__name__
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        save(thing, self.folder / name / kind)
        for other in set(KINDS[name]) - {kind}:
            shutil.rmtree(self.folder / name / other, ignore_errors=True)
