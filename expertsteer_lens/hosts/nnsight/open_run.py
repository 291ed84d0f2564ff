"""The user's own run, seen from the code that is executing in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from expertsteer_lens.hosts.parts import EditFn
from expertsteer_lens.hosts.pass_arguments import read_pass
from expertsteer_lens.interventions.clock import ForwardInfo

from . import runs

if TYPE_CHECKING:
    from .host import NNsightHost


class OpenRun:
    """The run whose code is executing now, seen from that code: a plan may join it."""

    def __init__(self, host: NNsightHost, caller: Any) -> None:
        self._host, self._caller = host, caller

    def has_joined(self, mark: Any) -> bool:
        """Whether functions of this mark are at work on the caller's rows of the run."""
        return runs.has_joined(self._caller, mark)

    def has_begun(self) -> bool:
        """Whether the caller has seen the model run, or is in a loop over later steps."""
        start = runs.location(self._host.model, self._host.blocks.base, "input")
        return bool(self._caller.occurrence(start)) or self._caller.iteration not in (0, None)

    def join(
        self,
        on_forward: Callable[[ForwardInfo], None],
        fns: Mapping[str, EditFn],
        *,
        finish: Callable[[], None],
        mark: Any,
    ) -> None:
        """Call functions at their hook points in this run, on the caller's rows and before its own
        code.

        Args:
            on_forward: called before the first block of every pass.
            fns: by hook name.
            finish: called when the run has ended by itself.
            mark: see `has_joined`.
        """
        host, model = self._host, self._host.model
        names = host.decoder_arguments()
        counts: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

        def note(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
            args, kwargs = inputs
            info = read_pass(names, args, kwargs, counts)
            if info is not None:
                on_forward(info)

        # A coroutine of its own, because only that hears of the end of the run.
        watching = runs.following(runs.one_call(host.blocks.base, "arguments", note), finish)
        workers = [runs.worker(model, watching)]
        for call in host._calls_at(host._checked(fns)):
            workers.append(runs.HookWorker(model, runs.one_call(*call)))
        runs.join(self._caller, workers, mark)
