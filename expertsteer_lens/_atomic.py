"""Writing that a kill, a full disk or a second writer cannot leave half done.

Beside `name` lie, while it is written, `.name.expertsteer-new` (what is being made),
`.name.expertsteer-old` (the folder before it, from the moment the name is given up until the new
one is in place) and `.name.expertsteer-lock` (whose turn it is; the operating system frees the lock
of a writer that dies). A new or old folder found by the one whose turn it is belongs to a dead one.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from expertsteer_lens.errors import ArgumentError, ArtifactError

try:
    import fcntl
except ImportError:  # Windows: writers do not wait for one another there
    fcntl = None  # type: ignore[assignment]


NEW, LOCK = "expertsteer-new", "expertsteer-lock"


def write_folder(
    path: Path,
    write: Callable[[Path], object],
    *,
    ours: Collection[str],
    check: Callable[[Path], object],
) -> None:
    """Have `write` fill a new folder, and put it at `path` once it is complete and on the disk.

    Whenever the process dies, `readable(path)` is the folder before or the new one. Files that are
    not ours move from the one to the other, after the switch; none is deleted.

    Args:
        path: of the folder; a link is followed.
        write: is given an empty folder.
        ours: names of the files that may be deleted with the folder before.
        check: is given `path` before anything is written, and raises if it must not be replaced.

    Raises:
        ArtifactError: it cannot be written; what was there before is as it was.
    """
    check_place(path)
    real = Path(os.path.realpath(path))
    new, old = _beside(real, "new"), _beside(real, "old")
    with named(path), _turn(real):
        _recover(real, ours)
        check(real)
        if real == Path.cwd() or os.path.ismount(real):
            raise ArtifactError(
                f"{path} is the working folder or the root of a file system, which cannot be "
                "replaced by a rename; give a folder inside it."
            )
        try:
            new.mkdir()
            write(new)
            if real.is_dir():
                shutil.copymode(real, new)
            for file in new.rglob("*"):
                _sync_folder(file) if file.is_dir() else _sync(file)
            _sync_folder(new)
            if not _absent(real):
                os.rename(real, old)
            elif real.exists():
                os.rmdir(real)
            os.rename(new, real)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            if _absent(real) and old.exists():
                with suppress(OSError):  # then `readable` finds it, and the next writer recovers it
                    os.rename(old, real)
            raise
        with named(path, _WRITTEN):
            _sync_folder(real.parent)
            if old.exists():
                _retire(old, real, ours)


def write_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `path`, and put it there once it is complete and on the disk:
    at any moment there is the file before or the new one. What is no file (a pipe, a device) is
    written to as it is.

    Raises:
        ArtifactError: it cannot be written; what was there before is as it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_file(folder + "/a.txt", lambda file: file.write_text("b"))
    ...     (Path(folder) / "a.txt").read_text()
    'b'
    """
    check_place(path)
    real = Path(os.path.realpath(path))
    if real.exists() and not real.is_file() and not real.is_dir():
        write(real)
        return
    # The ending stays last: some writers go by it.
    new = real.with_name(f".{real.stem}.{NEW}{real.suffix}")
    with named(path), _turn(real):
        try:
            new.unlink(missing_ok=True)
            write(new)
            if real.is_file():
                shutil.copymode(real, new)
            _sync(new)
            os.replace(new, real)
        finally:
            with suppress(OSError):
                new.unlink(missing_ok=True)
    with named(path, _WRITTEN):
        _sync_folder(real.parent)


def write_text(path: str | Path, text: str) -> None:
    """`write_file` of a text in UTF-8."""
    write_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_figure(path: Path, figure: Any) -> None:
    """`write_file` of a plotly figure as HTML that opens offline."""
    from plotly.offline import get_plotlyjs

    # The figures of a folder share one plotly.min.js beside them, and plotly takes one that is
    # there for complete.
    script = path.with_name("plotly.min.js")
    if not script.exists():
        write_text(script, get_plotlyjs())
    write_file(path, lambda file: figure.write_html(file, include_plotlyjs="directory"))


def readable(path: Path) -> Path | None:
    """Where the complete folder lies: at `path`, or beside it if a writer is between its two
    renames or died there; None if there is nothing, or cannot be (a name that no file can have)."""
    try:
        real = Path(os.path.realpath(path))
        if not real.name:
            return path
        old = _beside(real, "old")
        for _ in range(20):  # while one place is looked at, a writer may come to use the other
            if not _absent(real):
                return path
            if old.is_dir():
                return old
        return path if path.exists() else None
    except ValueError:  # a null byte in the name
        return None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return None


