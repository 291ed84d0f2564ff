"""What a steering vector brings besides its direction, for edits that ask for more than one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, DataError, WidthError

from .edits import find_edit


def checked_parameters(edit: str, given: Mapping[str, Any], *, d: int) -> dict[str, Tensor]:
    """Copies in float32, each of the axes that the edit says.

    Args:
        edit: name of the edit.
        given: by name; numbers may be plain numbers.
        d: width of the vector.

    Raises:
        ArgumentError: a parameter is missing, or the edit knows none of that name.
        DataError: NaN or Inf, or another shape.
        WidthError: `[d]` of another width than the direction.

    Example:
        >>> given = {"weights": torch.zeros(2), "bias": 1.0}
        >>> checked_parameters("add_contextual", given, d=2)["bias"]
        tensor(1.)
    """
    kind = find_edit(edit)
    wanted = kind.parameters
    if not isinstance(given, Mapping) or set(given) != set(wanted):
        got = sorted(given) if isinstance(given, Mapping) else type(given).__name__
        passed = "pass SteeringVector(parameters={...})"
        remedy = ", ".join(filter(None, (passed, kind.remedy))) if wanted else "leave them out"
        raise ArgumentError(
            f"edit={edit!r} takes the parameters {sorted(wanted)}, got {got}; {remedy}."
        )
    out = {}
    for name, axes in wanted.items():
        value = torch.as_tensor(given[name]).detach().to(torch.float32).clone().contiguous()
        if not bool(torch.isfinite(value).all()) or value.ndim != len(axes):
            what = "a finite vector [d]" if axes else "a finite number"
            raise DataError(
                f"parameters[{name!r}] of edit={edit!r} must be {what}, got shape "
                f"{tuple(value.shape)} with {int((~torch.isfinite(value)).sum())} values that are "
                "NaN or Inf."
            )
        if axes and value.shape[0] != d:
            raise WidthError(
                f"parameters[{name!r}] of edit={edit!r} has width {value.shape[0]}, but the "
                f"direction has width {d}."
            )
        out[name] = value
    return out


def shown_parameters(parameters: Mapping[str, Tensor]) -> str:
    """Numbers as they are, of vectors their norm; empty where there are none.

    Example:
        >>> shown_parameters({"weights": torch.tensor([3.0, 4.0]), "bias": torch.tensor(0.5)})
        '|weights| 5, bias 0.5'
    """
    return ", ".join(
        f"|{name}| {float(value.norm()):.4g}" if value.ndim else f"{name} {float(value):.4g}"
        for name, value in parameters.items()
    )
