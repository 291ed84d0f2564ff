"""A plan as a file: each field by its own name in `config.json`; directions by number in
`vectors.safetensors`, and parameters of edits that have any, as `number.name`."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from expertsteer_lens.errors import ArtifactError
from expertsteer_lens.interventions.positions import positions_from_json, positions_to_json

from .codec import check_types

if TYPE_CHECKING:
    from expertsteer_lens.steer.plan import SteeringPlan
    from expertsteer_lens.steer.vector import SteeringVector

SIGN_CONVENTION = (
    "directions are unit vectors pointing towards the positive class; "
    "coefficient > 0 steers towards it"
)

_REFUSALS = (TypeError, ValueError, LookupError, RuntimeError, OverflowError)
"""What constructors raise for content of no use."""


def write_plan(plan: SteeringPlan) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `config.json` says of a plan, and its directions and parameters by number."""
    tensors = {
        key: value.detach().float().cpu().contiguous().clone()
        for i, v in enumerate(plan.vectors)
        for key, value in {
            str(i): v.direction,
            **{f"{i}.{name}": value for name, value in v.parameters.items()},
        }.items()
    }
    content = {
        "sign_convention": SIGN_CONVENTION,
        "vectors": [_vector_fields(v) for v in plan.vectors],
        "positions": positions_to_json(plan.positions),
        "basis": plan.basis,
        "target": dict(plan.target),
        "provenance": dict(plan.provenance),
    }
    return _to_json(content), tensors


def _vector_fields(vector: Any) -> dict[str, Any]:
    entry = {
        f.name: getattr(vector, f.name)
        for f in fields(vector)
        if f.name not in ("direction", "gate", "parameters")
    }
    return {**entry, "gate": None if vector.gate is None else vector.gate.to_dict()}


def read_plan(
    content: dict[str, Any], tensors: dict[str, torch.Tensor], where: str
) -> SteeringPlan:
    """The plan that `write_plan` wrote; `where` names the file in messages.

    Raises:
        ArtifactError: a field is missing, unknown or of no use.
    """
    from expertsteer_lens.steer.plan import SteeringPlan

    known = {"sign_convention", "vectors", "positions", "basis", "target", "provenance"}
    check_fields(content, known, where)
    missing = sorted(known - set(content))
    if missing:
        raise ArtifactError(f"{where} lacks the field {missing[0]!r}.")
    plain = {name: content[name] for name in ("target", "provenance", "basis")}
    check_types(SteeringPlan, plain, where)
    if not isinstance(content["vectors"], list):
        raise ArtifactError(f"{where}: vectors must be a list, got {content['vectors']!r:.60}.")
    vectors = [
        _read_vector(entry, tensors, i, f"{where}, vectors[{i}]")
        for i, entry in enumerate(content["vectors"])
    ]
    try:
        return SteeringPlan(
            vectors=tuple(vectors),
            positions=positions_from_json(content["positions"]),
            basis=content["basis"],
            target=content["target"],
            provenance=content["provenance"],
        )
    except _REFUSALS as error:
        raise ArtifactError(f"{where}: {error}") from error


def _read_vector(
    entry: Any, tensors: dict[str, torch.Tensor], i: int, where: str
) -> SteeringVector:
    from expertsteer_lens.steer.vector import SteeringVector

    known = {f.name for f in fields(SteeringVector)} - {"direction", "parameters"}
    check_fields(entry, known, where)
    if str(i) not in tensors:
        raise ArtifactError(f"{where} ({entry.get('hook_name')}) has no tensor beside it.")
    parameters = {
        key.removeprefix(f"{i}."): value
        for key, value in tensors.items()
        if key.startswith(f"{i}.")
    }
    check_types(SteeringVector, entry, where)
    if not isinstance(entry.get("gate"), dict | None):
        raise ArtifactError(f"{where}: gate must be an object or null, got {entry['gate']!r:.60}.")
    try:
        return SteeringVector(direction=tensors[str(i)], parameters=parameters, **entry)
    except _REFUSALS as error:
        raise ArtifactError(f"{where} is invalid: {error}") from error


def plan_class() -> type:
    """`SteeringPlan`, imported when it is needed."""
    from expertsteer_lens.steer.plan import SteeringPlan

    return SteeringPlan


def check_fields(entry: Any, known: set[str], where: str) -> None:
    """Raise `ArtifactError` unless `entry` is a JSON object with known fields only."""
    if not isinstance(entry, dict):
        raise ArtifactError(f"{where} must be a JSON object, got {type(entry).__name__}.")
    unknown = sorted(set(entry) - known)
    if unknown:
        raise ArtifactError(
            f"{where} has an unknown field {unknown[0]!r}; known fields are {sorted(known)}."
        )


def _to_json(value: Any) -> Any:
    """JSON-able copy; NaN and Inf become null, since JSON has neither."""
    if isinstance(value, dict):
        return {str(k): _to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(v) for v in value]
    if isinstance(value, torch.Tensor):
        return _to_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)
