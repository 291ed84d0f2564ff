"""Hook points of TransformerLens: functions put on them, and taken off again exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

Function = Callable[[Tensor], Tensor | None]


@contextmanager
def functions_at(model: Any, fns: Mapping[str, Function]) -> Iterator[HookPoints]:
    """Put each function at its hook point of `model`, in order, until the end of the block."""
    points, registered = model.hook_dict, HookPoints(model)
    with ExitStack() as stack:
        for name, fn in fns.items():
            handle = _add_hook(points[name], fn)
            stack.callback(_remove_hook, points[name], handle)
            registered.entries.append((name, points[name], handle))
        yield registered


class HookPoints:
    """The hooks of one `intervene` call."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.entries: list[tuple[str, Any, Any]] = []
        """Hook name, hook point and handle."""

    def lost(self, *, thorough: bool = True) -> list[str]:
        """See `Registration`."""
        # A Bridge builds its hook_dict anew each time it is asked, about a millisecond: not on
        # every pass.
        points = self.model.hook_dict if thorough else None
        return [
            name
            for name, point, handle in self.entries
            if not _is_there(point, handle)
            or (points is not None and points.get(name) is not point)
        ]


def _add_hook(point: Any, fn: Function) -> Any:
    """Register at the hook point and return its handle (`add_hook` returns None before
    TransformerLens 4.3)."""
    before = {id(h) for h in point.fwd_hooks}
    point.add_hook(lambda tensor, hook: fn(tensor), dir="fwd")
    return next(h for h in point.fwd_hooks if id(h) not in before)


def _remove_hook(point: Any, handle: Any) -> None:
    """Take off this handle and nothing else; harmless if somebody did already."""
    handle.hook.remove()
    point.fwd_hooks[:] = [h for h in point.fwd_hooks if h is not handle]


def _is_there(point: Any, handle: Any) -> bool:
    return any(h is handle for h in point.fwd_hooks) and handle.hook.id in point._forward_hooks
