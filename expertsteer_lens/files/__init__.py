"""Files of ours, and of other programs."""

from __future__ import annotations

from . import export
from .codec import register_class
from .io import load, push_to_hub, save
from .kinds import Kind, register_kind, result_kind

__all__ = [
    "Kind",
    "export",
    "load",
    "push_to_hub",
    "register_class",
    "register_kind",
    "result_kind",
    "save",
]
