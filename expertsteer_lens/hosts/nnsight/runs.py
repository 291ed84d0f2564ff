"""Workers: code that nnsight runs in step with a model, on every pass of a run.

A run is one `trace`, `generate` or `pipe`. Each worker is a nnsight `Mediator`, as the body of a
trace or an edit is, so it is served in turn with the user's own code. It starts over with every run
and ends with it.

There are two kinds. `worker` makes a coroutine with a body of its own; the bodies made here are
nested and name nothing of this package when they run, only nnsight, so nnsight can send them to a
server that has never heard of it. A `HookWorker` is a few plain functions at hook points: it stays
on this machine, and costs a call instead of two switches of coroutines."""

from __future__ import annotations

import ast
import operator
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from nnsight.intervention.interleaver import Event, Mediator, Pending

from expertsteer_lens.errors import InterventionError
from expertsteer_lens.hosts.blocks import first_argument, first_of, with_first, with_first_argument
from expertsteer_lens.hosts.overrides import calls_through
from expertsteer_lens.hosts.scope import CHANGING_HOOKS
from expertsteer_lens.hosts.turns import who_is_in

CODE = "body(model)"

Body = Callable[[Any], None]
"""What a worker runs; takes the nnsight model."""
CallSide = Literal["arguments", "input", "output"]
HookCall = tuple[str, CallSide, Callable[[Any], Any]]
"""A module (dotted path from the model's root), which side of it, and a function.

At "input" and "output" the function is called with the activation, and what it returns (unless
None) takes its place. At "arguments" it is called with `(args, kwargs)` of the module's call, to
look at only. A tuple and no class of ours, because it may be sent to a server."""


def worker(model: Any, body: Body) -> Any:
    """A worker that has not started; put into `model._edits` it runs (anew) in every run of the
    model."""
    source = compile(CODE, "<expertsteer_lens>", "exec")
    return Mediator(source, {}, {"body": body, "model": model}, copy=True, node=ast.parse(CODE))


def following(
    calls: Callable[[], Sequence[HookCall]], finish: Callable[[], None] | None = None
) -> Body:
    """A body that makes the calls at every pass of a run.

    Args:
        calls: makes the calls of a run, in the order in which a pass reaches them.
        finish: called when the run has ended by itself (not by an exception, and not by
            `tracer.stop()`).
    """

    def body(model: Any) -> None:
        from nnsight.intervention.interleaver import OutOfOrderError
        from nnsight.intervention.iterator import Iterations

        of_run = [(model.get(path) if path else model, side, fn) for path, side, fn in calls()]
        try:
            for _ in Iterations()[:]:
                for module, side, fn in of_run:
                    if side == "arguments":
                        fn(module.inputs)
                    elif side == "input":
                        value = fn(module.input)
                        if value is not None:
                            module.input = value
                    else:
                        output = module.output
                        pair = isinstance(output, tuple)
                        value = fn(output[0] if pair else output)
                        if value is not None:
                            module.output = (value, *output[1:]) if pair else value
        except OutOfOrderError:
            # nnsight's word for: the run is over, and this worker still waits for a next pass.
            if finish is not None:
                finish()

    return body


def one_call(path: str, side: CallSide, fn: Callable[[Any], Any]) -> Callable[[], list[HookCall]]:
    """The calls of a worker that has one; can be sent if `fn` can."""

    def calls() -> Any:
        return [(path, side, fn)]

    return calls


def stopping(path: str, keep: list[Any]) -> Body:
    """Keep what enters the module at `path` and end the run there."""

    def body(model: Any) -> None:
        from nnsight.intervention.interleaver import EarlyStopException

        keep.append(model.get(path).input)
        raise EarlyStopException

    return body


ONE_RUN = (
    "another thread is in a run of nnsight on this model, which takes every pass of the model for "
    "its own; wait for its end, or run the wrapped module in every thread: "
    "model._module.generate(...)."
)


