"""Watching a model from outside: where each forward pass is in its sequence, and when `generate`
begins and ends."""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from expertsteer_lens.errors import InterventionError
from expertsteer_lens.interventions.positions import ForwardInfo, SequenceToken

from .parts import Observer
from .scope import CHANGING_HOOKS, Scope

CACHE_NAMES = ("past_key_values", "cache", "cache_params")
"""What decoders of transformers call their cache: it became `cache` in 5.24, and is `cache_params`
in recurrent models."""
GENERATE_NAMES = ("generate", "generate_stream", "hf_generate")

PACKED_NAMES = ("generate_batch", "init_continuous_batching")
PREPARE_NAMES = ("prepare_inputs_for_generation",)
"""What transformers' own generate calls before each pass that it runs."""

_CACHED_TOKENS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""Tokens given so far to caches that do not count them (those of recurrent models), as seen by the
watchers of this process."""

_SEQUENCES: weakref.WeakKeyDictionary[Any, SequenceToken] = weakref.WeakKeyDictionary()
"""By cache: the sequence that is in it."""


@contextmanager
def watch_causal_module(
    module: nn.Module, observer: Observer, *, root: nn.Module, scope: Scope
) -> Iterator[None]:
    """Report every call of a Hugging Face causal model's decoder to `observer`.

    Ids, mask and cache are read from the call's own arguments, so nothing has to be guessed: the
    number of cached tokens is the cache's own, and a pass on top of a cache belongs to the sequence
    that is in it, whatever ran between. Where the decoder is given its mask in a form that hides
    the padding, the mask is the one that the whole model, `root`, was given."""
    names = parameter_names(module)
    measured_before = n_measuring(module)
    # Per thread, what is known of the pass that it runs: the mask of the root; the tokens and the
    # sequence.
    now = _PerThread()

    # torch says that a hook takes keywords a moment after it is on, and takes that back a moment
    # before it is off: a call without them is a pass of another thread that began meanwhile.
    def enters_root(m: nn.Module, args: Any, kwargs: Any = None) -> None:
        mask = None if kwargs is None else kwargs.get("attention_mask")
        now.root_mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def enters(m: nn.Module, args: Any, kwargs: Any = None) -> None:
        now.pass_ = None
        if kwargs is None or n_measuring(module) > measured_before or is_copy(m, module):
            return
        if not scope():
            scope.n_elsewhere += 1
            return
        info = describe_pass(names, args, kwargs, _CACHED_TOKENS)
        if info is None:
            return
        cache = find_cache(names, args, kwargs)
        info.sequence = _sequence_in(cache, info.past)
        info.fills_cache = info.past == 0 and (cache is not None or kwargs.get("use_cache") is True)
        total = info.past + info.n_new
        now.pass_ = (total, info.sequence)
        if (
            info.opaque_mask
            and now.root_mask is not None
            and now.root_mask.shape
            == (
                info.batch,
                total,
            )
        ):
            info = info.with_mask(now.root_mask)
        observer.on_forward(info)

    def leaves(m: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        # Noted at the end of the pass, so that two watchers of one pass read the same number at its
        # beginning and note the same number here.
        if (
            now.pass_ is None
            or output is None
            or n_measuring(module) > measured_before
            or is_copy(m, module)
        ):
            return
        total, sequence = now.pass_
        now.pass_ = None
        note_cached(names, args, kwargs, _CACHED_TOKENS, total)
        # A pass that was given no cache may have made one.
        made = next((getattr(output, n, None) for n in CACHE_NAMES if hasattr(output, n)), None)
        if sequence is not None and _is_followed(made) and made not in _SEQUENCES:
            _SEQUENCES[made] = sequence

    with ExitStack() as stack:
        with CHANGING_HOOKS:
            handles = [
                module.register_forward_pre_hook(enters, with_kwargs=True),
                module.register_forward_hook(leaves, with_kwargs=True),
            ]
            if root is not module:
                handles.append(root.register_forward_pre_hook(enters_root, with_kwargs=True))
        for handle in handles:
            stack.callback(remove_handle, handle)
        yield


class _PerThread(threading.local):
    root_mask: Tensor | None = None
    pass_: tuple[int, SequenceToken | None] | None = None


def remove_handle(handle: Any) -> None:
    """Take a torch hook off."""
    with CHANGING_HOOKS:
        handle.remove()


def is_copy(module: nn.Module, original: nn.Module) -> bool:
    """Whether a hook that was put on `original` is called on a copy of it (`copy.deepcopy`), which
    is another model. The replicas of `nn.DataParallel` are not: they run its passes."""
    return module is not original and not getattr(module, "_is_replica", False)


def _is_followed(cache: Any) -> bool:
    return hasattr(cache, "get_seq_length") and type(cache).__hash__ is not None


def _sequence_in(cache: Any, past: int) -> SequenceToken | None:
    """What stands for the sequence that is in the cache; None without one. An empty cache begins a
    new one."""
    if not _is_followed(cache):
        return SequenceToken() if cache is None and past == 0 else None
    try:
        if past == 0 or cache not in _SEQUENCES:
            _SEQUENCES[cache] = SequenceToken()
        return _SEQUENCES[cache]
    except TypeError:  # a cache that cannot be referred to weakly
        return None


_MEASURED: ContextVar[tuple[int, ...]] = ContextVar("expertsteer_measured", default=())


@contextmanager
def measuring(module: nn.Module) -> Iterator[None]:
    """Inside the block, passes of the module in this thread are measurements of our own and no part
    of anybody's sequence: no observer hears of them."""
    token = _MEASURED.set((*_MEASURED.get(), id(module)))
    try:
        yield
    finally:
        _MEASURED.reset(token)


