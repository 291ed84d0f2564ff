"""When `generate` of a model begins and ends, and its steps."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from expertsteer_lens.errors import InterventionError

from .overrides import Around, calls_through, is_stream
from .parts import Observer
from .scope import Scope

GENERATE_NAMES = ("generate", "generate_stream", "hf_generate")
PACKED_NAMES = ("generate_batch", "init_continuous_batching")
KEPT_MANAGER = "_cached_continuous_batching_manager"
"""Where a model keeps the manager of an earlier `generate_batch(persistent_manager=True)`."""
PREPARE_NAMES = ("prepare_inputs_for_generation",)
"""What transformers' own generate calls before each pass that it runs."""

Noting = Callable[[Sequence[Any], Mapping[str, Any]], AbstractContextManager[bool]]
"""Tells an observer of a call with these arguments, for as long as it goes on, unless the call is
none of its scope."""


@contextmanager
def watch_generate(objects: Sequence[Any], observer: Observer, *, scope: Scope) -> Iterator[None]:
    """Report the beginning and end of every `generate` call on `objects` to `observer`, and its
    steps.

    By their shapes, uncached generation and one-token prompts look like a series of unrelated
    passes, so the call itself is noted."""
    with ExitStack() as stack:
        for obj in objects:
            for name in (*GENERATE_NAMES, *PACKED_NAMES, *PREPARE_NAMES):
                if callable(getattr(type(obj), name, None)):
                    around = _observed(obj, name, observer, _noting(obj, name, observer, scope))
                    stack.enter_context(calls_through(obj, name, around))
        yield


def _observed(obj: Any, name: str, observer: Observer, noting: Noting) -> Around:
    parameters = list(inspect.signature(getattr(obj, name)).parameters)
    streamer_at = parameters.index("streamer") if "streamer" in parameters else None

    def call_noted(call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        with noting(args, kwargs) as watched:
            if watched and name in GENERATE_NAMES:
                args, kwargs = _streamed_aside(args, kwargs, streamer_at, observer)
            return call(*args, **kwargs)

    def stream_noted(call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with noting(args, kwargs) as watched, contextlib.closing(call(*args, **kwargs)) as items:
            for item in items:
                with observer.aside() if watched else nullcontext():
                    yield item

    return stream_noted if is_stream(obj, name) else call_noted


def _streamed_aside(
    args: tuple[Any, ...], kwargs: dict[str, Any], at: int | None, observer: Observer
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, with a streamer whose own passes are told from those of the call."""
    if kwargs.get("streamer") is not None:
        return args, {**kwargs, "streamer": _AsideStreamer(kwargs["streamer"], observer)}
    if at is not None and at < len(args) and args[at] is not None:
        return (*args[:at], _AsideStreamer(args[at], observer), *args[at + 1 :]), kwargs
    return args, kwargs


class _AsideStreamer:
    """A streamer, whose methods may run the model themselves: such a pass is of no generate call
    that is open."""

    def __init__(self, streamer: Any, observer: Observer) -> None:
        self._streamer, self._observer = streamer, observer

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._streamer, name)
        if not callable(found):
            return found

        def called(*args: Any, **kwargs: Any) -> Any:
            """The streamer's own method."""
            with self._observer.aside():
                return found(*args, **kwargs)

        return called


def _noting(obj: Any, name: str, observer: Observer, scope: Scope) -> Noting:
    # Only transformers' own generate runs its prompt in chunks, or with an assistant's guesses.
    reads_prompt = name == "generate" and hasattr(type(obj), PREPARE_NAMES[0])

    @contextmanager
    def noting(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[bool]:
        if not scope():
            yield False
        elif name in PREPARE_NAMES:
            yield True
            observer.on_prepare()
        elif name in PACKED_NAMES:
            observer.on_packed(kwargs, getattr(obj, KEPT_MANAGER, None))
            yield True
        else:
            observer.on_generate(True, _prompt_mask(args, kwargs) if reads_prompt else None)
            try:
                yield True
            except BaseException:
                with contextlib.suppress(InterventionError):  # the first error is the one to tell
                    observer.on_generate(False)
                raise
            observer.on_generate(False)

    return noting


def _prompt_mask(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Real tokens of the prompt `[rows, pos]` that a transformers `generate` call is given; None if
    it does not say."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.bool()
    for value in (
        kwargs.get("inputs_embeds"),
        kwargs.get("input_ids"),
        kwargs.get("inputs"),
        *args[:1],
    ):
        if isinstance(value, Tensor) and value.ndim >= 2:
            return torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
    return None
