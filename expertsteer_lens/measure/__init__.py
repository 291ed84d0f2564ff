"""What steering does, in nats, and how strong it may be."""

from __future__ import annotations

from .calibration import Calibration, calibrate
from .context_strength import ContextStrength, fit_context_strength

__all__ = ["Calibration", "ContextStrength", "calibrate", "fit_context_strength"]
