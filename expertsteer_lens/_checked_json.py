"""Objects in JSON files with a checksum over their content, read strictly: what one reader of JSON
takes for this and another for that is refused."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from expertsteer_lens.errors import ArtifactError

DIGEST = "content_sha256"
"""The key that has the checksum of all the others."""


def digest_of(content: dict[str, Any]) -> str:
    """SHA-256 of the JSON without spaces and with sorted keys, so that indenting a file or
    reordering its keys is no change; the checksum itself is left out.

    >>> digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1, "content_sha256": ""})
    True
    """
    rest = {name: value for name, value in content.items() if name != DIGEST}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; its checksum is not looked at.

    Raises:
        ArtifactError: it cannot be read, is no JSON object, has a key twice, or a number that JSON
            or a computer has not.
    """
    try:
        odd = file.exists() and not file.is_file()  # a pipe or a device would be read for ever
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error}).") from error
    if odd:
        raise ArtifactError(f"{file} is no file (but a folder, a pipe or a device).")
    try:
        content = json.loads(
            file.read_text(encoding="utf-8"),
            object_pairs_hook=refuse_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error}).") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{file} is damaged: it holds no JSON object.")
    return content


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Hook for `json.loads`: readers of JSON differ in which of two equal keys they take.

    Raises:
        ValueError: a key stands twice in one object.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number
