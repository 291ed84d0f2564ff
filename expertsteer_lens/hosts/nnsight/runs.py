"""Workers: code that nnsight runs in step with a model, on every pass of a run.

A run is one `trace`, `generate` or `pipe`. Each worker is a nnsight `Mediator`, as the body of a
trace or an edit is, so it is served in turn with the user's own code. It starts over with every run
and ends with it.

There are two kinds. A `worker` is a coroutine with a body of its own; the bodies made here are
nested and name nothing of this package when they run, only nnsight, so nnsight can send them to a
server that has never heard of it. A `Station` is a few plain functions at hook points: it stays on
this machine, and costs a call instead of two switches of coroutines."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from nnsight.intervention.interleaver import Event, Mediator, Pending

from expertsteer_lens.errors import InterventionError
from expertsteer_lens.hosts.blocks import first_argument, first_of, with_first, with_first_argument

CODE = "body(model)"

Body = Callable[[Any], None]
"""What a worker runs; takes the nnsight model."""


def worker(model: Any, body: Body) -> Any:
    """A worker that has not started; put into `model._edits` it runs (anew) in every run of the
    model."""
    source = compile(CODE, "<expertsteer_lens>", "exec")
    return Mediator(source, {}, {"body": body, "model": model}, copy=True, node=ast.parse(CODE))


def following(
    path: str, side: str, fn: Callable[[Any], Any], finish: Callable[[], None] | None = None
) -> Body:
    """At every pass: `fn(activation)` at one side of the module at `path`; what it returns (unless
    None) takes its place.

    Args:
        path: dotted path from the model's root.
        side: "input", "output", or "arguments" (`fn` gets `(args, kwargs)` of the call, to look at
            only).
        fn: called with the activation.
        finish: called when the run has ended by itself (not by an exception, and not by
            `tracer.stop()`).
    """

    def body(model: Any) -> None:
        from nnsight.intervention.interleaver import OutOfOrderError
        from nnsight.intervention.iterator import Iterations

        module = model.get(path) if path else model
        try:
            for _ in Iterations()[:]:
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
        except (
            OutOfOrderError
        ):  # nnsight's word for: the run is over, and this worker still waits for a next pass
            if finish is not None:
                finish()

    return body


Stop = tuple[str, str, Callable[[Any], Any]]
"""A location, which side of its module ("input", "output", or "arguments" to look at the whole
call), and a function that is called there with the activation; what it returns (unless None) takes
its place."""


def location(envoy: Any, side: str) -> str:
    """nnsight's word for one side of a module."""
    return f"{envoy.path}.{'output' if side == 'output' else 'input'}"


class Station(Mediator):
    """Plain functions at one or more hook points, called in turn, pass after pass.

    To nnsight it is a worker that waits at its first stop and, once served there, for the next.
    """

    def __init__(self, stops: Callable[[], list[Stop]], *, twin: Mediator | None = None) -> None:
        """Keep where to stop.

        Args:
            stops: makes the stops of a run, in the order in which a pass reaches them.
            twin: a worker that does the same and is sent to a server in place of this one; None: it
                cannot be sent.
        """
        super().__init__(None, {}, {})
        self._stops, self._twin = stops, twin
        self._run: list[Stop] = []
        self._next = 0

    def start(self, interleaver: Any = None) -> None:
        """Wait for the first stop of a run."""
        self.interleaver, self._run, self._next = interleaver, self._stops(), 0
        self.counts_at_start = {place: interleaver.counts.get(place, 0) for place, *_ in self._run}
        self.pending = Pending(Event.VALUE, self._run[0][0], 0)

    def handle(self, provider: str, value: Any) -> Any:
        """Serve this visit: what the module was given (arguments and keywords), or what it
        returned."""
        batcher, edited = (
            self.interleaver.batcher,
            None,
        )  # the batcher knows which rows of the batch are whose
        own = value if batcher is None else batcher.narrow(value, self.batch_group)
        for _ in self._run:  # once round at most: several stops may be at this location
            _, side, fn = self._run[self._next]
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
            self._next = (self._next + 1) % len(self._run)
            if self._run[self._next][0] != provider:
                break
        place = self._run[self._next][0]
        self.pending = Pending(Event.VALUE, place, self.occurrence(place) + (place == provider))
        if edited is None:
            return value
        return edited if batcher is None else batcher.widen(value, self.batch_group, edited)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._twin is not None:
            return operator.getitem, (
                (self._twin,),
                0,
            )  # the twin, said in words that every Python knows
        raise InterventionError(
            "steering by hooks stays on this machine and cannot be sent with a remote run; use "
            "`handle = plan.edit(as_host(model, remote=...))` instead of plan.hooks, attach or "
            "apply."
        )


def stopping(path: str, keep: list[Any]) -> Body:
    """Keep what enters the module at `path` and end the run there."""

    def body(model: Any) -> None:
        from nnsight.intervention.interleaver import EarlyStopException

        keep.append(model.get(path).input)
        raise EarlyStopException

    return body


def run_in_progress(model: Any) -> bool:
    """Whether a trace (or generate) of this model is being run now."""
    return bool(model.interleaver.interleaving or model.interleaver.mediators)


def current_run() -> Any:
    """The worker whose code is running now (the body of a trace), or None outside of one."""
    from greenlet import getcurrent

    reference = getattr(getcurrent(), "mediator", None)
    return None if reference is None else reference()


def has_joined(caller: Any, mark: Any) -> bool:
    """Whether workers of this mark are at work on the caller's rows of the run."""
    marks = [getattr(one, "expertsteer_mark", None) for one in caller.interleaver.mediators]
    return (mark, caller.batch_group) in marks


def join(caller: Any, workers: list[Any], mark: Any) -> None:
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