def _beside(real: Path, what: str) -> Path:
    # Not `with_name`, which the root of a file system does not take.
    return real.parent / f".{real.name}.expertsteer-{what}"


def check_path(path: object) -> None:
    """Refuse what can be no path.

    Raises:
        ArgumentError: it is no text or `Path`, is empty, or holds the character NUL.
    """
    said = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(said, str) or not said or "\0" in said:
        raise ArgumentError(
            f"a path must be a text or a pathlib.Path that names a folder or a file, got {said!r}."
        )


def check_place(path: str | Path) -> None:
    """Refuse what can be no path, what has no name of its own, and a path such as "~/plan", which a
    shell expands and Python does not.

    Raises:
        ArgumentError: see `check_path`.
        ArtifactError: it begins with a home folder, or is the root.
    """
    check_path(path)
    if not Path(os.path.realpath(path)).name:
        raise ArtifactError(f"{path} is the root of the file system; give a place below it.")
    if os.path.expanduser(path) != os.fspath(path):
        raise ArtifactError(
            f"{path} would become a folder named '~'; give the whole path, which "
            f"pathlib.Path({os.fspath(path)!r}).expanduser() is."
        )


def lock_of(path: Path) -> Path:
    """The file by which writers to a path wait for one another."""
    return _beside(path, "lock")


def _absent(real: Path) -> bool:
    """Whether nothing, or an empty folder, is there."""
    try:
        return not any(real.iterdir())
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False


def _recover(real: Path, ours: Collection[str]) -> None:
    """Clear away what dead writers left."""
    new, old = _beside(real, "new"), _beside(real, "old")
    if new.exists():
        shutil.rmtree(new)
    if old.exists() and _absent(real):
        if real.exists():
            os.rmdir(real)
        os.rename(old, real)
    elif old.exists():
        _retire(old, real, ours)


def _retire(old: Path, real: Path, ours: Collection[str]) -> None:
    """Delete a folder that was replaced; what is not ours in it moves to the new one."""
    for entry in sorted(old.iterdir()):
        if entry.name in ours and (entry.is_symlink() or not entry.is_dir()):
            entry.unlink()
            continue
        there = real / entry.name
        while os.path.lexists(there):
            there = there.with_name(f"{there.name}.old")
        os.rename(entry, there)
    old.rmdir()


_NOT_WRITTEN = (
    "could not be written; what was there before is as it was. Make room on the disk, or choose a "
    "place that you may write to"
)
_WRITTEN = (
    "was written, but the disk does not confirm it, or what was there before could not be cleared "
    "away; writing it again tries again"
)


@contextmanager
def named(path: str | Path, state: str = _NOT_WRITTEN) -> Iterator[None]:
    """Errors of the operating system as ours, which say the state that they leave."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"{path} {state} ({error}).") from error


@contextmanager
def hold(path: str | Path, remedy: str) -> Iterator[None]:
    """A block in which this process alone writes to a path that is written piece by piece.

    Args:
        path: what is written; its folder is made.
        remedy: the end of the message if another process (or thread) holds it.

    Raises:
        ArtifactError: another one holds it, or the place cannot be written to.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, hold(folder + "/a", "wait for it."):
    ...     with hold(folder + "/a", "wait for it."):
    ...         pass
    Traceback (most recent call last):
    ...
    expertsteer_lens.errors.ArtifactError: ... is being written by another process; wait for it.
    """
    with ExitStack() as stack:
        with named(path):
            turn = _turn(Path(os.path.realpath(path)), wait=False)
            try:
                stack.enter_context(turn)
            except BlockingIOError as error:
                raise ArtifactError(
                    f"{path} is being written by another process; {remedy}"
                ) from error
        yield


@contextmanager
def _turn(real: Path, *, wait: bool = True) -> Iterator[None]:
    """Wait until no other process or thread writes to this path, or raise `BlockingIOError`."""
    real.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    lock = lock_of(real)
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise
            except OSError:  # some network file systems have no locks
                pass
            # The writer before us removes the file, and what we waited for may be no longer there.
            if not _same(handle, lock):
                continue
            try:
                yield
            finally:
                with suppress(OSError):  # a lock file that nobody holds is in nobody's way
                    lock.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def _same(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def _sync(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # unknown to some file systems
            raise
    finally:
        os.close(handle)
