"""Our results as JSON and tensors, and back: what `save` and `load` do with everything but a plan.

A value becomes JSON that JSON readers understand, and every tensor in it becomes a numbered entry
beside it. What JSON has no word for is an object with one key that begins with "$": "$tensor" (its
number), "$tuple", "$items" (a dict whose keys are not texts), "$float" (NaN and infinities),
"$model" (facts of a model, which is never saved) and "$class" with "fields". A class is known by
its name: only those in `CLASSES` are ever built, by their constructors, which check what they are
given.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from expertsteer_lens._tables import register
from expertsteer_lens.errors import ArgumentError, ArtifactError


@dataclass(frozen=True)
class WrittenClass:
    """How the objects of one class are written: as named fields."""

    locate: Callable[[], type]
    """Gives the class; called when it is needed, so that reading a plan imports no results."""
    to_fields: Callable[[Any], dict[str, Any]]
    from_fields: Callable[[type, dict[str, Any]], Any]


def encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; its tensors are added to `tensors`, on the CPU and sharing no memory with
    one another.

    Raises:
        ArgumentError: the value holds something that a file cannot, such as a function.

    >>> encode({"pair": (1, float("inf"))}, {})
    {'pair': {'$tuple': [1, {'$float': 'inf'}]}}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = _own_memory(value.detach().cpu(), tensors)
        return {"$tensor": len(tensors) - 1}
    name = type(value).__name__
    if name in CLASSES and class_of(name) is type(value):
        content = CLASSES[name].to_fields(value)
        return {"$class": name, "fields": {k: encode(v, tensors) for k, v in content.items()}}
    if isinstance(value, tuple):
        return {"$tuple": [encode(v, tensors) for v in value]}
    if isinstance(value, list):
        return [encode(v, tensors) for v in value]
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: encode(v, tensors) for k, v in value.items()}
        return {"$items": [[encode(k, tensors), encode(v, tensors)] for k, v in value.items()]}
    if callable(getattr(value, "facts", None)):
        return {"$model": value.facts()}
    raise ArgumentError(f"a {type(value).__module__}.{name} cannot be written to a file.")


def decode(
    value: Any, tensors: Mapping[str, Tensor], model: Callable[[dict[str, Any]], Any]
) -> Any:
    """Inverse of `encode`.

    Args:
        value: JSON.
        tensors: by number, as text.
        model: what stands for a model of which only the facts are known.

    Raises:
        ArtifactError: the JSON is none of ours, or a constructor refuses its content.

    >>> decode({"pair": {"$tuple": [1, {"$float": "inf"}]}}, {}, dict)
    {'pair': (1, inf)}
    """

    def inner(part: Any) -> Any:
        if isinstance(part, list):
            return [inner(v) for v in part]
        if not isinstance(part, dict):
            return part
        tag = next((key for key in part if key.startswith("$")), None)
        if tag is None:
            return {k: inner(v) for k, v in part.items()}
        content = part[tag]
        if set(part) - ({tag, "fields"} if tag == "$class" else {tag}):
            raise ArtifactError(f"{tag} stands beside other keys: {sorted(part)}.")
        if tag == "$tensor" and str(content) in tensors:
            return tensors[str(content)]
        if tag == "$tuple" and isinstance(content, list):
            return tuple(inner(v) for v in content)
        if tag == "$items" and isinstance(content, list):
            return {inner(k): inner(v) for k, v in content}
        if tag == "$float" and content in ("nan", "inf", "-inf"):
            return float(content)
        if tag == "$model" and isinstance(content, dict):
            return model(content)
        if tag == "$class" and content in CLASSES and isinstance(part.get("fields"), dict):
            return _build(content, {k: inner(v) for k, v in part["fields"].items()})
        raise ArtifactError(f"{tag}: {content!r} is not understood.")

    return inner(value)


def class_of(name: str) -> type:
    """The class of this name in `CLASSES`."""
    return CLASSES[name].locate()


def register_class(
    cls: type,
    *,
    to_fields: Callable[[Any], dict[str, Any]] | None = None,
    from_fields: Callable[[type, dict[str, Any]], Any] | None = None,
) -> None:
    """Let objects of a class of yours stand in saved results, e.g. the map of your own aligner.

    Args:
        cls: a dataclass or named tuple, known in files by its bare name; any class if both
            functions are given. A program that loads the files must register it as well.
        to_fields: its content by name: numbers, texts, tensors, tuples, dicts, registered classes.
        from_fields: builds it from the class and that content.

    Raises:
        ArgumentError: the name is taken, or it is not clear how the class is written.

    >>> from typing import NamedTuple
    >>> class Shift(NamedTuple):
    ...     by: float
    >>> register_class(Shift)
    >>> encode(Shift(0.5), {})
    {'$class': 'Shift', 'fields': {'by': 0.5}}
    >>> del CLASSES["Shift"]
    """
    if (to_fields is None or from_fields is None) and not (
        is_dataclass(cls) or hasattr(cls, "_fields")
    ):
        raise ArgumentError(
            f"{cls.__name__} must be a dataclass or a named tuple, or come with to_fields and "
            "from_fields."
        )
    written = WrittenClass(lambda: cls, to_fields or _constructor_fields, from_fields or _construct)
    register(CLASSES, cls.__name__, written, what="a class", made_by=cls)


def _own_memory(value: Tensor, written: Mapping[str, Tensor]) -> Tensor:
    """The tensor in memory of its own, copied only where it is part of a larger one or shared with
    one already there."""
    storage = value.untyped_storage()
    whole = storage.nbytes() == value.numel() * value.element_size() and value.is_contiguous()
    shared = any(
        storage.data_ptr() == earlier.untyped_storage().data_ptr() for earlier in written.values()
    )
    return value if whole and not shared else value.clone(memory_format=torch.contiguous_format)


def _build(name: str, content: dict[str, Any]) -> Any:
    try:
        return CLASSES[name].from_fields(class_of(name), content)
    except ArtifactError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise ArtifactError(f"{name} is invalid: {error}") from error


def _constructor_fields(value: Any) -> dict[str, Any]:
    """What the constructor of a dataclass or a named tuple takes."""
    return {field: getattr(value, field) for field in _known_fields(type(value))}


def _known_fields(cls: Any) -> dict[str, bool]:
    """Names of the constructor's fields, and whether each must be given."""
    if is_dataclass(cls):
        return {
            f.name: f.default is MISSING and f.default_factory is MISSING
            for f in fields(cls)
            if f.init
        }
    return {field: field not in cls._field_defaults for field in cls._fields}


