"""Files of ours, and of other programs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .codec import register_class
from .io import load, push_to_hub, save
from .kinds import Kind, register_kind, result_kind

if TYPE_CHECKING:
    from . import export

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


def __getattr__(name: str) -> Any:
    # Looked up when it is used: `export` brings plans and hosts, a tenth of the time of importing
    # the package.
    if name == "export":
        return importlib.import_module(f"{__name__}.export")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