def n_measuring(module: nn.Module) -> int:
    """How many `measuring` blocks of the module this thread is in. An observer takes no part in
    passes of blocks that were opened after it; one that a measurement itself has put on does."""
    return _MEASURED.get().count(id(module))


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
    packed = None if is_plain else _packed_positions(given, tokens)
    if packed is not None:
        return ForwardInfo(tokens.shape[0], tokens.shape[1], packed=packed)
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


def _packed_positions(given: Mapping[str, Any], tokens: Tensor) -> Tensor | None:
    """Where each token is in its own sequence `[1, pos]`, if the row is made of several (continuous
    batching, padding-free training); None for a row of one."""
    index = given.get("position_ids")
    if not isinstance(index, Tensor) or index.shape != tokens.shape[:2] or tokens.shape[0] != 1:
        return None
    if given.get("cu_seq_lens_q") is None and bool((index[:, 1:] == index[:, :-1] + 1).all()):
        return None
    return index


def find_cache(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The cache among a decoder's arguments; None if there is none."""
    return _find_cache({**dict(zip(names, args, strict=False)), **kwargs})


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
def watch_generate(objects: Sequence[Any], observer: Observer, *, scope: Scope) -> Iterator[None]:
    """Report the beginning and end of every `generate` call on `objects` to `observer`, and its
    steps.

    By their shapes, uncached generation and one-token prompts look like a series of unrelated
    passes, so the call itself is noted, by a wrapper that lives on the instance only as long
    as somebody watches."""
    with ExitStack() as stack:
        for obj in objects:
            for name in (*GENERATE_NAMES, *PACKED_NAMES, *PREPARE_NAMES):
                if callable(getattr(type(obj), name, None)):
                    stack.enter_context(_observed_calls(obj, name, observer, scope))
        yield


@contextmanager
def _observed_calls(obj: Any, name: str, observer: Observer, scope: Scope) -> Iterator[None]:
    with CHANGING_HOOKS:
        current = obj.__dict__.get(name)
        if not isinstance(current, _ObservedCall):
            current = _ObservedCall(obj, name, current)
            obj.__dict__[name] = current
        entry = (observer, scope)
        current.observers.append(entry)
    try:
        yield
    finally:
        with CHANGING_HOOKS:
            current.observers[:] = [one for one in current.observers if one is not entry]
            # If somebody wrapped ours meanwhile, it stays inside theirs and merely passes calls on.
            if not current.observers and obj.__dict__.get(name) is current:
                if current.previous is None:
                    del obj.__dict__[name]
                else:
                    obj.__dict__[name] = current.previous


class _ObservedCall:
    """A method of one object, on that object, that tells observers when it is called and when that
    ends."""

    def __init__(self, obj: Any, name: str, previous: Callable[..., Any] | None) -> None:
        self.previous = previous
        self.observers: list[tuple[Observer, Scope]] = []
        self._obj, self._name = obj, name
        method = getattr(type(obj), name)
        self.__wrapped__ = method if previous is None else previous
        self.__doc__, self.__name__ = method.__doc__, name
        self.__signature__ = inspect.signature(getattr(obj, name))
        # Only transformers' own generate runs its prompt in chunks, or with an assistant's guesses.
        self._reads_prompt = name == "generate" and hasattr(
            type(obj), "prepare_inputs_for_generation"
        )
        self._yields = inspect.isgeneratorfunction(inspect.unwrap(self.__wrapped__))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        if self._yields:
            return self._items(args, kwargs)
        with self._noting(args, kwargs) as watching:
            return self._call(*self._with_streamer(args, kwargs, watching))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """On a copy of the object nothing is watched: there it is the copy's own method."""
        copied = memo.get(id(self._obj))
        if self.previous is not None or copied is None:
            return copy.deepcopy(self.previous, memo)  # which may be one of ours too
        return types.MethodType(getattr(type(copied), self._name), copied)

    def _call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return getattr(type(self._obj), self._name)(self._obj, *args, **kwargs)

    def _items(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
        with (
            self._noting(args, kwargs) as watching,
            contextlib.closing(self._call(args, kwargs)) as items,
        ):
            for item in items:
                with _aside(watching):
                    yield item

    def _with_streamer(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], watching: Sequence[Observer]
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """The arguments, with a streamer whose own passes are told from those of the call."""
        names = list(self.__signature__.parameters)
        at = names.index("streamer") if "streamer" in names else len(args)
        if not watching or self._name not in GENERATE_NAMES:
            return args, kwargs
        if kwargs.get("streamer") is not None:
            kwargs = {**kwargs, "streamer": _AsideStreamer(kwargs["streamer"], watching)}
        elif at < len(args) and args[at] is not None:
            args = (*args[:at], _AsideStreamer(args[at], watching), *args[at + 1 :])
        return args, kwargs

    @contextlib.contextmanager
    def _noting(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[list[Observer]]:
        # Those who were there when the call began hear of its end.
        watching = [observer for observer, scope in self.observers if scope()]
        if self._name in PREPARE_NAMES:
            yield watching
            for observer in watching:
                observer.on_prepare()
            return
        if self._name in PACKED_NAMES:
            for observer in watching:
                observer.on_packed(kwargs)
            yield watching
            return
        prompt = prompt_mask(args, kwargs) if self._reads_prompt else None
        for observer in watching:
            observer.on_generate(True, prompt)
        try:
            yield watching
        finally:
            for observer in watching:
                observer.on_generate(False)


@contextmanager
def _aside(watching: Sequence[Observer]) -> Iterator[None]:
    """Inside the block, passes of this thread are of no generate call that is open."""
    with ExitStack() as stack:
        for observer in watching:
            stack.enter_context(observer.aside())
        yield


class _AsideStreamer:
    """A streamer, whose methods may run the model themselves."""

    def __init__(self, streamer: Any, watching: Sequence[Observer]) -> None:
        self._streamer, self._watching = streamer, watching

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._streamer, name)
        if not callable(found):
            return found

        def called(*args: Any, **kwargs: Any) -> Any:
            with _aside(self._watching):
                return found(*args, **kwargs)

        return called
