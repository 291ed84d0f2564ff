"""What steering does, in nats, and how strong it may be."""

from __future__ import annotations

from .calibration import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
