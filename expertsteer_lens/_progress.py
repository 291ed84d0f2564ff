"""Progress bars: one idiom for all of the package."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def is_shown(progress: bool | None) -> bool:
    """Whether a bar is drawn: as asked (True, False), or, with None, where standard error is a
    terminal. The environment variable TQDM_DISABLE=1 overrules."""
    if os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false"):
        return False
    return sys.stderr.isatty() if progress is None else progress


def progress_bar(
    items: Iterable[T],
    label: str,
    *,
    progress: bool | None,
    total: int | None = None,
    unit: str = "it",
) -> Iterable[T]:
    """The items, with a tqdm bar on standard error while they are gone through.

    Args:
        items: what is gone through.
        label: what the bar is called.
        progress: see `is_shown`.
        total: how many there are, where `items` does not say.
        unit: what one of them is.

    Example:
        >>> list(progress_bar([1, 2], "counting", progress=False))
        [1, 2]
    """
    if not is_shown(progress):
        return items
    from tqdm.auto import tqdm

    bar: Iterable[T] = tqdm(items, desc=label, total=total, unit=unit, leave=False)
    return bar
