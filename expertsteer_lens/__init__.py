"""Steer a target language model with directions taught by an external expert model.

Importing this package imports no host (transformer_lens, nnsight, transformers); a host is imported when a model of it
is used.
"""

from __future__ import annotations

import importlib
from typing import Any

# Not lazy: nnsight mounts a method `save` on every object, modules included, so a lazy `save` would never be looked up.
from .io import load, push_to_hub, save

__version__ = "0.1.0"

_HOME = {
    "ActivationStore": "activations",
    "Aligner": "aligners",
    "AlignerConfig": "aligners",
    "Behaviour": "contrast",
    "Bench": "bench",
    "Calibration": "calibration",
    "Chat": "chat",
    "ContrastPairs": "contrast",
    "Evaluation": "evaluation",
    "ExpertSteer": "pipeline",
    "ExpertSteerConfig": "pipeline",
    "ExpertSteering": "fitted",
    "Gate": "gates",
    "LayerPairMI": "mutual_information",
    "LayerPairs": "pairing",
    "MIConfig": "mutual_information",
    "PairingConfig": "pairing",
    "RFM": "rfm",
    "RFMConfig": "rfm",
    "SteeringPlan": "plan",
    "SteeringVector": "plan",
    "as_host": "hosts",
    "calibrate": "calibration",
    "capture": "hosts",
    "capture_tensors": "hosts",
    "evaluate": "evaluation",
    "fit_aligner": "aligners",
    "fit_gate": "gates",
    "fit_rfm": "rfm",
    "layer_pair_mi": "mutual_information",
    "run_bench": "bench",
    "select_layer_pairs": "pairing",
}
_MODULES = ("directions", "edits", "errors", "export", "plots", "presets", "zoo")

__all__ = ["__version__", "load", "push_to_hub", "save", *sorted(_HOME), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'expertsteer_lens' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
