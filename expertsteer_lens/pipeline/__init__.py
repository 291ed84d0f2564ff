"""The four steps in order, and their result."""

from __future__ import annotations

from .asking import ask_about
from .config import PRESETS, ExpertSteerConfig
from .expert_steer import ExpertSteer
from .fitted import ExpertSteering
from .instructed import likelier_under
from .labelling import LabelledTexts, label_texts
from .reproduce import Reproduction, reproduce

__all__ = [
    "PRESETS",
    "ExpertSteer",
    "ExpertSteerConfig",
    "ExpertSteering",
    "LabelledTexts",
    "Reproduction",
    "ask_about",
    "label_texts",
    "likelier_under",
    "reproduce",
]
