"""Files of earlier format versions, said in the words of today's.

Works on the JSON alone, before anything is built: each function below takes the fields that a class
had then and gives those it has now.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Fields = dict[str, Any]


def _rfm_from_1(fields: Fields) -> Fields:
    """Format 1 had the recursion's own `Fold` and `Round` in place of a predictor. Their inner
    products, norms and held-out predictions follow from the rest or are not needed."""
    kept = {name: value for name, value in fields.items() if not name.startswith("_")}
    fold, last = fields["_fold"]["fields"], fields["_round"]["fields"]
    predictor = {
        "support_rows": fold["rows"],
        "mean": fold["shift"],
        "scale": fold["scale"],
        "coefficients": last["alpha"],
        "intercept": fields["_offset"],
        "kernel": fields["config"]["fields"]["kernel"],
        "length": last["length"],
        "metric": last["metric"],
        "gradients": last["gradients"],
    }
    return {
        **kept,
        "predictor": {"$class": "KernelPredictor", "fields": predictor},
        "class_difference": fields["_contrast"],
    }


def _renamed(**names: str) -> Callable[[Fields], Fields]:
    """Fields that have another name now, given as old=new."""
    return lambda fields: {names.get(old, old): value for old, value in fields.items()}


FROM_1: dict[str, Callable[[Fields], Fields]] = {
    "ExpertSteerConfig": lambda fields: {
        # Fields that came later act as what the old version did.
        **_renamed(read_positions="reading")(fields),
        "pair_tokens": False,
        "mi_on": "texts",
    },
    "ExpertSteering": _renamed(readings="data"),
    "Readings": _renamed(
        expert_anchors="expert_anchor_states",
        target_anchors="target_anchor_states",
        expert_pairs="expert_pair_states",
        target_pairs="target_pair_states",
    ),
    "RFM": _rfm_from_1,
}
"""Classes whose fields were others in format 1, by the name they had then."""
NAMES_FROM_1 = {"Readings": "FitData"}
"""Classes that had another name."""


def upgrade(config: dict[str, Any]) -> dict[str, Any]:
    """The content of a `config.json` of format 1 or 2 in format 2.

    Raises:
        KeyError, TypeError: it lacks what its format has.

    >>> upgrade({"format_version": 1, "vectors": []})
    {'format_version': 2, 'vectors': [], 'kind': 'SteeringPlan'}
    """
    if config["format_version"] != 1:
        return config
    changed = {**config, "format_version": 2, "kind": config.get("kind", "SteeringPlan")}
    if "content" in config:
        changed["content"] = _upgrade_classes(config["content"])
    return changed


def _upgrade_classes(part: Any) -> Any:
    if isinstance(part, list):
        return [_upgrade_classes(value) for value in part]
    if not isinstance(part, dict):
        return part
    name = part.get("$class")
    if isinstance(name, str) and name in FROM_1:
        part = {"$class": NAMES_FROM_1.get(name, name), "fields": FROM_1[name](part["fields"])}
    return {key: _upgrade_classes(value) for key, value in part.items()}
