"""nnsight as a host."""

from __future__ import annotations

from .host import NNsightHost

__all__ = ["NNsightHost"]
