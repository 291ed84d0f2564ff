"""Step 3, learn: directions from labelled activations."""

from __future__ import annotations

from . import directions, learners
from .config import RFMConfig
from .predictor import KernelPredictor
from .rfm import RFM, fit_rfm

__all__ = ["RFM", "KernelPredictor", "RFMConfig", "directions", "fit_rfm", "learners"]