def _construct(cls: type, content: dict[str, Any]) -> Any:
    known = _known_fields(cls)
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise ArtifactError(
            f"{cls.__name__} has an unknown field {unknown[0]!r}; known fields are {sorted(known)}."
        )
    missing = sorted(field for field, needed in known.items() if needed and field not in content)
    if missing:
        raise ArtifactError(f"{cls.__name__} lacks the field {missing[0]!r}.")
    check_types(cls, content, cls.__name__)
    return cls(**content)


_PLAIN: dict[str, type | tuple[type, ...]] = {
    "None": type(None),
    "bool": bool,
    "int": int,
    "float": (int, float),
    "str": str,
    "tuple": (tuple, list),
    "Mapping": Mapping,
    "dict": dict,
}
"""What JSON has to be for fields whose annotations are made of these; others are not looked at."""


def check_types(cls: Any, content: Mapping[str, Any], where: str) -> None:
    """Whether the fields of a dataclass or a named tuple have the plain types it says: constructors
    take a text for a switch, or a number for a list, and fail when it is used.

    Args:
        cls: the class.
        content: its fields.
        where: begins the message.

    Raises:
        ArtifactError: one has another.
    """
    of_fields = {f.name: f.type for f in fields(cls)} if is_dataclass(cls) else {}
    said: dict[str, Any] = of_fields or dict(cls.__annotations__)
    for name, value in content.items():
        text = said.get(name)
        text = text.__name__ if isinstance(text, type) else text
        text = getattr(text, "__forward_arg__", text)  # so named tuples keep it
        parts = [part.partition("[")[0] for part in _alternatives(str(text))]
        if not all(part in _PLAIN for part in parts):
            continue
        is_number = "int" in parts or "float" in parts
        wrong_bool = isinstance(value, bool) and is_number and "bool" not in parts
        if wrong_bool or not any(isinstance(value, _PLAIN[part]) for part in parts):
            raise ArtifactError(f"{where}: {name} must be {text}, got {value!r:.60}.")


def _alternatives(annotation: str) -> list[str]:
    """The types of an annotation that are not inside of another.

    >>> _alternatives("tuple[int | str, ...] | None")
    ['tuple[int | str, ...]', 'None']
    """
    out, depth = [""], 0
    for sign in annotation:
        depth += (sign == "[") - (sign == "]")
        if sign == "|" and depth == 0:
            out.append("")
        else:
            out[-1] += sign
    return [part.strip() for part in out]


def _ours(module: str, name: str) -> Callable[[], type]:
    def locate() -> type:
        cls: type = getattr(importlib.import_module(f"expertsteer_lens.{module}"), name)
        return cls

    return locate


_HOMES = {
    "align.aligner": ("AffineMap", "Aligner", "AlignerQuality"),
    "align.config": ("AlignerConfig",),
    "data.activations": ("ActivationStore",),
    "data.chat": ("Chat",),
    "data.behaviour": ("Behaviour",),
    "evaluation.finished": ("FinishedRows",),
    "evaluation.result": ("Evaluation", "EvaluationRow"),
    "learn.config": ("RFMConfig", "RFMRound"),
    "learn.predictor": ("KernelPredictor",),
    "learn.rfm": ("RFM", "ClassMedians"),
    "measure.calibration": ("Calibration",),
    "pair.config": ("MIConfig",),
    "pair.result": ("LayerPairMI",),
    "pair.rules": ("LayerPair", "LayerPairs", "PairingConfig"),
    "pipeline.config": ("ExpertSteerConfig",),
    "pipeline.fit_data": ("FitData",),
    "pipeline.fitted": ("ExpertSteering",),
    "pipeline.readings": ("FinishedReadings",),
}
CLASSES = {
    name: WrittenClass(_ours(module, name), _constructor_fields, _construct)
    for module, names in _HOMES.items()
    for name in names
}
"""Every class that a file may hold, by its name."""
CLASSES["RFMHistory"] = WrittenClass(
    _ours("learn.config", "RFMHistory"),
    to_fields=lambda history: {"items": list(history)},
    from_fields=lambda cls, content: cls(content["items"]),
)
CLASSES["FitData"] = WrittenClass(
    _ours("pipeline.fit_data", "FitData"),
    to_fields=lambda data: data.to_fields(),
    from_fields=_construct,
)
CLASSES["PairedMoments"] = WrittenClass(
    _ours("align.paired_moments", "PairedMoments"),
    to_fields=lambda moments: moments.state(),
    from_fields=lambda cls, content: cls.from_state(content),  # type: ignore[attr-defined]
)
