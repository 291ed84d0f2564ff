"""When `generate` of a model begins and ends, and its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .overrides import Around, calls_through, is_stream
from .parts import Observer
from .scope import Scope

GENERATE_NAMES = ("generate", "generate_stream", "hf_generate")
PACKED_NAMES = ("generate_batch", "init_continuous_batching")
PREPARE_NAMES = ("prepare_inputs_for_generation",)
"""What transformers' own generate calls before each pass that it runs."""

Noting = Callable[[Sequence[Any], Mapping[str, Any]], AbstractContextManager[None]]
"""Tells an observer of a call with these arguments, for as long as it goes on."""


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
                    around = _observed(_noting(obj, name, observer, scope), is_stream(obj, name))
                    stack.enter_context(calls_through(obj, name, around))
        yield


def _observed(noting: Noting, is_stream: bool) -> Around:
    def call_noted(call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        with noting(args, kwargs):
            return call(*args, **kwargs)

    def stream_noted(call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with noting(args, kwargs):
            yield from call(*args, **kwargs)

    return stream_noted if is_stream else call_noted


def _noting(obj: Any, name: str, observer: Observer, scope: Scope) -> Noting:
    # Only transformers' own generate runs its prompt in chunks, or with an assistant's guesses.
    reads_prompt = name == "generate" and hasattr(type(obj), PREPARE_NAMES[0])

    @contextmanager
    def noting(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
        if not scope():
            yield
        elif name in PREPARE_NAMES:
            yield
            observer.on_prepare()
        elif name in PACKED_NAMES:
            observer.on_packed(kwargs)
            yield
        else:
            observer.on_generate(True, _prompt_mask(args, kwargs) if reads_prompt else None)
            try:
                yield
            finally:
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
