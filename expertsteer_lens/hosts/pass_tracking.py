"""Watching a model from outside: where each forward pass is in its sequence, and when `generate`
begins and ends."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from expertsteer_lens.errors import InterventionError
from expertsteer_lens.interventions.positions import ForwardInfo

from .parts import Observer

CACHE_NAMES = ("past_key_values", "cache", "cache_params")
"""What decoders of transformers call their cache: it became `cache` in 5.24, and is `cache_params`
in recurrent models."""
GENERATE_NAMES = ("generate", "generate_stream", "hf_generate")

_CACHED_TOKENS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""Tokens given so far to caches that do not count them (those of recurrent models), as seen by the
watchers of this process."""


@contextmanager
def watch_causal_module(
    module: nn.Module, observer: Observer, *, root: nn.Module
) -> Iterator[None]:
    """Report every call of a Hugging Face causal model's decoder to `observer`.

    Ids, mask and cache are read from the call's own arguments, so nothing has to be guessed: the
    number of cached tokens is the cache's own. Where the decoder is given its mask in a form that
    hides the padding, the mask is the one that the whole model, `root`, was given."""
    names = parameter_names(module)
    root_mask: Tensor | None = None
    total = 0

    def enters_root(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal root_mask
        mask = kwargs.get("attention_mask")
        root_mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def enters(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal total
        if is_measured(module):
            return
        info = describe_pass(names, args, kwargs, _CACHED_TOKENS)
        if info is None:
            return
        total = info.past + info.n_new
        whole = (info.batch, total)
        if info.opaque_mask and root_mask is not None and root_mask.shape == whole:
            info = info.with_mask(root_mask)
        observer.on_forward(info)

    def leaves(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Noted at the end of the pass, so that two watchers of one pass read the same number at its
        # beginning and note the same number here.
        if not is_measured(module):
            note_cached(names, args, kwargs, _CACHED_TOKENS, total)

    with ExitStack() as stack:
        if root is not module:
            stack.callback(root.register_forward_pre_hook(enters_root, with_kwargs=True).remove)
        stack.callback(module.register_forward_pre_hook(enters, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(leaves, with_kwargs=True).remove)
        yield


_MEASURED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def measuring(module: nn.Module) -> Iterator[None]:
    """Inside the block, passes of the module are measurements of our own and no part of anybody's
    sequence: no observer hears of them."""
    if module in _MEASURED:
        yield
        return
    _MEASURED.add(module)
    try:
        yield
    finally:
        _MEASURED.discard(module)


def is_measured(module: nn.Module) -> bool:
    """Whether a pass of the module would be a measurement of our own; see `measuring`."""
    return module in _MEASURED


def parameter_names(module: nn.Module) -> list[str]:
    """What the positional arguments of a module's `forward` are called; wrappers of it may or may
    not show `self`."""
    return [name for name in inspect.signature(module.forward).parameters if name != "self"]


def describe_pass(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], counts: Mapping[Any, int]
) -> ForwardInfo | None:
    """What a decoder's arguments say about the pass; None if they hold no tokens, or stand-ins
    without values.

    Args:
        names: of the positional arguments.
        args: positional arguments.
        kwargs: keyword arguments.
        counts: tokens in caches that do not count them themselves.

    Raises:
        InterventionError: the cache does not count its tokens, and was filled before anybody
            watched.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    ids = given.get("input_ids")
    tokens = ids if ids is not None else given.get("inputs_embeds")
    if not isinstance(tokens, Tensor):
        tokens = next((a for a in args if isinstance(a, Tensor)), None)
    if tokens is None or is_stand_in(tokens):
        return None
    mask = given.get("attention_mask")
    is_plain = isinstance(mask, Tensor) and mask.ndim == 2
    return ForwardInfo(
        batch=tokens.shape[0],
        n_new=tokens.shape[1],
        past=_cached_tokens(_find_cache(given), counts),
        attention_mask=mask if is_plain else None,
        input_ids=ids if isinstance(ids, Tensor) else None,
        opaque_mask=mask is not None and not is_plain,
    )


def note_cached(
    names: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    counts: MutableMapping[Any, int],
    total: int,
) -> None:
    """Note that the cache in these arguments holds `total` tokens after the pass, unless it counts
    them itself."""
    cache = _find_cache({**dict(zip(names, args, strict=False)), **kwargs})
    if hasattr(cache, "get_seq_length") and not _counts_itself(cache):
        counts[cache] = total


def read_pass(
    names: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    counts: MutableMapping[Any, int],
) -> ForwardInfo | None:
    """`describe_pass` for one that reads each pass once and keeps `counts` for itself."""
    info = describe_pass(names, args, kwargs, counts)
    if info is not None:
        note_cached(names, args, kwargs, counts, info.past + info.n_new)
    return info


def _find_cache(given: Mapping[str, Any]) -> Any:
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def _counts_itself(cache: Any) -> bool:
    try:
        cache.get_seq_length()
    except ValueError:
        return False
    return True


def _cached_tokens(cache: Any, counts: Mapping[Any, int]) -> int:
    """Tokens in a cache before a pass."""
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        try:  # the tuple-of-tuples form of older transformers: keys are [batch, heads, pos, d_head]
            return int(cache[0][0].shape[-2])
        except (TypeError, IndexError, AttributeError):
            return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # states of a recurrent model, which have no length
        pass
    past = counts.get(cache, 0)
    filled = getattr(cache, "has_previous_state", False)
    if past == 0 and (filled() if callable(filled) else filled):
        raise InterventionError(
            f"the {type(cache).__name__} given does not say how many tokens it holds, and it was "
            "filled before steering was on; start steering before the prompt is run."
        )
    return past


def prompt_mask(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
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


def is_stand_in(tensor: Tensor) -> bool:
    """Whether this is a fake tensor, with a shape and no values (nnsight's `scan` runs a model on
    them)."""
    kind = type(tensor)
    return kind is not Tensor and "FakeTensor" in (cls.__name__ for cls in kind.__mro__)


@contextmanager
def watch_generate(objects: Sequence[Any], observer: Observer) -> Iterator[None]:
    """Report the beginning and end of every `generate` call on `objects` to `observer`.

    By their shapes, uncached generation and one-token prompts look like a series of unrelated
    passes, so the call itself is noted, by a wrapper that lives on the instance only as long
    as somebody watches."""
    with ExitStack() as stack:
        for obj in objects:
            for name in GENERATE_NAMES:
                if callable(getattr(type(obj), name, None)):
                    stack.enter_context(_observed_calls(obj, name, observer))
        yield


_OBSERVERS = "_expertsteer_observers"


@contextmanager
def _observed_calls(obj: Any, name: str, observer: Observer) -> Iterator[None]:
    current = obj.__dict__.get(name)
    if current is None or not hasattr(current, _OBSERVERS):
        wrapper = _wrap_calls(obj, name, current)
        obj.__dict__[name] = wrapper
        current = wrapper
    observers: list[Observer] = getattr(current, _OBSERVERS)
    observers.append(observer)
    try:
        yield
    finally:
        observers[:] = [o for o in observers if o is not observer]
        # If somebody wrapped ours meanwhile, it stays inside theirs and merely passes calls on.
        if not observers and obj.__dict__.get(name) is current:
            previous = current.__wrapped_instance_attribute__
            if previous is None:
                del obj.__dict__[name]
            else:
                obj.__dict__[name] = previous


def _wrap_calls(obj: Any, name: str, previous: Callable[..., Any] | None) -> Any:
    original = previous if previous is not None else getattr(type(obj), name).__get__(obj)
    observers: list[Observer] = []

    # Only transformers' own generate runs its prompt in chunks, or with an assistant's guesses.
    reads_prompt = name == "generate" and hasattr(type(obj), "prepare_inputs_for_generation")

    @contextlib.contextmanager
    def noting(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
        watching = list(observers)  # those who were there when the call began hear of its end
        prompt = prompt_mask(args, kwargs) if reads_prompt else None
        for observer in watching:
            observer.on_generate(True, prompt)
        try:
            yield
        finally:
            for observer in watching:
                observer.on_generate(False)

    if inspect.isgeneratorfunction(inspect.unwrap(original)):

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            with noting(args, kwargs):
                yield from original(*args, **kwargs)
    else:

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            with noting(args, kwargs):
                return original(*args, **kwargs)

    call.__dict__[_OBSERVERS] = observers
    call.__dict__["__wrapped_instance_attribute__"] = previous
    return call
