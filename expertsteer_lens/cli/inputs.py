"""What the commands read: texts, settings and what was saved, with errors that name the file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertsteer_lens._checks import check_choice
from expertsteer_lens.data.chat import check_texts
from expertsteer_lens.data.texts import check_text, lines_of, parse_json, read_file
from expertsteer_lens.errors import ArgumentError, ArtifactError, DataError

from .terminal import say

if TYPE_CHECKING:
    from .options import ModelOptions, TextOptions


JSON_LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx")
"""Endings, in small letters, of files that hold no plain lines of text."""


def read_texts(path: Path) -> list[Any]:
    """Texts of a file, one a line, empty lines skipped; in a `.jsonl` or `.ndjson` file a line is a
    JSON text or a list of messages; a `.json` file is a list of such.

    Raises:
        DataError: the file is a table or not UTF-8 text, holds JSON under another ending, a line is
            not what it should be, or there is none.
    """
    ending = path.suffix.lower()
    if ending in TABLES:
        raise DataError(
            f"{path} is a table, of which each line would be taken for a text; write its texts to "
            "a .txt file, one a line, or to a .jsonl file, each a JSON text."
        )
    if ending == ".json":
        return _texts_of_list(path)
    lines = lines_of(path)
    if not lines:
        raise DataError(f"{path} holds no text; give one a line.")
    if ending not in JSON_LINES:
        _refuse_json(path, lines)
        return [check_text(f"{path}, line {number}", line) for number, line in lines]
    out = []
    for number, line in lines:
        try:
            out.append(check_texts("text", [parse_json(line, path, line=number)])[0])
        except DataError as error:
            raise DataError(
                f"{path}, line {number}: give a JSON text or a list of messages with 'role' and "
                f"'content' ({error})."
            ) from error
    return out


def _texts_of_list(path: Path) -> list[Any]:
    found = parse_json(
        read_file(path), path, hint="; a file of JSON lines ends in .jsonl, one of plain text .txt"
    )
    if not isinstance(found, list):
        raise DataError(
            f"{path} must hold a JSON list of texts, got {type(found).__name__}; or give a .jsonl "
            "file with a JSON text a line, or a .txt file with a text a line."
        )
    try:
        return list(check_texts("text", found))
    except DataError as error:
        raise DataError(
            f"{path}: give a list of texts, or of lists of messages with 'role' and 'content' "
            f"({error})."
        ) from error


def _refuse_json(path: Path, lines: list[tuple[int, str]]) -> None:
    """Raise for JSON lists and objects, whole or a line each, where lines of text are expected."""
    number, first = lines[0]
    if not first.lstrip().startswith(("{", "[")):
        return
    for text in (first, "\n".join(line for _, line in lines)):
        try:
            found = parse_json(text, path)
        except DataError:
            continue
        if isinstance(found, list | dict):
            raise DataError(
                f"{path}, line {number}: this is JSON, but in a {path.suffix or 'plain'} file a "
                "line is a text as it stands; name the file .jsonl (a JSON text or a list of "
                "messages a line) or .json (a list of them). JSON that is meant as text is given "
                "as JSON texts in a .jsonl file."
            )


def check_experts(names: list[str]) -> None:
    """Raise `ArgumentError` if one expert is given twice, before any is loaded."""
    known: set[str] = set()
    for name in names:
        # A folder has many names.
        one = os.path.realpath(name) if os.path.exists(name) else name
        if one in known:
            raise ArgumentError(f"--expert {name!r} is given twice; give every expert once.")
        known.add(one)


@contextmanager
def lines_named(**files: Path | None) -> Iterator[None]:
    """A block in which an error about one text of a list names the line of its file instead.

    Args:
        files: by the name of the list, "pairs" or "anchors"; each with a text a line.

    Raises:
        DataError: a text cannot be used.
    """
    try:
        yield
    except DataError as error:
        found = re.match(r"(\w+)(?:\.(\w+))?\[(\d+)\] (.*)", str(error), re.DOTALL)
        path = files.get(found[1]) if found else None
        if found is None or path is None or path.suffix == ".json" or hasattr(error, "finished"):
            raise
        number = lines_of(path)[int(found[3])][0]
        part = f", {found[2]} text" if found[2] else ""
        raise DataError(f"{path}, line {number}{part}: it {found[4]}") from error


def read_config(path: Path | None, preset: str) -> Any:
    """The preset's `ExpertSteerConfig` with the fields of a JSON file over it; a step's fields may
    be given in part.

    Raises:
        ArgumentError: an unknown field or a value that cannot be used; the message names file and
            field.
        DataError: the file is not JSON.
    """
    from expertsteer_lens._config import config_from_dict
    from expertsteer_lens.pipeline import ExpertSteerConfig

    base = ExpertSteerConfig.preset(preset)
    if path is None:
        return base
    merged = base.to_dict()
    for key, value in _json_object(path, "a config file").items():
        part = merged.get(key)
        in_part = isinstance(part, dict) and isinstance(value, dict)
        merged[key] = {**part, **value} if in_part and part else value
    return config_from_dict(ExpertSteerConfig, merged, str(path))


def _json_object(path: Path, what: str) -> dict[str, Any]:
    data = parse_json(read_file(path), path)
    if not isinstance(data, dict):
        raise DataError(
            f"{path} must hold one JSON object, got {type(data).__name__}; see the help for {what}."
        )
    return data


def texts_to_fit(texts: TextOptions, seed: int) -> tuple[Any, Any]:
    """Contrast pairs, and the behaviour if they come from a benchmark.

    Raises:
        ArgumentError: neither or both of --pairs and --benchmark, or options of the latter with the
            former.
        DataError: a file cannot be used.
    """
    from expertsteer_lens.benchmarks import public
    from expertsteer_lens.data.contrast import ContrastPairs

    if texts.benchmark is not None and texts.pairs is not None:
        raise ArgumentError("give either --pairs FILE or --benchmark NAME, not both.")
    if texts.benchmark is not None:
        check_choice("--benchmark", texts.benchmark, public.names())
        found = public.load(
            texts.benchmark, path=texts.benchmark_path, limit=texts.limit, seed=seed
        )
        say(repr(found))
        return found.pairs(chat=texts.chat), found.behaviour(chat=texts.chat)
    if texts.pairs is None:
        raise ArgumentError("give either --pairs FILE or --benchmark NAME, got neither.")
    if texts.benchmark_path is not None or texts.limit is not None or texts.chat:
        raise ArgumentError(
            "--benchmark-path, --limit and --chat go with --benchmark; leave them out with --pairs "
            "(a chat there is a list of messages)."
        )
    try:
        return ContrastPairs.from_jsonl(texts.pairs), None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{texts.pairs} is not UTF-8 text ({error.reason} at byte {error.start})."
        ) from error


def read_behaviour(path: Path) -> Any:
    """A `Behaviour` from a JSON file with the keys prompts, positive and negative.

    Raises:
        DataError: the file is not such an object.
    """
    from expertsteer_lens.data.behaviour import Behaviour

    return Behaviour.from_json(path)


def load_saved(name: str, kind: str, *, target: Any = None) -> Any:
    """What `save` wrote, which must be of one kind.

    Args:
        name: folder or hub id.
        kind: name of the class, "SteeringPlan" or "ExpertSteering".
        target: the model that a fit steers.

    Raises:
        ArtifactError: something of another kind is there, or nothing.
    """
    from expertsteer_lens.files.io import load

    check_saved(name, kind)
    loaded = load(name, target=target)
    if type(loaded).__name__ == kind:
        return loaded
    raise _of_another_kind(name, type(loaded).__name__, kind)


def check_saved(name: str, kind: str) -> None:
    """Refuse what is no saved thing of this kind, before a model is loaded for it; what a hub id
    names is looked at when it is loaded.

    Raises:
        ArtifactError: something of another kind is there, or nothing.
    """
    from expertsteer_lens.data.states_folder import is_states_folder
    from expertsteer_lens.files.hub import hub_id
    from expertsteer_lens.files.io import kind_of_saved, load

    there = kind_of_saved(Path(name))
    if there is None and is_states_folder(Path(name)):
        there = "ActivationStore"
    if there is None and hub_id(name) is None:
        load(name)  # says what is wrong
    if there not in (None, kind):
        raise _of_another_kind(name, str(there), kind)


def _of_another_kind(name: str, there: str, kind: str) -> ArtifactError:
    hint = ""
    if kind == "SteeringPlan" and there == "ExpertSteering":
        hint = " (`fit` wrote one to OUT/plan; or in Python: esl.save(fit.plan(), folder))"
    return ArtifactError(f"{name} holds a saved {there}, but a saved {kind} is needed here{hint}.")


def load_states_or_model(name: str, models: ModelOptions) -> Any:
    """What `capture` saved of an expert, or the expert itself.

    Raises:
        ArtifactError: something else that `save` wrote.
    """
    from expertsteer_lens.data.states_folder import is_states_folder
    from expertsteer_lens.files.io import kind_of_saved, load

    kind = kind_of_saved(Path(name))
    if kind == "ActivationStore" or is_states_folder(Path(name)):
        return load(name)
    if kind is not None:
        raise ArtifactError(
            f"{name} holds a saved {kind}, which is no expert; give a model, or the states that "
            "`capture` saved of one."
        )
    return models.load(name)
