"""Configurations from JSON, and the check that every field holds what its annotation says.

A configuration is a frozen dataclass of JSON scalars, tuples of them, and other configurations.
What a field may hold is read off its annotation; ranges and combinations are the business of the
class' own `__post_init__`.
"""

from __future__ import annotations

import difflib
import functools
import types
from collections.abc import Collection, Hashable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from expertsteer_lens._checks import shown
from expertsteer_lens.errors import ArgumentError

C = TypeVar("C")
_WORDS = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a text",
    type(None): "None",
}


def config_from_dict(cls: type[C], data: Any, where: str = "config") -> C:
    """A configuration from a dict such as JSON holds: lists become tuples, dicts configurations.

    Args:
        cls: the dataclass.
        data: its fields by name; those left out keep their defaults.
        where: how messages name it, e.g. "config" or "config.aligner".

    Raises:
        ArgumentError: `data` is no dict, a field is unknown, or a value cannot be used; the message
            names the field.

    Example:
        >>> from expertsteer_lens.pipeline import ExpertSteerConfig
        >>> config_from_dict(ExpertSteerConfig, {"aligner": {"kind": "ridge"}}).aligner.kind
        'ridge'
        >>> config_from_dict(ExpertSteerConfig, {"aligner": {"knd": 1}})
        Traceback (most recent call last):
        expertsteer_lens.errors.ArgumentError: config.aligner has unknown field 'knd'; closest: \
'kind'; known fields are ['anchor_weight', 'kind', 'learning_rate', 'n_components', 'n_folds', \
'n_steps', 'options', 'ridge', 'solver', 'standardise'].
    """
    if not isinstance(data, Mapping):
        raise ArgumentError(
            f"{where} must be a dict of the fields of {cls.__name__}, got {shown(data)}; known "
            f"fields are {sorted(_fields(cls))}."
        )
    check_known_fields(cls, data, where)
    try:
        values = {n: _fitting(cls, n, value, f"{where}.{n}") for n, value in data.items()}
    except RecursionError:
        raise ArgumentError(
            f"{where} is nested too deeply; a field holds a number, a text, a list or the fields "
            "of a step."
        ) from None
    try:
        return cls(**values)
    except ArgumentError as error:
        raise ArgumentError(f"{where}: {error}") from error


def check_known_fields(cls: type, names: Collection[str], where: str) -> None:
    """Refuse names that are no fields of `cls`.

    Raises:
        ArgumentError: naming the first such name, and the closest field.
    """
    known = sorted(_fields(cls))
    unknown = sorted(str(name) for name in names if name not in known)
    if unknown:
        near = difflib.get_close_matches(unknown[0][:200], known, n=1)
        hint = f"; closest: {near[0]!r}" if near else ""
        raise ArgumentError(
            f"{where} has unknown field {shown(unknown[0])}{hint}; known fields are {known}."
        )


def check_field_types(config: Any) -> None:
    """For `__post_init__`: every field must hold what its annotation says; a dict where a
    configuration belongs becomes one, a list where a tuple belongs a tuple.

    Raises:
        ArgumentError: naming the field, what it takes, what arrived and its default.
    """
    for name in _fields(type(config)):
        value = getattr(config, name)
        fitting = _fitting(type(config), name, value, name)
        if fitting is not value:
            object.__setattr__(config, name, fitting)


def _fields(cls: Any) -> dict[str, tuple[Field[Any], Any]]:
    """Each field by name, with its annotation resolved."""
    return _resolved(cls)


@functools.cache
def _resolved(cls: Hashable) -> dict[str, tuple[Field[Any], Any]]:
    hints = get_type_hints(cls)
    own = fields(cast(Any, cls))
    return {field.name: (field, hints[field.name]) for field in own if field.init}


def _with_tuples(value: Any) -> Any:
    """Lists, which JSON has in place of tuples, as tuples, inner ones too."""
    return tuple(_with_tuples(part) for part in value) if isinstance(value, list) else value


def _fitting(cls: type, name: str, value: Any, where: str) -> Any:
    """The value as the field wants it, or an error that says what the field takes."""
    field, annotation = _fields(cls)[name]
    for part in _alternatives(annotation):
        if is_dataclass(part) and isinstance(value, Mapping):
            return config_from_dict(part, value, where)  # type: ignore[arg-type]
    value = _with_tuples(value)
    if _matches(value, annotation):
        return value
    raise ArgumentError(
        f"{where} must be {_words(annotation)}, got {shown(value)}; {_default_words(field)}."
    )


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


def _matches(value: Any, annotation: Any) -> bool:
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_matches(value, part) for part in inner)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if origin is tuple and inner[-1] is not Ellipsis:  # so many, each of its own kind
        fitting = isinstance(value, tuple) and len(value) == len(inner)
        return fitting and all(_matches(v, part) for v, part in zip(value, inner, strict=True))
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(v, inner[0]) for v in value)
    if annotation in (int, float):  # an int is a number; a bool is neither
        kinds = (int, float) if annotation is float else int
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, origin or annotation)


def _words(annotation: Any) -> str:
    """What a field takes, in words: "'last', 'mean' or an integer"."""
    words: list[str] = []
    for part in _alternatives(annotation):
        if get_origin(part) is Literal:
            words += [repr(choice) for choice in get_args(part)]
        elif get_origin(part) is tuple:
            words.append(f"a tuple, each {_words(get_args(part)[0])}")
        elif is_dataclass(part):
            words.append(f"{part.__name__}(...) or a dict of its fields")  # type: ignore[union-attr]
        else:
            words.append(_WORDS.get(part, getattr(part, "__name__", str(part))))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _default_words(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return f"the default is {field.default!r}"
    return "leave it out for the default" if field.default_factory is not MISSING else "give one"
