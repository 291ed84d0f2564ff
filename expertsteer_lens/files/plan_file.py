"""A plan as a file: each field by its own name in `config.json`, directions by number in
`vectors.safetensors`."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from expertsteer_lens.errors import ArgumentError, ArtifactError
from expertsteer_lens.interventions.positions import positions_from_json, positions_to_json

if TYPE_CHECKING:
    from expertsteer_lens.steer.plan import SteeringPlan

SIGN_CONVENTION = (
    "directions are unit vectors pointing towards the positive class; "
    "coefficient > 0 steers towards it"
)


def plan_content(plan: SteeringPlan) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `config.json` says of a plan, and its directions by number."""
    tensors = {
        str(i): v.direction.detach().float().cpu().contiguous().clone()
        for i, v in enumerate(plan.vectors)
    }
    content = {
        "sign_convention": SIGN_CONVENTION,
        "vectors": [_vector_fields(v) for v in plan.vectors],
        "positions": positions_to_json(plan.positions),
        "basis": plan.basis,
        "target": dict(plan.target),
        "provenance": dict(plan.provenance),
    }
    return _plain(content), tensors


def _vector_fields(vector: Any) -> dict[str, Any]:
    entry = {
        f.name: getattr(vector, f.name)
        for f in fields(vector)
        if f.name not in ("direction", "gate")
    }
    return {**entry, "gate": None if vector.gate is None else vector.gate.to_dict()}


def plan_from(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path
) -> SteeringPlan:
    """The plan that `plan_content` wrote.

    Raises:
        ArtifactError: a field is missing, unknown or of no use.
    """
    from expertsteer_lens.steer.plan import SteeringPlan, SteeringVector

    known = {
        "format_version",
        "sign_convention",
        "vectors",
        "positions",
        "basis",
        "target",
        "provenance",
        "vectors_sha256",
        "versions",
    }
    check_fields(config, known, f"{folder / 'config.json'}")
    missing = sorted(known - set(config))
    if missing:
        raise ArtifactError(f"{folder / 'config.json'} lacks the field {missing[0]!r}.")
    names = {f.name for f in fields(SteeringVector)} - {"direction"}
    vectors = []
    for i, entry in enumerate(config["vectors"]):
        check_fields(entry, names, f"{folder / 'config.json'}, vectors[{i}]")
        if str(i) not in tensors:
            raise ArtifactError(
                f"{folder / 'vectors.safetensors'} has no tensor for vectors[{i}] "
                f"({entry.get('hook_name')})."
            )
        try:
            vectors.append(SteeringVector(direction=tensors[str(i)], **entry))
        except (TypeError, ValueError) as error:
            raise ArtifactError(
                f"{folder / 'config.json'}, vectors[{i}] is invalid: {error}"
            ) from error
    try:
        positions = positions_from_json(config["positions"])
    except ArgumentError as error:
        raise ArtifactError(f"{folder / 'config.json'}: {error}") from error
    return SteeringPlan(
        vectors=tuple(vectors),
        positions=positions,
        basis=config["basis"],
        target=config["target"],
        provenance=config["provenance"],
    )


def check_fields(entry: Any, known: set[str], where: str) -> None:
    """Raise `ArtifactError` unless `entry` is a JSON object with known fields only."""
    if not isinstance(entry, dict):
        raise ArtifactError(f"{where} must be a JSON object, got {type(entry).__name__}.")
    unknown = sorted(set(entry) - known)
    if unknown:
        raise ArtifactError(
            f"{where} has an unknown field {unknown[0]!r}; known fields are {sorted(known)}."
        )


def _plain(value: Any) -> Any:
    """JSON-able copy; NaN and Inf become null, since JSON has neither."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def plan_card(plan: SteeringPlan) -> str:
    """The README of a saved plan."""
    target, expert = plan.target or {}, plan.provenance.get("expert") or {}
    rows = "\n".join(
        f"| `{v.hook_name}` | {v.edit} | {v.coefficient:g} | {v.relative_to} | "
        f"{'' if v.median_norm is None else f'{v.median_norm:.4g}'} |"
        for v in plan.vectors
    )
    return f"""---
library_name: expertsteer-lens
tags: [activation-steering, expertsteer]
---

# Steering plan for {target.get("name", "an unnamed model")}

Directions taught by {expert.get("name", "the caller")}.
{SIGN_CONVENTION[0].upper() + SIGN_CONVENTION[1:]}.

| hook point | edit | coefficient | unit | median norm |
|---|---|---|---|---|
{rows}

Positions: `{plan.positions}`. Residual basis: `{plan.basis}`.
Target fingerprint: `{target.get("fingerprint")}`.

```python
import expertsteer_lens as esl

plan = esl.load("this folder or hub id")
with plan.hooks(model):
    ...
```

All settings, seeds, hashes of the data and the calibration curve are in `config.json`.
"""
