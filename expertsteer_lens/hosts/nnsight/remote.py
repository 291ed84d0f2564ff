"""Runs on a server: the blocks below are sent as source, so they name nothing but nnsight, torch
and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from expertsteer_lens.hosts.blocks import Place


def logits(model: Any, options: Mapping[str, Any], *, remote: bool | str) -> Tensor:
    """The logits of one pass."""
    with model.trace(**options, remote=remote):
        found = model.output.logits.save()
    return found


def generated(model: Any, options: Mapping[str, Any], *, remote: bool | str) -> Tensor:
    """Prompt and new tokens of one call of `generate`."""
    with model.generate(**options, remote=remote) as tracer:
        ids = tracer.result.save()
    return ids


def rows(
    model: Any,
    options: Mapping[str, Any],
    places: Mapping[str, Place],
    positions: str | int,
    *,
    remote: bool | str,
) -> dict[str, Tensor]:
    """What `activations.take_positions` picks at each hook point, picked where the model is.

    Args:
        model: an nnsight model.
        options: arguments of the pass, `attention_mask` among them.
        places: hook points in the order in which a pass reaches them.
        positions: "last", "mean", "all" or an index.
        remote: as nnsight takes it.
    """
    import nnsight

    mask = options["attention_mask"].bool()
    rank, lengths = mask.long().cumsum(1) - 1, mask.sum(1, keepdim=True)
    wanted = {"last": -1, "mean": None, "all": None}.get(positions, positions)  # type: ignore[arg-type]
    chosen = (
        mask
        if wanted is None
        else mask & (rank == (lengths + wanted if wanted < 0 else torch.full_like(lengths, wanted)))
    )
    weights = mask.float() / lengths if positions == "mean" else None
    sites = [(name, place.path, place.side) for name, place in places.items()]
    with model.trace(**options, remote=remote) as tracer:
        kept = nnsight.save({})
        for name, path, side in sites:
            module = model.get(path)
            value = module.input if side == "input" else module.output
            value = value[0] if isinstance(value, tuple) else value
            if weights is None:
                kept[name] = value[chosen.to(value.device)].float().cpu()
            else:
                kept[name] = (value.float() * weights.to(value.device)[..., None]).sum(1).cpu()
        tracer.stop()
    return dict(kept)
