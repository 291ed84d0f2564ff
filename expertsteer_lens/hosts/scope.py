"""Whose passes are whose: one model may be run by several threads and tasks at once, some steered,
some read, some plain."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch

CHANGING_HOOKS = threading.RLock()
"""Held while hooks are put on or taken off, and while a model is measured without the hooks of
others."""


def remove_handle(handle: Any) -> None:
    """Take a torch hook off."""
    with CHANGING_HOOKS:
        handle.remove()


_OPEN: ContextVar[tuple[int, ...]] = ContextVar("expertsteer_open_scopes", default=())
_INHERITED: WeakKeyDictionary[threading.Thread, tuple[int, ...]] = WeakKeyDictionary()
"""The scopes in which a thread was started."""
_NUMBERS = itertools.count(1)


class Scope:
    """The passes that belong to whoever steers or reads a model.

    Those of the context that opened it (a thread, or a task of asyncio), and of threads and tasks
    that are started there while it is open (a streamer's). With `everywhere` all passes belong to
    it, whoever runs them. Called, it says whether what runs now belongs to it."""

    def __init__(self, *, everywhere: bool = False) -> None:
        self.everywhere = everywhere
        self.n_elsewhere = 0
        """Passes seen that do not belong to it."""
        self._number = next(_NUMBERS)

    def __call__(self) -> bool:
        """Whether what runs now belongs to it."""
        return self.everywhere or self._number in _OPEN.get() or self._is_inherited()

    def _is_inherited(self) -> bool:
        thread = threading.current_thread()
        # A pass that autograd runs once more in a thread of its own belongs to nobody: whoever is
        # there takes part, as in the pass that it repeats.
        recomputed = isinstance(thread, threading._DummyThread) and _in_backward()
        return recomputed or self._number in _INHERITED.get(thread, ())

    @contextmanager
    def opened(self) -> Iterator[Scope]:
        """Open in this context until the end of the block."""
        if self.everywhere:
            yield self
            return
        _OPEN.set((*_OPEN.get(), self._number))
        try:
            with _noting_threads():
                yield self
        finally:
            # By value and not by token: a generator may be closed in another context.
            _OPEN.set(tuple(n for n in _OPEN.get() if n != self._number))


@contextmanager
def scope_or_new(scope: Scope | None) -> Iterator[Scope]:
    """The scope given, or one of this block."""
    if scope is not None:
        yield scope
    else:
        with Scope().opened() as new:
            yield new


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


_n_noting = 0
_start: Any = None


@contextmanager
def _noting_threads() -> Iterator[None]:
    """Note in which scopes a thread is started, as long as any is open: Python does not say who
    started a thread, and a new thread begins with an empty context."""
    global _n_noting, _start
    with CHANGING_HOOKS:
        if _n_noting == 0:
            original = threading.Thread.start

            def start(self: threading.Thread) -> None:
                found = (*_OPEN.get(), *_INHERITED.get(threading.current_thread(), ()))
                if found:
                    _INHERITED[self] = found
                original(self)

            _start = start, original
            threading.Thread.start = start  # type: ignore[method-assign]
        _n_noting += 1
    try:
        yield
    finally:
        with CHANGING_HOOKS:
            _n_noting -= 1
            # If somebody wrapped ours meanwhile, it stays inside theirs and does no harm.
            if _n_noting == 0 and threading.Thread.start is _start[0]:
                threading.Thread.start = _start[1]  # type: ignore[method-assign]
