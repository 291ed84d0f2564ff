"""Runs on a server. The blocks below are sent as source, so they name nothing but nnsight, torch
and plain values; what they need of this package travels in `pack`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from expertsteer_lens.hosts.blocks import Place
from expertsteer_lens.hosts.row_picker import take_rows

PACKAGE = __name__.partition(".")[0]


def pack(value: Any) -> bytes:
    """`value` in a form that a server without this package can read, by `unpacker`.

    Functions and classes of this package travel with it as source, which nnsight does for modules
    that are registered (`nnsight.register`). This package is registered only while `value` is
    written: a user who sends things of ours elsewhere should not get copies of our classes. Classes
    that travel must not hold methods without source, which `dataclass` and `NamedTuple` make up:
    those would be sent as bytecode, which only the same version of Python reads."""
    import cloudpickle  # type: ignore[import-untyped]
    from nnsight.intervention.serialization import dumps

    module = sys.modules[PACKAGE]
    is_ours = PACKAGE not in cloudpickle.list_registry_pickle_by_value()
    if is_ours:
        cloudpickle.register_pickle_by_value(module)
    try:
        packed: bytes = dumps(value)
        return packed
    finally:
        if is_ours:
            cloudpickle.unregister_pickle_by_value(module)


def unpacker(packed: bytes) -> Callable[[], Any]:
    """A function that can be sent, and gives back there what was packed."""

    def unpack() -> Any:
        from nnsight.intervention.serialization import loads

        return loads(packed)

    return unpack


def called(unpack: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """A function that can be sent, and calls there what it unpacks."""

    def call() -> Any:
        return unpack()()

    return call


def logits(model: Any, options: Mapping[str, Any], *, remote: bool | str) -> Tensor:
    """The logits of one pass."""
    with model.trace(**options, remote=remote):
        saved = model.output.logits.save()
    return saved  # type: ignore[no-any-return]


def generated(model: Any, options: Mapping[str, Any], *, remote: bool | str) -> Tensor:
    """Prompt and new tokens of one call of `generate`."""
    with model.generate(**options, remote=remote) as tracer:
        ids = tracer.result.save()
    return ids  # type: ignore[no-any-return]


def rows(
    model: Any,
    options: Mapping[str, Any],
    places: Mapping[str, Place],
    positions: str | int,
    *,
    tokens: Tensor | None,
    remote: bool | str,
) -> dict[str, Tensor]:
    """What `take_rows` picks at each hook point, picked where the model is.

    Args:
        model: an nnsight model.
        options: arguments of the pass, `attention_mask` among them.
        places: hook points in the order in which a pass reaches them.
        positions: "last", "mean", "all" or an index.
        tokens: which tokens are looked at, a mask; None: all real ones.
        remote: as nnsight takes it.
    """
    import nnsight

    mask = options["attention_mask"] if tokens is None else tokens
    where = [(name, place.path, place.side) for name, place in places.items()]
    unpack = unpacker(pack(take_rows))
    with model.trace(**options, remote=remote) as tracer:
        take = unpack()
        kept = nnsight.save({})
        for name, path, side in where:
            module = model.get(path)
            value = module.input if side == "input" else module.output
            value = value[0] if isinstance(value, tuple) else value
            kept[name] = take(value, positions, mask).cpu()
        tracer.stop()
    return dict(kept)
