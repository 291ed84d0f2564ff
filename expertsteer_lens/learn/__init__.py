"""Step 3, learn: directions from labelled activations."""

from __future__ import annotations

from . import directions
from .config import RFMConfig
from .rfm import RFM, fit_rfm

__all__ = ["RFM", "RFMConfig", "directions", "fit_rfm"]
