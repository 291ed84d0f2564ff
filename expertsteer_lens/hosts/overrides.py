"""A method of one object, called through functions of ours for as long as somebody needs it."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .scope import CHANGING_HOOKS

Around = Callable[..., Any]
"""Takes what it stands around (to call it, or not to) and the arguments of the call, returns the
result."""


@contextmanager
def calls_through(obj: Any, name: str, around: Around) -> Iterator[None]:
    """Inside the block, calls of the method `name` of this object go through `around`.

    The one added last is called first. One that several blocks add is called once, until the last
    of those blocks has ended; blocks may end in any order. If somebody has put a function of his
    own over the method meanwhile, that stays where it is. A copy of the object, and an object read
    from a pickle, has the method as it was.

    Args:
        obj: the object; the method of its class is left alone.
        name: of the method.
        around: called as `around(call, *args, **kwargs)`.

    Example:
        >>> class Speaker:
        ...     def say(self, word):
        ...         return word
        >>> speaker = Speaker()
        >>> with calls_through(speaker, "say", lambda call, word: call(word.upper())):
        ...     speaker.say("sun")
        'SUN'
        >>> speaker.say("sun")
        'sun'
    """
    with CHANGING_HOOKS:
        placed = obj.__dict__.get(name)
        if not isinstance(placed, _Override):
            placed = obj.__dict__[name] = _Override(obj, name)
        placed.arounds = (*placed.arounds, around)
    try:
        yield
    finally:
        with CHANGING_HOOKS:
            placed.discard(around)


def is_stream(obj: Any, name: str) -> bool:
    """Whether the method returns an iterator before it has done anything."""
    return inspect.isgeneratorfunction(inspect.unwrap(getattr(obj, name)))


class _Override:
    """What is in an object's `__dict__` in place of a method of its class, or of the function that
    was there before."""

    def __init__(self, obj: Any, name: str) -> None:
        self.__doc__, self.__name__ = getattr(obj, name).__doc__, name
        self.arounds: tuple[Around, ...] = ()
        self._obj, self._name, self._previous = obj, name, obj.__dict__.get(name)
        self._is_stream = is_stream(obj, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method, through those who are there when it begins."""
        return self._steps(args, kwargs) if self._is_stream else self._through(args, kwargs)

    def _through(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        call = self.__wrapped__
        for around in dict.fromkeys(self.arounds):
            call = functools.partial(around, call)
        return call(*args, **kwargs)

    def _steps(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
        yield from self._through(args, kwargs)  # begins with its first step

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        if self._previous is not None:
            found: Callable[..., Any] = self._previous
            return found
        # Looked up at every call: the method of the class may be replaced meanwhile.
        return types.MethodType(getattr(type(self._obj), self._name), self._obj)

    def discard(self, around: Around) -> None:
        """Take one off, and with the last of them this object itself, unless somebody has wrapped
        it meanwhile: then it stays inside theirs and passes calls on."""
        last = max(i for i, one in enumerate(self.arounds) if one == around)
        self.arounds = self.arounds[:last] + self.arounds[last + 1 :]
        own = self._obj.__dict__
        if self.arounds or own.get(self._name) is not self:
            return
        if self._previous is None:
            del own[self._name]
        else:
            own[self._name] = self._previous

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """On a copy of the object, which is another one: its own method."""
        if self._previous is not None:
            return copy.deepcopy(self._previous, memo)  # which may be one of ours too
        copied = copy.deepcopy(self._obj, memo)
        return types.MethodType(getattr(type(copied), self._name), copied)

    def __reduce__(self) -> Any:
        if self._previous is not None:
            return operator.getitem, ((self._previous,), 0)
        return getattr, (
            self._obj,
            self._name,
        )  # as Python writes a method; nothing is over it there
