"""Step 2, pair: how much two layers share, and which pairs are kept."""

from __future__ import annotations

from .mutual_information import layer_pair_mi
from .result import LayerPairMI, MIConfig
from .rules import LayerPair, LayerPairs, PairingConfig, select_layer_pairs

__all__ = [
    "LayerPair",
    "LayerPairMI",
    "LayerPairs",
    "MIConfig",
    "PairingConfig",
    "layer_pair_mi",
    "select_layer_pairs",
]
