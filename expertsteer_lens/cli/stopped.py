"""What a command had finished when it was stopped: kept in a folder, from which the same command
goes on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from expertsteer_lens.errors import ArgumentError, Interrupted

from .terminal import say


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

    @contextmanager
    def kept_as(self, name: str, **also: Any) -> Iterator[Any]:
        """A block that gets what was kept under this name (None: nothing), and in which what is
        finished is kept if the user stops it.

        Args:
            name: what `Interrupted.finished` is kept as.
            also: what was finished before the block, by name.

        Raises:
            ArgumentError: what was kept is of a command with other options.
            Interrupted: the user stopped it; the message says where it is kept.
        """
        place, before = self.folder / name, self._read(name)
        if before is not None:
            say(f"going on with the {name} in {place}")
        try:
            yield before
        except KeyboardInterrupt as stop:
            if isinstance(stop, Interrupted):
                also[name] = stop.finished
            if not also and before is None:
                raise
            for key, thing in also.items():
                self._keep(thing, key)
            said = str(stop).split(", which are kept")[0] or "stopped"
            raise Interrupted(
                f"{said}; what was finished is kept in {self.folder}, and the same command goes on "
                "from there.",
                None,
            ) from stop
        except ArgumentError as error:
            if before is None or not str(error).startswith("finished holds "):
                raise
            raise ArgumentError(
                f"{place} {str(error).removeprefix('finished ').split(';')[0]}; give the options "
                "of the command that was stopped, another --out, or remove that folder."
            ) from error

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

    def _keep(self, thing: Any, name: str) -> None:
        from expertsteer_lens.files.io import save

        kind = type(thing).__name__
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        save(thing, self.folder / name / kind)
        for other in set(KINDS[name]) - {kind}:
            shutil.rmtree(self.folder / name / other, ignore_errors=True)
