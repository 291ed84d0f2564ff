"""What steering does, in nats, and how strong it may be."""

from __future__ import annotations

from .calibration import Calibration, calibrate
from .context_strength import ContextStrength, fit_context_strength
from .placement import Placement, place

__all__ = [
    "Calibration",
    "ContextStrength",
    "Placement",
    "calibrate",
    "fit_context_strength",
    "place",
]
