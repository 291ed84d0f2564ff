"""One name of the cache for TransformerLens and for transformers, which do not always agree.

From 5.24 on transformers hands the cache on as `cache`, everywhere. TransformerLens 4.3 looks for
`past_key_values` (recurrent layers: `cache_params`) in the components that it computes itself,
finds nothing, and every cached step of a generation sees its own token alone. Nothing of that is an
error by itself: the text is merely wrong."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .scope import CHANGING_HOOKS

OLD, RECURRENT, NEW = "past_key_values", "cache_params", "cache"

_DONE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def agree_on_cache_name(bridge: nn.Module, inner: nn.Module) -> None:
    """Let the components of a Bridge find the cache that its model is given.

    Puts forward pre-hooks on the components that look for an old name alone, and on the model, and
    leaves them there: without them a plain cached generation is wrong too. Nothing is done where
    transformers uses the old names, where TransformerLens knows the new one, or the second time.

    Args:
        bridge: the Bridge.
        inner: the Hugging Face module inside it.
    """
    with CHANGING_HOOKS:
        if inner in _DONE:
            return
        _DONE.add(inner)
        if not _takes(inner, NEW) or _takes(inner, OLD):
            return
        _put_on(inner, _to_new)
        for module in list(bridge.modules()):
            if _is_of_lens(type(module)):
                _on_component(module)
            elif _is_of_lens(module.__dict__.get("forward")):
                _on_patched_block(module)


def _on_component(module: nn.Module) -> None:
    names = _names_in(type(module), "forward")
    if OLD in names and NEW not in names:
        _put_on(module, _to_old)
    if RECURRENT in names and NEW not in names:
        _put_on(module, _to_recurrent)
        inside = getattr(module, "original_component", None)
        if isinstance(inside, nn.Module) and _takes(inside, NEW):
            _put_on(inside, _to_new)  # it is called with the arguments of the component
    names = _names_in(type(module), "_update_kv_cache")
    if OLD in names and NEW not in names:
        module._update_kv_cache = functools.partial(_update_kv_cache, module)


def _on_patched_block(block: nn.Module) -> None:
    """A block of transformers (T5 and its kin) whose `forward` TransformerLens has replaced."""
    if not _takes(block, OLD) or _takes(block, NEW):
        return
    _put_on(block, _to_old)
    for part in getattr(block, "layer", ()):  # of T5: given a cache only if it takes the old name
        if _takes(part, NEW) and not _takes(part, OLD):
            part.forward = types.MethodType(_forward_by_old_name, part)


def _put_on(module: nn.Module, hook: Callable[..., Any]) -> None:
    if hook not in module._forward_pre_hooks.values():  # a copy of a model has its hooks already
        module.register_forward_pre_hook(hook, with_kwargs=True)


def _renamed(kwargs: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    if kwargs.get(old) is None or new in kwargs:
        return kwargs
    return {new if name == old else name: value for name, value in kwargs.items()}


def _to_old(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, _renamed(kwargs, NEW, OLD)


def _to_recurrent(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, _renamed(kwargs, NEW, RECURRENT)


def _to_new(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, _renamed(_renamed(kwargs, OLD, NEW), RECURRENT, NEW)


def _update_kv_cache(
    component: nn.Module, keys: Tensor, values: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = type(component)._update_kv_cache(  # type: ignore[attr-defined]
        component, keys, values, **_renamed(kwargs, NEW, OLD)
    )
    return out


def _forward_by_old_name(
    part: nn.Module, *args: Any, past_key_values: Any = None, **kwargs: Any
) -> Any:
    return type(part).forward(part, *args, **{NEW: past_key_values}, **kwargs)


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def _is_of_lens(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("transformer_lens.")


@functools.cache
def _names_in(kind: type, method: str) -> frozenset[str]:
    """The texts in the code of a method: keywords that it looks for are among them."""
    code = getattr(getattr(kind, method, None), "__code__", None)
    return frozenset(c for c in getattr(code, "co_consts", ()) if isinstance(c, str))