class HookWorker(Mediator):  # type: ignore[misc]  # nnsight has no types
    """Plain functions at one or more hook points, called in turn, pass after pass.

    To nnsight it is a worker that waits at the place of its first call and, once served there, at
    the place of the next.
    """

    def __init__(
        self,
        model: Any,
        calls: Callable[[], Sequence[HookCall]],
        *,
        remote_form: Callable[[], Mediator] | None = None,
    ) -> None:
        """Keep where to call.

        Args:
            model: the nnsight model.
            calls: makes the calls of a run, in the order in which a pass reaches them.
            remote_form: makes a worker that does the same and is sent to a server in place of this
                one; None: it cannot be sent.
        """
        super().__init__(None, {}, {})
        self._model, self._make_calls, self._make_remote_form = model, calls, remote_form
        # Of the run: its thread; nnsight's name of the place, side and function of each call; which
        # is next.
        self._thread: int | None = None
        self._calls: list[tuple[str, CallSide, Callable[[Any], Any]]] = []
        self._next = 0
        self._n_served: Counter[str] = Counter()

    def start(self, interleaver: Any = None) -> None:
        """Wait for the first call of a run."""
        self.interleaver, self._next, self._thread = interleaver, 0, threading.get_ident()
        self._calls = [
            (location(self._model, path, side), side, fn) for path, side, fn in self._make_calls()
        ]
        self.counts_at_start = {
            place: interleaver.counts.get(place, 0) for place, _, _ in self._calls
        }
        self.pending = Pending(Event.VALUE, self._calls[0][0], 0) if self._calls else None
        self._n_served.clear()

    def was_passed_over(self) -> bool:
        """Whether its run went through a place without being served there: a pass of another thread
        was counted as one of the run, so that this one waited for a later one."""
        return self._thread == threading.get_ident() and any(
            self.occurrence(place) > self._n_served[place] for place, _, _ in self._calls
        )

    def handle(self, provider: str, value: Any) -> Any:
        """Serve this visit: what the module was given (arguments and keywords), or what it
        returned."""
        if self._thread != threading.get_ident():
            raise InterventionError(ONE_RUN)
        batcher = self.interleaver.batcher  # knows which rows of the batch are whose
        own = value if batcher is None else batcher.narrow(value, self.batch_group)
        edited = None
        for _ in self._calls:  # once round at most: several calls may be at this place
            _, side, fn = self._calls[self._next]
            if side == "arguments":
                fn(own)
            elif side == "input":
                args, kwargs = own
                changed = fn(first_argument(args, kwargs))
                if changed is not None:
                    own = edited = with_first_argument(args, kwargs, changed)
            else:
                changed = fn(first_of(own))
                if changed is not None:
                    own = edited = with_first(own, changed)
            self._next = (self._next + 1) % len(self._calls)
            if self._calls[self._next][0] != provider:
                break
        self._n_served[provider] += 1
        place = self._calls[self._next][0]
        self.pending = Pending(Event.VALUE, place, self.occurrence(place) + (place == provider))
        if edited is None:
            return value
        return edited if batcher is None else batcher.widen(value, self.batch_group, edited)

    def __deepcopy__(self, memo: dict[int, Any]) -> HookWorker:
        """On a copy of the model, which is another model, it does nothing."""
        return HookWorker(None, list)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._make_remote_form is None:
            raise InterventionError(
                "steering by hooks stays on this machine and cannot be sent with a remote run; use "
                "`handle = plan.edit(as_host(model, remote=...))` instead of plan.hooks, attach or "
                "apply."
            )
        # What is unpickled is `(remote_form,)[0]`, the remote form itself: an expression of
        # builtins alone, which every Python can evaluate.
        return operator.getitem, ((self._make_remote_form(),), 0)


def location(model: Any, path: str, side: CallSide) -> str:
    """nnsight's name for one side of a module of the model."""
    module = model.get(path) if path else model
    return f"{module.path}.{'output' if side == 'output' else 'input'}"


