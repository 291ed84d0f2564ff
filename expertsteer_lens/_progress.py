"""Progress: one idiom for all of the package.

On a terminal a step is a tqdm bar, and steps inside of it are bars below. Elsewhere, in a log file,
it is one line when the outermost step has ended. What will take longer than a minute says so, with
what it costs, as soon as the first item shows how long one takes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

LONG = 60.0
"""Seconds from which a step announces what it will cost."""

_open: list[Step] = []
"""Steps that are under way, the outermost first."""


def is_shown(progress: bool | None) -> bool:
    """Whether progress is shown: as asked (True, False), or, with None, where standard error is a
    terminal. The environment variable TQDM_DISABLE=1 overrules."""
    if os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false"):
        return False
    return sys.stderr.isatty() if progress is None else progress


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(4.26), duration(95), duration(7400)
        ('4.3 s', '1 min 35 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


class Step:
    """A step under way: a context manager that counts what is finished.

    Args:
        label: what the step is called.
        total: how many items there are; None: not known. May be an upper bound.
        progress: see `is_shown`.
        unit: what one item is.
        cost: what the step costs beyond time (passes, tokens, memory), in words; said where it
            takes longer than a minute.

    Example:
        >>> with Step("counting", total=2, progress=False) as step:
        ...     step.advance()
        >>> step.n
        1
    """

    def __init__(
        self,
        label: str,
        *,
        total: int | None = None,
        progress: bool | None,
        unit: str = "it",
        cost: str = "",
    ) -> None:
        self.label, self.total, self.unit, self.cost = label, total, unit, cost
        self.n = 0
        self._shown = is_shown(progress)
        self._bar: Any = None
        self._started = 0.0

    def __enter__(self) -> Step:
        self._started = time.perf_counter()
        if self._shown:
            if sys.stderr.isatty():
                from tqdm.auto import tqdm

                self._bar = tqdm(total=self.total, desc=self.label, unit=self.unit, leave=False)
            _open.append(self)
        return self

    def advance(self) -> None:
        """One more item is finished."""
        self.n += 1
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.update()
        if self.n == 1 and self.total and self is _open[0]:
            estimate = (time.perf_counter() - self._started) * self.total
            if estimate > LONG:
                cost = f"; {self.cost}" if self.cost else ""
                self._say(f"{self._counted(self.total)}, about {duration(estimate)}{cost}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.close()
        outermost = self is _open[0]
        _open.remove(self)
        took = duration(time.perf_counter() - self._started)
        if kind is not None and kind is not GeneratorExit:
            of = "" if self.total is None else f" of {self.total}"
            self._say(f"stopped after {self.n}{of} ({took})")
        elif outermost and self._bar is None:
            self._say(f"{self._counted(self.n)} in {took}")

    def _counted(self, n: int) -> str:
        unit = "item" if self.unit == "it" else self.unit
        if n != 1:
            unit += "es" if unit.endswith("ch") else "s"
        return f"{n} {unit}"

    def _say(self, text: str) -> None:
        line = f"{self.label}: {text}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


def progress_bar(
    items: Iterable[T],
    label: str,
    *,
    progress: bool | None,
    total: int | None = None,
    unit: str = "it",
    cost: str = "",
) -> Iterable[T]:
    """The items, with their progress on standard error while they are gone through.

    Args:
        items: what is gone through.
        label: what the step is called.
        progress: see `is_shown`.
        total: how many there are, where `items` does not say.
        unit: what one of them is.
        cost: see `Step`.

    Example:
        >>> list(progress_bar([1, 2], "counting", progress=False))
        [1, 2]
    """
    if not is_shown(progress):
        return items
    if total is None and isinstance(items, Sized):
        total = len(items)
    return _walked(items, Step(label, total=total, progress=progress, unit=unit, cost=cost))


def _walked(items: Iterable[T], step: Step) -> Iterator[T]:
    with step:
        for item in items:
            yield item
            step.advance()
