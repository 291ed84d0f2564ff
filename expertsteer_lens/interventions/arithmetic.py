"""Arithmetic on activations that all edits share."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from expertsteer_lens._checks import check_number
from expertsteer_lens.errors import ArgumentError, WidthError

Basis = Literal["raw", "centred"]
"""Coordinates of the residual stream: as they are, or without their mean (see `centre`)."""
Mask = Bool[Tensor, "batch pos"] | None
"""Tokens to edit; None edits every token."""


def centre(activations: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """P x = x - mean(x) over the last axis: the coordinates in which pre-LayerNorm models are
    fitted and steered."""
    return activations - activations.mean(dim=-1, keepdim=True)


def wide(value: Tensor) -> Tensor:
    """`value` in float32, or in float64 if it came so: half precision is too coarse for projections
    and norms."""
    return value if value.dtype == torch.float64 else value.float()


def multiply_along(x: Tensor, unit: Tensor, factor: float | Tensor) -> Tensor:
    """The component of x along `unit` times `factor`."""
    along = x @ unit
    change = (torch.as_tensor(factor, device=along.device) - 1.0) * along
    return x + change[..., None] * unit


def move_between(x: Tensor, unit: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    """The projection of x on `unit` moved into [low, high]."""
    along = x @ unit
    moved = along if low is None else torch.maximum(along, low)
    moved = moved if high is None else torch.minimum(moved, high)
    return x + (moved - along)[..., None] * unit


def finish(before: Tensor, after: Tensor, mask: Mask, preserve_norm: bool) -> Tensor:
    """The edited activations in the type of those before, at the tokens of the mask; with the norms
    of those before, if these are to be kept."""
    if preserve_norm:
        after = wide(after)
        norm = after.norm(dim=-1, keepdim=True)
        after = after * (
            wide(before).norm(dim=-1, keepdim=True)
            / norm.clamp(min=torch.finfo(torch.float32).tiny)
        )
    return outside_unchanged(before, after.to(before.dtype), mask)


def outside_unchanged(before: Tensor, after: Tensor, mask: Mask) -> Tensor:
    """`after` at the tokens of the mask, `before` at all others, bit for bit.

    Raises:
        ArgumentError: the mask has another shape.
    """
    if mask is None:
        return after
    if mask.shape != before.shape[:2]:
        raise ArgumentError(
            f"mask must have shape {tuple(before.shape[:2])}, got {tuple(mask.shape)}."
        )
    return torch.where(mask.to(before.device)[..., None], after, before)


def check_width(name: str, value: Tensor, activations: Tensor) -> None:
    """Raise if the activations are not `[batch, pos, d]` (`ArgumentError`), or `value` is not as
    wide (`WidthError`)."""
    if activations.ndim != 3:
        raise ArgumentError(
            f"activations must have shape [batch, pos, d], got {tuple(activations.shape)}."
        )
    if value.shape[-1] != activations.shape[-1]:
        raise WidthError(
            f"{name} has width {value.shape[-1]}, but the activations have width "
            f"{activations.shape[-1]}."
        )


def unit_of(direction: Tensor, activations: Tensor) -> Tensor:
    """The unit vector along a direction, in the type and on the device in which the activations are
    edited."""
    check_width("direction", direction, activations)
    value = direction.to(wide(activations))
    norm: Tensor = value.norm()
    check_number("the norm of direction", float(norm), low=0.0, high=math.inf, low_open=True)
    return value / norm
