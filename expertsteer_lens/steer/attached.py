"""Steering without an end: a plan that is attached to a model, and how it comes off."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from expertsteer_lens.hosts import as_host

if TYPE_CHECKING:
    from .run import PlanRun


_ATTACHED: weakref.WeakKeyDictionary[Any, list[weakref.ref[SteeringHandle]]] = (
    weakref.WeakKeyDictionary()
)
"""Handles by model, in the order in which they were made. Neither is kept alive by this."""


class SteeringHandle:
    """Steering without an end; `.remove()` ends it, once or many times.

    The model owns the steering, as it owns torch hooks: it goes on when the handle is dropped, and
    ends with the model. `detach(model)` removes all of it without a handle."""

    def __init__(self, run: PlanRun) -> None:
        self.report = run.report
        self._stack = ExitStack()
        self._stack.enter_context(run.installed())
        # The hooks on the model hold the run, and through it this handle: so the handle lives as
        # long as its hooks are on, and nothing holds the model.
        run.handle = self
        known = _ATTACHED.setdefault(run.host.model, [])
        known[:] = [one for one in known if one() is not None] + [weakref.ref(self)]

    def remove(self) -> None:
        """Take the hooks off; nothing happens the second time."""
        self._stack.close()

    def __repr__(self) -> str:
        return f"SteeringHandle({self.report!r})"


def detach(model: Any) -> None:
    """Take off everything that `plan.attach(model)` has put on this model, whoever has the handles.

    Edits made by `plan.edit` stay, and so do hooks of yours.

    Args:
        model: the object that was given to `attach`; nothing happens if nothing is attached.
    """
    for reference in _ATTACHED.pop(as_host(model).model, []):
        handle = reference()
        if handle is not None:
            handle.remove()
