"""The type checker that the tests put on the whole package: shapes and dtypes of array annotations,
by beartype.

Public functions refuse bad arguments themselves, with messages that are tested, so a check before
the call would answer in their place. Here arguments and result are checked together after a call
that returned: whoever accepts a shape that its annotation excludes, or returns another than it
says, fails the test that did it; whoever refuses it is heard. Functions without an array in their
annotations are left alone: their types are mypy's business, and tests stand in for models and
hosts with objects of their own.
"""

from __future__ import annotations

import inspect
import pathlib
from collections.abc import Callable
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # ints pass for floats
TRAVELS = (
    "data.read_positions",
    "hosts.base",
    "hosts.nnsight",
    "hosts.pass_arguments",
    "hosts.row_picker",
    "interventions",
    "steer.checks",
    "steer.nnsight_edit",
    "steer.report",
)
"""Modules whose functions nnsight carries to other processes by their source: a wrapper around them
would have no source there."""
CHECKED: set[str] = set()
"""Functions that are checked, by module and qualified name."""


def modules() -> list[str]:
    """All modules of the package, by name, but for those in `TRAVELS`."""
    package = pathlib.Path(__file__).resolve().parents[1] / "expertsteer_lens"
    names = [
        ".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("*.py")
    ]
    # A name stands for all below it, so packages themselves are left out.
    kept = [n for n in names if not n.startswith(TRAVELS) and not n.endswith("__init__")]
    return [f"expertsteer_lens.{name}" for name in kept]


def checked(stub: Callable[..., Any]) -> Callable[..., Any]:
    """What jaxtyping calls with two empty functions of the signature of each function: one for the
    arguments before the call, and one that has the result as a further argument `ret...`, for after
    it. Only the latter is checked."""
    parameters = inspect.signature(stub).parameters
    if not any(name.startswith("ret") and name[3:].isdigit() for name in parameters):
        return stub
    arrays = {k: v for k, v in stub.__annotations__.items() if holds_array(v)}
    if not arrays:
        return stub
    CHECKED.add(f"{stub.__module__}.{stub.__qualname__}")
    stub.__annotations__ = arrays
    return _beartype(stub)


def holds_array(annotation: Any) -> bool:
    """Whether a jaxtyping array stands anywhere in the annotation."""
    if inspect.isclass(annotation) and not get_args(annotation):
        return issubclass(annotation, AbstractArray)
    return any(holds_array(part) for part in get_args(annotation))
