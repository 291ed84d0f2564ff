"""Argument checks; each raises one of our errors with the remedy in the message."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, DataError, HookNameError, WidthError

Scalar = bool | int | float | str
"""What an option of a registered variant may be."""


def shown(value: object, width: int = 200) -> str:
    """The `repr` of a value for a message, its middle left out where it is long.

    >>> shown("a")
    "'a'"
    >>> shown("a" * 1000, 20)
    "'aaaaaaaa…aaaaaaaa'"
    """
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an int of too many digits
        return f"one {type(value).__name__} too large to show"
    if len(text) <= width:
        return text
    half = (width - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


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


def check_classes(name: str, labels: Any, n: int) -> Tensor:
    """Return labels as a tensor of shape `[n]`, values as they are: bool, 0/1 or -1/+1. A single
    class is allowed (a part of labelled rows), see `check_labels`.

    Raises:
        DataError: no numbers, wrong length, NaN, or values of another kind.
    """
    try:
        given = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name} must be 0/1, -1/+1 or bool, got {type(labels).__name__} that is no list of "
            f"numbers ({error})."
        ) from error
    if given.shape != (n,):
        raise DataError(
            f"{name} must have one label per row: expected shape ({n},), got {tuple(given.shape)}."
        )
    if given.is_complex():
        raise DataError(f"{name} must be 0/1, -1/+1 or bool, got {given.dtype}.")
    values = given.to(torch.float64)
    if values.isnan().any():
        raise DataError(f"{name} holds NaN in row {int(values.isnan().nonzero()[0])}.")
    present = set(torch.unique(values).tolist())
    if not (present <= {0.0, 1.0} or present <= {-1.0, 1.0}):
        raise DataError(f"{name} must be 0/1, -1/+1 or bool, got values {sorted(present)[:5]}.")
    return given


def check_labels(name: str, labels: Any, n: int) -> Tensor:
    """Return labels as float64 0/1 of shape `[n]`; accepts bool, 0/1 or -1/+1.

    Raises:
        DataError: as `check_classes`, or fewer than two classes.
    """
    values = check_classes(name, labels, n).to(torch.float64)
    present = torch.unique(values).tolist()
    if len(present) < 2:
        raise DataError(
            f"{name} must hold two classes, got only {present}; give positive and negative "
            "examples."
        )
    return (values > 0).to(torch.float64)


def check_groups(name: str, groups: Any, n: int) -> Tensor:
    """Return the group of each of `n` rows as an integer tensor `[n]` on the CPU.

    Raises:
        DataError: not one integer per row.
    """
    try:
        given = torch.as_tensor(groups).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} must hold one integer per row ({error}).") from error
    if given.shape != (n,) or given.is_floating_point() or given.dtype == torch.bool:
        raise DataError(
            f"{name} must hold one integer per row, shape ({n},), got {given.dtype} of shape "
            f"{tuple(given.shape)}."
        )
    return given


def check_list(name: str, value: Iterable[Any], of: str = "texts") -> list[Any]:
    """Return the items of `value` as a list.

    Raises:
        DataError: a single str (whose items are letters), a dict or a set (whose order is not the
            caller's), or nothing to iterate over.
    """
    if isinstance(value, str | bytes):
        raise DataError(
            f"{name} must be a list of {of}, got one {type(value).__name__}; wrap it in a list."
        )
    if isinstance(value, Mapping | Set):
        raise DataError(
            f"{name} must be a list of {of}, got a {type(value).__name__}, which has no order of "
            "its own; give a list."
        )
    if not isinstance(value, Iterable):
        raise DataError(f"{name} must be a list of {of}, got {type(value).__name__}.")
    return list(value)


def check_choice(name: str, value: str, choices: Collection[str]) -> str:
    """Return `value` if it is one of `choices`, else raise `ArgumentError` with the closest."""
    if value not in choices:
        near = difflib.get_close_matches(str(value)[:200], list(choices), n=1)
        hint = f"; closest: {near[0]!r}" if near else ""
        raise ArgumentError(f"{name} must be one of {sorted(choices)}, got {shown(value)}{hint}.")
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
            f"got {shown(value)}."
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
    near = difflib.get_close_matches(str(hook_name)[:200], list(known), n=1, cutoff=0.3)
    hint = f"; closest: {near[0]!r}" if near else ""
    return HookNameError(f"hook {shown(hook_name)} is not on this model ({model}){hint}.")


WHY_NOTHING_HAPPENS = "docs/why_nothing_happens.md"


def explained_at(heading: str) -> str:
    """The end of a message about steering without effect: where that case is explained.

    Args:
        heading: anchor of a heading of the page `why_nothing_happens`.
    """
    return f" Explained in {WHY_NOTHING_HAPPENS}#{heading}."


def complete_options(
    given: object, known: Mapping[str, Scalar], owner: str
) -> tuple[tuple[str, Scalar], ...]:
    """Options of a registered variant, its defaults (`known`) included, as sorted pairs.

    Raises:
        ArgumentError: they are no dict, the variant (`owner`, e.g. "kind='ridge'") has none of that
            name, or a value is no number, text or bool.

    >>> complete_options({"width": 2.0}, {"width": 0.3, "two_ways": True}, "kind='near'")
    (('two_ways', True), ('width', 2.0))
    """
    try:
        options = dict(given)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise ArgumentError(
            f"options must be a dict of settings by name, got {shown(given)}."
        ) from None
    for name, value in options.items():
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ArgumentError(
                f"options: {shown(name)} is no option of {owner}, which has: {listed}."
            )
        if not isinstance(value, bool | int | float | str):
            raise ArgumentError(
                f"options[{name!r}] must be a number, a text or a bool, got {shown(value)}."
            )
    return tuple(sorted({**known, **options}.items()))


def find_option(options: object, name: str, owner: str) -> Any:
    """The value of an option that `complete_options` completed.

    Raises:
        ArgumentError: there is none of that name.
    """
    values = dict(options)  # type: ignore[call-overload]
    if name not in values:
        raise ArgumentError(f"{owner} has no option {name!r}; it has {list(values)}.")
    return values[name]


def keep_finished(error: Exception, finished: object, what: str, function: str) -> None:
    """Give an error what was finished before it, as `error.finished`, and a note that says so; what
    a step further inside has given stays.

    Args:
        error: of a step that came after.
        finished: what was finished.
        what: that, in words.
        function: the one that takes it as `finished=`.

    Example:
        >>> error = RuntimeError("no room")
        >>> keep_finished(error, {"a": 1}, "the states of a", "fit")
        >>> error.finished, error.__notes__[0][:42]
        ({'a': 1}, 'Kept in error.finished: the states of a; o')
    """
    if not hasattr(error, "finished"):
        vars(error)["finished"] = finished
        error.add_note(
            f"{KEPT}: {what}; once the cause is removed, call {function} again with the same "
            "arguments and finished=error.finished."
        )


KEPT = "Kept in error.finished"
"""How the note begins that `keep_finished` adds."""
