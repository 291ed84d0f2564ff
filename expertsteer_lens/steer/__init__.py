"""Step 4, steer: plans, and a plan at work on a model."""

from __future__ import annotations

from .plan import SteeringPlan, SteeringVector

__all__ = ["SteeringPlan", "SteeringVector"]
