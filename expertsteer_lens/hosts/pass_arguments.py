"""What the arguments of a decoder's call say about the pass: how many tokens, with which mask, on
top of which cache.

Sent to a server as source with `plan.edit`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from expertsteer_lens.errors import InterventionError
from expertsteer_lens.interventions.clock import ForwardInfo

CACHE_NAMES = ("past_key_values", "cache", "cache_params")
"""What decoders of transformers call their cache: it became `cache` in 5.24, and is `cache_params`
in recurrent models."""


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
    filled = getattr(cache, "has_previous_state", None)
    filled = filled() if callable(filled) else filled
    if filled is False:
        return 0  # it holds nothing, or was reset since
    if past == 0 and filled:
        raise InterventionError(
            f"the {type(cache).__name__} given does not say how many tokens it holds, and it was "
            "filled before steering was on; start steering before the prompt is run."
        )
    return past


def is_stand_in(tensor: Tensor) -> bool:
    """Whether this is a fake tensor, with a shape and no values (nnsight's `scan` runs a model on
    them)."""
    kind = type(tensor)
    return kind is not Tensor and "FakeTensor" in (cls.__name__ for cls in kind.__mro__)
