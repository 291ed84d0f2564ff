"""Step 2, pair: how much two layers share, and which pairs are kept."""

from __future__ import annotations

from .base import Estimator
from .config import MIConfig
from .estimators import ESTIMATORS, register_estimator
from .mutual_information import layer_pair_mi
from .result import LayerPairMI
from .rules import (
    RULES,
    LayerPair,
    LayerPairs,
    PairingConfig,
    PairingRule,
    allowed_targets,
    register_rule,
    select_layer_pairs,
)

__all__ = [
    "ESTIMATORS",
    "RULES",
    "Estimator",
    "LayerPair",
    "LayerPairMI",
    "LayerPairs",
    "MIConfig",
    "PairingConfig",
    "PairingRule",
    "allowed_targets",
    "layer_pair_mi",
    "register_estimator",
    "register_rule",
    "select_layer_pairs",
]
