"""How a variant of the user's own comes into a table of variants."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from expertsteer_lens.errors import ArgumentError

_MADE_BY: dict[tuple[int, str], tuple[str, str]] = {}
"""Where the function or class behind each registered name was defined: table and name to its module
and its name there."""


def register(
    table: MutableMapping[str, Any], name: str, variant: Any, *, what: str, made_by: Any
) -> None:
    """Put a variant into a table under a name that is free, or that the same definition had: a cell
    of a notebook that is run again defines its function anew.

    Args:
        table: name to variant.
        name: of the variant.
        variant: what the table holds.
        what: it is, for the message.
        made_by: the function or class of the user's that it consists of.

    Raises:
        ArgumentError: the name is no text, or another variant's.
    """
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"the name of {what} must be a text, got {name!r}.")
    key = id(table), name
    place = getattr(made_by, "__module__", ""), getattr(made_by, "__qualname__", repr(made_by))
    again = _MADE_BY.get(key) == place and place[0] == "__main__"
    if name in table and table[name] != variant and not again:
        raise ArgumentError(f"there is already {what} {name!r}; choose another name.")
    table[name] = variant
    _MADE_BY[key] = place