def is_in_run(model: Any, *, unknown: bool) -> bool:
    """Whether this thread is in a trace (or generate) of the model.

    Args:
        model: the nnsight model.
        unknown: what to say of a run that began before anybody looked whose it is.
    """
    if not (model.interleaver.interleaving or model.interleaver.mediators):
        return False
    runs = _RUNS.get(model)
    if runs is None or runs.thread is None:
        return unknown
    return runs.thread == threading.get_ident()


@contextmanager
def one_at_a_time(model: Any, *, for_edits: bool = False) -> Iterator[None]:
    """Inside the block, runs of the model in several threads do not overlap.

    nnsight keeps the state of one run: where two overlap, the end of one takes the workers of the
    other away. What is called while a run is under way nnsight takes for a part of it, and
    `HookWorker` refuses it. `for_edits`: what is called so and outlasts that run is refused too,
    as it must be where only runs are steered (edits).
    """
    with CHANGING_HOOKS:
        if model not in _RUNS:
            _RUNS[model] = _OneAtATime(model)
        runs = _RUNS[model]
    with calls_through(model, "interleave", runs.run), ExitStack() as stack:
        if for_edits:
            stack.enter_context(calls_through(model._module, "generate", runs.generate))
        yield


class _OneAtATime:
    """The runs of one model, each of which goes through nnsight's `interleave`."""

    def __init__(self, model: Any) -> None:
        self.thread: int | None = None
        """That is in a run."""
        self._has_inner = False
        self._model = weakref.ref(model)
        self._lock = threading.RLock()

    def run(self, interleave: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run the model, alone."""
        with self._lock:
            before, self.thread = self.thread, threading.get_ident()
            try:
                if before is None and self._is_in_a_run():
                    raise InterventionError(ONE_RUN)
                return self._run_whole(interleave, *args, **kwargs)
            finally:
                self.thread = before

    def generate(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """A `generate` of the wrapped module. The nnsight model that finds another thread in a run
        calls it as a part of that run; once that has ended, nobody would steer what is left."""
        if self.thread != threading.get_ident() and self._is_called_by_the_model():
            raise InterventionError(ONE_RUN)
        return call(*args, **kwargs)

    def _is_called_by_the_model(self) -> bool:
        model, frame = self._model(), sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name == "generate" and frame.f_locals.get("self") is model:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False

    def _run_whole(self, interleave: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        those = [*model._edits, *model.interleaver.mediators]
        workers = [one for one in those if isinstance(one, HookWorker)]
        self._has_inner = False
        result = interleave(*args, **kwargs)
        # A session runs the model in runs inside its own, which are looked at by themselves.
        passed_over = not self._has_inner and any(one.was_passed_over() for one in workers)
        self._has_inner = True
        if passed_over:
            raise InterventionError(ONE_RUN)
        return result

    def _is_in_a_run(self) -> bool:
        """Whether a run is under way that began before anybody counted; nnsight notes that it runs
        only after it has made the workers of the run."""
        model: Any = self._model()
        return model.interleaver.interleaving or who_is_in([(model, "interleave")])[1]


_RUNS: weakref.WeakKeyDictionary[Any, _OneAtATime] = weakref.WeakKeyDictionary()


def current_worker() -> Any:
    """The worker whose code is running now (the body of a trace), or None outside of one."""
    from greenlet import getcurrent

    reference = getattr(getcurrent(), "mediator", None)
    return None if reference is None else reference()


def has_joined(caller: Any, mark: Any) -> bool:
    """Whether workers of this mark are at work on the caller's rows of the run."""
    marks = [getattr(one, "expertsteer_mark", None) for one in caller.interleaver.mediators]
    return (mark, caller.batch_group) in marks


def join(caller: Any, workers: Sequence[Any], mark: Any) -> None:
    """Start workers in the caller's run, before it in turn and on its rows.

    Served before the code that called, they have changed an activation by the time it is read
    there."""
    run = caller.interleaver
    for new in workers:
        new.batch_group = caller.batch_group
        new.expertsteer_mark = (mark, caller.batch_group)
        run.mediators.insert(run.mediators.index(caller), new)
        new.start(run)
    run.reindex()
