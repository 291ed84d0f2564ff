"""Step 4, steer: plans, and a plan at work on a model."""

from __future__ import annotations

from .plan import SteeringPlan, SteeringVector
from .report import RunReport
from .run import SteeringHandle, detach

__all__ = ["RunReport", "SteeringHandle", "SteeringPlan", "SteeringVector", "detach"]
