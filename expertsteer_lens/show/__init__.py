"""Figures and one HTML page."""

from __future__ import annotations

from . import plots, report

__all__ = ["plots", "report"]
