"""Runs of one TransformerBridge by several threads, one after another.

A Bridge keeps on the model what belongs to a run: the cache between two steps of its `generate`,
the layer to stop at, the rows of the batch, which of its hook points have fired. Where runs of two
threads overlap, each takes what the other left: wrong tokens, and no error. So while a Bridge is
read or steered, whoever runs it waits for his turn, plain runs too."""

from __future__ import annotations

import inspect
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType
from typing import Any

from torch import nn

from .generate_calls import GENERATE_NAMES
from .overrides import calls_through, is_stream
from .scope import CHANGING_HOOKS

_TURNS: weakref.WeakKeyDictionary[nn.Module, Turns] = weakref.WeakKeyDictionary()


def turns_of(bridge: nn.Module, inner: nn.Module) -> Turns:
    """The turns of a Bridge, around the module `inner`; the same for all who ask."""
    with CHANGING_HOOKS:
        if bridge not in _TURNS:
            _TURNS[bridge] = Turns(bridge, inner)
        return _TURNS[bridge]


class Turns:
    """Whose turn it is to run one Bridge. A thread has its turn for a whole call of the Bridge (a
    `generate` of many passes), for a step of `generate_stream`, or for a pass of the module
    inside."""

    def __init__(self, bridge: nn.Module, inner: nn.Module) -> None:
        self._methods = [(weakref.ref(inner), "forward"), (weakref.ref(bridge), "forward")]
        self._methods += [
            (weakref.ref(bridge), name)
            for name in GENERATE_NAMES
            if callable(getattr(type(bridge), name, None))
        ]
        self._lock = threading.RLock()
        self._n_inside = 0  # calls of the thread whose turn it is that are inside one another

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside the block, turns are kept by all threads."""
        with ExitStack() as stack:
            for obj, name in self._found():
                around = self._stream_in_turn if is_stream(obj, name) else self._call_in_turn
                stack.enter_context(calls_through(obj, name, around))
            yield

    def _call_in_turn(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        with self.taken():
            return call(*args, **kwargs)

    def _stream_in_turn(
        self, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Iterator[Any]:
        """Of a stream each step is a turn: what it leaves between them it does not need."""
        steps = call(*args, **kwargs)
        try:
            while True:
                with self.taken():
                    try:
                        item = next(steps)
                    except StopIteration:
                        return
                yield item
        finally:
            with self.taken():
                steps.close()

    def _found(self) -> Iterator[tuple[nn.Module, str]]:
        for reference, name in self._methods:
            obj = reference()
            if obj is not None:
                yield obj, name

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside the block it is the turn of this thread."""
        self._wait()
        self._n_inside += 1
        try:
            yield
        finally:
            self._n_inside -= 1
            self._lock.release()

    def _wait(self) -> None:
        self._lock.acquire()
        # A run that began before turns were kept knows nothing of them: wait for its end, and let
        # it have its passes meanwhile.
        while self._n_inside == 0 and self._is_run_elsewhere():
            self._lock.release()
            time.sleep(0.001)
            self._lock.acquire()

    def _is_run_elsewhere(self) -> bool:
        """Whether another thread is in a run that did not wait for its turn.

        Whoever did is not in one while this thread holds the lock. A thread in such a run itself
        waits for no other: they would wait for it."""
        here, elsewhere = who_is_in(self._found())
        return elsewhere and not here


def who_is_in(methods: Iterable[tuple[Any, str]]) -> tuple[bool, bool]:
    """Whether this thread is in a call of one of these methods (object and name), and whether
    another is.

    Seen in what each thread has on its stack, so also of calls that began before anybody asked."""
    frames: dict[int, FrameType] = sys._current_frames()
    mine = frames.pop(threading.get_ident())
    if not frames:
        return False, False
    calls = {inspect.unwrap(getattr(type(obj), name)).__code__: obj for obj, name in methods}
    return _is_in(mine, calls), any(_is_in(frame, calls) for frame in frames.values())


def _is_in(frame: FrameType | None, calls: dict[CodeType, Any]) -> bool:
    try:
        while frame is not None:
            obj = calls.get(frame.f_code)
            if obj is not None and frame.f_locals.get("self") is obj:
                return True
            frame = frame.f_back
    except AttributeError:  # a thread that runs on may leave no frame where one was
        return True
    return False
