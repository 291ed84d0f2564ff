"""Controls, ceilings, intervals and the verdict."""

from __future__ import annotations

from .comparisons import COMPARISONS, Comparison, NotMeasured, Setting, register_control
from .result import Evaluation, EvaluationRow
from .run import evaluate

__all__ = [
    "COMPARISONS",
    "Comparison",
    "Evaluation",
    "EvaluationRow",
    "NotMeasured",
    "Setting",
    "evaluate",
    "register_control",
]
