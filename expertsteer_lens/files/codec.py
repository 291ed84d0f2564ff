"""Our results as JSON and tensors, and back: what `save` and `load` do with everything but a plan.

A value becomes JSON that JSON readers understand, and every tensor in it becomes a numbered entry
beside it. What JSON has no word for is an object with one key that begins with "$": "$tensor" (its
number), "$tuple", "$items" (a dict whose keys are not texts), "$float" (NaN and infinities),
"$model" (facts of a model, which is never saved) and "$class" with "fields". Only the classes
listed here are ever built, by their constructors, which check what they are given."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, ArtifactError

KINDS = {
    "ActivationStore": "data.activations",
    "Aligner": "align.aligner",
    "Calibration": "measure.calibration",
    "Evaluation": "evaluation.run",
    "ExpertSteering": "pipeline.fitted",
    "LayerPairMI": "pair.result",
    "LayerPairs": "pair.rules",
    "RFM": "learn.rfm",
}
"""What a user may save, and where it lives."""
_PARTS = {
    "AffineMap": "align.aligner",
    "AlignerConfig": "align.aligner",
    "AlignerQuality": "align.aligner",
    "Behaviour": "data.contrast",
    "Chat": "data.chat",
    "ClassMedians": "learn.rfm",
    "EvaluationRow": "evaluation.run",
    "ExpertSteerConfig": "pipeline.expert_steer",
    "Fold": "learn.recursion",
    "LayerPair": "pair.rules",
    "MIConfig": "pair.config",
    "PairingConfig": "pair.rules",
    "RFMConfig": "learn.config",
    "RFMHistory": "learn.config",
    "RFMRound": "learn.config",
    "Readings": "pipeline.fit_data",
    "Round": "learn.recursion",
}
"""What these are made of."""
_HOMES = {**KINDS, **_PARTS}


def encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; its tensors are added to `tensors`, on the CPU and sharing no memory with
    one another.

    Raises:
        ArgumentError: the value holds something that a file cannot, such as a function.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = _alone(value.detach().cpu(), tensors)
        return {"$tensor": len(tensors) - 1}
    name = type(value).__name__
    if f"expertsteer_lens.{_HOMES.get(name)}" == type(value).__module__:
        if is_dataclass(value):
            content = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        else:
            content = value._asdict() if hasattr(value, "_asdict") else {"items": list(value)}
        return {"$class": name, "fields": {k: encode(v, tensors) for k, v in content.items()}}
    if isinstance(value, tuple):
        return {"$tuple": [encode(v, tensors) for v in value]}
    if isinstance(value, list):
        return [encode(v, tensors) for v in value]
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: encode(v, tensors) for k, v in value.items()}
        return {"$items": [[encode(k, tensors), encode(v, tensors)] for k, v in value.items()]}
    if hasattr(value, "facts"):
        return {"$model": value.facts()}
    raise ArgumentError(f"a {type(value).__module__}.{name} cannot be written to a file.")


def _alone(value: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    """The tensor in memory of its own, copied only where it is part of a larger one or shared with
    one already there."""
    storage = value.untyped_storage()
    own = storage.nbytes() == value.numel() * value.element_size() and value.is_contiguous()
    taken = any(
        storage.data_ptr() == other.untyped_storage().data_ptr() for other in others.values()
    )
    return value if own and not taken else value.clone(memory_format=torch.contiguous_format)


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
        if tag == "$class" and content in _HOMES and isinstance(part.get("fields"), dict):
            return _built(content, {k: inner(v) for k, v in part["fields"].items()})
        raise ArtifactError(f"{tag}: {content!r} is not understood.")

    return inner(value)


def class_of(name: str) -> Any:
    """The class of this name, if it is one of those that files may hold."""
    return getattr(importlib.import_module(f"expertsteer_lens.{_HOMES[name]}"), name)


def _built(name: str, content: dict[str, Any]) -> Any:
    cls = class_of(name)
    if name == "RFMHistory":
        return cls(content["items"])
    if is_dataclass(cls):
        known = {
            f.name: f.default is MISSING and f.default_factory is MISSING
            for f in fields(cls)
            if f.init
        }
    else:
        known = {field: field not in cls._field_defaults for field in cls._fields}
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise ArtifactError(
            f"{name} has an unknown field {unknown[0]!r}; known fields are {sorted(known)}."
        )
    missing = sorted(field for field, needed in known.items() if needed and field not in content)
    if missing:
        raise ArtifactError(f"{name} lacks the field {missing[0]!r}.")
    try:
        return cls(**content)
    except (TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{name} is invalid: {error}") from error
