"""Files of ours, and of other programs."""

from __future__ import annotations

from . import export

__all__ = ["export"]
