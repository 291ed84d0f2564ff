"""Argument checks; each raises one of our errors with the remedy in the message."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection

import torch
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, DataError, HookNameError, WidthError


def check_matrix(
    name: str, value: Tensor, *, width: int | None = None, min_rows: int = 1
) -> Tensor:
    """Return `value` if it is a finite floating `[n, d]` tensor, else raise.

    Raises:
        DataError: wrong shape, too few rows, integer dtype, NaN or Inf (the message names the first
            bad row).
        WidthError: `width` is given and differs from `d`.
    """
    if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
        got = (
            f"shape {tuple(value.shape)}, {value.dtype}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise DataError(f"{name} must be a floating tensor of shape [n, d], got {got}.")
    if value.shape[0] < min_rows:
        raise DataError(f"{name} needs at least {min_rows} rows, got {value.shape[0]}.")
    if width is not None and value.shape[1] != width:
        raise WidthError(f"{name} must have width {width}, got {value.shape[1]}.")
    check_finite(name, value)
    return value


def check_finite(name: str, value: Tensor) -> None:
    """Raise `DataError` naming the first row that holds NaN or Inf."""
    if torch.isfinite(value.sum(dtype=torch.promote_types(value.dtype, torch.float32))):
        return  # one pass and no copies; a sum that overflows is looked at below
    if not torch.isfinite(value).all():
        bad = (
            (~torch.isfinite(value)).reshape(value.shape[0], -1).any(dim=1).nonzero()[:, 0].tolist()
        )
        raise DataError(
            f"{name} holds NaN or Inf in {len(bad)} of {value.shape[0]} rows (first: row "
            f"{bad[0]}); "
            "look at the text of that row and at the model's dtype (float16 overflows above 65504)."
        )


def check_labels(name: str, labels: Tensor, n: int) -> Tensor:
    """Return labels as float64 0/1 of shape `[n]`; accepts bool, 0/1 or -1/+1.

    Raises:
        DataError: wrong length, other values, or fewer than two classes.
    """
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or labels.shape[0] != n:
        raise DataError(
            f"{name} must have one label per row: expected shape ({n},), got {tuple(labels.shape)}."
        )
    values = labels.to(torch.float64)
    check_finite(name, values)
    present = set(values.unique().tolist())
    if not (present <= {0.0, 1.0} or present <= {-1.0, 1.0}):
        shown = sorted(present)[:5]
        raise DataError(f"{name} must be 0/1, -1/+1 or bool, got values {shown}.")
    if len(present) < 2:
        raise DataError(
            f"{name} must hold two classes, got only {sorted(present)}; give positive and negative "
            "examples."
        )
    return (values > 0).to(torch.float64)


def check_choice(name: str, value: str, choices: Collection[str]) -> str:
    """Return `value` if it is one of `choices`, else raise `ArgumentError` with the closest."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), list(choices), n=1)
        hint = f"; closest: {near[0]!r}" if near else ""
        raise ArgumentError(f"{name} must be one of {sorted(choices)}, got {value!r}{hint}.")
    return value


def check_number(
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    integer: bool = False,
) -> None:
    """Raise `ArgumentError` unless `low <= value <= high` (`low < value` if `low_open`)."""
    kind = int if integer else (int, float)
    ok = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    ok = ok and (low < value if low_open else low <= value) and value <= high
    if not ok:
        left = "(" if low_open else "["
        raise ArgumentError(
            f"{name} must be {'an integer' if integer else 'a number'} in {left}{low}, {high}], "
            f"got {value!r}."
        )


def check_paired(
    expert: Tensor, target: Tensor, expert_name: str = "expert", target_name: str = "target"
) -> None:
    """Raise `DataError` unless both have the same number of rows."""
    if expert.shape[0] != target.shape[0]:
        raise DataError(
            f"{expert_name} and {target_name} must be paired row by row (same texts, same order): "
            f"got {expert.shape[0]} and {target.shape[0]} rows."
        )


def unknown_hook(hook_name: str, known: Collection[str], model: str) -> HookNameError:
    """Build (not raise) the error for a hook name that is not on `model`, naming the closest that
    is."""
    near = difflib.get_close_matches(str(hook_name), list(known), n=1, cutoff=0.3)
    hint = f"; closest: {near[0]!r}" if near else ""
    return HookNameError(f"hook {hook_name!r} is not on this model ({model}){hint}.")
