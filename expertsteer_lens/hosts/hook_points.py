"""Hook points of TransformerLens: functions put on them, and taken off again exactly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from .compiled import eager_where_compiled
from .pass_tracking import is_copy
from .scope import CHANGING_HOOKS, Scope, scope_or_new

Function = Callable[[Tensor], Tensor | None]


@contextmanager
def functions_at(
    model: Any, fns: Mapping[str, Function], *, scope: Scope | None = None
) -> Iterator[HookPoints]:
    """Put each function at its hook point of `model`, in order, until the end of the block; they
    are called in passes of the scope."""
    points, registered = model.hook_dict, HookPoints(model)
    with ExitStack() as stack:
        stack.enter_context(eager_where_compiled(model))
        acts = stack.enter_context(scope_or_new(scope))
        for name, fn in fns.items():
            handle = _add_hook(points[name], fn, acts)
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
        with CHANGING_HOOKS:  # other threads put theirs on and off the same points
            return [
                name
                for name, point, handle in self.entries
                if not _is_there(point, handle)
                or (points is not None and points.get(name) is not point)
            ]


def _add_hook(point: Any, fn: Function, acts: Scope) -> Any:
    """Register at the hook point and return its handle (`add_hook` returns None before
    TransformerLens 4.3)."""
    with CHANGING_HOOKS:
        before = {id(h) for h in point.fwd_hooks}
        point.add_hook(lambda tensor, hook: fn(tensor) if acts() else None, dir="fwd")
        handle = next(h for h in point.fwd_hooks if id(h) not in before)
        # What TransformerLens registers hands on the hook point that it was made for, on a copy of
        # it too; only torch says which of the two is running.
        full_hook = point._forward_hooks[handle.hook.id]

        @functools.wraps(full_hook)
        def on_this(module: Any, args: Any, output: Any) -> Any:
            return None if is_copy(module, point) else full_hook(module, args, output)

        point._forward_hooks[handle.hook.id] = on_this
        return handle


def _remove_hook(point: Any, handle: Any) -> None:
    """Take off this handle and nothing else; harmless if somebody did already."""
    with CHANGING_HOOKS:
        handle.hook.remove()
        point.fwd_hooks[:] = [h for h in point.fwd_hooks if h is not handle]


def _is_there(point: Any, handle: Any) -> bool:
    return any(h is handle for h in point.fwd_hooks) and handle.hook.id in point._forward_hooks
