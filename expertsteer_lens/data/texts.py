"""Plain texts: what a text may be, digests of texts in order, and files that hold them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from expertsteer_lens._checked_json import refuse_duplicates
from expertsteer_lens.errors import DataError


class HasBytes(Protocol):
    """A text: a str, or a chat."""

    def encode(self) -> bytes:
        """Bytes that are equal for equal texts."""
        ...


def check_text(name: str, text: str) -> str:
    """Return `text` if it can be shown to a model.

    Raises:
        DataError: it is empty, or holds half of a character (a lone surrogate, which JSON allows
            and no tokenizer takes).
    """
    if not text.strip():
        raise DataError(f"{name} is empty; remove it or give it a text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} holds half of a character (lone surrogate U+{ord(text[error.start]):04X} at "
            f"place {error.start}), which no tokenizer takes; remove it or mend the file."
        ) from error
    return text


def texts_sha256(texts: Iterable[HasBytes]) -> str:
    """SHA-256 of texts in order, each preceded by its length: equal digests mean the same texts in
    the same order.

    Example:
        >>> texts_sha256(["ab", "c"]) == texts_sha256(["a", "bc"])
        False
    """
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def text_hash(texts: Iterable[HasBytes]) -> str:
    """The first 16 hex digits of `texts_sha256`: how results name the texts they come from."""
    return texts_sha256(texts)[:16]


TEXTS_KEY = "texts_digest"
"""Where the provenance of captured states has the `texts_sha256` of their texts."""


def are_states_of(provenance: Mapping[str, Any], texts: Iterable[HasBytes]) -> bool:
    """Whether states with this provenance were read from these texts in this order; True where the
    provenance does not say."""
    texts = list(texts)
    if TEXTS_KEY in provenance:
        return bool(provenance[TEXTS_KEY] == texts_sha256(texts))
    if "texts_sha256" in provenance:
        return bool(provenance["texts_sha256"] == _sha256_of_version_0_1_0(texts))
    return True


def _sha256_of_version_0_1_0(texts: Iterable[HasBytes]) -> str:
    """What version 0.1.0 wrote as "texts_sha256": texts joined by the character U+001E, so a text
    that holds it is not told from two. Read only, never written."""
    return hashlib.sha256(b"\x1e".join(text.encode() for text in texts)).hexdigest()


_MARK = "\ufeff"
"""Some editors put it in front of a file; where files were joined it begins a line."""


def read_file(path: str | Path) -> str:
    """The text of a UTF-8 file, without the mark that some editors put in front (a BOM); line ends
    are as they stand there.

    Raises:
        DataError: it is not UTF-8 text, there is none, or it cannot be read.
    """
    try:
        # A pipe or a device would be read for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{path} is no file (but a folder, a pipe or a device); give a file.")
        text = Path(path).read_bytes().decode().lstrip(_MARK)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})."
        ) from error
    if "\0" in text:
        raise DataError(
            f"{path} is no text: it has the character NUL at place {text.index(chr(0))}, as a file "
            "in UTF-16 has; save it as UTF-8."
        )
    return text


def lines_of(path: str | Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, each with its number from 1.

    Only a line end (LF, or CR and LF) ends a line. `str.splitlines` also cuts at CR, form feeds,
    U+0085, U+2028 and others, which stand inside of texts, and unescaped inside of JSON texts.

    Raises:
        DataError: it is not UTF-8 text.
    """
    lines = enumerate(re.split("\r?\n", read_file(path)), start=1)
    marked = ((number, line.lstrip(_MARK)) for number, line in lines)
    return [(number, line) for number, line in marked if line.strip()]


def csv_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file by the names in its first line, as the texts that stand there: "1.50",
    "007" and "NA" are texts, no numbers and not nothing. A comma may end every row.

    Raises:
        DataError: there is no such file, it is no text or no CSV, a name stands twice, or a row has
            other cells than the first line.
    """
    # As opened with newline="": a cell may hold line ends of any kind.
    table = csv.reader(io.StringIO(read_file(path), newline=""), strict=True)
    out = []
    try:
        header = next(table, [])
        twice = next((name for name in header if name and header.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{path} has the column {twice!r} twice; rename one.")
        for cells in table:
            if not cells:
                continue
            if len(cells) < len(header) or any(cells[len(header) :]):
                raise DataError(
                    f"{path}, line {table.line_num} has {len(cells)} cells and the header "
                    f"{len(header)}; put cells that hold a comma in quotes, and write empty ones."
                )
            out.append(dict(zip(header, cells, strict=False)))
    except csv.Error as error:
        raise DataError(f"{path}, line {table.line_num} is not CSV: {error}.") from error
    return out


def parse_json(text: str, path: str | Path, *, line: int = 1, hint: str = "") -> Any:
    """The value of a JSON text that begins at `line` of a file; `hint` ends the message.

    Raises:
        DataError: it is not JSON, or nested too deeply, or holds a number of too many digits, or a
            key twice in one object.
    """
    try:
        return json.loads(text, object_pairs_hook=refuse_duplicates)
    except json.JSONDecodeError as error:
        reason, line = error.msg, line + error.lineno - 1
        raise DataError(f"{path} is not JSON ({reason}, line {line}){hint}.") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path} is no JSON that can be read ({error}, line {line}).") from error


def shortened(text: object, width: int = 40) -> str:
    """The beginning of a text, quoted, for a line about it."""
    text = str(text)
    return repr(text if len(text) <= width else text[: width - 1] + "…")
