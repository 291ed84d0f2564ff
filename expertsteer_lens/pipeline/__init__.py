"""The four steps in order, and their result."""

from __future__ import annotations

from .expert_steer import ExpertSteer, ExpertSteerConfig
from .fitted import ExpertSteering

__all__ = ["ExpertSteer", "ExpertSteerConfig", "ExpertSteering"]
