"""Controls, ceilings, intervals and the verdict."""

from __future__ import annotations

from .run import Evaluation, EvaluationRow, evaluate

__all__ = ["Evaluation", "EvaluationRow", "evaluate"]
