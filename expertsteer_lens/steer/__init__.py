"""Step 4, steer: plans, and a plan at work on a model."""

from __future__ import annotations

from .attached import SteeringHandle, detach
from .plan import SteeringPlan
from .report import RunReport
from .vector import SteeringVector

__all__ = ["RunReport", "SteeringHandle", "SteeringPlan", "SteeringVector", "detach"]
