"""Watching a model from outside: where each forward pass is in its sequence."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from expertsteer_lens.errors import InterventionError
from expertsteer_lens.interventions.clock import SequenceToken

from .parts import Observer
from .pass_arguments import (
    CACHE_NAMES,
    describe_pass,
    find_cache,
    note_cached,
    parameter_names,
)
from .scope import CHANGING_HOOKS, Scope, remove_handle

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
    # Sequences that passes of the scope went on with.
    followed: weakref.WeakSet[SequenceToken] = weakref.WeakSet()
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
            if _is_followed_by(find_cache(names, args, kwargs), followed):
                begun = describe_pass(names, args, kwargs, _CACHED_TOKENS)
                if begun is not None and begun.past > 0:
                    raise InterventionError(_LEFT_SCOPE)
            return
        info = describe_pass(names, args, kwargs, _CACHED_TOKENS)
        if info is None:
            return
        cache = find_cache(names, args, kwargs)
        info.sequence = _sequence_in(cache, info.past)
        if info.sequence is not None and cache is None:
            info.sequence = _MAKING.shared(module, followed, info.sequence)
        if info.sequence is not None:
            followed.add(info.sequence)
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
        now.mask = info.attention_mask
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
        states = (
            output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        )
        if isinstance(states, Tensor) and states.dtype == torch.float16:
            observer.on_half_precision(states, now.mask)
        _MAKING.pending.pop(id(module), None)
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
    mask: Tensor | None = None
    pass_: tuple[int, SequenceToken | None] | None = None


class _Making(threading.local):
    """Of each thread: by module, the sequence of a pass that was given no cache and may make one,
    and the watchers that have taken it: all watchers of the pass take the same."""

    def __init__(self) -> None:
        self.pending: dict[int, tuple[SequenceToken, list[Any]]] = {}

    def shared(self, module: nn.Module, watcher: Any, new: SequenceToken) -> SequenceToken:
        """The sequence that another watcher has made for this pass; else the new one."""
        sequence, takers = self.pending.get(id(module), (new, []))
        if any(one is watcher for one in takers):  # left from a pass that was broken off
            sequence, takers = new, []
        takers.append(watcher)
        self.pending[id(module)] = sequence, takers
        return sequence


_MAKING = _Making()


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


def _is_followed_by(cache: Any, followed: weakref.WeakSet[SequenceToken]) -> bool:
    """Whether passes of the scope went on with the sequence in this cache."""
    try:
        return _is_followed(cache) and _SEQUENCES.get(cache) in followed
    except TypeError:  # a cache that cannot be referred to weakly
        return False


_LEFT_SCOPE = (
    "this pass goes on with a cache that was filled while the model was steered, but in a thread "
    "or task that is not steered (a generator with the block inside, whose steps are taken by "
    "other threads or in other contexts?); open the block where the model is run, or use "
    "plan.attach(model), which steers every thread."
)


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
