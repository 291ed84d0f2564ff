"""Edits: pure functions on activations `[batch, pos, d]`, with an optional boolean mask `[batch,
pos]`.

Each returns a new tensor of the same shape, dtype and device. Tokens outside the mask come back bit
for bit. A `direction` is used as a unit vector: it is normalised here, so its length never matters.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from expertsteer_lens._checks import check_number
from expertsteer_lens.errors import ArgumentError, WidthError

Activations = Float[Tensor, "batch pos d"]
Mask = Bool[Tensor, "batch pos"] | None


def centre(activations: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """P x = x - mean(x) over the last axis: the coordinates in which pre-LayerNorm models are
    fitted and steered."""
    return activations - activations.mean(dim=-1, keepdim=True)


def wide(value: Tensor) -> Tensor:
    """`value` in float32, or in float64 if it came so: half precision is too coarse for projections
    and norms."""
    return value if value.dtype == torch.float64 else value.float()


def add(
    activations: Activations, delta: Tensor, *, mask: Mask = None, preserve_norm: bool = False
) -> Activations:
    """x + delta.

    Args:
        activations: `[batch, pos, d]`.
        delta: `[d]`, or anything that broadcasts to the activations (e.g. `[batch, 1, d]`: one per
            row).
        mask: tokens to edit; None edits every token.
        preserve_norm: rescale each edited token to the norm it had, so that only the angle changes.

    Raises:
        WidthError: the last axis of `delta` is not `d`.
    """
    _check_width("delta", delta, activations)
    base = wide(activations) if preserve_norm else activations
    return _finish(activations, base + delta.to(base), mask, preserve_norm)


def ablate(
    activations: Activations,
    direction: Tensor,
    *,
    strength: float | Tensor = 1.0,
    mask: Mask = None,
    preserve_norm: bool = False,
) -> Activations:
    """x - strength * (x . v) v: at strength 1 nothing is left along v; at -1 the component is
    doubled.

    Idempotent at strength 1. The projection is computed in at least float32.
    """
    return rescale(
        activations, direction, factor=1.0 - strength, mask=mask, preserve_norm=preserve_norm
    )


def rescale(
    activations: Activations,
    direction: Tensor,
    *,
    factor: float | Tensor,
    mask: Mask = None,
    preserve_norm: bool = False,
) -> Activations:
    """x + (factor - 1) * (x . v) v: the component along v times `factor`; the rest is left alone.

    Args:
        activations: `[batch, pos, d]`.
        direction: `[d]`.
        factor: a number, or a tensor that broadcasts to `[batch, pos]`. 1 changes nothing, 0
            ablates.
        mask: tokens to edit; None edits every token.
        preserve_norm: rescale each edited token to the norm it had.
    """
    unit = _unit(direction, activations)
    along = wide(activations) @ unit
    change = (torch.as_tensor(factor, device=along.device) - 1.0) * along
    return _finish(activations, wide(activations) + change[..., None] * unit, mask, preserve_norm)


def clamp(
    activations: Activations,
    direction: Tensor,
    *,
    low: float | Tensor | None = None,
    high: float | Tensor | None = None,
    mask: Mask = None,
    preserve_norm: bool = False,
) -> Activations:
    """Move the projection on v into [low, high], leaving the rest alone; `low == high` sets it.

    Args:
        activations: `[batch, pos, d]`.
        direction: `[d]`.
        low: smallest projection allowed (a number, or a tensor that broadcasts to `[batch, pos]`);
            None: no bound.
        high: largest projection allowed; None: no bound.
        mask: tokens to edit; None edits every token.
        preserve_norm: rescale each edited token to the norm it had.

    Raises:
        ArgumentError: neither bound is given, or low > high.
    """
    if low is None and high is None:
        raise ArgumentError("clamp needs low, high or both, got neither.")
    unit = _unit(direction, activations)
    along = wide(activations) @ unit
    lower = None if low is None else torch.as_tensor(low, dtype=along.dtype, device=along.device)
    upper = None if high is None else torch.as_tensor(high, dtype=along.dtype, device=along.device)
    if lower is not None and upper is not None and bool((lower > upper).any()):
        raise ArgumentError(f"clamp needs low <= high, got low={low}, high={high}.")
    moved = along if lower is None else torch.maximum(along, lower)
    moved = moved if upper is None else torch.minimum(moved, upper)
    edited = wide(activations) + (moved - along)[..., None] * unit
    return _finish(activations, edited, mask, preserve_norm)


def _finish(before: Tensor, after: Tensor, mask: Mask, preserve_norm: bool) -> Tensor:
    if preserve_norm:
        after = wide(after)
        norm = after.norm(dim=-1, keepdim=True)
        after = after * (
            wide(before).norm(dim=-1, keepdim=True)
            / norm.clamp(min=torch.finfo(torch.float32).tiny)
        )
    after = after.to(before.dtype)
    if mask is None:
        return after
    if mask.shape != before.shape[:2]:
        raise ArgumentError(
            f"mask must have shape {tuple(before.shape[:2])}, got {tuple(mask.shape)}."
        )
    return torch.where(mask.to(before.device)[..., None], after, before)


def _check_width(name: str, value: Tensor, activations: Tensor) -> None:
    if activations.ndim != 3:
        raise ArgumentError(
            f"activations must have shape [batch, pos, d], got {tuple(activations.shape)}."
        )
    if value.shape[-1] != activations.shape[-1]:
        raise WidthError(
            f"{name} has width {value.shape[-1]}, but the activations have width "
            f"{activations.shape[-1]}."
        )


def _unit(direction: Tensor, activations: Tensor) -> Tensor:
    _check_width("direction", direction, activations)
    value = direction.to(wide(activations))
    norm = value.norm()
    check_number("the norm of direction", float(norm), low=0.0, high=math.inf, low_open=True)
    return value / norm
